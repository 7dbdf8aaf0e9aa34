"""
How far a job is: all of its stages from the first to the last, what one waits for, the time left.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

from pho_service.api.answers import Worker
from pho_service.api.service import Service
from pho_service.api.submission import Card, at_hand
from pho_service.api.view import JobView, span, step_of
from pho_service.planning.costs import named_machine
from pho_service.spec.fields import FieldError
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


def steps(view: JobView, workers: Sequence[Worker]) -> list[StepRow]:
    """Every stage that a job has, or will have, in the order of the work."""
    return [_step(view, kind, workers) for kind in view.kinds]


def _step(view: JobView, kind: StageKind, workers: Sequence[Worker]) -> StepRow:
    job, counted = view.record, view.progress.of(kind)
    stages = [stage for stage in job.stages if stage.kind is kind]
    state, done, total = _state(job, stages), counted.done, counted.total if stages else 0
    step = next(filter(None, map(step_of, stages)), None)
    if step is not None and len(stages) == 1:
        done, total = step.done, step.steps
    words = [] if step is None else [step.title]
    if state == StageState.WAITING:
        words = [_waits_for(job, stages, workers)]
    elif state == StageState.RUNNING and not any(
        worker.job_id == job.id and worker.stage is kind for worker in workers
    ):
        words.append("its worker does not respond")
    failures = max((stage.failures for stage in stages), default=0)
    attempt = failures + (state != StageState.FAILED)
    if attempt > 1 and state != StageState.DONE:
        words.append(f"attempt {attempt}")
    begun = [stage.started_at for stage in stages if stage.started_at is not None]
    if begun:
        ended = [stage.finished_at or job.finished_at or view.now for stage in stages]
        words.append(span((max(ended) - min(begun)).total_seconds()))
    return StepRow(
        kind=kind, title=kind.heading, state=state, done=done, total=total, at=", ".join(words)
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
        return "paused until it is resumed"
    if not workers:
        return "no worker is connected"
    if not able:
        gpu = any(worker.device != "cpu" for worker in workers)
        return f"no connected worker does this{'' if gpu else ', and none has a GPU'}"
    if all(worker.stage is not None for worker in able):
        if any(stage.attempt > stage.failures for stage in stages):
            return "another job's turn"
        return "all workers that do this are busy"
    return "waiting for a worker to take it"


def time_left(service: Service, view: JobView, rows: Sequence[StepRow], card: Card) -> str:
    """
    How long a job still takes: what it is at by its pace, the rest by its plan, as much faster or
    slower as the search is. Empty where no plan can be made of files at hand.
    """
    job, progress = view.record, view.progress
    if view.document.is_transfer or not job.state.may_work or not view.manned:
        return ""
    place = at_hand(view.spec, service)
    if place is None:
        return ""
    try:
        plan = service.plan(view.spec, named_machine(card), place)
    except FieldError:  # its page says why once it fails
        return ""
    planned_s = dict.fromkeys(StageKind, 0.0)
    for stage in plan.stages:
        planned_s[stage.kind] += sqrt(stage.seconds[0] * stage.seconds[1])
    searched = StageKind.POINT if view.document.several else StageKind.SEARCH
    pieces, worked_s, pace = progress.of(searched), view.worked_s(searched), 1.0
    if worked_s and pieces.done and planned_s[searched]:
        pace = worked_s / pieces.done * pieces.total / planned_s[searched]
    left_s = 0.0
    for row in rows:
        if row.state == StageState.DONE:
            continue
        share = 1 - row.done / row.total if row.total else 1.0
        by_pace = progress.seconds_left if row.kind is job.stage else None
        left_s += planned_s[row.kind] * pace * share if by_pace is None else by_pace
    return span(left_s)
