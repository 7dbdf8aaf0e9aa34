"""The id of each request, in its answer and in the log."""

import asyncio
import logging
import re
from typing import Any

import pytest
from fastapi.testclient import TestClient

from pho_service.api.app import create_app
from pho_service.api.requests import RequestLog
from pho_service.host.settings import read_settings
from storage.database import Database
from storage.keys import KeyStore

ACCESS = "pho_service.api.requests"


@pytest.fixture
def http(database: Database) -> Any:
    """A front end that anybody may ask."""
    with TestClient(create_app(database, read_settings()), base_url="http://localhost") as client:
        yield client


def test_own_id(http: Any) -> None:
    """Every answer has one, another each time; in a problem it is in the document too."""
    first, second = http.get("/v1/jobs"), http.get("/v1/jobs/x")

    assert re.fullmatch(r"[0-9a-f]{32}", first.headers["X-Request-ID"])
    assert first.headers["X-Request-ID"] != second.headers["X-Request-ID"]
    assert second.json()["request_id"] == second.headers["X-Request-ID"]


def test_one_that_came_with_the_request_is_kept(http: Any) -> None:
    answer = http.get("/v1/jobs/x", headers={"X-Request-ID": "abc-1:2/3"})

    assert answer.headers["X-Request-ID"] == answer.json()["request_id"] == "abc-1:2/3"


@pytest.mark.parametrize("given", ["", "a b", "x" * 129, "<script>", 'a"b'])
def test_but_for_one_that_could_be_anything_it_is_not_repeated(http: Any, given: str) -> None:
    answer = http.get("/v1/jobs", headers={"X-Request-ID": given})

    assert re.fullmatch(r"[0-9a-f]{32}", answer.headers["X-Request-ID"])


def test_who_has_no_key_gets_one_as_well(database: Database) -> None:
    app = create_app(database, read_settings(), keys_needed=True)
    with TestClient(app) as client:
        answer = client.get("/v1/jobs")

    assert answer.status_code == 401
    assert answer.json()["request_id"] == answer.headers["X-Request-ID"]


def test_line(database: Database, caplog: pytest.LogCaptureFixture) -> None:
    """A line for each request, with the beginning of its key and without its query."""
    key, secret = KeyStore(database).create("laptop", sees_all=False)
    caplog.set_level(logging.DEBUG, ACCESS)
    with TestClient(create_app(database, read_settings())) as client:
        client.get("/v1/jobs?page_size=3", headers={"Authorization": f"Bearer {secret}"})
        client.get("/healthz")
    line, probe = (record for record in caplog.records if record.name == ACCESS)

    assert line.getMessage() == "GET /v1/jobs 200"
    assert (line.method, line.path, line.status) == ("GET", "/v1/jobs", 200)
    assert line.key == key.prefix
    assert 0 < line.milliseconds < 60_000
    assert (line.levelname, probe.levelname) == ("INFO", "DEBUG")


def test_a_request_that_a_service_which_stops_waits_for_no_longer_is_told_so() -> None:
    async def slow(*_: Any) -> None:
        raise asyncio.CancelledError

    answer = TestClient(RequestLog(slow)).get("/v1/jobs")

    assert answer.status_code == 503
    assert answer.json()["code"] == "stopping"
    assert answer.json()["request_id"] == answer.headers["X-Request-ID"]


def test_unexpected(
    http: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What nobody expected is a problem with an id, and in the log with its cause."""
    monkeypatch.setattr(http.app.state.service.jobs, "page", lambda *_, **__: 1 / 0)
    answer = http.get("/v1/jobs", headers={"X-Request-ID": "mine"})
    (failed,) = [r for r in caplog.records if r.exc_info]

    assert answer.status_code == 500
    assert answer.headers["X-Request-ID"] == answer.json()["request_id"] == "mine"
    assert answer.json()["code"] == "internal_error"
    assert failed.getMessage() == "GET /v1/jobs failed"
    assert "ZeroDivisionError" in str(failed.exc_info)
