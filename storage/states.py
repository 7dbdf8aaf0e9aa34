"""
The life of a job and of its stages, as plain tables: no SQL here.

    queued ──▶ running ──▶ succeeded, failed
      │  ▲        │
      │  └─resume─┼── paused, failed
      ▼           ▼
    pausing ──▶ paused          cancelling ──▶ cancelled

A job is ``pausing`` or ``cancelling`` for as long as a worker is busy with one
of its stages; workers look between two generations.
"""

from enum import StrEnum

# Stages that measure the perplexity of a trial have its number; those of a validation, and of what
# a result is judged by, have numbers from here.
VALIDATION, REFERENCES = 10_000_000, 20_000_000


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


class StageKind(StrEnum):
    """The work of a job, in this order; a transfer is a job of its own, a stage for each model."""

    TRANSFER = "transfer"  # measure a configuration on another model
    CALIBRATE = "calibrate"  # make the bundle, or find it
    POINT = "point"  # search and confirm one of several patterns
    SEARCH = "search"  # one island
    CONFIRM = "confirm"  # choose the finalists, compare them with the dense model
    PERPLEXITY = "perplexity"  # prune with one candidate and measure
    FINISH = "finish"  # choose the best and write the configuration, or the answer of a target
    TASKS = "tasks"  # measure the dense model, or the pruned one, on zero-shot tasks
    PRUNE = "prune"  # write the pruned model into the artifact store

    @property
    def rank(self) -> int:
        """0 for the first. A late stage goes first: begun jobs end before new ones begin."""
        return list(StageKind).index(self)


class StageState(StrEnum):
    """State of a stage."""

    WAITING = "waiting"  # in the queue, or put down by a pause
    RUNNING = "running"  # a worker has it, or had it and died
    DONE = "done"
    FAILED = "failed"


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
    return {
        JobState.PAUSING: JobState.PAUSED,
        JobState.CANCELLING: JobState.CANCELLED,
    }.get(state, state)
