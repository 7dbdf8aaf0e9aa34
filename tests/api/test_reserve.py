"""What is answered while everything else is busy, and what is said with every answer."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient

from pho_service.api.service import AT_ONCE, Heavy, Probe
from storage.database import Database
from storage.studies import DatabaseGone, read_trials

Submit = Callable[..., dict[str, Any]]
DOCUMENT = {"model": "org/name", "pattern": "0.5"}


# --------------------------------------------------------------------------- health


@pytest.fixture
def frozen(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> Iterator[TestClient]:
    """A front end whose database does not answer, with as many requests as it has threads."""
    thaw = threading.Event()
    service = client.app.state.service  # type: ignore[attr-defined]
    waiting = threading.Semaphore(0)

    def wait(*_: Any) -> None:
        waiting.release()
        thaw.wait()
        raise DatabaseGone("it was frozen")

    monkeypatch.setattr(service.keys, "exist", wait)
    monkeypatch.setattr(service.probe._database, "check", wait)
    threads = [
        threading.Thread(target=client.get, args=("/v1/jobs",), daemon=True) for _ in range(60)
    ]
    for thread in threads:
        thread.start()
    for _ in range(40):  # all threads of the front end
        waiting.acquire(timeout=60)
    yield client
    thaw.set()
    for thread in threads:
        thread.join()


def test_health_while_all_wait(frozen: TestClient) -> None:
    """Who looks after the process is answered while every thread waits for the database."""
    for path, status in (("/healthz", 200), ("/readyz", 503), ("/readyz", 503)):
        began = time.monotonic()
        assert frozen.get(path).status_code == status
        assert time.monotonic() - began < 5  # a second and what a loaded machine adds


def test_probe(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """One question is asked at a time; when the server wakes, the next is answered."""
    probe = Probe(database)
    monkeypatch.setattr("pho_service.api.service.ANSWER_S", 0.05)
    asked, thaw, check = [], threading.Event(), probe._database.check

    def slowly() -> None:
        asked.append(None)
        thaw.wait()
        check()

    monkeypatch.setattr(probe._database, "check", slowly)

    async def run() -> None:
        for _ in range(3):
            with pytest.raises(DatabaseGone, match="has not answered for"):
                await probe.check()
        thaw.set()
        monkeypatch.setattr("pho_service.api.service.ANSWER_S", 60.0)
        await probe.check()

    asyncio.run(run())
    assert len(asked) == 1
    probe.close()


def test_heavy_requests_take_turns() -> None:
    """What takes long takes few threads, however many ask for it, and all get it."""
    at_once, most, lock = 0, 0, threading.Lock()

    def work(number: int) -> int:
        nonlocal at_once, most
        with lock:
            at_once += 1
            most = max(most, at_once)
        time.sleep(0.005)
        with lock:
            at_once -= 1
        return number

    async def run() -> list[int]:
        heavy = Heavy()
        return await asyncio.gather(*(heavy.run(work, i) for i in range(20)))

    assert asyncio.run(run()) == [*range(20)]
    assert most == AT_ONCE


# --------------------------------------------------------------------------- trials


def test_trials_are_those_of_optuna(submit: Submit, hand: Any, database: Database) -> None:
    import optuna

    from storage.studies import open_storage, open_study

    job = submit()
    hand.record(job, 30, failed=4)
    with open_storage(database.studies_url) as storage:
        study = open_study(storage, job["name"], direction="minimize")
        study.add_trial(
            optuna.create_trial(
                value=float("inf"),
                params={"x": 0.25, "c": "b", "k": 3},
                distributions={
                    "x": optuna.distributions.FloatDistribution(0, 1),
                    "c": optuna.distributions.CategoricalDistribution(["a", "b"]),
                    "k": optuna.distributions.IntDistribution(1, 9, step=2),
                },
                user_attrs={"method": "crepe"},
            )
        )
        expected = study.get_trials()
    with database.transaction() as connection:
        every = read_trials(connection, job["name"])
        page = read_trials(connection, job["name"], first=29, limit=2, attributes=["method"])
        none = read_trials(connection, "no such study")

    assert every == expected
    assert [(t.number, t.user_attrs, t.params) for t in page] == [
        (t.number, {"method": t.user_attrs["method"]}, t.params) for t in expected[29:]
    ]
    assert none == []


def test_page_of_trials_reads_no_study(
    client: TestClient, submit: Submit, hand: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = submit()
    hand.record(job, 5)
    monkeypatch.setattr("optuna.load_study", None)
    url = f"/v1/jobs/{job['id']}"
    page = client.get(f"{url}/trials?page_size=2").json()

    assert [t["number"] for t in page["trials"]] == [0, 1]
    assert client.get(f"{url}/report").status_code == 200


# -------------------------------------------------------------------------- headers


def test_headers(client: TestClient, submit: Submit, hand: Any) -> None:
    """Every answer says that it is what it says, is in nobody's frame, and is not to be kept."""
    job = submit()
    hand.record(job, 3)
    hand.succeed(job["id"])
    url = f"/v1/jobs/{job['id']}"
    number = client.get("/api/studies").json()["study_summaries"][0]["study_id"]
    for path in (
        "/docs", f"{url}/report", f"{url}/best", url, f"/csv/{number}", "/openapi.json", "/nope",
        "/v1/jobs/x", "/", "/dashboard", "/healthz",
    ):  # fmt: skip
        headers = client.get(path).headers

        assert headers["x-content-type-options"] == "nosniff", path
        assert headers["x-frame-options"] == "DENY", path
        assert headers["content-security-policy"].count("frame-ancestors 'none'") == 1, path
        assert headers["cache-control"] == "no-store", path
    assert "cache-control" not in client.get("/static/bundle.js").headers


def test_a_body_with_two_ends_is_refused_and_its_connection_closed(client: TestClient) -> None:
    headers = {"Transfer-Encoding": "chunked", "Content-Length": "2"}
    answer = client.post("/v1/jobs", content=iter([b"{}"]), headers=headers)

    assert answer.status_code == 400
    assert answer.json()["code"] == "two_lengths"
    assert answer.headers["connection"] == "close"
