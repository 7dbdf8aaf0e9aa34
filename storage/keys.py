"""
API keys: shown once, stored as their SHA-256.

A key has 256 random bits, so a plain hash keeps it as safe as a slow one would.
"""

import hashlib
import secrets
import uuid
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import func, insert, select, update

from storage.database import Database
from storage.tables import keys

_PREFIX = "pho_"
_SHOWN = 10  # characters of a key that tell it apart from others


@dataclass(frozen=True, kw_only=True)
class Key:
    """
    Attributes:
        prefix: How the key begins.
        sees_all: Whether it reaches the jobs of all keys, and the dashboard.
        revoked_at: Since when it opens nothing.
    """

    id: uuid.UUID
    name: str
    prefix: str
    sees_all: bool
    created_at: datetime
    revoked_at: datetime | None


class NoSuchKey(LookupError):
    """No key has this id or prefix."""


class KeyStore:
    """
    All keys of a database.

    Args:
        database: Migrated.
    """

    def __init__(self, database: Database) -> None:
        self.database = database

    def create(self, name: str, *, sees_all: bool) -> tuple[Key, str]:
        """Make a key; the second value is the secret, which cannot be had again."""
        secret = _PREFIX + secrets.token_urlsafe(32)
        values = {
            "id": uuid.uuid4(),
            "name": name,
            "prefix": secret[:_SHOWN],
            "sha256": key_digest(secret),
            "sees_all": sees_all,
        }
        with self.database.transaction() as connection:
            row = connection.execute(insert(keys).values(values).returning(*KEY_COLUMNS)).one()
            return Key(**row._mapping), secret

    def all(self) -> list[Key]:
        """All keys, revoked ones too, oldest first."""
        with self.database.transaction() as connection:
            rows = connection.execute(select(*KEY_COLUMNS).order_by(keys.c.created_at, keys.c.id))
            return [Key(**row._mapping) for row in rows]

    def revoke(self, prefix: str) -> Key:
        """
        Close a key. Its jobs stay.

        Args:
            prefix: How the key begins, or its id.

        Raises:
            NoSuchKey: None does, or more than one.
        """
        chosen = [k for k in self.all() if str(k.id) == prefix or k.prefix == prefix]
        if len(chosen) != 1:
            raise NoSuchKey(prefix)
        with self.database.transaction() as connection:
            row = connection.execute(
                update(keys)
                .where(keys.c.id == chosen[0].id)
                .values(revoked_at=func.coalesce(keys.c.revoked_at, func.now()))
                .returning(*KEY_COLUMNS)
            ).one()
            return Key(**row._mapping)

    def find(self, secret: str) -> Key | None:
        """The key that this secret is, if it is one and not revoked."""
        query = select(*KEY_COLUMNS).where(
            keys.c.sha256 == key_digest(secret), keys.c.revoked_at.is_(None)
        )
        with self.database.transaction() as connection:
            row = connection.execute(query).first()
            return None if row is None else Key(**row._mapping)

    def is_open(self, key_id: uuid.UUID) -> bool:
        """Whether a key is there, and not revoked."""
        query = select(keys.c.id).where(keys.c.id == key_id, keys.c.revoked_at.is_(None))
        with self.database.transaction() as connection:
            return connection.execute(query).first() is not None

    def digests(self) -> set[bytes]:
        """Return the digests of all keys that are not revoked, by :func:`key_digest`."""
        query = select(keys.c.sha256).where(keys.c.revoked_at.is_(None))
        with self.database.transaction() as connection:
            return {bytes(row.sha256) for row in connection.execute(query)}

    def exist(self) -> bool:
        """Whether a key was ever made, even if all are revoked."""
        with self.database.transaction() as connection:
            return connection.execute(select(keys.c.id).limit(1)).first() is not None


KEY_COLUMNS = (
    keys.c.id, keys.c.name, keys.c.prefix, keys.c.sees_all, keys.c.created_at, keys.c.revoked_at,
)  # fmt: skip


def key_digest(secret: str) -> bytes:
    """What is stored of a key."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).digest()
