"""API keys: shown once, found by their secret alone, and closed for good."""

import hashlib
import json
import uuid
from datetime import timedelta

import pytest
from sqlalchemy import delete, func, select, update

from storage.configurations import ConfigurationStore
from storage.database import Database
from storage.jobs import JobStore
from storage.keys import MOST_LOGINS, KeyStore, NoSuchKey, SessionStore, key_digest
from storage.records import NewStage, StageKind
from storage.rows import JobFilter
from storage.tables import configurations, jobs, keys

WEIRD = [
    "", " ", "pho_", "\ud800", "pho_\udfff\ud800", "\0", "pho_" + "a" * 2_000_000, "' OR 1=1 --",
    "é" * 50, "%s %(x)s :x {x}",
]  # fmt: skip


@pytest.fixture(scope="module")
def database(shared_database: Database) -> Database:
    """One for all tests of this file."""
    return shared_database


@pytest.fixture
def store(database: Database) -> KeyStore:
    """No keys yet, and no jobs."""
    with database.transaction() as connection:
        for table in (configurations, jobs, keys):
            connection.execute(delete(table))
    return KeyStore(database)


def test_a_key_is_found_by_its_secret_with_all_that_is_known_of_it(store: KeyStore) -> None:
    key, secret = store.create("mine", sees_all=True)

    assert store.find(secret) == key
    assert (key.name, key.sees_all, key.revoked_at) == ("mine", True, None)
    assert key.created_at.utcoffset() is not None


def test_secrets_differ_and_begin_with_what_is_shown_of_them(store: KeyStore) -> None:
    made = [store.create("same name", sees_all=False) for _ in range(20)]
    secrets = {secret for _, secret in made}

    assert len(secrets) == 20
    assert {len(secret) for secret in secrets} == {len("pho_") + 43}  # 32 bytes in base64
    assert all(secret.startswith(key.prefix) for key, secret in made)
    assert all(key.prefix.startswith("pho_") for key, _ in made)


def test_of_a_secret_only_the_hash_and_the_beginning_are_kept(store: KeyStore) -> None:
    key, secret = store.create("mine", sees_all=False)
    with store.database.transaction() as connection:
        (row,) = connection.exec_driver_sql("SELECT to_jsonb(k)::text FROM pho.keys k").scalars()
        digest = connection.execute(select(keys.c.sha256)).scalar_one()

    assert secret[len(key.prefix) :] not in row
    assert secret[len(key.prefix) : len(key.prefix) + 8] not in row
    assert json.loads(row)["prefix"] == secret[:10]
    assert bytes(digest) == hashlib.sha256(secret.encode()).digest()


def test_keys_are_listed_oldest_first_revoked_ones_too(store: KeyStore) -> None:
    made = [store.create(name, sees_all=False)[0] for name in "bac"]
    revoked = store.revoke(made[1].prefix)

    assert store.all() == [made[0], revoked, made[2]]


def test_without_keys_none_is_listed_none_is_found_and_none_exists(store: KeyStore) -> None:
    assert store.all() == []
    assert store.find("pho_x") is None
    assert not store.exist()


@pytest.mark.parametrize("by", ["prefix", "id"])
def test_a_revoked_key_opens_nothing_and_stays_revoked(store: KeyStore, by: str) -> None:
    key, secret = store.create("mine", sees_all=False)
    other, other_secret = store.create("other", sees_all=False)
    revoked = store.revoke(str(getattr(key, by)))

    assert store.find(secret) is None
    assert store.find(other_secret) == other
    assert revoked.id == key.id
    assert revoked.revoked_at is not None
    assert store.revoke(key.prefix) == revoked
    assert store.exist()  # so the service stays closed


def test_a_key_has_so_many_logins_the_oldest_ends(store: KeyStore, database: Database) -> None:
    sessions, (key, _), (other, _) = (
        SessionStore(database), *(store.create(name, sees_all=False) for name in "ab")
    )  # fmt: skip
    theirs = sessions.begin(other.id, hours=1)
    tokens = [sessions.begin(key.id, hours=1) for _ in range(MOST_LOGINS + 2)]
    open_ones = [sessions.find(key_digest(token)) is not None for token in (theirs, *tokens)]

    assert open_ones == [True, False, False, *[True] * MOST_LOGINS]


def test_a_key_opens_nothing_from_its_expiry_on_nor_does_a_login_by_it(store: KeyStore) -> None:
    key, secret = store.create("short", sees_all=False, lasts=timedelta(hours=1))
    lasting, _ = store.create("lasting", sees_all=False)
    sessions = SessionStore(store.database)
    token = key_digest(sessions.begin(key.id, hours=24.0))
    before = store.find(secret), sessions.find(token), store.is_open(key.id)
    with store.database.transaction() as connection:
        past = func.now() - timedelta(seconds=1)
        connection.execute(update(keys).where(keys.c.id == key.id).values(expires_at=past))

    assert key.expires_at == key.created_at + timedelta(hours=1)
    assert before == (key, key, True)
    assert (store.find(secret), sessions.find(token), store.is_open(key.id)) == (None, None, False)
    assert key_digest(secret) not in store.digests()
    assert lasting.expires_at is None
    assert store.is_open(lasting.id)


def test_a_new_key_takes_over_jobs_library_rights_and_span_of_an_old_one(store: KeyStore) -> None:
    old, secret = store.create("mine", sees_all=True, lasts=timedelta(days=30))
    other, _ = store.create("other", sees_all=False)
    job, of_other = (submitted(store, owner, idempotency_key="one") for owner in (old.id, other.id))
    library = ConfigurationStore(store.database)
    library.add({"pattern": "0.5"}, transfers=[], owner_id=old.id)
    new, new_secret = store.rotate(old.prefix)
    lasting, _ = store.rotate(str(new.id), lasts=timedelta(days=1))

    assert (store.find(secret), store.find(new_secret)) == (None, None)
    assert (new.name, new.sees_all) == ("mine", True)
    assert new.expires_at == new.created_at + timedelta(days=30)
    assert lasting.expires_at == lasting.created_at + timedelta(days=1)
    assert [j.id for j in JobStore(store.database).page(JobFilter(visible_to=lasting.id))] == [job]
    assert submitted(store, lasting.id, idempotency_key="one") == job
    assert submitted(store, other.id, idempotency_key="one") == of_other
    assert library.count(lasting.id) == 1


def test_a_key_gets_the_jobs_of_nobody_and_none_of_anothers(store: KeyStore) -> None:
    key, _ = store.create("mine", sees_all=False)
    other, _ = store.create("other", sees_all=False)
    own, of_other = (submitted(store, owner, idempotency_key="one") for owner in (key.id, other.id))
    alone = [submitted(store, None, idempotency_key=name) for name in ("one", "two")]
    library = ConfigurationStore(store.database)
    for owner in (key.id, None):
        library.add({"pattern": "0.5"}, transfers=[], owner_id=owner)
    library.add({"pattern": "2:4"}, transfers=[], owner_id=None)
    before = store.without_key()
    taken = store.take_over(key.prefix)

    assert (before, taken, store.without_key()) == (2, (key, 2), 0)
    mine = JobStore(store.database).page(JobFilter(visible_to=key.id))
    assert [j.id for j in mine] == [*alone[::-1], own]
    assert submitted(store, key.id, idempotency_key="one") == own
    assert submitted(store, key.id, idempotency_key="two") == alone[1]
    assert of_other not in [j.id for j in mine]
    assert (library.count(key.id), library.count(None)) == (2, 1)


def submitted(store: KeyStore, owner: uuid.UUID | None, *, idempotency_key: str) -> uuid.UUID:
    """A job of a key, or of nobody; the same for the same Idempotency-Key."""
    job, _ = JobStore(store.database).submit(
        {"model": "org/name"}, name="n", first=NewStage(kind=StageKind.CALIBRATE), trials=1,
        max_attempts=1, owner_id=owner, idempotency_key=idempotency_key,
    )  # fmt: skip
    return job.id


@pytest.mark.parametrize(
    "prefix", ["", "pho_", "pho_%", "%", "nobody", str(uuid.UUID(int=0)), "not-a-uuid-but-long" * 9]
)
def test_what_names_no_key_revokes_none(store: KeyStore, prefix: str) -> None:
    key, secret = store.create("mine", sees_all=False)
    with pytest.raises(NoSuchKey):
        store.revoke(prefix)

    assert store.find(secret) == key


def test_revoke_by_a_prefix_of_two(store: KeyStore) -> None:
    made = [store.create(name, sees_all=False) for name in "ab"]
    with store.database.transaction() as connection:
        connection.execute(update(keys).values(prefix="pho_same00"))
    with pytest.raises(NoSuchKey):
        store.revoke("pho_same00")
    store.revoke(str(made[0][0].id))

    assert [store.find(secret) is None for _, secret in made] == [True, False]


def test_whatever_somebody_sends_as_a_key_is_none_and_no_error(store: KeyStore) -> None:
    store.create("mine", sees_all=True)

    assert [store.find(secret) for secret in WEIRD] == [None] * len(WEIRD)


def test_a_secret_is_found_whole_and_as_it_is_or_not_at_all(store: KeyStore) -> None:
    key, secret = store.create("mine", sees_all=True)
    near = [secret[:-1], secret + " ", " " + secret, secret.swapcase(), key.prefix, str(key.id)]

    assert [store.find(text) for text in near] == [None] * len(near)


@pytest.mark.parametrize("name", ["", "é" * 1000, "'; DROP TABLE keys", "%s\n{x}"])
def test_a_key_may_be_called_anything(store: KeyStore, name: str) -> None:
    key, _ = store.create(name, sees_all=False)

    assert [k.name for k in store.all()] == [key.name] == [name]
