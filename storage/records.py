"""
The life of jobs and stages, and what the stores give and refuse: plain values, no SQL.
"""

import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any, Literal, Self

# Stages that measure the perplexity of a trial have its number; those of a validation, and of what
# a result is judged by, have numbers from here.
VALIDATION, REFERENCE_NUMBERS = 10_000_000, 20_000_000
PATTERN = "pattern"  # in the params of a stage: which of a job's patterns it is about


class JobState(StrEnum):
    """State of a job."""

    QUEUED = "queued"  # waits for its first or next worker
    RUNNING = "running"  # at least one stage was begun
    PAUSING = "pausing"  # a worker has yet to put it down
    PAUSED = "paused"  # nothing happens until it is resumed
    CANCELLING = "cancelling"  # a worker has yet to put it down
    CANCELLED = "cancelled"  # for good
    SUCCEEDED = "succeeded"  # has a configuration; may be extended
    FAILED = "failed"  # has an error; may be resumed

    @property
    def is_over(self) -> bool:
        """Whether nothing more happens by itself, and the job may be deleted."""
        return self in (JobState.CANCELLED, JobState.SUCCEEDED, JobState.FAILED)

    @property
    def may_work(self) -> bool:
        """Whether workers may take up its stages."""
        return self in (JobState.QUEUED, JobState.RUNNING)


# Of the calibrate stage of a job that chooses its sizes, before any model is calibrated.
SIZING = -1
# Of the finish stage that sees, after the search, how long a recovery may take.
RESTING = 1


class StageKind(StrEnum):
    """The work of a job, in this order; a transfer is a job of its own, a stage for each model."""

    _value_: str
    heading: str  # What it does, for people
    unit: str  # What its stages are of, or what else is counted of them

    def __new__(cls, value: str, heading: str = "", unit: str = "stages") -> Self:
        kind = str.__new__(cls, value)
        kind._value_, kind.heading, kind.unit = value, heading, unit
        return kind

    TRANSFER = "transfer", "Measure on other models", "models"
    # Make the bundle, or find it.
    CALIBRATE = "calibrate", "Calibrate", "parts"
    # Search and confirm one of several patterns.
    POINT = "point", "Search and confirm each pattern", "patterns"
    SEARCH = "search", "Search", "trials"  # one island
    # Compare candidates with the dense model.
    CONFIRM = "confirm", "Choose the finalists"
    # Prune with one candidate and measure.
    PERPLEXITY = "perplexity", "Measure perplexities", "perplexities"
    # Write the configuration, or the answer of a target.
    FINISH = "finish", "Choose the best"
    # Measure the dense model, or the pruned one, on zero-shot tasks.
    TASKS = "tasks", "Measure tasks, dense and pruned", "models"
    # Into the artifact store.
    PRUNE = "prune", "Write the pruned model"

    @property
    def rank(self) -> int:
        """0 for the first. A late stage goes first: begun jobs end before new ones begin."""
        return list(StageKind).index(self)


class Drain(StrEnum):
    """How a worker that takes no more stages ends."""

    FINISH = "finish"  # once the stage that it has in hand is done
    NOW = "now"  # the stage that it has in hand is handed back


class StageState(StrEnum):
    """State of a stage."""

    WAITING = "waiting"  # in the queue, or put down by a pause
    RUNNING = "running"  # a worker has it, or had it and died
    DONE = "done"
    FAILED = "failed"


class AttemptEnd(StrEnum):
    """How an attempt of a stage has ended."""

    DONE = "done"  # with a result
    FAILED = "failed"  # and its job with it
    RETRIED = "retried"  # it failed, and comes again
    LOST = "lost"  # its worker died, or was cut off
    HANDED_BACK = "handed_back"  # unfinished: its worker or its job stops, or its turn is over


# Upper limits in seconds of what the durations of stages are counted in.
DURATIONS_S = (1, 5, 15, 60, 300, 900, 3600, 4 * 3600, 12 * 3600, 24 * 3600, float("inf"))


# What a user may ask for, and what the job is then; from all other states it is a conflict.
VERBS: dict[str, dict[JobState, JobState]] = {
    "cancel": {
        JobState.QUEUED: JobState.CANCELLING,
        JobState.RUNNING: JobState.CANCELLING,
        JobState.PAUSING: JobState.CANCELLING,
        JobState.PAUSED: JobState.CANCELLING,
        JobState.CANCELLING: JobState.CANCELLING,
        JobState.CANCELLED: JobState.CANCELLED,
    },
    "pause": {
        JobState.QUEUED: JobState.PAUSING,
        JobState.RUNNING: JobState.PAUSING,
        JobState.PAUSING: JobState.PAUSING,
        JobState.PAUSED: JobState.PAUSED,
    },
    "resume": {
        JobState.PAUSING: JobState.QUEUED,
        JobState.PAUSED: JobState.QUEUED,
        JobState.FAILED: JobState.QUEUED,
        JobState.QUEUED: JobState.QUEUED,
        JobState.RUNNING: JobState.RUNNING,
    },
    "extend": {
        JobState.QUEUED: JobState.QUEUED,
        JobState.RUNNING: JobState.RUNNING,
        JobState.PAUSED: JobState.PAUSED,
        JobState.SUCCEEDED: JobState.QUEUED,
    },
    "delete": {
        JobState.CANCELLED: JobState.CANCELLED,
        JobState.SUCCEEDED: JobState.SUCCEEDED,
        JobState.FAILED: JobState.FAILED,
        JobState.PAUSED: JobState.PAUSED,
    },
}


def settled(state: JobState, *, busy: bool) -> JobState:
    """The state once it is known whether a worker is still busy with the job."""
    if busy:
        return state
    return {JobState.PAUSING: JobState.PAUSED, JobState.CANCELLING: JobState.CANCELLED}.get(
        state, state
    )


class NoSuchJob(LookupError):
    """No job has this id, or it belongs to another key."""


class StateConflict(Exception):
    """A job is in a state in which this cannot be done."""

    def __init__(self, verb: str, state: JobState, reason: str = "") -> None:
        super().__init__(f"a job that is {state} cannot be {_PAST[verb]}. {reason}".strip())
        self.state = state


class IdempotencyKeyReused(Exception):
    """An idempotency key came with another document than the first time."""


class TooManyJobs(Exception):
    """An owner has as many jobs as are allowed."""

    def __init__(self, which: Literal["unfinished", "urgent", "finished"]) -> None:
        super().__init__(which)
        self.which = which


class TooManyTrials(Exception):
    """An extension is beyond what a job may have."""


class LostClaim(Exception):
    """A stage was given to another worker meanwhile, or its job was deleted."""


_PAST = {
    "cancel": "cancelled", "pause": "paused", "resume": "resumed", "extend": "extended",
    "delete": "deleted", "prune": "pruned",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A piece of a job that one worker does."""

    id: int
    job_id: uuid.UUID
    kind: StageKind
    # Island of a search, trial of a perplexity, place of a point; for tasks, 0 for the dense model
    # and 1 for the pruned one; 0 for other stages.
    number: int
    state: StageState
    attempt: int  # How often it was begun; only the latest attempt may write
    failures: int  # Attempts that failed or whose worker died
    worker_id: uuid.UUID | None
    params: dict[str, Any] | None  # What to do
    done: int  # Finished trials
    elapsed_s: float  # Seconds of work, of all attempts, up to the last progress
    worked_s: float  # The same of any stage, of attempts that have ended by themselves
    best_value: float | None  # Best value of the objective, so far
    # What it is at while it runs: ``title``, and how many of its ``steps`` are ``done``; None
    # before its worker has said anything.
    step: dict[str, Any] | None
    result: dict[str, Any] | None  # What it gave
    started_at: datetime | None
    finished_at: datetime | None

    @property
    def about(self) -> str | None:
        """Which of its job's patterns this is about, if it has several."""
        return (self.params or {}).get(PATTERN)

    @property
    def part_of(self) -> int | None:
        """The number of the model whose calibration this is a part of, if it is one."""
        return (self.params or {}).get("part_of")


@dataclass(frozen=True, kw_only=True)
class JobRecord:
    """A search that somebody asked for."""

    id: uuid.UUID
    number: int  # Counts up; newer jobs have higher ones
    owner_id: uuid.UUID | None  # The key that it was submitted with
    name: str  # Name of the job and of its studies
    spec: dict[str, Any]  # The document, as it was submitted, with the defaults
    state: JobState
    stage: StageKind | None  # Stage that runs, or that ran last
    priority: int
    trials: int  # Number of trials of each island
    max_attempts: int  # Attempts allowed for each stage
    error: dict[str, Any] | None  # Why it failed: type, message, stage and what else is known
    best: dict[str, Any] | None  # The configuration
    warnings: list[str] | None
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    stages: list[Stage]  # In the order in which they were made

    def of_kind(self, kind: StageKind) -> list[Stage]:
        """The stages of one kind, without their parts, by number."""
        return self._sorted(s for s in self.stages if s.kind is kind and s.part_of is None)

    @property
    def shards(self) -> list[Stage]:
        """The parts that large calibrations are shared out in, by number."""
        return self._sorted(s for s in self.stages if s.part_of is not None)

    @property
    def has_done(self) -> bool:
        """Whether any of its stages has ended well."""
        return any(stage.state is StageState.DONE for stage in self.stages)

    @property
    def pruning(self) -> Stage | None:
        """The stage that writes the pruned model, if there is one."""
        return next(iter(self.of_kind(StageKind.PRUNE)), None)

    @property
    def tasks(self) -> dict[str, Any] | None:
        """What the dense model and the pruned one scored in tasks; None before both are known."""
        results = [stage.result for stage in self.of_kind(StageKind.TASKS)]
        if not results or any(result is None for result in results):
            return None
        dense, pruned = ({**result} for result in results if result is not None)
        how = {name: dense[name] for name in ("limit", "bos", "versions")}
        return {"dense": dense["scores"], "pruned": pruned["scores"], **how}

    def with_tasks(self, configuration: Mapping[str, Any]) -> dict[str, Any]:
        """The job's best with what it scored in tasks; any other configuration as it is."""
        tasks = self.tasks if configuration == self.best else None
        return {**configuration, **({} if tasks is None else {"tasks": tasks})}

    @staticmethod
    def _sorted(stages: Iterable[Stage]) -> list[Stage]:
        return sorted(stages, key=lambda stage: stage.number)


@dataclass(frozen=True, kw_only=True)
class NewStage:
    """A stage to be made."""

    kind: StageKind
    number: int = 0
    params: Mapping[str, Any] | None = None
    lock: str | None = None  # Stages with the same lock run one after the other, of all jobs


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A worker's right to work on a stage, until somebody else gets it."""

    job: JobRecord
    stage: Stage

    @property
    def attempt(self) -> int:
        """The fencing token of every write."""
        return self.stage.attempt


@dataclass(frozen=True, kw_only=True)
class EventRecord:
    """Something that happened to a job. Ids count up."""

    id: int
    kind: str
    data: dict[str, Any]
    created_at: datetime


@dataclass(frozen=True, kw_only=True)
class WorkerRecord:
    """A worker that reported lately, and what it is doing."""

    id: uuid.UUID
    name: str
    device: str
    stages: list[str]
    started_at: datetime
    heartbeat_at: datetime
    store: str | None  # Id of the artifact store that it sees: see :meth:`ClaimStore.enter_worker`
    drain: Drain | None
    memory_used: int | None  # Bytes of its GPUs, by whomever; None before it has used one
    memory_total: int | None
    job_id: uuid.UUID | None
    stage: StageKind | None
