"""Workers as the API sees them: which artifact store they see, and that they can be drained."""

import asyncio
import re
import uuid
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from pho_service.api.answers import NO_WORKER
from pho_service.errors import OutputError
from storage.records import Drain, StageKind


@pytest.fixture
def client(client_of, monkeypatch):
    """A front end that has made the id of its store, noted it once, and does not measure it."""
    for name in ("noted", "measured"):
        monkeypatch.setattr(f"pho_service.api.app.keep_store_{name}", lambda _: asyncio.sleep(0))
    client = client_of()
    client.app.state.service.note_store()
    assert isinstance(client, TestClient)
    return client


def enter(store, worker, *, sees=None):
    """A worker reports, with the id of the artifact store that it sees."""
    kinds = [StageKind.SEARCH]
    return store.enter_worker(worker, name="host:7", device="cpu", kinds=kinds, store=sees).drain


def test_readyz_compares_the_store_of_the_api_with_those_of_its_workers(
    client, hand, settings, refusal
):
    own = Path(settings.artifacts, "store-id").read_text()
    first, second = uuid.uuid4(), uuid.uuid4()
    answers = []
    for seen in ((None, own), (own, "other"), ("", "other")):
        enter(hand.store, first, sees=seen[0])
        enter(hand.store, second, sees=seen[1])
        answers.append(client.get("/readyz"))
    same, one, both = answers
    shown = client.get("/v1/workers").json()["workers"]

    assert hand.store.stores(0.0) == (own, [])
    assert same.json() == {"status": "ok"}
    assert one.status_code == 200
    (warning,) = one.json()["warnings"]
    assert warning.startswith("1 of 2 workers see another artifact store")
    detail = refusal(both, 503, "artifact_store_unavailable")["detail"]
    assert detail.startswith("2 of 2 workers see another artifact store")
    assert "the same PHO_ARTIFACTS; in containers, mount the same volume" in detail
    assert [worker["other_store"] for worker in shown] == [True, True]
    assert "sees another artifact store than the API" in client.get("/").text


def test_readyz_tells_sizes_to_a_key_that_sees_all_jobs(client, keys, refusal):
    client.app.state.service.stored = {"pruned": 3 * 2**20, "free": 2**30}  # type: ignore[attr-defined]
    anybody = client.get("/readyz?verbose")
    ours, all_jobs = (
        {"Authorization": f"Bearer {keys.create(name, sees_all=sees_all)[1]}"}
        for name, sees_all in (("ours", False), ("all", True))
    )
    told = client.get("/readyz?verbose", headers=all_jobs)

    for answer in (anybody, told):
        version, *tables, store = answer.json()["details"]
        assert re.fullmatch(r"PostgreSQL \d\d\S*, .*iB", version)
        assert tables
        assert all(re.match(r"dead rows: \d+ beside \d+ rows in ", each) for each in tables)
        assert store == "artifact store: pruned 3.0 MiB; 1.0 GiB free"
    refusal(client.get("/readyz?verbose"), 401, "no_key")
    refusal(client.get("/readyz?verbose", headers=ours), 403, "not_for_this_key")
    refusal(client.get("/readyz?%76erbose"), 403, "not_for_this_key")
    for path in ("/readyz", "/healthz", "/healthz?verbose"):  # these tell nobody anything
        assert client.get(path).json()["status"] == "ok"


def test_readyz_of_an_api_that_cannot_use_its_store_or_sees_another_than_the_rest_says_so(
    client, client_of, tmp_path, refusal
):
    moved = client_of(artifacts=str(tmp_path / "elsewhere"))
    moved.app.state.service.note_store()
    differs = refusal(client.get("/readyz"), 503, "artifact_store_unavailable")["detail"]
    (tmp_path / "file").touch()
    broken = client_of(artifacts=str(tmp_path / "file"))
    with pytest.raises(OutputError):
        broken.app.state.service.note_store()
    answer = broken.get("/readyz")

    assert "nother process of the API sees another artifact store" in differs
    assert moved.get("/readyz").json() == {"status": "ok"}
    detail = refusal(answer, 503, "artifact_store_unavailable")["detail"]
    assert "store-id cannot be read or written there" in detail


def test_an_api_that_starts_notes_which_artifact_store_it_sees(client_of, hand, settings):
    client_of()
    while (noted := hand.store.stores(0.0)[0]) is None:
        pass

    assert noted == Path(settings.artifacts, "store-id").read_text()


def test_a_worker_that_is_drained_hears_of_it_with_its_next_report(client, hand, submit):
    enter(hand.store, hand.worker_id)
    job = submit()["id"]
    hand.take(job, StageKind.CALIBRATE)
    path = f"/v1/workers/{hand.worker_id}:drain"
    asked = client.post(path)
    heard = enter(hand.store, hand.worker_id)
    (listed,) = client.get("/v1/workers").json()["workers"]
    page = client.get("/").text
    client.post(path, params={"now": True})

    assert asked.status_code == 202
    assert (asked.json()["drain"], asked.json()["job_id"]) == ("finish", job)
    assert listed["drain"] == "finish"
    assert heard is Drain.FINISH
    assert ", then ends" in page
    assert enter(hand.store, hand.worker_id) is Drain.NOW


def test_only_who_sees_all_jobs_drains_and_only_a_worker_that_reports(
    client, hand, bearer_of, refusal
):
    enter(hand.store, hand.worker_id)
    path = f"/v1/workers/{hand.worker_id}:drain"
    ordinary, admin = bearer_of("a"), bearer_of("admin", sees_all=True)

    refusal(client.post(path, headers=ordinary), 403, "not_for_this_key")
    assert enter(hand.store, hand.worker_id) is None
    unknown = f"/v1/workers/{uuid.uuid4()}:drain"
    refusal(client.post(unknown, headers=admin), 404, "no_such_worker")
    assert client.post(path, headers=admin).status_code == 202


def test_readyz_says_when_the_disk_of_the_artifact_store_is_full(client, refusal, monkeypatch):
    monkeypatch.setattr(client.app.state.service.pruned, "free", lambda: 4096)
    full = client.get("/readyz")
    monkeypatch.setattr(client.app.state.service.pruned, "free", lambda: 2**30)

    detail = refusal(full, 503, "artifact_store_unavailable")["detail"]
    assert "artifact store is full: 4.0 KiB are free" in detail
    assert client.get("/readyz").json() == {"status": "ok"}


@pytest.fixture
def unmanned(client_of):
    """A front end that starts no worker of its own."""
    return client_of(workers=0)


def test_a_job_that_no_worker_can_take_says_so_until_one_is_connected(unmanned, hand):
    document = {"model": "org/name", "pattern": "0.5"}
    submitted = unmanned.post("/v1/jobs", json=document).json()
    place, page = submitted["links"]["job"], submitted["links"]["page"]
    before = unmanned.get(place).json()["warnings"], unmanned.get(page).text
    enter(hand.store, uuid.uuid4())
    after = unmanned.get(place).json()["warnings"], unmanned.get(page).text

    assert NO_WORKER in submitted["warnings"]
    assert NO_WORKER in before[0]
    assert "No worker is connected: the job waits" in before[1]
    assert NO_WORKER not in after[0]
    assert "No worker is connected" not in after[1]
    assert NO_WORKER not in unmanned.post("/v1/jobs", json=document).json()["warnings"]


def test_no_time_left_is_told_of_a_job_whose_workers_are_all_gone(unmanned, hand, submit):
    job = submit(trials=40)["id"]
    hand.calibrate(job)
    hand.store.progress(hand.take(job, StageKind.SEARCH), done=10, elapsed_s=50.0, best_value=0.5)
    alone = unmanned.get(f"/v1/jobs/{job}").json(), unmanned.get("/v1/jobs").json()["jobs"][0]
    page, listing = unmanned.get(f"/jobs/{job}").text, unmanned.get("/").text
    enter(hand.store, uuid.uuid4())

    assert [answer["progress"]["seconds_left"] for answer in alone] == [None, None]
    assert "left in all" not in page
    assert re.findall(r"about \d.*? left", page + listing) == []
    assert unmanned.get(f"/v1/jobs/{job}").json()["progress"]["seconds_left"] == 150.0


def test_a_service_that_starts_its_own_workers_gives_them_a_minute(client, submit):
    assert NO_WORKER not in submit()["warnings"]
    client.app.state.service._began -= 4000.0  # type: ignore[attr-defined]  # FastAPI's

    assert NO_WORKER in submit()["warnings"]
