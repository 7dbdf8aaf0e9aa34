"""
The pruned models of jobs, as the API asks for them: which are wanted, and which are old.

What their files are is the result of a stage, ``prune``; the files are in the artifact store.
"""

import uuid
from typing import Any

from sqlalchemy import delete, func, select

from storage.database import Database
from storage.records import Job, NewStage, StateConflict
from storage.rows import add_stages, find_job, interval, set_state, update_stage
from storage.states import JobState, StageKind, StageState
from storage.tables import jobs, stages

PATTERN = "pattern"  # in the params of a stage: which of a job's patterns it is about
REMOVED = "removed"  # in the stage's result: when the files were deleted, if they were

_LATER = "Wait until it has succeeded; `prune` in a job's document prunes as soon as that."
_WAY_OUT = {
    JobState.FAILED: "Its error says why; resume it first.",
    JobState.PAUSED: "Resume it, and wait until it has succeeded.",
    JobState.CANCELLING: "Submit it again.",
    JobState.CANCELLED: "Submit it again.",
}


def chosen(job: Job, pattern: str | None) -> dict[str, Any]:
    """The configuration that a job has found; of several patterns, that of one."""
    found = job.best
    if pattern is not None:
        results = (s.result or {} for s in job.of_kind(StageKind.POINT) if s.about == pattern)
        found = next(results, {}).get("configuration")
    if found is None:
        raise LookupError(f"the job has no configuration for {pattern or 'its pattern'}")
    return found


def ask_to_prune(
    database: Database,
    job_id: uuid.UUID,
    *,
    visible_to: uuid.UUID | None = None,
    pattern: str | None = None,
) -> Job:
    """Have the pruned model of a job written, if it is not there or on its way already."""
    with database.transaction() as connection:
        job = find_job(connection, job_id, visible_to=visible_to, lock=True)
        stage = job.pruning
        ended = job.state in (JobState.FAILED, JobState.CANCELLING, JobState.CANCELLED)
        mine = stage is not None and stage.about == pattern
        if stage and mine and not ended and REMOVED not in (stage.result or {}):
            return job
        if job.state is not JobState.SUCCEEDED:
            raise StateConflict("prune", job.state, _WAY_OUT.get(job.state, _LATER))
        pruning = (stages.c.job_id == job.id, stages.c.kind == StageKind.PRUNE)
        connection.execute(delete(stages).where(*pruning))
        set_state(connection, job, JobState.QUEUED)
        params = None if pattern is None else {PATTERN: pattern}
        new = NewStage(kind=StageKind.PRUNE, params=params)
        add_stages(connection, find_job(connection, job_id), [new])
        return find_job(connection, job_id)


def note_removed(database: Database, job_id: uuid.UUID, when: str) -> None:
    """Note that the files of a job's pruned model are deleted."""
    with database.transaction() as connection:
        stage = find_job(connection, job_id, lock=True).pruning
        if stage is not None and stage.result is not None:
            update_stage(connection, stage.id, result={**stage.result, REMOVED: when})


def pruned_for(database: Database, days: float, limit: int = 100) -> list[uuid.UUID]:
    """Some jobs that are over, and whose pruned model has been there for so many days."""
    query = (
        select(jobs.c.id)
        .join(stages, stages.c.job_id == jobs.c.id)
        .where(
            jobs.c.state.in_([s for s in JobState if s.is_over]),
            stages.c.kind == StageKind.PRUNE,
            stages.c.state == StageState.DONE,
            stages.c.finished_at < func.now() - interval(days * 86_400),
            stages.c.result[REMOVED].as_string().is_(None),
        )
        .order_by(stages.c.finished_at)
        .limit(limit)
    )
    with database.transaction() as connection:
        return [*connection.execute(query).scalars()]
