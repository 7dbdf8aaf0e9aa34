"""
The library: configurations that outlive the jobs that found them, each stored once.
"""

import hashlib
import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Row, Select, delete, func, select, update
from sqlalchemy.dialects.postgresql import insert as pg_insert

from storage.database import Database
from storage.tables import configurations

CONSIDERED = 2000  # of an owner's entries, those of the asked pattern first, then the newest


class NoSuchConfiguration(LookupError):
    """No configuration has this id, or it belongs to another key."""


@dataclass(frozen=True, kw_only=True)
class StoredConfiguration:
    """An entry of the library."""

    id: uuid.UUID
    job_id: uuid.UUID | None  # That found it; None if it was imported. The job may be deleted since
    document: dict[str, Any]  # The configuration
    transfers: list[dict[str, Any]]  # What it was worth on other models
    created_at: datetime


@dataclass(frozen=True, kw_only=True)
class StoredFacts:
    """What is known of an entry without reading its document."""

    id: uuid.UUID
    job_id: uuid.UUID | None
    created_at: datetime
    facts: dict[str, Any] | None  # What a ranking reads, as it was remembered; None if it was not


class ConfigurationStore:
    """The library of a database."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def add(
        self,
        document: Mapping[str, Any],
        *,
        transfers: list[dict[str, Any]],
        owner_id: uuid.UUID | None,
    ) -> tuple[StoredConfiguration, bool]:
        with self.database.transaction() as connection:
            entry_id, new = keep(connection, document, owner_id=owner_id, job_id=None)
            for transfer in transfers:
                _add_transfer(connection, entry_id, transfer)
            return _get(connection, entry_id), new

    def get(
        self, entry_id: uuid.UUID, *, visible_to: uuid.UUID | None = None
    ) -> StoredConfiguration:
        with self.database.transaction() as connection:
            return _get(connection, entry_id, visible_to)

    def all(
        self, *, pattern: str | None = None, visible_to: uuid.UUID | None = None
    ) -> list[StoredConfiguration]:
        """The newest entries, at most :data:`CONSIDERED`; those of ``pattern`` before others."""
        with self.database.transaction() as connection:
            query = _considered(select(configurations), pattern, visible_to)
            return [_entry(row) for row in connection.execute(query)]

    def facts(
        self, *, pattern: str | None = None, visible_to: uuid.UUID | None = None
    ) -> list[StoredFacts]:
        c = configurations.c
        with self.database.transaction() as connection:
            columns = select(c.id, c.job_id, c.created_at, c.facts)
            query = _considered(columns, pattern, visible_to)
            return [StoredFacts(**row._mapping) for row in connection.execute(query)]

    def remember(self, entry: StoredConfiguration, facts: Mapping[str, Any]) -> None:
        """Keep what a ranking reads of an entry, unless it has changed since it was read."""
        with self.database.transaction() as connection:
            query = select(configurations.c.transfers).where(configurations.c.id == entry.id)
            transfers = connection.execute(query.with_for_update()).scalar()
            if transfers == entry.transfers:
                connection.execute(
                    update(configurations)
                    .where(configurations.c.id == entry.id)
                    .values(facts=dict(facts))
                )

    def count(self, owner_id: uuid.UUID | None) -> int:
        query = select(func.count()).where(configurations.c.owner_id == owner_id)
        with self.database.transaction() as connection:
            return connection.execute(query).scalar_one()

    def delete_older(self, days: float) -> int:
        """Forget the entries of all owners that are older; gives how many."""
        older = configurations.c.created_at < func.now() - func.make_interval(
            0, 0, 0, 0, 0, 0, days * 86400
        )
        with self.database.transaction() as connection:
            return connection.execute(delete(configurations).where(older)).rowcount

    def transfers(
        self, document: Mapping[str, Any], *, owner_id: uuid.UUID | None
    ) -> list[dict[str, Any]]:
        """What a configuration of an owner was worth on other models; nothing if it is gone."""
        with self.database.transaction() as connection:
            entry_id = _known(connection, document, owner_id)
            return [] if entry_id is None else _get(connection, entry_id).transfers

    def delete(self, entry_id: uuid.UUID, *, visible_to: uuid.UUID | None = None) -> None:
        """Forget an entry. The job that found it stays."""
        with self.database.transaction() as connection:
            _get(connection, entry_id, visible_to)
            connection.execute(delete(configurations).where(configurations.c.id == entry_id))


def keep(
    connection: Connection,
    document: Mapping[str, Any],
    *,
    owner_id: uuid.UUID | None,
    job_id: uuid.UUID | None,
) -> tuple[uuid.UUID, bool]:
    """Store a configuration, unless its owner has it, in the caller's transaction: id, if new."""
    values: dict[str, Any] = {
        "id": uuid.uuid4(),
        "owner_id": owner_id,
        "job_id": job_id,
        "sha256": digest(document),
        "document": dict(document),
        "transfers": [],
        "pattern": pattern if isinstance(pattern := document.get("pattern"), str) else None,
    }
    new = pg_insert(configurations).values(values).on_conflict_do_nothing()
    while (inserted := connection.execute(new.returning(configurations.c.id)).first()) is None:
        entry_id = _known(connection, document, owner_id)
        if entry_id is not None:  # else it was deleted just now
            return entry_id, False
    return inserted.id, True


def keep_transfer(
    connection: Connection,
    document: Mapping[str, Any],
    transfer: Mapping[str, Any],
    *,
    owner_id: uuid.UUID | None,
) -> None:
    """Note what a configuration was worth on another model, if its owner has it still."""
    entry_id = _known(connection, document, owner_id)
    if entry_id is not None:
        _add_transfer(connection, entry_id, transfer)


def digest(document: Mapping[str, Any]) -> bytes:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).digest()


def _considered(
    query: Select[Any], pattern: str | None, visible_to: uuid.UUID | None
) -> Select[Any]:
    of_pattern = configurations.c.pattern == (pattern or "")
    query = query.order_by(of_pattern.desc().nulls_last(), configurations.c.number.desc())
    if visible_to is not None:
        query = query.where(configurations.c.owner_id == visible_to)
    return query.limit(CONSIDERED)


def _add_transfer(connection: Connection, entry_id: uuid.UUID, transfer: Mapping[str, Any]) -> None:
    query = select(configurations.c.transfers).where(configurations.c.id == entry_id)
    transfers = connection.execute(query.with_for_update()).scalar_one()
    if transfer not in transfers:
        connection.execute(
            update(configurations)
            .where(configurations.c.id == entry_id)
            .values(transfers=[*transfers, dict(transfer)], facts=None)
        )


def _get(
    connection: Connection, entry_id: uuid.UUID, visible_to: uuid.UUID | None = None
) -> StoredConfiguration:
    query = select(configurations).where(configurations.c.id == entry_id)
    if visible_to is not None:
        query = query.where(configurations.c.owner_id == visible_to)
    row = connection.execute(query).first()
    if row is None:
        raise NoSuchConfiguration(str(entry_id))
    return _entry(row)


def _entry(row: Row[Any]) -> StoredConfiguration:
    return StoredConfiguration(
        id=row.id,
        job_id=row.job_id,
        document=row.document,
        transfers=row.transfers,
        created_at=row.created_at,
    )


def _known(
    connection: Connection, document: Mapping[str, Any], owner_id: uuid.UUID | None
) -> uuid.UUID | None:
    """The id of an owner's entry with this configuration."""
    same_document = configurations.c.sha256 == digest(document)
    same_owner = configurations.c.owner_id == owner_id  # IS NULL for None
    return connection.execute(select(configurations.c.id).where(same_owner, same_document)).scalar()
