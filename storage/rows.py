"""
The rows of jobs and stages: locked, read, written, and put into the queue.
"""

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from sqlalchemy import Connection, Float, Row, cast, extract, func, insert, select, update
from sqlalchemy.dialects.postgresql import insert as pg_insert

from storage.notifications import add_notification
from storage.queue import Where, enqueue, leave_queue
from storage.records import (
    DURATIONS_S,
    AttemptEnd,
    Claim,
    JobRecord,
    JobState,
    LostClaim,
    NewStage,
    NoSuchJob,
    Stage,
    StageState,
    settled,
)
from storage.tables import events, jobs, stages, tallies

_JOB = [jobs.c[field.name] for field in fields(JobRecord) if field.name != "stages"]
_STAGE = [stages.c[field.name] for field in fields(Stage)]


def find_job(
    connection: Connection,
    job_id: uuid.UUID,
    *,
    visible_to: uuid.UUID | None = None,
    lock: bool = False,
) -> JobRecord:
    records = find_jobs(connection, jobs.c.id == job_id, visible_to=visible_to, lock=lock)
    if not records:
        raise NoSuchJob(str(job_id))
    return records[0]


def find_jobs(
    connection: Connection,
    *conditions: Any,
    visible_to: uuid.UUID | None = None,
    order: Sequence[Any] = (jobs.c.number.desc(),),
    skip: int = 0,
    limit: int | None = None,
    lock: bool = False,
) -> list[JobRecord]:
    """Jobs with their stages, newest first or in another order, of all keys or of one."""
    query = select(*_JOB).where(*conditions).order_by(*order).offset(skip).limit(limit)
    if visible_to is not None:
        query = query.where(jobs.c.owner_id == visible_to)
    rows = connection.execute(query.with_for_update() if lock else query).all()
    job_stages: dict[uuid.UUID, list[Stage]] = {row.id: [] for row in rows}
    query = select(*_STAGE).where(stages.c.job_id.in_(job_stages)).order_by(stages.c.id)
    for row in connection.execute(query):
        job_stages[row.job_id].append(Stage(**row._mapping))
    return [JobRecord(**row._mapping, stages=job_stages[row.id]) for row in rows]


def lock_stage(connection: Connection, stage_id: int) -> Row[Any] | None:
    """A stage's row with its entry in the queue, locked."""
    query = select(stages).where(stages.c.id == stage_id)
    return connection.execute(query.with_for_update()).first()


def check_claim(connection: Connection, claim: Claim) -> None:
    """Lock the stage's row; raise LostClaim unless the claim still holds."""
    row = lock_stage(connection, claim.stage.id)
    if row is None or row.attempt != claim.attempt or row.state is not StageState.RUNNING:
        raise LostClaim


def add_stages(connection: Connection, job: JobRecord, new: Sequence[NewStage]) -> None:
    """Make stages, and put them into the queue if the job may work; those that exist stay."""
    for stage in new:
        row = connection.execute(
            pg_insert(stages)
            .values(
                job_id=job.id,
                kind=stage.kind,
                number=stage.number,
                state=StageState.WAITING,
                params={**(stage.params or {}), "lock": stage.lock},
            )
            .on_conflict_do_nothing()
            .returning(stages)
        ).first()
        if row is not None and job.state.may_work:
            enqueue_stage(connection, job, row)


def enqueue_stage(
    connection: Connection, job: JobRecord, stage: Stage | Row[Any], where: Where = "by rank"
) -> None:
    """Put a stage into the queue; an entry that it had before stands for nothing."""
    lock = (stage.params or {})["lock"]
    queue_id = enqueue(
        connection, stage.id, stage.kind, priority=job.priority, lock=lock, where=where
    )
    update_stage(connection, stage.id, queue_id=queue_id)


def update_stage(connection: Connection, stage_id: int, **values: Any) -> None:
    connection.execute(update(stages).where(stages.c.id == stage_id).values(**values))


def set_state(
    connection: Connection,
    job: JobRecord,
    state: JobState,
    *,
    error: Mapping[str, Any] | None = None,
    details: Mapping[str, Any] | None = None,
) -> None:
    """Write a job's state and its event, with these details, if it is another one than before."""
    if state is job.state:
        return
    cause = {} if error is None else {"error": dict(error)}
    end = func.now() if state.is_over else None
    connection.execute(
        update(jobs).where(jobs.c.id == job.id).values(state=state, finished_at=end, **cause)
    )
    add_event(connection, job.id, "state", {"state": state, **cause, **(details or {})})
    if not state.may_work:  # or every pause leaves entries that workers take for nothing
        leave_queue(connection, job)
    if state.is_over and job.spec.get("notify"):
        add_notification(connection, job, state, error)


def settle(connection: Connection, job: JobRecord) -> None:
    """Write a job's state as it is once no worker is busy with it, if none is."""
    running = connection.execute(
        select(func.count())
        .select_from(stages)
        .where(stages.c.job_id == job.id, stages.c.state == StageState.RUNNING)
    ).scalar_one()
    set_state(connection, job, settled(job.state, busy=running > 0))


LOG = "log"  # kind of an event: lines that a worker has logged


def add_event(
    connection: Connection, job_id: uuid.UUID, kind: str, data: Mapping[str, Any]
) -> None:
    """Tell those who follow a job what happened to it."""
    connection.execute(insert(events).values(job_id=job_id, kind=kind, data=dict(data)))


def claimed_job(connection: Connection, claim: Claim) -> JobRecord:
    """The job, locked, if the claim still holds."""
    try:
        job = find_job(connection, claim.job.id, lock=True)
    except NoSuchJob:
        raise LostClaim from None
    check_claim(connection, claim)
    return job


def end_attempt(connection: Connection, stage_id: int, end: AttemptEnd) -> None:
    """Count how the attempt that a worker has in hand ends, if one has; call it late."""
    # Many workers count in the same rows, each of which is locked to the end of the transaction.
    elapsed_s = cast(extract("epoch", func.now() - stages.c.begun_at), Float)
    worked_s = 0.0 if end is AttemptEnd.LOST else elapsed_s  # since when it did not is not known
    row = connection.execute(
        update(stages)
        .where(stages.c.id == stage_id, stages.c.begun_at.is_not(None))
        .values(worked_s=stages.c.worked_s + worked_s, begun_at=None)
        .returning(stages.c.kind, stages.c.worked_s)
    ).first()
    if row is None:
        return
    up_to_s = next(limit_s for limit_s in DURATIONS_S if row.worked_s <= limit_s)
    tally = pg_insert(tallies).values(
        kind=row.kind, outcome=end, up_to_s=up_to_s, count=1, seconds=row.worked_s
    )
    sums = {name: tallies.c[name] + tally.excluded[name] for name in ("count", "seconds")}
    key = [*tallies.primary_key]
    connection.execute(tally.on_conflict_do_update(index_elements=key, set_=sums))


def put_down(connection: Connection, job: JobRecord, stage_id: int, failures: int) -> None:
    """Nobody works on the stage now; the queue may give it out again."""
    end_attempt(connection, stage_id, AttemptEnd.HANDED_BACK)
    update_stage(connection, stage_id, state=StageState.WAITING, failures=failures, worker_id=None)
    settle(connection, job)
