"""
Logs and traces of the service and its workers, without secrets.
"""

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from textwrap import indent
from typing import TYPE_CHECKING, Any, Literal

from pho_service.errors import InvalidInput, plain, plain_line
from pho_service.host.machine import install_command

if TYPE_CHECKING:
    from opentelemetry.trace import Span, Tracer


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
    """Return whether lines that are logged here carry these fields."""
    return fields.items() <= _about.get().items()


def configure_logs(log_format: LogFormat) -> None:
    """Log to stderr, a line for each event."""
    handler = logging.StreamHandler()
    handler.addFilter(_add_fields)
    handler.setFormatter(_json() if log_format == "json" else _Text(_TEXT))
    logging.basicConfig(level=logging.INFO, handlers=[handler])


def adopt_loggers(names: Iterable[str], level: int) -> None:
    """Have libraries log as we do, and only from a level on."""
    # To be called before they are imported, for what they say meanwhile, and again after it: some
    # set a level and a handler of their own then.
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


_tracer: "Tracer | None" = None  # OpenTelemetry is only imported if it is wanted


def configure_tracing(service: str) -> None:
    """Send spans from now on; OpenTelemetry's own variables, ``OTEL_...``, say where to."""
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ModuleNotFoundError as error:
        raise InvalidInput(
            f"PHO_TRACES needs OpenTelemetry: {install_command('otel')}, or leave it out."
        ) from error
    provider = TracerProvider(resource=Resource.create({"service.name": service}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace_with(provider.get_tracer("pho_service"))


def trace_with(tracer: "Tracer | None") -> None:
    """Make spans with this from now on; None makes none."""
    global _tracer
    _tracer = tracer


@contextmanager
def span(name: str, **attributes: str | int) -> Iterator[None]:
    """A span around the block, whose ids are in the block's log."""
    if _tracer is None:
        yield
        return
    with _tracer.start_as_current_span(name, attributes=attributes) as current, _logged(current):
        yield


@contextmanager
def request_span(method: str, path: str, request: str) -> Iterator[Callable[[int], None]]:
    """A span around a request, by OpenTelemetry's conventions for servers of HTTP."""
    if _tracer is None:
        yield lambda _status: None
        return
    from opentelemetry.trace import SpanKind, StatusCode

    attributes = {"http.request.method": method, "url.path": path, "request": request}
    with (
        _tracer.start_as_current_span(
            f"{method} request", kind=SpanKind.SERVER, attributes=attributes
        ) as current,
        _logged(current),
    ):

        def answered(status: int) -> None:
            current.set_attribute("http.response.status_code", status)
            if status >= 500:
                current.set_status(StatusCode.ERROR)

        yield answered


@contextmanager
def _logged(current: "Span") -> Iterator[None]:
    ids = current.get_span_context()
    with about(trace=f"{ids.trace_id:032x}", span=f"{ids.span_id:016x}"):
        yield
