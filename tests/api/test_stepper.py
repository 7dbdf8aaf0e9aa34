"""The stages of a job on its page: all from the first to the last, and what one waits for."""

import uuid

import pytest

from pho_service.api.job_page import contents
from pho_service.api.service import Caller
from storage.records import JobState, NewStage, StageKind

ADMIN = Caller(key_id=None, sees_all=True)


@pytest.fixture
def shown(client, hand):
    """What the page of a job shows, by its id."""
    service = client.app.state.service  # type: ignore[attr-defined]  # FastAPI's

    def of(job):
        record = hand.store.get(uuid.UUID(job))
        return contents(service, ADMIN, record, record.created_at)

    return of


@pytest.fixture
def steps(shown):
    """The steps of a job by their stage."""

    def of(job):
        return {str(row.kind): row for row in shown(job).steps}

    return of


def test_all_stages_are_there_from_the_beginning(submit, steps, hand):
    plain, tested = submit(), submit(prune=True, tasks=["boolq"], confirm=None)
    several = submit(pattern=None, patterns=["0.3", "2:4"])
    rows = steps(plain["id"])
    hand.succeed(plain["id"])

    assert [*rows] == ["calibrate", "search", "confirm", "perplexity", "finish"]
    assert [row.state for row in rows.values()] == ["waiting", *["to come"] * 4]
    assert [*steps(tested["id"])] == ["calibrate", "search", "confirm", "finish", "tasks", "prune"]
    assert [*steps(several["id"])] == ["calibrate", "point", "finish"]
    assert {row.state for row in steps(plain["id"]).values()} == {"done"}
    job = submit()["id"]
    hand.fail(job)
    assert [row.state for row in steps(job).values()] == ["failed", *["not reached"] * 4]
    assert "attempt" not in steps(job)["calibrate"].at  # the first that fails for good


def test_a_stage_says_what_it_waits_for(submit, steps, hand):
    job, other = submit()["id"], submit()["id"]

    def waits():
        return str(steps(job)["calibrate"].at)

    def enter(*kinds, device="cpu"):
        hand.worker_id = uuid.uuid4()
        hand.store.enter_worker(hand.worker_id, name="host:1", device=device, kinds=[*kinds])

    nobody = waits()
    enter(StageKind.SEARCH)
    no_gpu = waits()
    enter(StageKind.SEARCH, device="cuda:0")
    unable = waits()
    enter(*StageKind)
    free = waits()
    hand.take(other, StageKind.CALIBRATE)
    busy = waits()
    hand.bring(job, JobState.PAUSED)

    assert nobody == "no worker is connected"
    assert no_gpu == "no connected worker does this, and none has a GPU"
    assert unable == "no connected worker does this"
    assert free == "waiting for a worker to take it"
    assert busy == "all workers that do this are busy"
    assert waits() == "paused until it is resumed"


def test_turns_and_second_attempts_have_names(client, submit, shown, hand):
    job, other = submit()["id"], submit()["id"]
    hand.store.enter_worker(hand.worker_id, name="host:1", device="cpu", kinds=[*StageKind])
    hand.calibrate(job)
    for _ in range(3):  # a long search has hundreds
        hand.store.end_turn(hand.take(job, StageKind.SEARCH))
    hand.take(other, StageKind.CALIBRATE)
    view_of, page = shown(job), client.get(f"/jobs/{job}").text
    told = [text for _, text in view_of.happened.events]
    hand.take(job, StageKind.SEARCH)
    hand.take(job, StageKind.SEARCH)  # whose worker has died
    failed = [text for _, text in shown(job).happened.events]

    assert {str(row.kind): row.at for row in view_of.steps}["search"].startswith(
        "another job's turn, "
    )
    assert "running, search waits</span>" in page
    assert told[:3] == [
        "interrupted: search, another job's turn", "resumed: search", "began: search",
    ]  # fmt: skip
    assert failed[:2] == [
        "retried: search",
        "search failed and will be retried: its worker died, or was cut off (WorkerLost)",
    ]


def test_the_time_left_counts_the_stages_to_come(submit, shown, hand, tmp_path, write_small):
    write_small(tmp_path / "small")
    fields = {"model": "small", "trials": 100, "calibration": {"context_length": 128}}
    job, unknown = submit(**fields)["id"], submit()["id"]
    recovered = submit(**fields, prune=True, recovery={"minutes": 60})["id"]
    hand.store.enter_worker(hand.worker_id, name="host:1", device="cpu", kinds=[*StageKind])
    before = shown(job).left
    hand.calibrate(job)
    claim = hand.take(job, StageKind.SEARCH)
    hand.store.progress(claim, done=50, elapsed_s=36_000.0, best_value=0.5)
    during = shown(job).left
    hand.succeed(recovered, then=[NewStage(kind=StageKind.PRUNE)])

    assert before.endswith((" s", " min"))
    assert " h" in during or "days" in during  # ten hours of the search, and more in proportion
    assert shown(recovered).left == "60 min"
    assert shown(unknown).left == ""
