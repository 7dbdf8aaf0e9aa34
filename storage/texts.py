"""
The store of uploaded texts: whose they are. Their bytes are files of the artifact store.
"""

import uuid
from collections.abc import Callable, Collection
from dataclasses import dataclass, fields
from datetime import datetime

from sqlalchemy import ColumnElement, Connection, Text, cast, delete, exists, func, select, update
from sqlalchemy.dialects.postgresql import insert as pg_insert

from storage.database import Database
from storage.records import JobState
from storage.tables import interval, jobs, texts


@dataclass(frozen=True, kw_only=True)
class StoredText:
    """A text of a key."""

    number: int  # Counts up; newer ones have higher ones
    id: str  # ``sha256:``, its SHA-256, and how it is read: ``.txt``, ``.jsonl`` or ``.parquet``
    name: str  # Of the file that was uploaded
    bytes: int
    created_at: datetime
    used_at: datetime  # When it was last uploaded, or named by a new job


@dataclass(frozen=True, kw_only=True)
class TextLimits:
    """The most that one key may have."""

    count: int
    bytes: int


class NoSuchText(LookupError):
    """No text of this key has this id."""


class TooManyTexts(Exception):
    """A key has as many texts, or bytes of them, as it may have."""


class TextInUse(Exception):
    """A text is named by a job that is not over."""


_COLUMNS = [texts.c[field.name] for field in fields(StoredText)]


class TextStore:
    """All texts of a database. An owner is a key; None: uploaded without one."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def find(self, text_id: str, *, owner_id: uuid.UUID | None) -> StoredText:
        with self.database.transaction() as connection:
            return _find(connection, text_id, owner_id)

    def page(
        self, *, owner_id: uuid.UUID | None, before: int | None = None, limit: int = 50
    ) -> list[StoredText]:
        """The texts of a key, newest first."""
        query = select(*_COLUMNS).where(texts.c.owner_id == owner_id)
        if before is not None:
            query = query.where(texts.c.number < before)
        query = query.order_by(texts.c.number.desc()).limit(limit)
        with self.database.transaction() as connection:
            return [StoredText(**row._mapping) for row in connection.execute(query)]

    def add(
        self,
        text_id: str,
        name: str,
        size: int,
        *,
        owner_id: uuid.UUID | None,
        limits: TextLimits,
        put: Callable[[], None],
    ) -> tuple[StoredText, bool]:
        """Keep a text, whose file ``put`` puts into its place; or find it, not new."""
        with self.database.transaction() as connection:
            # One upload of an owner after the other, so that none slips past the limits.
            _lock(connection, f"pho texts of {owner_id}")
            _lock(connection, f"pho text {text_id}")
            try:
                stored, new = _find(connection, text_id, owner_id), False
                _touch(connection, [text_id], owner_id)
            except NoSuchText:
                _check_limits(connection, size, owner_id, limits)
                values = {"owner_id": owner_id, "id": text_id, "name": name, "bytes": size}
                insert = pg_insert(texts).values(values).returning(*_COLUMNS)
                row = connection.execute(insert).one()
                stored, new = StoredText(**row._mapping), True
            put()  # if it fails, nothing is stored
            return stored, new

    def touch(self, text_ids: Collection[str], *, owner_id: uuid.UUID | None) -> None:
        """Note that a new job names these."""
        with self.database.transaction() as connection:
            _touch(connection, text_ids, owner_id)

    def delete(
        self, text_id: str, *, owner_id: uuid.UUID | None, remove: Callable[[], None]
    ) -> None:
        """Forget a text, and ``remove`` its file unless another key or a job needs it."""
        with self.database.transaction() as connection:
            _lock(connection, f"pho text {text_id}")
            _find(connection, text_id, owner_id)
            own = jobs.c.owner_id == owner_id  # IS NULL for None
            if connection.execute(select(jobs.c.id).where(own, _works_on(text_id))).first():
                raise TextInUse(text_id)
            owned = (texts.c.owner_id == owner_id, texts.c.id == text_id)
            connection.execute(delete(texts).where(*owned))
            if not _needed(connection, text_id):
                remove()

    def unused_for(self, days: float, limit: int = 100) -> list[tuple[str, uuid.UUID | None]]:
        """Ids and owners of texts that no new job has named for so long, and no job works on."""
        query = select(texts.c.id, texts.c.owner_id).where(
            texts.c.used_at < func.now() - interval(days * 86_400),
            ~exists().where(_is_open(), cast(jobs.c.spec, Text).contains(texts.c.id)),
        )
        with self.database.transaction() as connection:
            rows = connection.execute(query.order_by(texts.c.used_at).limit(limit))
            return [(row.id, row.owner_id) for row in rows]


def _find(connection: Connection, text_id: str, owner_id: uuid.UUID | None) -> StoredText:
    query = select(*_COLUMNS).where(texts.c.id == text_id, texts.c.owner_id == owner_id)
    row = connection.execute(query).first()
    if row is None:
        raise NoSuchText(text_id)
    return StoredText(**row._mapping)


def _touch(connection: Connection, text_ids: Collection[str], owner_id: uuid.UUID | None) -> None:
    owned = (texts.c.owner_id == owner_id, texts.c.id.in_([*text_ids]))
    connection.execute(update(texts).where(*owned).values(used_at=func.now()))


def _lock(connection: Connection, what: str) -> None:
    connection.execute(select(func.pg_advisory_xact_lock(func.hashtext(what))))


def _check_limits(
    connection: Connection, size: int, owner_id: uuid.UUID | None, limits: TextLimits
) -> None:
    sums = select(func.count(), func.coalesce(func.sum(texts.c.bytes), 0))
    count, total = connection.execute(sums.where(texts.c.owner_id == owner_id)).one()
    if count >= limits.count:
        raise TooManyTexts(f"You have {count} texts, the most of one key. Delete some.")
    if total + size > limits.bytes:
        raise TooManyTexts(
            f"You have {total} bytes of texts, and this one has {size}, but one key may have "
            f"{limits.bytes}. Delete some; the operator sets PHO_MAX_UPLOADED_BYTES."
        )


def _is_open() -> ColumnElement[bool]:
    return jobs.c.state.in_([state for state in JobState if not state.is_over])


def _works_on(text_id: str) -> ColumnElement[bool]:
    """That a job is not over, and names the text."""
    return _is_open() & cast(jobs.c.spec, Text).contains(text_id, autoescape=True)


def _needed(connection: Connection, text_id: str) -> bool:
    owned = exists().where(texts.c.id == text_id)
    used = exists().where(_works_on(text_id))
    return bool(connection.execute(select(owned | used)).scalar_one())
