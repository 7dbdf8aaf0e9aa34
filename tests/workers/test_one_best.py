"""A job has one best, and shows the same one everywhere; more trials never make it worse."""

import optuna
import pytest
from optuna_dashboard import get_note

from pho_service.api.view import JobView
from pho_service.pipeline import confirmation
from pho_service.shown.page import trials_of
from pho_service.shown.report import Report
from pho_service.spec.configuration import Configuration
from pho_service.tuning import validation
from pho_service.tuning.result import chosen_in
from storage.records import REFERENCE_NUMBERS, VALIDATION, JobState, StageKind
from storage.studies import open_storage, study_name


def studies(hand, job):
    found = []
    with open_storage(hand.store.database.studies_url) as storage:
        for island in range(job.spec["islands"]):
            study = optuna.load_study(study_name=study_name(job.name, island), storage=storage)
            memory = optuna.create_study(study_name=study.study_name)
            memory.add_trials(study.trials)
            for key, value in study.user_attrs.items():
                memory.set_user_attr(key, value)
            memory.set_user_attr("note", get_note(study))
            found.append(memory)
    return found


def measured(job):
    """The perplexities of a job by trial."""
    return {
        s.number: s.result["perplexity"]
        for s in job.of_kind(StageKind.PERPLEXITY)
        if s.result and s.number < REFERENCE_NUMBERS
    }


@pytest.mark.thorough
def test_extended(hand, small):
    """What was confirmed before an extension stays a finalist, and so no result gets worse."""
    spec = small(confirm={"finalists": 1, "windows": 1}, trials=7, stream=True)
    job = hand.done(spec)
    found = max(measured(job))  # streamed, each finalist gets one, and not the baselines alone
    own = hand.done(spec.model_copy(update={"trials": 29}))
    hand.edit(job, StageKind.PERPLEXITY, lambda result: result.update(perplexity=1.5), found)
    hand.store.ask(job.id, "extend", trials=22)
    job = hand.until(job, None)

    assert found not in measured(own)
    assert job.best["confirmation"]["perplexity"] == 1.5
    assert job.best["finalists"][0]["trial"] == found
    assert {*measured(own)} < {*measured(job)}


@pytest.mark.parametrize("islands", [2, pytest.param(1, marks=pytest.mark.thorough)])
def test_marked(hand, small, islands):
    """Studies, their notes, the API and the report name the chosen trial, not the best by proxy."""
    job = hand.until(hand.submit(small(islands=islands)), StageKind.FINISH)
    last = max(measured(job))
    hand.edit(job, StageKind.PERPLEXITY, lambda result: result.update(perplexity=1.5), last)
    job = hand.until(job, None)
    number, island = divmod(last, islands)
    every = studies(hand, job)
    mark = every[island].user_attrs["chosen"]
    shown = JobView(job).answer
    report = Report(
        title="", subject="search", made_at=job.created_at,
        configuration=Configuration.model_validate(job.best),
        trials=trials_of([study.trials for study in every], islands),
    )  # fmt: skip

    assert (mark["trial"], mark["perplexity"]) == (number, 1.5)
    assert [study.user_attrs["chosen"] for study in every] == [mark] * islands
    assert [chosen_in(study) for study in every] == [
        number if i == island else None for i in range(islands)
    ]
    assert all(f"**Best** trial {number}" in study.user_attrs["note"] for study in every)
    assert shown.progress.best_value == shown.best.objective == mark["objective"]
    assert shown.progress.best_value > min(s.best_value for s in job.of_kind(StageKind.SEARCH))
    assert report.winner.number == last


def test_unconfirmed(hand, small):
    """Also where the best is that of the objective, while more trials are being searched."""
    job = hand.done(small(confirm=None))
    (study,) = studies(hand, job)
    configuration = Configuration.model_validate(job.best)
    better = optuna.trial.create_trial(value=0.0, user_attrs={"method": "crepe"})
    report = Report(
        title="", subject="search", made_at=job.created_at, configuration=configuration,
        trials=trials_of([[*study.trials, better]], 1),
    )  # fmt: skip

    assert report.winner.number == study.user_attrs["chosen"]["trial"] == study.best_trial.number


@pytest.mark.thorough
def test_a_report_gives_way_between_its_measurements_goes_on_and_is_what_is_shown(
    hand, small, monkeypatch
):
    hand.write_reported()
    spec = small(report={"text": "reported.jsonl", "windows": 3})
    expected = hand.done(spec)
    monkeypatch.setattr("workers.watch.LOOK_EVERY_S", 0.0)
    really, reported = confirmation._measure, []
    monkeypatch.setattr(
        confirmation, "_measure",
        lambda work, *args, **more: (reported.append(1), really(work, *args, **more))[1],
    )  # fmt: skip
    job = hand.until(hand.submit(spec), StageKind.FINISH)
    other = hand.submit(small(confirm=None))
    hand.work(job, turn_s=1e-9, most=2)
    put_down, before = hand.store.get(job.id).state, len(reported)
    hand.store.ask(other.id, "cancel")
    job = hand.until(hand.store.get(job.id), None)
    answer, configuration = JobView(job).answer, Configuration.model_validate(job.best)
    report = configuration.report

    assert put_down is not JobState.SUCCEEDED
    assert 0 < before < len(reported) == 4
    assert {**job.best, "search": None} == {**expected.best, "search": None}
    assert answer.best.headline == report != configuration.perplexities
    assert report.text["source"].endswith("/reported.jsonl")
    assert answer.measured[0].perplexity == report.pruned
    assert answer.measured[0].rise == report.rise


ASKED = {"validation": {"candidates": 8}}
DOUBT = "The proxy does not rank."


@pytest.fixture
def doubted(monkeypatch):
    """Whatever the proxy says, nobody believes it."""
    monkeypatch.setattr(validation, "verdict", lambda *_: DOUBT)


@pytest.mark.usefixtures("doubted")
@pytest.mark.thorough
def test_before_confirming(hand, small):
    """All random candidates are measured first; more finalists are confirmed, and told."""
    job = hand.until(hand.submit(small(**ASKED, trials=12)), StageKind.CONFIRM)
    first = [stage.number for stage in job.of_kind(StageKind.PERPLEXITY)]
    job = hand.until(job, None)
    (planned,) = job.of_kind(StageKind.CONFIRM)

    assert first == [VALIDATION + i for i in range(8)]
    assert job.state is JobState.SUCCEEDED
    assert planned.result["doubt"] in job.warnings
    assert "8 by it are finalists instead of 2" in planned.result["doubt"]
