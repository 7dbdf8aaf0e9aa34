"""
Messages that a job has ended: kept until they are delivered, or given up.

One is stored in the transaction that ends the job (:func:`storage.rows.set_state`), so none is
lost with a process. Senders take turns: who takes a message has it for some time, and after that
another one may.
"""

import uuid
from dataclasses import dataclass
from typing import Any

from sqlalchemy import delete, func, select, update

from storage.database import Database
from storage.rows import interval
from storage.tables import notifications

LEASE_S = 120.0  # longer than an attempt takes
KEEP_S = 30 * 86_400.0  # what was delivered, or given up
GIVE_UP_AFTER = 12  # attempts; the last is 17 hours after the first


@dataclass(frozen=True, kw_only=True)
class Notification:
    """
    A message to be sent.

    Attributes:
        id: The same in every attempt.
        url: Where to.
        document: JSON values.
        attempts: How many were made, this one included.
    """

    id: uuid.UUID
    url: str
    document: dict[str, Any]
    attempts: int


def take(database: Database) -> Notification | None:
    """The message that is due for longest, for :data:`LEASE_S`; None if none is."""
    due = (
        select(notifications.c.id)
        .where(notifications.c.ended_at.is_(None), notifications.c.due_at <= func.now())
        .order_by(notifications.c.due_at)
        .limit(1)
        .with_for_update(skip_locked=True)
    )
    taken = (
        update(notifications)
        .where(notifications.c.id.in_(due.scalar_subquery()))
        .values(attempts=notifications.c.attempts + 1, due_at=func.now() + interval(LEASE_S))
        .returning(
            notifications.c.id,
            notifications.c.url,
            notifications.c.document,
            notifications.c.attempts,
        )
    )
    with database.transaction() as connection:
        row = connection.execute(taken).first()
    return None if row is None else Notification(**row._mapping)


def end(database: Database, taken: Notification, *, error: str | None = None) -> None:
    """Note that a message was delivered, or, with an error, that it never will be."""
    _change(database, taken, ended_at=func.now(), error=error)
    old = notifications.c.ended_at < func.now() - interval(KEEP_S)
    with database.transaction() as connection:
        connection.execute(delete(notifications).where(old))


def put_off(database: Database, taken: Notification, *, error: str) -> bool:
    """
    Note that a message could not be delivered.

    Returns:
        Whether it is tried again, later each time; otherwise it is given up.
    """
    if taken.attempts >= GIVE_UP_AFTER:
        end(database, taken, error=error)
        return False
    wait_s = 30.0 * 2 ** (taken.attempts - 1)
    _change(database, taken, due_at=func.now() + interval(wait_s), error=error)
    return True


def _change(database: Database, taken: Notification, **values: Any) -> None:
    mine = notifications.c.id == taken.id
    with database.transaction() as connection:
        connection.execute(update(notifications).where(mine).values(values))
