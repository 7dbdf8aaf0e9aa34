"""
The queue: one procrastinate task, ``run_stage``, which carries the number of a stage.

This module puts stages in; ``workers`` takes them out, but for what no worker can.
"""

import uuid
from collections.abc import Sequence

from procrastinate import App, SyncPsycopgConnector
from sqlalchemy import Connection, text

from storage.states import JobState, StageKind

TASK = "run_stage"

# Never opened: entries are written on the connection of the caller's transaction.
_app = App(connector=SyncPsycopgConnector())


def enqueue(
    connection: Connection,
    stage_id: int,
    kind: StageKind,
    *,
    priority: int,
    lock: str | None,
    behind: bool = False,
) -> int:
    """Put a stage into the queue, in the caller's transaction."""
    lowest = priority * len(StageKind)
    place = lowest + kind.rank
    if behind:
        query = text(
            "SELECT min(priority) FROM procrastinate_jobs"
            " WHERE status = 'todo' AND priority BETWEEN :lowest AND :place"
        )
        last = connection.scalar(query, {"lowest": lowest, "place": place})
        place = place if last is None else last
    task = _app.configure_task(
        TASK,
        queue=kind.value,
        priority=place,
        lock=lock,
        connection=connection.connection.driver_connection,
    )
    return int(task.defer(stage_id=stage_id))


def something_waits(
    connection: Connection, kinds: Sequence[StageKind], *, priority: int, but_of: uuid.UUID
) -> bool:
    """Tell whether a stage of another job is in the queue that a worker could take now."""
    query = text(
        "SELECT EXISTS (SELECT FROM procrastinate_jobs entry"
        " JOIN pho.stages ON stages.queue_id = entry.id"
        " JOIN pho.jobs ON jobs.id = stages.job_id"
        " WHERE entry.status = 'todo' AND entry.queue_name = ANY(:kinds)"
        " AND jobs.state = ANY(:states) AND jobs.priority >= :priority AND jobs.id <> :but_of"
        " AND (entry.scheduled_at IS NULL OR entry.scheduled_at <= now())"
        " AND NOT EXISTS (SELECT FROM procrastinate_jobs other"
        "  WHERE other.lock = entry.lock AND other.status = 'doing'))"
    )
    states = [state for state in JobState if state.may_work]
    values = {"kinds": [*kinds], "states": states, "priority": priority, "but_of": but_of}
    return bool(connection.scalar(query, values))


def take_out(connection: Connection, queue_id: int) -> None:
    """Take an entry out of the queue, in the caller's transaction, whoever has it."""
    connection.execute(text("DELETE FROM procrastinate_jobs WHERE id = :id"), {"id": queue_id})


def take_out_waiting(connection: Connection, queue_id: int | None) -> bool:
    """Take an entry out of the queue, in the caller's transaction, if no worker has it."""
    query = text("DELETE FROM procrastinate_jobs WHERE id = :id AND status = 'todo' RETURNING id")
    return connection.execute(query, {"id": queue_id}).first() is not None
