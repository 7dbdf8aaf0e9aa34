"""
Messages that a job has ended: kept until they are delivered, or given up.
"""

import uuid
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Connection, delete, func, insert, select, update

from storage.database import Database
from storage.records import JobRecord, JobState
from storage.tables import interval, notifications

LEASE_S = 120.0  # longer than an attempt takes, with all its requests
KEEP_S = 30 * 86_400.0  # what was delivered, or given up
GIVE_UP_AFTER = 12  # attempts; the last is 17 hours after the first


@dataclass(frozen=True, kw_only=True)
class Notification:
    """A message to be sent."""

    id: uuid.UUID  # The same in every attempt
    url: str  # Where to
    document: dict[str, Any]  # JSON values
    attempts: int  # How many were made, this one included


def add_notification(
    connection: Connection, job: JobRecord, state: JobState, error: Mapping[str, Any] | None
) -> None:
    """Store a message for the address that a job names."""
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


def take_notification(database: Database, *, but_to: Collection[str] = ()) -> Notification | None:
    """The message that is due for longest, for :data:`LEASE_S`; None if none is."""
    host = func.lower(func.substring(notifications.c.url, "^[a-z]+://([^/?#]*)"))
    due_id = (
        select(notifications.c.id)
        .where(
            notifications.c.ended_at.is_(None),
            notifications.c.due_at <= func.now(),
            host.not_in(but_to),
        )
        .order_by(notifications.c.due_at)
        .limit(1)
        .with_for_update(skip_locked=True)
    )
    lease = (
        update(notifications)
        .where(notifications.c.id.in_(due_id.scalar_subquery()))
        .values(attempts=notifications.c.attempts + 1, due_at=func.now() + interval(LEASE_S))
        .returning(
            notifications.c.id,
            notifications.c.url,
            notifications.c.document,
            notifications.c.attempts,
        )
    )
    with database.transaction() as connection:
        row = connection.execute(lease).first()
    return None if row is None else Notification(**row._mapping)


def end_notification(
    database: Database, notification: Notification, *, error: str | None = None
) -> None:
    """Note that a message was delivered, or, with an error, that it never will be."""
    _change(database, notification, ended_at=func.now(), error=error)
    old = notifications.c.ended_at < func.now() - interval(KEEP_S)
    with database.transaction() as connection:
        connection.execute(delete(notifications).where(old))


def postpone_notification(database: Database, notification: Notification, *, error: str) -> bool:
    """Note that a message could not be delivered."""
    if notification.attempts >= GIVE_UP_AFTER:
        end_notification(database, notification, error=error)
        return False
    wait_s = 30.0 * 2 ** (notification.attempts - 1)
    _change(database, notification, due_at=func.now() + interval(wait_s), error=error)
    return True


def _change(database: Database, notification: Notification, **values: Any) -> None:
    same = notifications.c.id == notification.id
    with database.transaction() as connection:
        connection.execute(update(notifications).where(same).values(values))
