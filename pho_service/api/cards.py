"""
Jobs as the front page shows them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from pho_service.api.answers import Job
from pho_service.api.describe import describe, failure, is_transfer, studies_in_words
from pho_service.library.entries import measured_gain, transferred_gain
from pho_service.library.files import TransferTarget
from pho_service.spec.configuration import Configuration
from pho_service.spec.curve import Target
from storage import records as stored
from storage.states import VERBS, JobState, StageKind

_ASKED_HERE = ("pause", "resume", "cancel")  # with a button; the others need more than that
_MOST_LINES = 4  # of the models of a transfer, and of warnings; the report has all


@dataclass(frozen=True, kw_only=True)
class Bar:
    """Part of something that is done."""

    label: str
    done: int
    total: int


@dataclass(frozen=True, kw_only=True)
class Card:
    """
    A job.

    Attributes:
        job: As the API shows it.
        models: All of them.
        facts: What was asked, in some words: a name and a value each.
        bars: How far it is.
        results: What it has found, as sentences.
        warnings: What must be said of that.
        error: Why it failed.
        time: How long it takes still, or took.
        verbs: What can be asked of it.
        deletable: Whether it can be deleted.
        studies: A word and the number in optuna-dashboard of each, for those who may look there.
    """

    job: Job
    models: Sequence[str]
    facts: Sequence[tuple[str, str]]
    bars: Sequence[Bar]
    results: Sequence[str]
    warnings: Sequence[str]
    error: str | None
    time: str
    verbs: Sequence[str]
    deletable: bool
    studies: Sequence[tuple[str, int]]

    @property
    def moves(self) -> bool:
        """Whether it may be another one soon, by itself."""
        return not (self.job.state.is_over or self.job.state is JobState.PAUSED)


def card(
    job: stored.Job, studies: Mapping[str, int], now: datetime, notes: Sequence[str] = ()
) -> Card:
    """
    A job as a card.

    Args:
        job: With its stages.
        studies: The numbers of studies by name.
        now: The time.
        notes: Beside its warnings.
    """
    shown = describe(job, notes)
    return Card(
        job=shown,
        models=models_of(job),
        facts=_facts(job),
        bars=_bars(shown),
        results=_transferred(job) if is_transfer(job) else _found(job, shown),
        warnings=_first([*shown.warnings], "warnings"),
        error=failure(job),
        time=_time(shown, now),
        verbs=_verbs(job),
        deletable=job.state in VERBS["delete"],
        studies=[
            (word, studies[name]) for name, word in studies_in_words(job).items() if name in studies
        ],
    )


def _verbs(job: stored.Job) -> list[str]:
    """What has a button, because it changes something."""
    found = [v for v in _ASKED_HERE if VERBS[v].get(job.state, job.state) is not job.state]
    prunable = job.state is JobState.SUCCEEDED and not is_transfer(job)
    if (
        prunable
        and job.best is not None
        and not job.spec.get("more_models")
        and describe(job).pruned != "done"
    ):
        found.append("prune")
    return found


def span(seconds: float) -> str:
    """A time in words, as exact as one cares."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    if minutes < 90:
        return f"{minutes} min"
    hours = round(seconds / 3600)
    if hours < 72:
        return f"{minutes // 60} h {minutes % 60} min" if hours < 24 else f"{hours} h"
    return f"{round(hours / 24)} days"


def models_of(job: stored.Job) -> list[str]:
    """The models of a search or a transfer, as its document names them."""
    if is_transfer(job):
        return [*job.spec["models"]]
    return [job.spec["model"], *job.spec.get("more_models", ())]


def _facts(job: stored.Job) -> list[tuple[str, str]]:
    spec = job.spec["configuration"] if is_transfer(job) else job.spec
    facts = [asked_sparsity(spec)]
    if spec.get("scope"):
        facts.append(("Scope", str(spec["scope"])))
    if is_transfer(job):
        return [*facts, ("Transfer of", f"job {job.spec['source']}")]
    return [*facts, ("Preset", str(spec.get("preset", "score")))]


def asked_sparsity(spec: Mapping[str, Any]) -> tuple[str, str]:
    """How sparse a model is to be: a name and a value."""
    if spec.get("patterns"):
        return ("Patterns", ", ".join(map(str, spec["patterns"])))
    if spec.get("target"):
        return ("Target", f"within {Target.model_validate(spec['target'])}")
    return ("Pattern", str(spec["pattern"]))


def _bars(job: Job) -> list[Bar]:
    done = job.progress
    if job.kind == "transfer":
        return [Bar(label="models", done=done.models_done, total=done.models)]
    bars = [Bar(label="trials", done=done.trials_done, total=done.trials)]
    if done.shards:
        bars.insert(0, Bar(label="calibration", done=done.shards_done, total=done.shards))
    if done.points:
        bars.append(Bar(label="patterns", done=done.points_done, total=done.points))
    if done.perplexities:
        bars.append(Bar(label="perplexities", done=done.perplexities_done, total=done.perplexities))
    return bars


def _found(job: stored.Job, shown: Job) -> list[str]:
    """How good the result of a search is, and what it is."""
    if job.best is None and shown.points is not None:
        return []  # the table has it
    if job.best is None:
        value = shown.progress.best_value
        return [] if value is None else [f"Best objective so far: {value:.4g}."]
    assert shown.best is not None
    measured = []
    if shown.best.perplexity is not None:
        measured.append(f"perplexity {shown.best.perplexity:.2f}")
    elif shown.best.objective is not None:
        measured.append(f"objective {shown.best.objective:.4g}")
    gain = measured_gain(Configuration.model_validate(job.best))
    measured += [] if gain is None else [str(gain)]
    best = f"Best: {'; '.join([shown.best.method, *measured])}."
    good = shown.best.perplexities
    return [best] if good is None else [f"Perplexity: {good}.", best]


def _transferred(job: stored.Job) -> list[str]:
    """Describe what the configuration of a transfer is worth on each model."""
    lines = []
    for stage in job.of_kind(StageKind.TRANSFER):
        if stage.result is None:
            continue
        if "error" in stage.result:
            lines.append(f"{job.spec['models'][stage.number]}: {stage.result['error']}")
            continue
        target = TransferTarget.model_validate(stage.result)
        gain = transferred_gain(target)
        lines.append(f"{target.target}: {gain if gain is not None else 'measured'}.")
    return _first(lines, "models")


def _first(lines: Sequence[str], what: str) -> list[str]:
    left = len(lines) - _MOST_LINES
    return [*lines[:_MOST_LINES], *([f"And {left} more {what}: see the report."] * (left > 0))]


def _time(job: Job, now: datetime) -> str:
    if job.progress.seconds_left is not None:
        return f"{job.stage}: about {span(job.progress.seconds_left)} left"
    if job.started_at is None:
        return "not begun"
    if job.finished_at is None:
        return f"{span((now - job.started_at).total_seconds())} since it began"
    return f"took {span((job.finished_at - job.started_at).total_seconds())}"
