"""The database goes away and comes back under a front end that stays."""

import re
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest
from fastapi.testclient import TestClient

from pho_service.api.app import create_app
from storage.database import Database
from storage.embedded import Postmaster
from storage.jobs import JobStore
from storage.keys import KeyStore

DOCUMENT = {"model": "org/name", "pattern": "0.5", "minutes": None}


def until(holds):
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A PostgreSQL with a migrated database that the tests of this file stop and start."""
    server = Postmaster(tmp_path_factory.mktemp("own") / "postgresql")
    server.start()
    try:
        database = Database(server.url)
        database.migrate()
        database.close()
        yield server
    finally:
        server.stop()


@pytest.fixture
def front(server, settings):
    app = create_app(Database(server.url, pool=8), settings)
    with TestClient(app, "http://localhost:8000", raise_server_exceptions=False) as client:
        assert client.get("/v1/jobs").status_code == 200
        assert client.get("/api/studies").status_code == 200
        yield client


def test_each_operation_is_503_with_a_time_to_wait_and_works_again_afterwards(
    front, server, refusal, operations
):
    job = front.post("/v1/jobs", json=DOCUMENT).json()["id"]
    server.stop()
    began = time.monotonic()
    answers = [
        front.request(method, path.format(uuid.uuid4()))
        for method, path in [*operations, ("GET", "/readyz")]
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
    assert health.json()["status"] == "ok"
    assert front.get(f"/v1/jobs/{job}").json()["state"] == "queued"
    assert front.get("/readyz").json()["status"] == "ok"
    assert front.get("/api/studies").status_code == 200
    assert front.post("/v1/jobs", json=DOCUMENT).status_code == 202


def test_a_full_disk_is_no_outage(front, server, refusal):
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


def test_people_get_a_page_that_waits(front, server):
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


def test_no_key_is_called_wrong(server, settings, refusal):
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


def test_under_load_each_answer_is_right_or_503(front, server):
    ids = []
    seen = set()
    enough = threading.Event()

    def ask():
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


def test_a_stream_of_events_goes_on_after_an_outage(front, server, monkeypatch, caplog):
    monkeypatch.setattr("pho_service.api.jobs.RETRY_AFTER_S", 0.2)
    read, all_sent = JobStore.events, threading.Event()

    def events(*args, **options):
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
