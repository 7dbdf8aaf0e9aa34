"""The database goes away and comes back under a front end that stays."""

import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from pho_service.api.app import create_app
from pho_service.host.settings import Settings
from storage.database import Database
from storage.embedded import Postmaster
from storage.jobs import JobStore
from storage.keys import KeyStore

Refusal = Callable[..., dict[str, Any]]

DOCUMENT = {"model": "org/name", "pattern": "0.5"}
JOB = "/v1/jobs/00000000-0000-0000-0000-000000000000"
CONFIGURATION = "/v1/configurations/00000000-0000-0000-0000-000000000000"
OPERATIONS = [
    ("GET", "/v1/jobs"), ("POST", "/v1/jobs"), ("GET", JOB), ("DELETE", JOB),
    ("GET", f"{JOB}/trials"), ("GET", f"{JOB}/best"), ("GET", f"{JOB}/events"),
    ("POST", f"{JOB}:cancel"), ("POST", f"{JOB}:pause"), ("POST", f"{JOB}:resume"),
    ("POST", f"{JOB}:extend"), ("GET", "/v1/workers"), ("GET", "/readyz"), ("GET", "/metrics"),
    ("GET", "/dashboard"), ("GET", "/api/studies"), ("GET", "/static/bundle.js"), ("GET", "/docs"),
    ("GET", "/v1/configurations"), ("GET", CONFIGURATION), ("DELETE", CONFIGURATION),
    ("GET", "/nope"),
]  # fmt: skip


class Server:
    """
    A PostgreSQL that a test can stop and start.

    Args:
        folder: For the data.

    Attributes:
        url: Of its database.
    """

    def __init__(self, folder: Path) -> None:
        self._postmaster = Postmaster(folder / "postgresql")
        self._postmaster.start()
        self.url = self._postmaster.url

    def stop(self) -> None:
        """As an operator would, while others are connected."""
        self._postmaster.stop()

    def start(self) -> None:
        """On the same data."""
        self._postmaster.start()


def until(holds: Callable[[], bool]) -> None:
    """Wait until it does, for a minute at most."""
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """With a migrated database, for the tests of this file."""
    server = Server(tmp_path_factory.mktemp("own"))
    try:
        database = Database(server.url)
        database.migrate()
        database.close()
        yield server
    finally:
        server.stop()


@pytest.fixture
def front(server: Server, settings: Settings) -> Iterator[TestClient]:
    """A front end on it, which has answered before."""
    app = create_app(Database(server.url, pool=8), settings)
    with TestClient(app, "http://localhost:8000", raise_server_exceptions=False) as client:
        assert client.get("/v1/jobs").status_code == 200
        assert client.get("/api/studies").status_code == 200
        yield client


def test_every_operation(front: TestClient, server: Server, refusal: Refusal) -> None:
    """Without its database each operation is 503 with a time to wait, and works again after it."""
    job = front.post("/v1/jobs", json=DOCUMENT).json()["id"]
    server.stop()
    began = time.monotonic()
    answers = [
        front.request(method, path, json={**DOCUMENT} if path == "/v1/jobs" else {"trials": 1})
        for method, path in OPERATIONS
    ]
    took_s = time.monotonic() - began
    health = front.get("/healthz")
    server.start()

    for answer in answers:
        refusal(answer, 503, "database_unavailable")
        assert int(answer.headers["retry-after"]) > 0
        assert str(server.url) not in answer.text
        assert "socket" not in answer.text
    assert took_s < 10
    assert health.json() == {"status": "ok"}
    assert front.get(f"/v1/jobs/{job}").json()["state"] == "queued"
    assert front.get("/readyz").json() == {"status": "ok"}
    assert front.get("/api/studies").status_code == 200
    assert front.post("/v1/jobs", json=DOCUMENT).status_code == 202


def test_disk_full(front: TestClient, server: Server, refusal: Refusal) -> None:
    """A disk that is full is told from an outage; what can be read still is."""
    database = Database(server.url, pool=1)
    with database.transaction() as connection:
        connection.exec_driver_sql(
            "CREATE FUNCTION pho.full_disk() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
            "RAISE EXCEPTION 'No space left on device' USING ERRCODE = '53100'; END $$"
        )
        connection.exec_driver_sql(
            "CREATE TRIGGER full_disk BEFORE INSERT ON pho.jobs EXECUTE FUNCTION pho.full_disk()"
        )
    answer, listed = front.post("/v1/jobs", json=DOCUMENT), front.get("/v1/jobs")
    with database.transaction() as connection:
        connection.exec_driver_sql("DROP FUNCTION pho.full_disk CASCADE")
    database.close()

    refusal(answer, 503, "database_full")
    assert "The disk of the database is full" in answer.json()["detail"]
    assert listed.status_code == 200
    assert front.post("/v1/jobs", json=DOCUMENT).status_code == 202


def test_pages(front: TestClient, server: Server) -> None:
    """People get a page that waits for the database, and what they sent is not sent again."""
    job = front.post("/v1/jobs", json=DOCUMENT).json()["id"]
    server.stop()
    shown = [front.get(path) for path in ("/", "/new", "/?state=failed&refresh=off")]
    sent = [
        front.post("/new", data=DOCUMENT), front.post(f"/jobs/{job}/cancel", data={"view": ""}),
    ]  # fmt: skip
    server.start()

    for answer in (*shown, *sent):
        assert answer.status_code == 503
        assert answer.headers["content-type"] == "text/html; charset=utf-8"
        assert answer.headers["retry-after"] == "5"
        assert "The database cannot be reached. What was stored is kept" in answer.text
        assert ('http-equiv="refresh" content="5; url=/' in answer.text) is (answer in shown)
    assert "url=/?state=failed&amp;refresh=off" in shown[-1].text
    assert front.get("/").status_code == 200


def test_with_a_key(server: Server, settings: Settings, refusal: Refusal) -> None:
    """In an outage nobody is told that his key is wrong, and nobody gets in."""
    database = Database(server.url, pool=4)
    key, secret = KeyStore(database).create("k", sees_all=True)
    app = create_app(Database(server.url, pool=4), settings, keys_needed=True)
    with TestClient(app, "http://localhost:8000", raise_server_exceptions=False) as client:
        right, wrong = ({"Authorization": f"Bearer {s}"} for s in (secret, "pho_wrong"))
        server.stop()
        during = [client.get("/v1/jobs", headers=h) for h in (right, wrong, {})]
        server.start()
        after = [client.get("/v1/jobs", headers=h).status_code for h in (right, wrong, {})]
    with database.transaction() as connection:  # the other tests of this file need none
        connection.exec_driver_sql("DELETE FROM pho.keys WHERE id = %s", (key.id,))
    database.close()

    assert {a.status_code for a in during} <= {401, 503}
    refusal(during[0], 503, "database_unavailable")
    assert after == [200, 401, 401]


def test_restart_under_load(front: TestClient, server: Server) -> None:
    """While the server restarts under many callers, each is answered: right, or with 503."""
    ids: list[str] = []
    seen: set[int] = set()
    enough = threading.Event()

    def ask() -> None:
        while not enough.is_set():
            answer = front.post(
                "/v1/jobs", json=DOCUMENT, headers={"Idempotency-Key": str(uuid.uuid4())}
            )
            if answer.status_code == 202:
                ids.append(answer.json()["id"])
            seen.update((answer.status_code, front.get("/v1/jobs").status_code))
            seen.add(front.get("/api/studies").status_code)

    with ThreadPoolExecutor(4) as pool:
        asking = [pool.submit(ask) for _ in range(4)]
        try:
            until(lambda: len(ids) >= 20)
            server.stop()
            until(lambda: 503 in seen)
            server.start()
            before = len(ids)
            until(lambda: len(ids) >= before + 20)
        finally:
            enough.set()
    for each in asking:
        each.result()
    store = JobStore(Database(server.url, pool=1))
    stored = {str(job.id) for job in store.page(limit=100_000)}
    store.database.close()

    assert seen <= {200, 202, 503}
    assert {202, 503} <= seen
    assert {*ids} <= stored  # what was answered is not lost


def test_a_stream_of_events_goes_on_after_an_outage(
    front: TestClient,
    server: Server,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("pho_service.api.jobs.RETRY_AFTER_S", 0.2)
    read, all_sent = JobStore.events, threading.Event()

    def events(*args: Any, **options: Any) -> Any:
        found = read(*args, **options)
        if not found:
            all_sent.set()
        return found

    monkeypatch.setattr(JobStore, "events", events)
    job = front.post("/v1/jobs", json=DOCUMENT).json()["id"]
    with ThreadPoolExecutor(1) as pool:
        stream = pool.submit(front.get, f"/v1/jobs/{job}/events")
        until(all_sent.is_set)
        server.stop()
        until(lambda: "a stream of events waits for the database" in caplog.text)
        server.start()
        front.post(f"/v1/jobs/{job}:cancel")
        answer = stream.result(timeout=60)
    states = re.findall(r'"state": "(\w+)"', answer.text)
    ids = [int(line[4:]) for line in answer.text.splitlines() if line.startswith("id: ")]

    assert states == ["queued", "cancelled"]
    assert ids == sorted({*ids})
