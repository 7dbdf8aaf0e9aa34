"""optuna-dashboard below the same host, and what Prometheus sees."""

import json
import time
import uuid
from collections.abc import Callable
from typing import Any

import pytest
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

from storage.database import Database
from storage.records import JobState, StageKind

Submit = Callable[..., dict[str, Any]]
Refusal = Callable[..., dict[str, Any]]


@pytest.mark.parametrize(
    ("path", "content_type"),
    [
        ("/dashboard", "text/html"),
        ("/dashboard/studies/1", "text/html"),
        ("/api/meta", "application/json"),
        ("/api/studies", "application/json"),
    ],
)
def test_pages(shared_client: TestClient, path: str, content_type: str) -> None:
    """The dashboard's pages are where its own links look for them."""
    answer = shared_client.get(path)

    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith(content_type)
    assert shared_client.head(path).status_code == 200


def test_way_back(shared_client: TestClient) -> None:
    """Each page of the dashboard leads back to PHO, and has no buttons for what is refused."""
    answer = shared_client.get("/dashboard/studies/1", headers={"If-Modified-Since": "now"})

    assert '<a id="pho" href="/">' in answer.text
    assert 'button[aria-label="delete study"]' in answer.text
    assert answer.text.rstrip().endswith("</html>")
    assert "last-modified" not in answer.headers


@pytest.mark.parametrize("encoding", [None, "identity", "gzip", "br", "gzip;q=0"])
def test_bundle(shared_client: TestClient, encoding: str | None) -> None:
    """The pages' files come, whatever encodings a client asks for, or if it asks for none."""
    headers = {} if encoding is None else {"Accept-Encoding": encoding}
    if encoding is None:
        del shared_client.headers["accept-encoding"]
    answer = shared_client.get("/static/bundle.js", headers=headers)

    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/javascript")
    assert len(answer.content) > 1_000_000


def test_studies(client: TestClient, submit: Submit, hand: Any) -> None:
    """Each job's study is shown under the name of the job, with its trials."""
    jobs = [submit(), submit()]
    for job in jobs:
        hand.record(job, 5)
    studies = client.get("/api/studies").json()["study_summaries"]
    trials = client.get(f"/api/studies/{studies[0]['study_id']}").json()["trials"]

    assert {s["study_name"] for s in studies} == {job["name"] for job in jobs}
    assert len(trials) == 5


def test_fresh(client: TestClient, submit: Submit, hand: Any) -> None:
    """Studies that begin or go after the dashboard was opened are seen to do so."""
    before = client.get("/api/studies").json()["study_summaries"]
    job = submit()
    hand.record(job, 5)
    during = client.get("/api/studies").json()["study_summaries"]
    hand.bring(job["id"], JobState.CANCELLED)
    client.delete(f"/v1/jobs/{job['id']}")
    after = client.get("/api/studies").json()["study_summaries"]

    assert [len(studies) for studies in (before, during, after)] == [0, 1, 0]


def test_only_for_reading(client: TestClient, submit: Submit, hand: Any, refusal: Refusal) -> None:
    """Nobody can change a study through the dashboard."""
    job = submit()
    hand.record(job, 2)
    body = json.dumps({"study_name": "mine", "directions": ["minimize"], "body": "x"})
    headers = {"Content-Type": "application/json"}
    for method in ("POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "X"):
        for path in ("/api/studies", "/api/studies/1", "/api/studies/1/note", "/dashboard",
                     "/api/studies/1/rename", "/static/bundle.js", "/artifacts/1/x",
                     "/api/studies?_method=DELETE"):  # fmt: skip
            answer = client.request(method, path, content=body, headers=headers)

            refusal(answer, 405, "read_only")
            assert answer.headers["allow"] == "GET, HEAD"
    assert hand.studies() == [job["name"]]


def test_method_in_disguise(client: TestClient, submit: Submit, hand: Any) -> None:
    """Nor with a header that says that GET means something else."""
    job = submit()
    hand.record(job, 2)
    for header in ("X-HTTP-Method-Override", "X-HTTP-Method", "X-Method-Override"):
        client.get("/api/studies/1", headers={header: "DELETE"})
        client.head("/api/studies/1", headers={header: "DELETE"})

    assert hand.studies() == [job["name"]]


@pytest.mark.parametrize(
    "path",
    [
        "/static/%2e%2e/%2e%2e/app.py",
        "/static/..%2f..%2fapp.py",
        "/static//etc/passwd",
        "/static/%00",
        "/artifacts/..%2f..%2f..%2fetc/passwd",
    ],
)
def test_path_tricks(shared_client: TestClient, path: str) -> None:
    """No path leads out of the dashboard's own files."""
    assert shared_client.get(f"http://127.0.0.1:8000{path}").status_code in (400, 403, 404)


def test_a_large_body_that_comes_with_a_get_does_no_harm(client: TestClient) -> None:
    chunks = (b"x" * 10_000 for _ in range(20))
    answer = client.request("GET", "/api/studies", content=chunks)

    assert answer.status_code in (200, 413)


def open_connections(database: Database) -> list[str]:
    """What others did last on this database."""
    with database.transaction() as connection:
        return [
            *connection.exec_driver_sql(
                "SELECT query FROM pg_stat_activity"
                " WHERE datname = current_database() AND pid <> pg_backend_pid()"
            ).scalars()
        ]


def test_closed(client_of: Any, database: Database) -> None:
    """When the front end ends, so do all its connections, the dashboard's too."""
    client = client_of()
    client.get("/api/studies")
    client.get("/v1/jobs")
    client.__exit__(None, None, None)
    deadline = time.monotonic() + 60.0
    while (left := open_connections(database)) and time.monotonic() < deadline:
        time.sleep(0.05)  # the server takes its time to notice
    client.__enter__()  # for the fixture to close

    assert left == []


# ---------------------------------------------------------------------------- metrics


def counts(client: TestClient) -> dict[tuple[str, ...], float]:
    """All that is counted, by name and labels; 0 is left out."""
    answer = client.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
        if sample.value
    }


def test_without_jobs_and_workers_all_counts_are_there_and_0(client: TestClient) -> None:
    names = {
        (sample.name, *sample.labels.values())
        for family in text_string_to_metric_families(client.get("/metrics").text)
        for sample in family.samples
    }

    assert counts(client) == {}
    assert {("pho_jobs", state) for state in JobState} <= names
    assert {("pho_stages", kind, "waiting") for kind in StageKind} <= names
    assert {("pho_workers", "busy"), ("pho_workers", "idle")} <= names


def test_counts(client: TestClient, submit: Submit, hand: Any) -> None:
    """Jobs are counted by state, stages of jobs that may work by kind, workers by what they do."""
    for state in (JobState.QUEUED, JobState.QUEUED, JobState.PAUSED, JobState.FAILED):
        hand.bring(submit()["id"], state)
    job = submit(islands=3)["id"]
    hand.calibrate(job)
    hand.take(job, StageKind.SEARCH, 1)
    for worker in (hand.worker_id, uuid.uuid4(), uuid.uuid4()):
        hand.store.enter_worker(worker, name="w", device="cpu", kinds=list(StageKind))

    assert counts(client) == {
        ("pho_jobs", "queued"): 2, ("pho_jobs", "paused"): 1, ("pho_jobs", "failed"): 1,
        ("pho_jobs", "running"): 1, ("pho_stages", "calibrate", "waiting"): 2,
        ("pho_stages", "search", "waiting"): 2, ("pho_stages", "search", "running"): 1,
        ("pho_workers", "busy"): 1, ("pho_workers", "idle"): 2,
    }  # fmt: skip


def test_workers(client_of: Any, hand: Any) -> None:
    """Workers are listed with what they do, as long as they report."""
    client = client_of(stalled_after_s=5.0)
    hand.store.enter_worker(hand.worker_id, name="host:7", device="cpu", kinds=[StageKind.SEARCH])
    gone = uuid.uuid4()
    hand.store.enter_worker(gone, name="gone", device="cuda:0", kinds=list(StageKind))
    with hand.store.database.transaction() as connection:
        connection.exec_driver_sql(
            "UPDATE pho.workers SET heartbeat_at = now() - interval '6 s' WHERE id = %s", (gone,)
        )
    (worker,) = client.get("/v1/workers").json()["workers"]

    assert (worker["id"], worker["name"]) == (str(hand.worker_id), "host:7")
    assert (worker["device"], worker["stages"]) == ("cpu", ["search"])
    assert worker["job_id"] is worker["stage"] is None


def test_busy_worker(client: TestClient, submit: Submit, hand: Any) -> None:
    """A worker that is busy says with which stage of which job."""
    job = submit()["id"]
    hand.store.enter_worker(hand.worker_id, name="host:7", device="cpu", kinds=list(StageKind))
    hand.take(job, StageKind.CALIBRATE)
    (worker,) = client.get("/v1/workers").json()["workers"]

    assert (worker["job_id"], worker["stage"]) == (job, "calibrate")
