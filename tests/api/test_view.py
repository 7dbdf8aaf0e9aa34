"""A job as all of its faces show it: what was asked, what can be asked of it, how far it is."""

import uuid
from datetime import UTC, datetime

import pytest

from pho_service.api.view import JobDocument, JobView
from storage.records import JobRecord, JobState

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
