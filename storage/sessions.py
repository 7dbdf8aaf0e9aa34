"""
Logins of browsers: an opaque token each, which stands for a key until it expires.

As of keys, only the SHA-256 of a token is stored; it has 256 random bits.
"""

import secrets
import uuid
from datetime import timedelta

from sqlalchemy import delete, func, insert, select

from storage.database import Database
from storage.keys import KEY_COLUMNS, OPENS, Key, key_digest
from storage.tables import keys, sessions


class SessionStore:
    """
    All logins of a database.

    Args:
        database: Migrated.
    """

    def __init__(self, database: Database) -> None:
        self.database = database

    def begin(self, key_id: uuid.UUID, *, hours: float) -> str:
        """
        Log in with a key, and forget the logins that have expired.

        Args:
            key_id: A key that opens something.
            hours: How long the login lasts.

        Returns:
            The token, which cannot be had again.
        """
        token = secrets.token_urlsafe(32)
        with self.database.transaction() as connection:
            connection.execute(delete(sessions).where(sessions.c.expires_at <= func.now()))
            connection.execute(
                insert(sessions).values(
                    sha256=key_digest(token),
                    key_id=key_id,
                    expires_at=func.now() + timedelta(hours=hours),
                )
            )
        return token

    def find(self, sha256: bytes) -> Key | None:
        """
        The key that a login stands for, if neither it nor the key has ended.

        Args:
            sha256: SHA-256 of the token, as :func:`storage.keys.key_digest` gives it.
        """
        query = (
            select(*KEY_COLUMNS)
            .join(sessions, sessions.c.key_id == keys.c.id)
            .where(
                sessions.c.sha256 == sha256,
                sessions.c.expires_at > func.now(),
                OPENS,
            )
        )
        with self.database.transaction() as connection:
            row = connection.execute(query).first()
            return None if row is None else Key(**row._mapping)

    def end(self, sha256: bytes) -> None:
        """Log out; a login that is not there has ended already."""
        with self.database.transaction() as connection:
            connection.execute(delete(sessions).where(sessions.c.sha256 == sha256))
