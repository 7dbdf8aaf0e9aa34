"""
How far a job is: all of its stages from the first to the last, what one waits for, the time left.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from math import sqrt

from pho_service.api.answers import Progress, Worker
from pho_service.api.describe import is_several, is_transfer, step_of, worked_s
from pho_service.api.plan import Card, at_hand
from pho_service.api.service import Service
from pho_service.planning.costs import named_machine
from pho_service.spec.fields import FieldError
from pho_service.spec.job import JobSpec
from storage.records import JobRecord, JobState, Stage, StageKind, StageState


@dataclass(frozen=True, kw_only=True)
class StepRow:
    """
    All stages of a kind: what they are at, or wait for, and the part that is done: trials of
    searches, steps of one stage, or stages of several.
    """

    kind: StageKind
    title: str
    state: str  # That of a stage, or that none has begun
    done: int
    total: int
    at: str  # What it is at, or waits for, and how long it took


def steps(
    job: JobRecord, progress: Progress, workers: Sequence[Worker], now: datetime
) -> list[StepRow]:
    """Every stage that a job has, or will have, in the order of the work."""
    return [_step(job, kind, progress, workers, now) for kind in _kinds(job)]


def _kinds(job: JobRecord) -> list[StageKind]:
    known = {stage.kind for stage in job.stages}
    if job.state is not JobState.SUCCEEDED and not is_transfer(job):
        one = {StageKind.SEARCH, StageKind.CONFIRM}
        one |= {StageKind.PERPLEXITY} if job.spec.get("confirm") else set()
        known |= {StageKind.CALIBRATE, StageKind.FINISH}
        known |= {StageKind.POINT} if is_several(job.spec) else one
        known |= {StageKind.TASKS} if job.spec.get("tasks") else set()
        known |= {StageKind.PRUNE} if job.spec.get("prune") else set()
    return [kind for kind in StageKind if kind in known]


def _step(
    job: JobRecord, kind: StageKind, progress: Progress, workers: Sequence[Worker], now: datetime
) -> StepRow:
    mine = [stage for stage in job.stages if stage.kind is kind]
    known, state = progress.of(kind), _state(job, mine)
    done, total = known.done, known.total if mine else 0
    step = next(filter(None, map(step_of, mine)), None)
    if step is not None and len(mine) == 1:
        done, total = step.done, step.steps
    at = [] if step is None else [step.title]
    if state == StageState.WAITING:
        at = [_waits_for(job, mine, workers)]
    elif state == StageState.RUNNING and not any(
        worker.job_id == job.id and worker.stage is kind for worker in workers
    ):
        at.append("its worker does not report")
    failures = max((stage.failures for stage in mine), default=0)
    attempt = failures + (state != StageState.FAILED)
    if attempt > 1 and state != StageState.DONE:
        at.append(f"attempt {attempt}")
    return StepRow(
        kind=kind,
        title=kind.heading,
        state=state,
        done=done,
        total=total,
        at=", ".join([*at, *_seconds(mine, job.finished_at or now)]),
    )


def _state(job: JobRecord, stages: Sequence[Stage]) -> str:
    """Return the state of several stages: the one that a user must know first."""
    states = {stage.state for stage in stages}
    for state in (StageState.FAILED, StageState.RUNNING, StageState.WAITING):
        if state in states:
            over = job.state.is_over and state is StageState.WAITING
            return "not reached" if over else state.value
    return "done" if stages else "not reached" if job.state.is_over else "to come"


def _waits_for(job: JobRecord, stages: Sequence[Stage], workers: Sequence[Worker]) -> str:
    kind = stages[0].kind
    able = [worker for worker in workers if kind in worker.stages]
    if job.state is JobState.PAUSED:
        return "until it is resumed"
    if not workers:
        return "no worker reports"
    if not able:
        gpu = any(worker.device != "cpu" for worker in workers)
        return f"no worker that does this reports{'' if gpu else ', and none with a GPU'}"
    if all(worker.stage is not None for worker in able):
        if any(stage.attempt > stage.failures for stage in stages):
            return "another job's turn"
        return "all workers that do this are busy"
    return "for a worker to take it up"


def _seconds(stages: Sequence[Stage], by: datetime) -> list[str]:
    """How long it took from the first to the last of them, or to this time if they are not done."""
    begun = [stage.started_at for stage in stages if stage.started_at is not None]
    if not begun:
        return []
    ended = [stage.finished_at or by for stage in stages]
    return [span((max(ended) - min(begun)).total_seconds())]


def time_left(
    service: Service, job: JobRecord, progress: Progress, rows: Sequence[StepRow], card: Card
) -> str:
    """
    How long a job still takes: what it is at by its pace, the rest by its plan, as much faster or
    slower as the search is. Empty where no plan can be made of files at hand.
    """
    if is_transfer(job) or not job.state.may_work:
        return ""
    spec = JobSpec.model_validate(job.spec)
    place = at_hand(spec, service)
    if place is None:
        return ""
    try:
        plan = service.plan(spec, named_machine(card), place)
    except FieldError:  # its page says why once it fails
        return ""
    planned_s = dict.fromkeys(StageKind, 0.0)
    for stage in plan.stages:
        planned_s[stage.kind] += sqrt(stage.seconds[0] * stage.seconds[1])
    searched = StageKind.POINT if spec.several else StageKind.SEARCH
    at, worked, pace = progress.of(searched), worked_s(job, searched), 1.0
    if worked and at.done and planned_s[searched]:
        pace = worked / at.done * at.total / planned_s[searched]
    left = 0.0
    for row in rows:
        if row.state == StageState.DONE:
            continue
        share = 1 - row.done / row.total if row.total else 1.0
        by_pace = progress.seconds_left if row.kind is job.stage else None
        left += planned_s[row.kind] * pace * share if by_pace is None else by_pace
    return span(left)


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
