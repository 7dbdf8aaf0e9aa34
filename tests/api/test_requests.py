"""The id of each request, in its answer and in the log."""

import asyncio
import logging
import re

from fastapi.testclient import TestClient
from prometheus_client import CollectorRegistry

from pho_service.api.requests import RequestLog
from pho_service.api.service import Answers

ACCESS = "pho_service.api.requests"


def test_every_answer_has_an_id_another_each_time(client):
    first, second = client.get("/v1/jobs"), client.get("/v1/jobs/x")

    assert re.fullmatch(r"[0-9a-f]{32}", first.headers["X-Request-ID"])
    assert first.headers["X-Request-ID"] != second.headers["X-Request-ID"]
    assert second.json()["request_id"] == second.headers["X-Request-ID"]
    own = client.get("/v1/jobs/x", headers={"X-Request-ID": "abc-1:2/3"})
    assert own.headers["X-Request-ID"] == own.json()["request_id"] == "abc-1:2/3"
    for given in ("", "a b", "x" * 129, "<script>", 'a"b'):  # which could be anything
        answer = client.get("/v1/jobs", headers={"X-Request-ID": given})
        assert re.fullmatch(r"[0-9a-f]{32}", answer.headers["X-Request-ID"])


def test_line(client, keys, caplog):
    """A line for each request, with the beginning of its key and without its query."""
    key, secret = keys.create("laptop", sees_all=False)
    caplog.set_level(logging.DEBUG, ACCESS)
    client.get("/v1/jobs?page_size=3", headers={"Authorization": f"Bearer {secret}"})
    client.get("/healthz")
    line, probe = (record for record in caplog.records if record.name == ACCESS)

    assert line.getMessage() == "GET /v1/jobs 200"
    assert (line.method, line.path, line.status) == ("GET", "/v1/jobs", 200)
    assert line.key == key.prefix
    assert 0 < line.milliseconds < 60_000
    assert (line.levelname, probe.levelname) == ("INFO", "DEBUG")


def test_a_request_that_a_service_which_stops_waits_for_no_longer_is_told_so():
    async def slow(*_):
        raise asyncio.CancelledError

    answer = TestClient(RequestLog(slow, Answers(CollectorRegistry()))).get("/v1/jobs")

    assert answer.status_code == 503
    assert answer.json()["code"] == "stopping"
    assert answer.json()["request_id"] == answer.headers["X-Request-ID"]


def test_what_nobody_expected_is_a_problem_with_an_id_and_in_the_log_with_its_cause(
    client, monkeypatch, caplog
):
    service = client.app.state.service  # type: ignore[attr-defined]
    monkeypatch.setattr(service.jobs, "page", lambda *_, **__: 1 / 0)
    answer = client.get("/v1/jobs", headers={"X-Request-ID": "mine"})
    (failed,) = [r for r in caplog.records if r.exc_info]

    assert answer.status_code == 500
    assert answer.headers["X-Request-ID"] == answer.json()["request_id"] == "mine"
    assert answer.json()["code"] == "internal_error"
    assert "zero" not in answer.text
    assert failed.getMessage() == "GET /v1/jobs failed"
    assert "ZeroDivisionError" in str(failed.exc_info)
