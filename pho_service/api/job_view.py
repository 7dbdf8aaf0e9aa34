"""
What the page of a job shows: a head that is alive, over the sections of its report.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from pho_service.api import artifacts
from pho_service.api.answers import ArtifactList, Job
from pho_service.api.describe import describe, failure, is_transfer, step_of, studies_in_words
from pho_service.api.points import is_several
from pho_service.api.report import TITLES, collected
from pho_service.api.service import Caller, Service
from pho_service.shown.page import sections
from pho_service.shown.parts import Section
from pho_service.spec.curve import Target
from storage import records as stored
from storage.states import VERBS, JobState, StageKind, StageState
from storage.studies import study_ids

LOGS = 100  # parts of logs that are shown, the newest
LOG_LINES = 300  # the newest
_ASKED_HERE = ("pause", "resume", "cancel")  # with a button; the others need more than that
_FIRST = ("result", "curve")  # above the buttons
_SHOWN = ("tasks", "search", "finalists", "layers", "transfer")


@dataclass(frozen=True, kw_only=True)
class JobHead:
    """
    A job: what was asked, how far it is, and what can be asked of it.

    Attributes:
        job: As the API shows it.
        facts: What was asked, in some words: a name and a value each.
        error: Why it failed.
        time: How long it takes still, or took.
        verbs: What can be asked of it.
    """

    job: Job
    models: Sequence[str]
    facts: Sequence[tuple[str, str]]
    error: str | None
    time: str
    verbs: Sequence[str]
    deletable: bool

    @classmethod
    def of(cls, job: stored.Job, now: datetime) -> "JobHead":
        """The head of a job, with its stages."""
        shown = describe(job)
        return cls(
            job=shown,
            models=models_of(job),
            facts=_facts(job),
            error=failure(job),
            time=_time(shown, now),
            verbs=_verbs(job),
            deletable=job.state in VERBS["delete"],
        )

    @property
    def moves(self) -> bool:
        """Whether it may be another one soon, by itself."""
        return moves(self.job)


def moves(job: Job) -> bool:
    """Whether a job may be another one soon, by itself."""
    return not (job.state.is_over or job.state is JobState.PAUSED)


@dataclass(frozen=True, kw_only=True)
class StageRow:
    """
    All stages of a kind: what they are at, and the part that is done: trials of searches, steps of
    one stage, or stages of several.
    """

    title: str
    state: str
    done: int
    total: int
    at: str
    attempts: int


@dataclass(frozen=True, kw_only=True)
class Logged:
    """Lines that a worker has logged of a stage, and the stage."""

    title: str
    lines: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class JobView:
    """
    A job, whole.

    Attributes:
        studies: A word and the number in optuna-dashboard of each, for those who may look there.
        stages: By kind, in the order of the work.
        first: Sections of the report that stand above the buttons.
        sections: Those below them.
        happened: The last of them.
        logs: What workers have logged, the oldest first.
        files: Files of the pruned model; None if there are none.
        extensible: Whether it can be given more trials.
    """

    head: JobHead
    studies: Sequence[tuple[str, int]]
    stages: Sequence[StageRow]
    first: Sequence[Section]
    sections: Sequence[Section]
    happened: Section
    logs: Sequence[Logged]
    files: ArtifactList | None
    extensible: bool


def view(service: Service, caller: Caller, job: stored.Job, now: datetime) -> JobView:
    """Everything that is known of a job."""
    known, head = {}, JobHead.of(job, now)
    if caller.sees_all:  # others may not look into the dashboard
        with service.database.transaction() as connection:
            known = study_ids(connection, [*studies_in_words(job)])
    found = {section.id: section for section in sections(collected(service, job))}
    return JobView(
        head=head,
        studies=[(w, known[name]) for name, w in studies_in_words(job).items() if name in known],
        stages=_stages(job, now),
        first=[found[name] for name in _FIRST if name in found],
        sections=[found[name] for name in _SHOWN if name in found and found[name].is_known],
        happened=Section(id="happened", title="What happened", events=found["happened"].events),
        logs=_logs(service.jobs.logs(job.id, limit=LOGS), named=caller.sees_all),
        files=artifacts.listed(job) if head.job.pruned == "done" else None,
        extensible=not is_transfer(job)
        and not is_several(job.spec)
        and job.state in VERBS["extend"],
    )


def _stages(job: stored.Job, now: datetime) -> list[StageRow]:
    rows = []
    for kind in dict.fromkeys(stage.kind for stage in job.stages):
        mine = [stage for stage in job.stages if stage.kind is kind]
        done, total = sum(stage.state is StageState.DONE for stage in mine), len(mine)
        if kind is StageKind.SEARCH:
            done, total = sum(stage.done for stage in mine), job.trials * len(mine)
        step = next(filter(None, map(step_of, mine)), None)
        if step is not None and len(mine) == 1:
            done, total = step.done, step.steps
        at = [] if step is None else [step.title]
        at += _seconds(mine, job.finished_at or now)
        rows.append(
            StageRow(
                title=TITLES.get(kind, kind.value.capitalize()),
                state=_state(mine),
                done=done,
                total=total,
                at=", ".join(at),
                attempts=max(stage.attempt for stage in mine),
            )
        )
    return rows


def _state(stages: Sequence[stored.Stage]) -> str:
    """Return the state of several stages: the one that a user must know first."""
    states = {stage.state for stage in stages}
    for state in (StageState.FAILED, StageState.RUNNING, StageState.WAITING):
        if state in states:
            return state.value
    return StageState.DONE.value


def _seconds(stages: Sequence[stored.Stage], by: datetime) -> list[str]:
    """How long it took from the first to the last of them, or to this time if they are not done."""
    begun = [stage.started_at for stage in stages if stage.started_at is not None]
    if not begun:
        return []
    ended = [stage.finished_at or by for stage in stages]
    return [span((max(ended) - min(begun)).total_seconds())]


def _logs(events: Sequence[stored.Event], *, named: bool) -> list[Logged]:
    """The last lines, those of a kind of stage, a worker and an attempt together."""
    found: dict[str, list[str]] = {}
    left = LOG_LINES
    for event in reversed(events):
        data = event.data
        kind = StageKind(data["stage"])
        title = TITLES.get(kind, kind.value.capitalize())
        title += f", {data['worker']}" * named
        if data["attempt"] > 1:
            title += f", attempt {data['attempt']}"
        lines = data["lines"][-left:] if left else []
        left -= len(lines)
        if lines:
            found[title] = [*lines, *found.get(title, [])]
    return [Logged(title=title, lines=lines) for title, lines in reversed(found.items())]


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


def _time(job: Job, now: datetime) -> str:
    if job.progress.seconds_left is not None:
        return f"{job.stage}: about {span(job.progress.seconds_left)} left"
    if job.started_at is None:
        return "not begun"
    if job.finished_at is None:
        return f"{span((now - job.started_at).total_seconds())} since it began"
    return f"took {span((job.finished_at - job.started_at).total_seconds())}"
