"""API keys: shown once, found by their secret alone, and closed for good."""

import hashlib
import json
import threading
import uuid
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import delete, func, select, update

from storage.configurations import ConfigurationStore
from storage.jobs import JobStore, NewJob
from storage.keys import (
    MOST_LOGINS,
    KeyStore,
    NoSuchKey,
    Quota,
    QuotaExceeded,
    SessionStore,
    key_digest,
)
from storage.listing import JobFilter
from storage.records import NewStage, StageKind
from storage.tables import configurations, jobs, keys, stages, work

WEIRD = [
    "", " ", "pho_", "\ud800", "pho_\udfff\ud800", "\0", "pho_" + "a" * 2_000_000, "' OR 1=1 --",
    "é" * 50, "%s %(x)s :x {x}",
]  # fmt: skip


@pytest.fixture(scope="module")
def database(shared_database):
    return shared_database


@pytest.fixture
def store(database):
    """No keys yet, and no jobs."""
    with database.transaction() as connection:
        for table in (configurations, jobs, keys):
            connection.execute(delete(table))
    return KeyStore(database)


def test_a_key_is_found_by_its_secret_with_all_that_is_known_of_it(store):
    key, secret = store.create("mine", sees_all=True)

    assert store.find(secret) == key
    assert (key.name, key.sees_all, key.revoked_at) == ("mine", True, None)
    assert key.created_at.utcoffset() is not None


def test_secrets_differ_and_begin_with_what_is_shown_of_them(store):
    made = [store.create("same name", sees_all=False) for _ in range(20)]
    secrets = {secret for _, secret in made}

    assert len(secrets) == 20
    assert {len(secret) for secret in secrets} == {len("pho_") + 43}  # 32 bytes in base64
    assert all(secret.startswith(key.prefix) for key, secret in made)
    assert all(key.prefix.startswith("pho_") for key, _ in made)


def test_of_a_secret_only_the_hash_and_the_beginning_are_kept(store):
    key, secret = store.create("mine", sees_all=False)
    with store.database.transaction() as connection:
        (row,) = connection.exec_driver_sql("SELECT to_jsonb(k)::text FROM pho.keys k").scalars()
        digest = connection.execute(select(keys.c.sha256)).scalar_one()

    assert secret[len(key.prefix) :] not in row
    assert secret[len(key.prefix) : len(key.prefix) + 8] not in row
    assert json.loads(row)["prefix"] == secret[:10]
    assert bytes(digest) == hashlib.sha256(secret.encode()).digest()


def test_keys_are_listed_oldest_first_revoked_ones_too(store):
    assert store.all() == []
    assert not store.exist()
    made = [store.create(name, sees_all=False)[0] for name in "bac"]
    revoked = store.revoke(made[1].prefix)

    assert store.all() == [made[0], revoked, made[2]]


@pytest.mark.parametrize("by", ["prefix", "id"])
def test_a_revoked_key_opens_nothing_and_stays_revoked(store, by):
    key, secret = store.create("mine", sees_all=False)
    other, other_secret = store.create("other", sees_all=False)
    revoked = store.revoke(str(getattr(key, by)))

    assert store.find(secret) is None
    assert store.find(other_secret) == other
    assert revoked.id == key.id
    assert revoked.revoked_at is not None
    assert store.revoke(key.prefix) == revoked
    assert store.exist()  # so the service stays closed


def test_a_key_has_so_many_logins_the_oldest_ends(store, database):
    sessions, (key, _), (other, _) = (
        SessionStore(database), *(store.create(name, sees_all=False) for name in "ab")
    )  # fmt: skip
    theirs = sessions.begin(other.id, hours=1)
    tokens = [sessions.begin(key.id, hours=1) for _ in range(MOST_LOGINS + 2)]
    open_ones = [sessions.find(key_digest(token)) is not None for token in (theirs, *tokens)]

    assert open_ones == [True, False, False, *[True] * MOST_LOGINS]
    assert store.logins() == {other.id: 1, key.id: MOST_LOGINS}
    store.revoke(key.prefix)
    assert store.logins() == {other.id: 1}


def test_a_key_opens_nothing_from_its_expiry_on_nor_does_a_login_by_it(store):
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


def test_a_new_key_takes_over_jobs_library_rights_and_span_of_an_old_one(store):
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


def test_a_key_gets_the_jobs_of_nobody_and_none_of_anothers(store):
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


def submitted(store, owner, *, idempotency_key=None, tokens=0, **spec):
    """A job of a key, or of nobody; the same for the same Idempotency-Key."""
    new = NewJob(
        spec={"model": "org/name", **spec}, name="n", trials=1,
        stages=[NewStage(kind=StageKind.CALIBRATE)], max_attempts=1,
        idempotency_key=idempotency_key, tokens=tokens,
    )  # fmt: skip
    job, _ = JobStore(store.database).submit(new, owner_id=owner)
    return job.id


WEEK = Quota(100, timedelta(days=7))


def aged(store, job, by):
    """Let a job have been submitted earlier."""
    earlier = update(work).where(work.c.job_id == job).values(planned_at=work.c.planned_at - by)
    with store.database.transaction() as connection:
        connection.execute(earlier)


def test_a_job_above_the_quota_is_refused_until_enough_of_it_is_free(store):
    key, _ = store.create("team", sees_all=False, quota=WEEK)
    days = [6, 5, 1]
    for day, tokens in zip(days, (20, 30, 40), strict=True):
        aged(store, submitted(store, key.id, tokens=tokens), timedelta(days=day))
    with pytest.raises(QuotaExceeded) as refused:
        submitted(store, key.id, tokens=60)  # 10 are left; the two oldest give 50 back
    free_at = refused.value.free_at
    assert free_at is not None
    left = free_at - datetime.now(UTC)

    assert timedelta(days=2) - timedelta(minutes=5) < left <= timedelta(days=2)
    assert str(refused.value) == (
        "the quota of key 'team' is 100 tokens in 7 days. 90 tokens are used, and this is planned "
        f"to take 60 tokens. Enough is free from {free_at.astimezone(UTC):%Y-%m-%d %H:%M} UTC on."
    )
    assert store.used() == {key.id: 90}
    assert submitted(store, key.id, tokens=10)


def test_what_is_older_than_the_span_does_not_count_above_the_whole_quota_is_never_room(store):
    key, _ = store.create("team", sees_all=False, quota=WEEK)
    aged(store, submitted(store, key.id, tokens=100), timedelta(days=7))

    assert store.used() == {}
    assert submitted(store, key.id, tokens=100)
    assert store.used() == {key.id: 100}
    with pytest.raises(QuotaExceeded, match="more than the whole quota") as refused:
        submitted(store, key.id, tokens=101)
    assert refused.value.free_at is None
    assert JobStore(store.database).counts()[0] == {"queued": 2}


def test_only_what_no_worker_has_begun_is_given_back_a_repeated_request_counts_once(store):
    key, _ = store.create("team", sees_all=False, quota=WEEK)
    store_of_jobs = JobStore(store.database)
    begun, cancelled, _ = (
        submitted(store, key.id, tokens=n, idempotency_key=str(n)) for n in (30, 50, 50)
    )
    stage = store_of_jobs.get(begun).stages[0]
    entry = stage_entry(store, stage.id)
    assert store_of_jobs.claim(stage.id, entry, uuid.uuid4()) is not None
    for job in (begun, cancelled):
        store_of_jobs.ask(job, "cancel")
    with store_of_jobs.deleting(cancelled):
        pass

    assert store.used() == {key.id: 30}


def failed_at_once(store, job, step=None):
    """Let a worker fail at the first stage of a job, at some step."""
    jobs = JobStore(store.database)
    stage = jobs.get(job).stages[0]
    claim = jobs.claim(stage.id, stage_entry(store, stage.id), uuid.uuid4())
    assert claim is not None
    jobs.watch(claim, step)
    jobs.fail(claim, {"type": "TextError", "message": "too short"}, retry=False)
    return jobs


@pytest.mark.parametrize(
    ("step", "used"), [(None, 0), ({"title": "Calibrating", "done": 1, "steps": 9}, 24)]
)
def test_a_job_that_fails_in_its_first_stage_counts_for_what_it_used(store, step, used):
    key, _ = store.create("team", sees_all=False, quota=WEEK)
    calibration = {"samples": 3, "context_length": 8}
    job = submitted(store, key.id, tokens=60, calibration=calibration)
    jobs = failed_at_once(store, job, step)

    assert store.used() == ({key.id: used} if used else {})
    jobs.ask(job, "resume", tokens=60)
    assert store.used() == {key.id: 60}


def test_a_job_that_begins_anew_counts_again_and_waits_for_room(store):
    key, _ = store.create("team", sees_all=False, quota=WEEK)
    job = submitted(store, key.id, tokens=60)
    jobs = failed_at_once(store, job)
    submitted(store, key.id, tokens=50)

    with pytest.raises(QuotaExceeded):
        jobs.ask(job, "resume", tokens=60)
    assert jobs.get(job).state == "failed"


def stage_entry(store, stage_id):
    with store.database.transaction() as connection:
        chosen = select(stages.c.queue_id).where(stages.c.id == stage_id)
        return int(connection.execute(chosen).scalar_one())


def test_two_jobs_at_once_do_not_slip_past_the_quota(store):
    key, _ = store.create("team", sees_all=False, quota=WEEK)
    begin, refused = threading.Barrier(4), []

    def submit():
        begin.wait(10)
        try:
            submitted(store, key.id, tokens=40)
        except QuotaExceeded as error:
            refused.append(error)

    threads = [threading.Thread(target=submit) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)

    assert len(refused) == 2
    assert store.used() == {key.id: 80}


def test_a_quota_stays_when_its_key_is_rotated_and_can_be_changed(store):
    key, _ = store.create("team", sees_all=False, quota=WEEK)
    submitted(store, key.id, tokens=60)
    new, _ = store.rotate(key.prefix)
    more = store.set_quota(new.prefix, Quota(150, timedelta(days=1)))
    submitted(store, new.id, tokens=90)
    scraper, _ = store.create("prometheus", sees_all=False, scrape_only=True)

    assert (new.quota, more.quota) == (WEEK, Quota(150, timedelta(days=1)))
    assert store.used() == {new.id: 150}
    assert store.set_quota(new.prefix, None).quota is None
    assert submitted(store, new.id, tokens=10**9)
    assert store.used() == {}
    with pytest.raises(NoSuchKey):
        store.set_quota(scraper.prefix, WEEK)


def test_what_names_no_key_or_two_revokes_none(store):
    made = [store.create(name, sees_all=False) for name in "ab"]
    with store.database.transaction() as connection:
        connection.execute(update(keys).values(prefix="pho_same00"))
    nothing = ("", "pho_", "pho_%", "%", "nobody", str(uuid.UUID(int=0)), "not-a-uuid-but-long" * 9)
    for prefix in (*nothing, "pho_same00"):
        with pytest.raises(NoSuchKey):
            store.revoke(prefix)
    store.revoke(str(made[0][0].id))

    assert [store.find(secret) is None for _, secret in made] == [True, False]


def test_a_secret_is_found_whole_and_as_it_is_or_not_at_all(store):
    key, secret = store.create("mine", sees_all=True)
    near = [secret[:-1], secret + " ", " " + secret, secret.swapcase(), key.prefix, str(key.id)]

    assert {text: store.find(text) for text in [*near, *WEIRD]} == dict.fromkeys([*near, *WEIRD])


def test_a_key_may_be_called_anything(store):
    names = ["", "é" * 1000, "'; DROP TABLE keys", "%s\n{x}"]
    made = [store.create(name, sees_all=False)[0].name for name in names]

    assert [key.name for key in store.all()] == made == names
