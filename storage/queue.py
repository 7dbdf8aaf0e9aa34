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
    """
    Put a stage into the queue, in the caller's transaction.

    Args:
        connection: Connection of :meth:`storage.database.Database.transaction`.
        stage_id: What to run.
        kind: The queue's name. Later kinds go first, so begun jobs end before new ones begin.
        priority: Priority of the job; higher goes first.
        lock: Entries with the same lock run one after the other.
        behind: Whether it waits behind whatever of this priority waits by now.

    Returns:
        The id of the queue's entry.
    """
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
    """
    Tell whether a stage of another job is in the queue that a worker could take now.

    Args:
        connection: Connection of :meth:`storage.database.Database.transaction`.
        kinds: Stages that the worker does.
        priority: The lowest that the job may have.
        but_of: The job that does not count.
    """
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
    """
    Take an entry out of the queue, in the caller's transaction, whoever has it.

    Args:
        connection: Connection of :meth:`storage.database.Database.transaction`.
        queue_id: The entry's; nothing happens if it is out already.
    """
    connection.execute(text("DELETE FROM procrastinate_jobs WHERE id = :id"), {"id": queue_id})


def take_out_waiting(connection: Connection, queue_id: int | None) -> bool:
    """
    Take an entry out of the queue, in the caller's transaction, if no worker has it.

    Args:
        connection: Connection of :meth:`storage.database.Database.transaction`.
        queue_id: The entry's.

    Returns:
        True if it waited, and is out now.
    """
    query = text("DELETE FROM procrastinate_jobs WHERE id = :id AND status = 'todo' RETURNING id")
    return connection.execute(query, {"id": queue_id}).first() is not None
