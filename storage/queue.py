"""
The queue: one procrastinate task, ``run_stage``, which carries the number of a stage.

This module puts stages in; ``workers`` takes them out, but for what no worker can.
"""

from procrastinate import App, SyncPsycopgConnector
from sqlalchemy import Connection, text

from storage.states import StageKind

TASK = "run_stage"

# Never opened: entries are written on the connection of the caller's transaction.
_app = App(connector=SyncPsycopgConnector())


def enqueue(
    connection: Connection, stage_id: int, kind: StageKind, *, priority: int, lock: str | None
) -> int:
    """
    Put a stage into the queue, in the caller's transaction.

    Args:
        connection: Connection of :meth:`storage.database.Database.transaction`.
        stage_id: What to run.
        kind: The queue's name. Later kinds go first, so begun jobs end before new ones begin.
        priority: Priority of the job; higher goes first.
        lock: Entries with the same lock run one after the other.

    Returns:
        The id of the queue's entry.
    """
    task = _app.configure_task(
        TASK,
        queue=kind.value,
        priority=priority * len(StageKind) + kind.rank,
        lock=lock,
        connection=connection.connection.driver_connection,
    )
    return int(task.defer(stage_id=stage_id))


def take_out(connection: Connection, queue_id: int) -> None:
    """
    Take an entry out of the queue, in the caller's transaction, whoever has it.

    Args:
        connection: Connection of :meth:`storage.database.Database.transaction`.
        queue_id: The entry's; nothing happens if it is out already.
    """
    connection.execute(text("DELETE FROM procrastinate_jobs WHERE id = :id"), {"id": queue_id})
