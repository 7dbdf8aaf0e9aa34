"""What is answered while everything else is busy, and what is said with every answer."""

import asyncio
import threading
import time
from typing import cast

import pytest
from sqlalchemy import Connection

from pho_service.api.service import ANSWER_S, AT_ONCE, Heavy
from storage.studies import DatabaseGone, read_trials


@pytest.fixture
def frozen(client, monkeypatch):
    """A front end whose database does not answer, with as many requests as it has threads."""
    thaw = threading.Event()
    service = client.app.state.service  # type: ignore[attr-defined]
    waiting = threading.Semaphore(0)

    def wait(*_):
        waiting.release()
        thaw.wait()
        raise DatabaseGone("it was frozen")

    monkeypatch.setattr("pho_service.api.service.ANSWER_S", ANSWER_S)
    monkeypatch.setattr(service.keys, "exist", wait)
    monkeypatch.setattr(service.probe._jobs, "stores", wait)
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


def test_probes_are_answered_while_every_thread_waits(frozen):
    for path, status in (("/healthz", 200), ("/readyz", 503), ("/readyz", 503)):
        began = time.monotonic()
        assert frozen.get(path).status_code == status
        assert time.monotonic() - began < 5  # a second and what a loaded machine adds


def test_what_takes_long_takes_few_threads_whoever_asks_and_all_get_it(at_once):
    def work(number):
        with at_once:
            time.sleep(0.005)
        return number

    async def run():
        heavy = Heavy()
        return await asyncio.gather(*(heavy.run(work, i) for i in range(20)))

    assert asyncio.run(run()) == [*range(20)]
    assert at_once.most == AT_ONCE


def test_trials_are_those_of_optuna(submit, hand, database):
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


def test_a_trial_that_is_added_while_others_are_read_is_not_among_them(submit, hand, database):
    job = submit()
    hand.record(job, 3)

    class Slow:
        """Between any two statements, a worker records a trial."""

        def execute(self, *words, **more):
            rows = connection.execute(*words, **more).all()
            hand.record(job, 1)
            return rows

    with database.transaction() as connection:
        found = read_trials(cast(Connection, Slow()), job["name"])

    assert [(trial.number, bool(trial.user_attrs)) for trial in found] == [
        (number, True) for number in range(3)
    ]


def test_every_answer_has_safe_headers(client, submit, hand):
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


def test_a_body_with_two_ends_is_refused_and_its_connection_closed(client):
    headers = {"Transfer-Encoding": "chunked", "Content-Length": "2"}
    answer = client.post("/v1/jobs", content=iter([b"{}"]), headers=headers)

    assert answer.status_code == 400
    assert answer.json()["code"] == "two_lengths"
    assert answer.headers["connection"] == "close"
