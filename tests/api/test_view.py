"""A job as all of its faces show it: what was asked, what can be asked of it, how far it is."""

import uuid
from datetime import UTC, datetime

import pytest

from pho_service.api.view import JobDocument, JobView
from storage.records import JobRecord, JobState, Stage, StageKind, StageState

NOW = datetime(2026, 12, 1, tzinfo=UTC)
SEARCH = {"model": "org/name", "pattern": "0.5", "scope": "row", "preset": "crepe"}
TRANSFER = {
    "kind": "transfer", "models": ["a", "b"], "source": "123",
    "configuration": {"method": "crepe", "pattern": "0.5", "scope": None},
}  # fmt: skip


def view(document=SEARCH, state=JobState.QUEUED, **fields):
    record = {
        "id": uuid.uuid4(), "number": 1, "owner_id": None, "name": "job", "spec": document,
        "state": state, "stage": None, "priority": 0, "trials": 8, "max_attempts": 3,
        "error": None, "best": None, "warnings": None, "created_at": NOW, "started_at": None,
        "finished_at": None, "stages": [],
    }  # fmt: skip
    return JobView(JobRecord(**{**record, **fields}), now=NOW)


def stage(kind, number=0, state=StageState.RUNNING, **fields):
    values = {
        "id": number, "job_id": uuid.uuid4(), "attempt": 1, "failures": 0, "worker_id": None,
        "params": None, "done": 0, "elapsed_s": 0.0, "worked_s": 0.0, "best_value": None,
        "step": None, "result": None, "started_at": NOW, "finished_at": None,
    }  # fmt: skip
    return Stage(kind=kind, number=number, state=state, **{**values, **fields})


def running(stages, document=SEARCH):
    return view(document, JobState.RUNNING, stage=stages[-1].kind, stages=stages).progress


@pytest.mark.parametrize(
    ("document", "models", "facts"),
    [
        (
            {**SEARCH, "more_models": ["org/other"]},
            ["org/name", "org/other"],
            [("Pattern", "0.5"), ("Scope", "row"), ("Preset", "crepe")],
        ),
        (
            {**SEARCH, "pattern": None, "scope": None, "patterns": ["0.3", "2:4"]},
            ["org/name"],
            [("Patterns", "0.3, 2:4"), ("Preset", "crepe")],
        ),
        (
            {**SEARCH, "pattern": None, "scope": None, "target": {"perplexity_rise": 0.05}},
            ["org/name"],
            [("Target", "within 5 % of dense"), ("Preset", "crepe")],
        ),
        (TRANSFER, ["a", "b"], [("Pattern", "0.5"), ("Transfer of", "job 123")]),
    ],
)
def test_a_document_tells_what_was_asked(document, models, facts):
    shown = JobDocument.of(document)

    assert shown.models == models
    assert shown.facts == facts


def test_what_an_older_or_a_newer_version_has_written_is_shown():
    older = view({"model": "org/name", "pattern": "0.5"})
    newer = view({**SEARCH, "colour": "red", "islands": 2, "objective": {"name": "beauty"}})

    assert older.document.facts == [("Pattern", "0.5"), ("Preset", "score")]
    assert newer.answer.spec["colour"] == "red"
    assert newer.islands == 2
    assert not newer.document.is_maximised


@pytest.mark.parametrize(
    ("state", "document", "verbs"),
    [
        (JobState.QUEUED, SEARCH, ["pause", "cancel"]),
        (JobState.PAUSED, SEARCH, ["resume", "cancel"]),
        (JobState.CANCELLED, SEARCH, []),
        (JobState.FAILED, SEARCH, ["resume"]),
        (JobState.SUCCEEDED, SEARCH, ["prune"]),
        (JobState.SUCCEEDED, {**SEARCH, "more_models": ["org/other"]}, []),
        (JobState.SUCCEEDED, TRANSFER, []),
    ],
)
def test_what_would_change_nothing_has_no_button(state, document, verbs):
    assert view(document, state, best={"method": "crepe"}).verbs == verbs


def test_searches_with_one_pattern_can_be_extended():
    several = {**SEARCH, "pattern": None, "patterns": ["0.3", "2:4"]}

    assert view(state=JobState.SUCCEEDED).extensible
    assert not view(state=JobState.FAILED).extensible
    assert not view(several, JobState.SUCCEEDED).extensible
    assert not view(TRANSFER, JobState.SUCCEEDED).extensible


def test_each_study_has_a_name_for_people():
    islands = view({**SEARCH, "islands": 2})

    assert islands.studies_in_words == {"job": "Study", "job island 1": "Study, island 1"}
    assert view(TRANSFER).studies_in_words == {}


def test_the_time_of_a_job_is_what_it_took_or_has_taken():
    began, ended = NOW.replace(hour=0), NOW.replace(hour=2)

    assert view().time == "not begun"
    assert view(state=JobState.RUNNING, started_at=began).time == "0 s since it began"
    assert view(state=JobState.FAILED, started_at=began, finished_at=ended).time == "took 2 h 0 min"


def test_no_time_is_left_to_tell_while_no_worker_has_the_stage():
    search = {"kind": StageKind.SEARCH, "done": 4, "elapsed_s": 20.0}
    document = {**SEARCH, "islands": 1}

    assert running([stage(**search)], document).seconds_left == 20.0
    assert running([stage(**search, state=StageState.WAITING)], document).seconds_left is None


def test_the_best_of_a_maximum_is_highest():
    islands = [stage(StageKind.SEARCH, n, best_value=value) for n, value in enumerate((0.5, 0.25))]

    assert running(islands).best_value == 0.25
    assert running(islands, {**SEARCH, "objective": {"name": "gini"}}).best_value == 0.5


def test_perplexities_are_counted_and_timed():
    done = {"state": StageState.DONE, "result": {"perplexity": 20.0, "seconds": 3.0}}
    states = (done, {}, {"state": StageState.WAITING})
    progress = running([stage(StageKind.PERPLEXITY, n, **each) for n, each in enumerate(states)])

    assert (progress.done, progress.total) == (1, 3)
    assert progress.pieces[-1].unit == "perplexities"
    assert progress.seconds_left == 6.0  # two at 3 s each, one after the other
