"""
The rows of jobs and stages: what the API's half and the workers' half of the store share.

Each function works on the connection of the caller's transaction.
"""

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import fields
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Connection, Row, func, insert, select, update
from sqlalchemy.dialects.postgresql import insert as pg_insert

from storage.queue import enqueue
from storage.records import Claim, Job, LostClaim, NewStage, NoSuchJob, Stage
from storage.states import JobState, StageKind, StageState, settled
from storage.tables import events, jobs, notifications, stages

_JOB = [jobs.c[field.name] for field in fields(Job) if field.name != "stages"]
_STAGE = [stages.c[field.name] for field in fields(Stage)]


def find_job(
    connection: Connection,
    job_id: uuid.UUID,
    *,
    visible_to: uuid.UUID | None = None,
    lock: bool = False,
) -> Job:
    """
    A job with its stages.

    Raises:
        NoSuchJob: It is not there, or not visible to this key.
    """
    found = find_jobs(connection, jobs.c.id == job_id, visible_to=visible_to, lock=lock)
    if not found:
        raise NoSuchJob(str(job_id))
    return found[0]


def find_jobs(
    connection: Connection,
    *which: Any,
    visible_to: uuid.UUID | None = None,
    order: Sequence[Any] = (jobs.c.number.desc(),),
    skip: int = 0,
    limit: int | None = None,
    lock: bool = False,
) -> list[Job]:
    """Jobs with their stages, newest first or in another order, of all keys or of one."""
    query = select(*_JOB).where(*which).order_by(*order).offset(skip).limit(limit)
    if visible_to is not None:
        query = query.where(jobs.c.owner_id == visible_to)
    rows = connection.execute(query.with_for_update() if lock else query).all()
    of_job: dict[uuid.UUID, list[Stage]] = {row.id: [] for row in rows}
    own = select(*_STAGE).where(stages.c.job_id.in_(of_job)).order_by(stages.c.id)
    for row in connection.execute(own):
        of_job[row.job_id].append(Stage(**row._mapping))
    return [Job(**row._mapping, stages=of_job[row.id]) for row in rows]


def lock_stage(connection: Connection, stage_id: int) -> Row[Any] | None:
    """A stage's row with its entry in the queue, locked."""
    query = select(stages).where(stages.c.id == stage_id)
    return connection.execute(query.with_for_update()).first()


def check_claim(connection: Connection, claim: Claim) -> None:
    """Lock the stage's row; raise LostClaim unless the claim still holds."""
    row = lock_stage(connection, claim.stage.id)
    if row is None or row.attempt != claim.attempt or row.state is not StageState.RUNNING:
        raise LostClaim


def add_stages(connection: Connection, job: Job, new: Sequence[NewStage]) -> None:
    """Make stages, and put them into the queue if the job may work; those that exist stay."""
    for stage in new:
        inserted = connection.execute(
            pg_insert(stages)
            .values(
                job_id=job.id,
                kind=stage.kind,
                number=stage.number,
                state=StageState.WAITING,
                params={**(stage.params or {}), "lock": stage.lock},
            )
            .on_conflict_do_nothing()
            .returning(stages.c.id)
        ).first()
        if inserted is not None and job.state.may_work:
            enqueue_stage(connection, job, inserted.id, stage.kind, stage.lock)


def enqueue_stage(
    connection: Connection,
    job: Job,
    stage_id: int,
    kind: StageKind,
    lock: str | None,
    *,
    behind: bool = False,
) -> None:
    """Put a stage into the queue; an entry that it had before stands for nothing."""
    queue_id = enqueue(connection, stage_id, kind, priority=job.priority, lock=lock, behind=behind)
    update_stage(connection, stage_id, queue_id=queue_id)


def enqueue_again(
    connection: Connection, job: Job, stage: Stage | Row[Any], *, behind: bool = False
) -> None:
    """Put a stage that was in the queue into it again, with the lock that it had."""
    lock = (stage.params or {})["lock"]
    enqueue_stage(connection, job, stage.id, stage.kind, lock, behind=behind)


def update_stage(connection: Connection, stage_id: int, **values: Any) -> None:
    """Write values of a stage."""
    connection.execute(update(stages).where(stages.c.id == stage_id).values(**values))


def set_state(
    connection: Connection,
    job: Job,
    state: JobState,
    *,
    error: Mapping[str, Any] | None = None,
    told: Mapping[str, Any] | None = None,
) -> None:
    """Write a job's state and its event, with what is told, if it is another one than before."""
    if state is job.state:
        return
    more = {} if error is None else {"error": dict(error)}
    finished = func.now() if state.is_over else None
    connection.execute(
        update(jobs).where(jobs.c.id == job.id).values(state=state, finished_at=finished, **more)
    )
    add_event(connection, job.id, "state", {"state": state, **more, **(told or {})})
    if state.is_over and job.spec.get("notify"):
        _add_notification(connection, job, state, error)


def _add_notification(
    connection: Connection, job: Job, state: JobState, error: Mapping[str, Any] | None
) -> None:
    """Store a message that a job has ended, for who asked for it."""
    document = {
        "type": "job.ended",
        "job_id": str(job.id),
        "name": job.name,
        "state": state,
        "error": error and {key: error[key] for key in ("type", "message") if key in error},
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    connection.execute(
        insert(notifications).values(
            id=uuid.uuid4(), job_id=job.id, url=job.spec["notify"], document=document
        )
    )


def settle(connection: Connection, job: Job) -> None:
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


def claimed_job(connection: Connection, claim: Claim) -> Job:
    """The job, locked, if the claim still holds."""
    try:
        job = find_job(connection, claim.job.id, lock=True)
    except NoSuchJob:
        raise LostClaim from None
    check_claim(connection, claim)
    return job


def put_down(connection: Connection, job: Job, stage_id: int, failures: int) -> None:
    """Nobody works on the stage now; the queue may give it out again."""
    update_stage(connection, stage_id, state=StageState.WAITING, failures=failures, worker_id=None)
    settle(connection, job)


def interval(seconds: float) -> Any:
    """So many seconds, in SQL."""
    return func.make_interval(0, 0, 0, 0, 0, 0, seconds)
