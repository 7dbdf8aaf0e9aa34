"""Logs: the fields of each line, and what never is in one."""

import io
import json
import logging
from contextvars import copy_context
from threading import Thread

import pytest

from pho_service.host import logs
from pho_service.host.logs import about, redact, request_id


@pytest.fixture
def logged(monkeypatch):
    """Configures logs; what is written since. Everything is as before afterwards."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    stream = io.StringIO()

    def configure(log_format):
        monkeypatch.setattr("sys.stderr", stream)
        root.handlers.clear()
        logs.configure_logs(log_format)
        return stream.getvalue

    yield configure
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.getLogger("talkative").setLevel(logging.NOTSET)


def test_a_line_is_one_json_object_with_time_level_logger_process(logged):
    written = logged("json")
    logging.getLogger("pho.x").info("é %s\nb", "a", extra={"layer": "q"})
    line = json.loads(written())

    assert written().count("\n") == 1
    assert line.pop("time").endswith("+00:00")
    assert line.pop("process") > 0
    assert line == {"level": "INFO", "logger": "pho.x", "message": "é a\nb", "layer": "q"}


def test_for_people_time_level_process_logger_message(logged):
    written = logged("text")
    with about(job="j"):
        logging.getLogger("x").warning("hello")

    assert written().endswith("x: hello\n")
    assert " WARNING [" in written()


def test_fields_of_a_block_are_in_all_of_its_lines(logged):
    written = logged("json")
    log = logging.getLogger("x")
    with about(job="j", attempt=1):
        with about(attempt=2):
            log.info("inner")
            thread = Thread(target=copy_context().run, args=(log.info, "thread"))
            thread.start()
            thread.join()
        log.info("outer", extra={"job": "other"})
    log.info("after")
    inner, thread_line, outer, after = map(json.loads, written().splitlines())

    assert (inner["job"], inner["attempt"]) == ("j", 2)
    assert (thread_line["job"], thread_line["attempt"]) == ("j", 2)
    assert (outer["job"], outer["attempt"]) == ("other", 1)
    assert "job" not in after


def test_is_known_while_a_request_is_answered():
    with about(request="r"):
        assert request_id() == "r"
    assert request_id() is None


def test_talkative_libraries_are_heard_when_it_matters(logged):
    written = logged("json")
    own = logging.getLogger("talkative")
    own.addHandler(logging.StreamHandler())
    own.propagate = False
    logs.adopt_loggers(["talkative"], logging.WARNING)
    logging.getLogger("talkative.part").info("chatter")
    logging.getLogger("talkative.part").warning("trouble")

    assert [json.loads(line)["message"] for line in written().splitlines()] == ["trouble"]


@pytest.mark.parametrize(
    ("text", "without"),
    [
        ("at postgresql://pho:s3cr:et/x@db/pho?a=b", "at postgresql://pho:***@db/pho?a=b"),
        ("at http://127.0.0.1:8000/v1/jobs", "at http://127.0.0.1:8000/v1/jobs"),
        ("host=db password=s3cret user=pho", "host=db password=*** user=pho"),
        ("{'password': 's3cret'}", "{'password': '***'}"),
        ("Authorization: Bearer s3cret-token", "Authorization: Bearer ***"),
        ("Basic cGhvOnMzY3JldA==", "Basic ***"),
        ("key pho_abcdefghijklmnopqrstuvwx", "key pho_***"),
        ("key pho_abcdef", "key pho_abcdef"),
        ("token hf_abcdefghijklmnopqrst", "token hf_***"),
        ("password authentication failed for user", "password authentication failed for user"),
    ],
)  # fmt: skip
def test_passwords_keys_and_tokens_are_starred_out(text, without):
    assert redact(text) == without


@pytest.mark.parametrize("log_format", ["json", "text"])
def test_neither_messages_nor_tracebacks_have_any(logged, log_format):
    written = logged(log_format)
    url = "postgresql://pho:planted@db/pho"
    try:
        int(url)
    except ValueError:
        logging.getLogger("x").exception("at %s", url, extra={"database": url})

    assert "planted" not in written()
    assert written().count("pho:***@db/pho") == (3 if log_format == "json" else 2)
    if log_format == "json":
        assert "base 10: 'postgresql" in json.loads(written())["exception"]


def test_a_message_is_one_line_whatever_it_holds(logged):
    written = logged("text")
    logging.getLogger("x").warning("column %s", "a\x1b[31m\nINFO fake")
    try:
        int("\x1b[0m\nERROR fake")
    except ValueError as error:
        logging.getLogger("x").error("failed", exc_info=error)  # noqa: TRY400 - with its traceback
    first, second, *more = written().splitlines()

    assert first.endswith(r"column a\x1b[31m\nINFO fake")
    assert second.endswith("x: failed")
    assert more
    assert all(line.startswith("    ") for line in more)
    assert "\x1b" not in written()
