"""
Logs of the service and its workers: configured here, as text or as JSON, without secrets.
"""

import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from textwrap import indent
from typing import Any, Literal

from pho_service.host.plain import plain, plain_line

LogFormat = Literal["text", "json"]

_TEXT = "%(asctime)s %(levelname)s [%(process)d] %(name)s: %(message)s"

# Nobody should log these; where another library does, in the text of an error say, they end here.
_SECRETS = (
    (re.compile(r"(://[^\s:/@]*):[^\s@]+@"), r"\1:***@"),  # the password of a URL
    (re.compile(r"(?i)\b(password[\"']?\s*[=:]\s*[\"']?)[^\s\"'&,;]+"), r"\1***"),
    (re.compile(r"(?i)\b(bearer|basic) +[\w.~+/=-]{6,}"), r"\1 ***"),
    (re.compile(r"\b(pho|hf)_[\w-]{16,}"), r"\1_***"),  # keys of ours and of the hub
)

_about: ContextVar[Mapping[str, Any]] = ContextVar("about", default={})  # noqa: B039 - never changed


@contextmanager
def about(**fields: Any) -> Iterator[None]:
    """Have every line that is logged in the block carry these fields."""
    token = _about.set({**_about.get(), **fields})
    try:
        yield
    finally:
        _about.reset(token)


def request_id() -> str | None:
    """Return the id of the request that is being answered; None outside of one."""
    return _about.get().get("request")


def is_about(**fields: Any) -> bool:
    """Whether lines that are logged here carry these fields."""
    return fields.items() <= _about.get().items()


def configure_logs(log_format: LogFormat) -> None:
    """
    Log to stderr, a line for each event.

    Args:
        log_format: ``text`` is for people; ``json`` has every field.
    """
    handler = logging.StreamHandler()
    handler.addFilter(_add_fields)
    handler.setFormatter(_json() if log_format == "json" else _Text(_TEXT))
    logging.basicConfig(level=logging.INFO, handlers=[handler])


def adopt_loggers(names: Iterable[str], level: int) -> None:
    """
    Have libraries log as we do, and only from a level on.

    To be called before they are imported, for what they say meanwhile, and again after it: some
    set a level and a handler of their own then.
    """
    for name in names:
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
        logger.setLevel(level)


def redact(text: str) -> str:
    """The text with stars in place of what looks like a secret."""
    for pattern, instead in _SECRETS:
        text = pattern.sub(instead, text)
    return text


def _add_fields(record: logging.LogRecord) -> bool:
    for name, value in _about.get().items():
        if name not in record.__dict__:
            setattr(record, name, value)
    return True


class _Text(logging.Formatter):
    """A line for each record, whatever its message holds; tracebacks follow it, set in."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        return plain_line(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:  # noqa: N802 - logging's name
        return indent(plain(super().formatException(ei)), "    ")


def _json() -> logging.Formatter:
    from pythonjsonlogger.json import JsonFormatter

    class Json(JsonFormatter):
        def process_log_record(self, log_data: dict[str, Any]) -> dict[str, Any]:
            return {k: redact(v) if isinstance(v, str) else v for k, v in log_data.items()}

    return Json(
        ["levelname", "name", "process", "message"],
        rename_fields={"levelname": "level", "name": "logger", "exc_info": "exception"},
        timestamp="time",
        json_ensure_ascii=False,
    )
