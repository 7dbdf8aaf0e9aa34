"""
API keys with their quotas and logins of browsers: shown once, stored as hashes.
"""

import hashlib
import secrets
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import Connection, and_, delete, exists, func, insert, or_, select, update

from storage.database import Database
from storage.tables import configurations, jobs, keys, sessions, texts, work

_PREFIX = "pho_"
MOST_LOGINS = 20  # of a key
_SHOWN = 10  # characters of a key that tell it apart from others


@dataclass(frozen=True)
class Quota:
    """How many tokens the jobs of a key may plan to run models over."""

    tokens: int
    span: timedelta  # In any stretch of time that is so long

    def __str__(self) -> str:
        days = self.span / timedelta(days=1)
        time = f"{days:g} days" if days >= 2 else f"{days * 24:g} hours"
        return f"{self.tokens:,} tokens in {time}"


@dataclass(frozen=True, kw_only=True)
class Key:
    id: uuid.UUID
    name: str
    prefix: str  # How the key begins
    sees_all: bool  # Whether it reaches the jobs of all keys, and the dashboard
    scrape_only: bool  # Whether it reads the metrics, and nothing else
    created_at: datetime
    revoked_at: datetime | None  # Since when it opens nothing
    expires_at: datetime | None  # From when on it opens nothing; None is never
    quota: Quota | None  # None: its jobs may plan as much as they like


class QuotaExceeded(Exception):
    """A job would plan more tokens than the quota of its key leaves."""

    def __init__(
        self, quota: Quota, *, used: int, planned_tokens: int, free_at: datetime | None, name: str
    ) -> None:
        when = (
            "That is more than the whole quota: ask for fewer or shorter windows or fewer "
            "candidates, or let the operator raise it (pho keys quota)."
            if free_at is None
            else f"Enough is free from {free_at.astimezone(UTC):%Y-%m-%d %H:%M} UTC on."
        )
        super().__init__(
            f"the quota of key {name!r} is {quota}. {used:,} tokens are used, and this is "
            f"planned to take {planned_tokens:,} tokens. {when}"
        )
        self.free_at = free_at  # None: never


class NoSuchKey(LookupError):
    """No key has this id or prefix."""


class KeyStore:
    """All keys of a database."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def create(
        self, name: str, *, sees_all: bool, scrape_only: bool = False,
        lasts: timedelta | None = None, quota: Quota | None = None,
    ) -> tuple[Key, str]:  # fmt: skip
        rights = {"sees_all": sees_all, "scrape_only": scrape_only, **_columns(quota)}
        with self.database.transaction() as connection:
            return _create(connection, name, rights, lasts=lasts)

    def rotate(self, prefix: str, *, lasts: timedelta | None = None) -> tuple[Key, str]:
        """
        Replace a key by a new one, which has its name and its rights and takes over all its jobs
        and its entries of the library. The old one is revoked.
        """
        old = self._chosen(prefix)
        if lasts is None and old.expires_at is not None:
            lasts = old.expires_at - old.created_at
        with self.database.transaction() as connection:
            rights = {"sees_all": old.sees_all, "scrape_only": old.scrape_only}
            rights |= _columns(old.quota)
            made = _create(connection, old.name, rights, lasts=lasts)
            _revoke(connection, old.id)
            _give(connection, old.id, made[0].id)
            key_work = update(work).where(work.c.key_id == old.id)
            connection.execute(key_work.values(key_id=made[0].id))
            return made

    def set_quota(self, prefix: str, quota: Quota | None) -> Key:
        """Give a key a quota, which counts what was planned under the one before, or none."""
        key = self._chosen(prefix)
        if key.scrape_only:
            raise NoSuchKey(prefix)
        change = update(keys).where(keys.c.id == key.id).values(**_columns(quota))
        with self.database.transaction() as connection:
            if quota is None:
                connection.execute(delete(work).where(work.c.key_id == key.id))
            return _key(connection.execute(change.returning(*KEY_COLUMNS)).one())

    def used(self) -> dict[uuid.UUID, int]:
        """How many tokens of its quota each key has used that has one and has used some."""
        query = (
            select(work.c.key_id, func.sum(work.c.amount))
            .join(keys, keys.c.id == work.c.key_id)
            .where(work.c.planned_at > func.now() - keys.c.quota_span)
            .group_by(work.c.key_id)
        )
        with self.database.transaction() as connection:
            return {key_id: int(amount) for key_id, amount in connection.execute(query)}

    def logins(self) -> dict[uuid.UUID, int]:
        """How many browsers are logged in with each key, if any are."""
        query = select(sessions.c.key_id, func.count()).join(keys, keys.c.id == sessions.c.key_id)
        query = query.where(sessions.c.expires_at > func.now(), OPENS).group_by(sessions.c.key_id)
        with self.database.transaction() as connection:
            return {row.key_id: int(row[1]) for row in connection.execute(query)}

    def take_over(self, prefix: str) -> tuple[Key, int]:
        """Give a key the jobs that were submitted without one, and their entries of the library."""
        key = self._chosen(prefix)
        if key.revoked_at is not None or key.scrape_only:
            raise NoSuchKey(prefix)
        with self.database.transaction() as connection:
            return key, _give(connection, None, key.id)

    def without_key(self) -> int:
        """How many jobs were submitted without a key, and taken over by none."""
        with self.database.transaction() as connection:
            count = select(func.count()).where(jobs.c.owner_id.is_(None))
            return int(connection.execute(count).scalar_one())

    def all(self) -> list[Key]:
        """All keys, revoked ones too, oldest first."""
        with self.database.transaction() as connection:
            rows = connection.execute(select(*KEY_COLUMNS).order_by(keys.c.created_at, keys.c.id))
            return [_key(row) for row in rows]

    def revoke(self, prefix: str) -> Key:
        """Close a key. Its jobs stay."""
        with self.database.transaction() as connection:
            return _revoke(connection, self._chosen(prefix).id)

    def _chosen(self, prefix: str) -> Key:
        chosen = [k for k in self.all() if str(k.id) == prefix or k.prefix == prefix]
        if len(chosen) != 1:
            raise NoSuchKey(prefix)
        return chosen[0]

    def find(self, secret: str) -> Key | None:
        """The key that this secret is, if it is one that opens something."""
        query = select(*KEY_COLUMNS).where(keys.c.sha256 == key_digest(secret), OPENS)
        with self.database.transaction() as connection:
            row = connection.execute(query).first()
            return None if row is None else _key(row)

    def is_open(self, key_id: uuid.UUID) -> bool:
        """Whether a key is there, and neither revoked nor expired."""
        query = select(keys.c.id).where(keys.c.id == key_id, OPENS)
        with self.database.transaction() as connection:
            return connection.execute(query).first() is not None

    def digests(self) -> set[bytes]:
        """Return the digests of all keys that open something, by :func:`key_digest`."""
        query = select(keys.c.sha256).where(OPENS)
        with self.database.transaction() as connection:
            return {bytes(row.sha256) for row in connection.execute(query)}

    def let_in(self) -> bool:
        """Whether a key opens the jobs of anybody: those that only scrape do not."""
        query = select(keys.c.id).where(OPENS, ~keys.c.scrape_only).limit(1)
        with self.database.transaction() as connection:
            return connection.execute(query).first() is not None

    def exist(self) -> bool:
        """Whether a key was ever made, even if all are revoked or have expired."""
        with self.database.transaction() as connection:
            return connection.execute(select(keys.c.id).limit(1)).first() is not None


_QUOTA = (keys.c.quota, keys.c.quota_span)
KEY_COLUMNS = (
    keys.c.id, keys.c.name, keys.c.prefix, keys.c.sees_all, keys.c.scrape_only, keys.c.created_at,
    keys.c.revoked_at, keys.c.expires_at, *_QUOTA,
)  # fmt: skip
# What holds of a key that is neither revoked nor expired.
OPENS = and_(
    keys.c.revoked_at.is_(None), or_(keys.c.expires_at.is_(None), keys.c.expires_at > func.now())
)


def key_digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).digest()


def _columns(quota: Quota | None) -> dict[str, Any]:
    values = (None, None) if quota is None else (quota.tokens, quota.span)
    return {column.name: value for column, value in zip(_QUOTA, values, strict=True)}


def _key(row: Any) -> Key:
    """The key of a row of :data:`KEY_COLUMNS`."""
    columns = dict(row._mapping)
    tokens, span = (columns.pop(column.name) for column in _QUOTA)
    return Key(**columns, quota=None if tokens is None else Quota(tokens, span))


# Work counts from when it is planned, whatever becomes of its job: else a key that deletes its jobs
# would have no quota. What a job has not used that ends before its first stage does is given back.
def charge(connection: Connection, key_id: uuid.UUID, job_id: uuid.UUID, tokens: int) -> None:
    """Count tokens that are planned now, or raise QuotaExceeded if the key's quota has no room."""
    key_row = select(*KEY_COLUMNS).where(keys.c.id == key_id)
    # One after the other, so that none slips past the quota.
    key = _key(connection.execute(key_row.with_for_update(key_share=True)).one())
    if (quota := key.quota) is None:
        return
    begins = func.now() - quota.span
    connection.execute(delete(work).where(work.c.key_id == key_id, work.c.planned_at <= begins))
    counted = select(work.c.amount, work.c.planned_at).where(work.c.key_id == key_id)
    counted_work = connection.execute(counted.order_by(work.c.planned_at, work.c.id)).all()
    left, free_at = quota.tokens - sum(row.amount for row in counted_work), None
    if tokens > left:
        room = left
        for row in counted_work:
            room += row.amount
            if room >= tokens:
                free_at = row.planned_at + quota.span
                break
        raise QuotaExceeded(
            quota, used=quota.tokens - left, planned_tokens=tokens, free_at=free_at, name=key.name
        )
    connection.execute(insert(work).values(key_id=key_id, job_id=job_id, amount=tokens))


def refund(connection: Connection, job_id: uuid.UUID, *, used: int = 0) -> None:
    """Count no more than was used of what was planned for a job."""
    planned = select(work.c.key_id, func.sum(work.c.amount), func.min(work.c.planned_at))
    planned = planned.where(work.c.job_id == job_id).group_by(work.c.key_id)
    rows = connection.execute(planned).all()
    connection.execute(delete(work).where(work.c.job_id == job_id))
    for key_id, amount, planned_at in rows if used else ():
        values = {"job_id": job_id, "amount": min(used, amount), "planned_at": planned_at}
        connection.execute(insert(work).values(key_id=key_id, **values))


def recharge(connection: Connection, key_id: uuid.UUID, job_id: uuid.UUID, tokens: int) -> None:
    """Count again what was given back of a job that starts over."""
    counted = select(func.coalesce(func.sum(work.c.amount), 0)).where(work.c.job_id == job_id)
    missing = tokens - int(connection.execute(counted).scalar_one())
    if missing > 0:
        charge(connection, key_id, job_id, missing)


def _create(
    connection: Connection, name: str, rights: dict[str, Any], *, lasts: timedelta | None
) -> tuple[Key, str]:
    secret = _PREFIX + secrets.token_urlsafe(32)
    values = {
        "id": uuid.uuid4(),
        "name": name,
        "prefix": secret[:_SHOWN],
        "sha256": key_digest(secret),
        **rights,
        "expires_at": None if lasts is None else func.now() + lasts,
    }
    row = connection.execute(insert(keys).values(values).returning(*KEY_COLUMNS)).one()
    return _key(row), secret


def _revoke(connection: Connection, key_id: uuid.UUID) -> Key:
    row = connection.execute(
        update(keys)
        .where(keys.c.id == key_id)
        .values(revoked_at=func.coalesce(keys.c.revoked_at, func.now()))
        .returning(*KEY_COLUMNS)
    ).one()
    return _key(row)


def _give(connection: Connection, giver: uuid.UUID | None, taker: uuid.UUID) -> int:
    """Give a key what another has, or what nobody has; returns the number of jobs."""
    # A job keeps its Idempotency-Key unless the taker has used that, too. A configuration that the
    # taker has already stays where it is.
    theirs, other = jobs.alias(), configurations.alias()
    connection.execute(
        update(jobs)
        .where(
            jobs.c.owner_id == giver,  # IS NULL for None
            exists().where(
                theirs.c.owner_id == taker, theirs.c.idempotency_key == jobs.c.idempotency_key
            ),
        )
        .values(idempotency_key=None)
    )
    moved = connection.execute(update(jobs).where(jobs.c.owner_id == giver).values(owner_id=taker))
    connection.execute(
        update(configurations)
        .where(
            configurations.c.owner_id == giver,
            ~exists().where(other.c.owner_id == taker, other.c.sha256 == configurations.c.sha256),
        )
        .values(owner_id=taker)
    )
    theirs = texts.alias()
    same = exists().where(theirs.c.owner_id == taker, theirs.c.id == texts.c.id)
    connection.execute(delete(texts).where(texts.c.owner_id == giver, same))
    connection.execute(update(texts).where(texts.c.owner_id == giver).values(owner_id=taker))
    return moved.rowcount


# Logins of browsers: an opaque token each, which stands for a key until it expires.
class SessionStore:
    """All logins of a database."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def begin(self, key_id: uuid.UUID, *, hours: float) -> str:
        """Log in with a key, and forget the logins that have expired, and the oldest of many."""
        token = secrets.token_urlsafe(32)
        same_key = sessions.c.key_id == key_id
        newest = sessions.c.expires_at.desc()
        many = select(sessions.c.sha256).where(same_key).order_by(newest).offset(MOST_LOGINS - 1)
        with self.database.transaction() as connection:
            connection.execute(delete(sessions).where(sessions.c.expires_at <= func.now()))
            connection.execute(delete(sessions).where(sessions.c.sha256.in_(many)))
            connection.execute(
                insert(sessions).values(
                    sha256=key_digest(token),
                    key_id=key_id,
                    expires_at=func.now() + timedelta(hours=hours),
                )
            )
        return token

    def find(self, sha256: bytes) -> Key | None:
        """The key that a login stands for, if neither it nor the key has ended."""
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
            return None if row is None else _key(row)

    def end(self, sha256: bytes) -> None:
        """Log out; a login that is not there has ended already."""
        with self.database.transaction() as connection:
            connection.execute(delete(sessions).where(sessions.c.sha256 == sha256))
