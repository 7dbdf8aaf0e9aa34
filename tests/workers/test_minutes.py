"""A job of so many minutes: the worker that begins chooses its sizes, and they stay."""

import json
import time
from types import SimpleNamespace

import pytest

from pho_service.pipeline.minutes import Clock
from pho_service.spec.job import JobSpec
from pho_service.spec.job_options import search_command
from pho_service.spec.steps import Reconstruction
from storage.records import RESTING, SIZING, StageKind
from workers import conductor


@pytest.fixture
def minutes(hand):
    """The document of a small job that is given minutes and no size."""

    def build(*, text="calibration.jsonl", **changes):
        text = {"text": str(hand.folder / text)}
        how = {"rows_per_layer": 4, "projection_rows": 16, "kernel_sizes": [3, 5]}
        document = {
            "model": str(hand.folder / "model"), "pattern": "0.5", "preset": "score", "trials": 12,
            "calibration": {**text, **how},
            "confirm": {"text": str(hand.folder / "confirmation.jsonl")},
        }  # fmt: skip
        return JobSpec.model_validate({**document, **changes})

    return build


@pytest.mark.parametrize("preset", [pytest.param("score", marks=pytest.mark.thorough), "best"])
def test_its_first_stage_chooses_what_the_document_then_says(hand, minutes, preset):
    asked = minutes(preset=preset)
    job = hand.done(asked)
    spec = JobSpec.model_validate(job.spec)
    numbers = {stage.number for stage in job.of_kind(StageKind.CALIBRATE)}
    trained = job.best["steps"].get("reconstruction")
    steps = spec.steps.model_copy(update={"reconstruction": trained and Reconstruction(**trained)})
    again = hand.done(spec.model_copy(update={"minutes": None, "steps": steps}))

    assert asked.free_sizes
    assert spec.free_sizes == []
    assert spec.minutes == 20
    assert numbers == {SIZING, 0}
    assert job.best["calibration"]["settings"]["samples"] == spec.calibration.samples
    assert f"--samples {spec.calibration.samples} " in search_command(job.spec)
    assert again.best["coefficients"] == job.best["coefficients"]
    assert again.best["perplexities"] == job.best["perplexities"]


def test_the_time_of_a_stage_counts_from_when_it_was_begun(hand, minutes, monkeypatch):
    """What it has worked is stored once it has ended, and a training looks at it before that."""
    passed, spent = [0], []
    clock_of = conductor._Job._clock

    def late(job, spec):
        passed[0] = 1000
        return clock_of(job, spec)

    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + passed[0])
    monkeypatch.setattr(conductor, "time", clock)
    monkeypatch.setattr(conductor._Job, "_clock", late)
    monkeypatch.setattr(Clock, "fit_text", lambda clock, *_: spent.append(clock.spent()))
    hand.step(hand.submit(minutes()))

    assert 1000 < spent[0] < 1100


def test_killed_after_the_choice_another_worker_keeps_it(hand, minutes, monkeypatch):
    job = hand.submit(minutes())
    hand.step(job)  # chooses
    chosen = hand.store.get(job.id).spec["calibration"]
    claim = hand.take(job)
    hand.store.hand_back(claim)
    monkeypatch.setattr(Clock, "fit_text", lambda *_: pytest.fail("it was chosen again"))
    hand.inputs = hand.new_inputs()

    assert hand.until(job, None).best is not None
    assert hand.store.get(job.id).spec["calibration"] == chosen


@pytest.mark.thorough
def test_the_winner_is_trained_in_as_many_passes_as_there_is_time_for(hand, minutes, monkeypatch):
    """Those that were left are what the configuration then says."""
    monkeypatch.setattr(Clock, "passes_left", lambda _clock, asked: asked - 1)
    trained = {"reconstruction": {"method": "block", "passes": 3}}
    job = hand.done(minutes(preset="best", steps=trained))
    found = job.best["steps"].get("reconstruction")

    assert found is None or found["passes"] == 2  # None: it was no better with it


def test_the_blocks_that_there_is_no_time_for_are_trained_in_one_pass(hand, minutes, monkeypatch):
    """The configuration says from which one on, and a search that is told so finds the same."""
    looks = []

    def passes_left(clock, asked):
        looks.append((clock, clock.spent()))
        return asked

    def trains_on(clock, _trained):
        looks.append((clock, clock.spent()))
        return False

    monkeypatch.setattr(Clock, "passes_left", passes_left)
    monkeypatch.setattr(Clock, "trains_on", trains_on)
    trained = {"reconstruction": {"method": "block", "passes": 2}}
    sizes = {"confirm/finalists": 1, "in_full": 1}
    asked = minutes(preset="best", steps=trained).sized(sizes)
    job = hand.done(asked)
    (before, before_s), (meanwhile, meanwhile_s) = looks
    given = {"reconstruction": {**trained["reconstruction"], "blocks": [1]}}
    spec = JobSpec.model_validate({**job.spec, "minutes": None, "steps": given})
    again = hand.done(spec)

    assert before is meanwhile  # the model is not run once more between two blocks
    assert meanwhile_s > before_s > 0
    assert job.best["steps"]["reconstruction"]["blocks"] == [1]
    assert again.best["steps"] == job.best["steps"]
    assert again.best["perplexities"] == job.best["perplexities"]


def test_finalists_that_there_is_no_time_for_are_left_out(hand, minutes, monkeypatch):
    """The first one is measured however late it is."""
    monkeypatch.setattr(Clock, "another_left", lambda _clock, before: not before)
    job = hand.done(minutes(preset="best", confirm={"finalists": 2}, in_full=2))

    assert len(job.best["finalists"]) == 1
    assert job.best["perplexities"]["pruned"] > 0


def test_finalists_that_take_too_long_are_given_up(hand, minutes, monkeypatch):
    """The first one is not, however late it is."""
    looks = []

    def prunes_on_left(_clock, pruned):
        looks.append(pruned)
        return False

    monkeypatch.setattr(Clock, "another_left", lambda *_: True)
    monkeypatch.setattr(Clock, "prunes_on_left", prunes_on_left)
    job = hand.done(minutes(preset="best", confirm={"finalists": 3}, in_full=3))

    assert [(look.before, look.done, look.linears) for look in looks] == [(1, 2, 14)] * 2
    assert all(look.linear_s > 0 for look in looks)
    assert len(job.best["finalists"]) == 1
    assert job.best["perplexities"]["pruned"] > 0


def test_what_is_left_goes_into_the_recovery_of_what_is_pruned(hand, minutes, monkeypatch):
    monkeypatch.setattr(Clock, "recovery_s", lambda _: 6.0)
    job = hand.done(minutes(minutes=0.1, prune=True, recovery={}))
    spec = JobSpec.model_validate(job.spec)

    assert spec.recovery.minutes == 0.1
    assert job.pruning.result["recovery"]["tokens"] > 0


@pytest.mark.parametrize(
    ("left_s", "words"), [pytest.param(0.0, 12_000, marks=pytest.mark.thorough), (60.0, 300)]
)
def test_with_too_little_time_or_text_left_the_model_is_pruned_and_not_recovered(
    hand, minutes, monkeypatch, left_s, words
):
    """Nobody has asked for it, so the job is done."""
    monkeypatch.setattr(Clock, "recovery_s", lambda _: left_s)
    lines = (hand.folder / "calibration.jsonl").read_text().splitlines()
    texts = " ".join(json.loads(line)["text"] for line in lines).split()
    (hand.folder / "short.txt").write_text(" ".join(texts[:words]))
    job = hand.done(minutes(text="short.txt", prune=True, recovery={}))
    (rest,) = (stage for stage in job.of_kind(StageKind.FINISH) if stage.number == RESTING)

    assert job.pruning.result["recovery"] is None
    assert rest.result["left_out"]
