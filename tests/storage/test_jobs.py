"""The store of jobs: what is promised to users and to workers, under threads and lost workers."""

import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import pytest
from sqlalchemy import delete, event, func, select, text, update

import storage.rows
from storage.claims import LOST_FOR_S, JobResult, worker_name
from storage.jobs import DEFAULT_LIMITS, JobStore, Limits, NewJob
from storage.keys import KeyStore
from storage.queue import enqueue
from storage.records import (
    Claim,
    IdempotencyKeyReused,
    JobState,
    LostClaim,
    NewStage,
    NoSuchJob,
    StageKind,
    StageState,
    StateConflict,
    TooManyJobs,
    TooManyTrials,
)
from storage.studies import DatabaseGone
from storage.tables import events, interval, jobs, keys, queue_workers, stages, workers

WORKER, OTHER = uuid.UUID(int=1), uuid.UUID(int=2)
CALIBRATE = NewStage(kind=StageKind.CALIBRATE, lock="bundle")
CONFIRM, FINISH = NewStage(kind=StageKind.CONFIRM), NewStage(kind=StageKind.FINISH)
ONE_JOB = Limits(unfinished=1)
ERROR = {"type": "Boom", "message": "it broke"}


@pytest.fixture(scope="module")
def database(shared_database):
    """One for all tests of this file."""
    return shared_database


@pytest.fixture
def store(database):
    """No jobs, keys or workers, and nothing in the queue."""
    with database.transaction() as connection:
        for table in (jobs, queue_workers, keys):
            connection.execute(delete(table))
        connection.exec_driver_sql("DELETE FROM procrastinate_jobs")
    return JobStore(database)


def submit(store, spec=None, **changes):
    """A new job of 10 trials, each stage with 3 attempts."""
    job, new = submit_any(store, spec, **changes)
    assert new
    return job


def submit_any(store, spec=None, *, owner_id=None, limits=DEFAULT_LIMITS, **changes):
    """The same, which may be an earlier job."""
    spec = {"trials": 10} if spec is None else spec
    new = NewJob(spec=spec, name="job", stages=[CALIBRATE], trials=10, max_attempts=3)
    return store.submit(replace(new, **changes), owner_id=owner_id, limits=limits)


def queue_id(store, stage_id):
    """The entry of the queue that stands for a stage."""
    with store.database.transaction() as connection:
        found = connection.execute(select(stages.c.queue_id).where(stages.c.id == stage_id))
        return int(found.scalar_one())


def claim(store, stage_id, worker=WORKER):
    """What a worker gets that the queue gave this stage; the entry waits no more."""
    entry = queue_id(store, stage_id)
    with store.database.transaction() as connection:
        given = {"id": entry}
        connection.execute(text("DELETE FROM procrastinate_jobs WHERE id = :id"), given)
    claimed = store.claim(stage_id, entry, worker)
    assert claimed is not None
    return claimed


def at_work(store, worker=WORKER, name="worker"):
    """The claim of a worker that is in the registry and has the entry of a new job in hand."""
    (stage,) = submit(store, stages=[NewStage(kind=CALIBRATE.kind)]).stages
    registration = store.enter_worker(worker, name=name, device="cpu", kinds=[CALIBRATE.kind])
    values = {"entry": queue_id(store, stage.id), "number": registration.number}
    query = "UPDATE procrastinate_jobs SET status = 'doing', worker_id = :number WHERE id = :entry"
    with store.database.transaction() as connection:
        connection.execute(text(query), values)
    return store.claim(stage.id, values["entry"], worker)


def late(store, worker, seconds):
    """A worker's last report was so long ago."""
    with store.database.transaction() as connection:
        connection.execute(
            update(queue_workers)
            .where(queue_workers.c.id == workers.c.number, workers.c.id == worker)
            .values(last_heartbeat=func.now() - interval(seconds))
        )


def begun(store, **changes):
    """The claim on the first stage of a new job."""
    return claim(store, submit(store, **changes).stages[0].id)


def islands(store, count, **changes):
    """The claims on all islands of a new job."""
    first = begun(store, **changes)
    searches = [NewStage(kind=StageKind.SEARCH, number=i) for i in range(count)]
    store.complete(first, {"provenance": {}}, then=searches)
    return [claim(store, s.id) for s in store.get(first.job.id).of_kind(StageKind.SEARCH)]


def ends(store, taken, best=None, *warnings):
    """A worker ends a job with a configuration."""
    job_result = JobResult(best={"b": 1} if best is None else best, warnings=warnings)
    return store.complete(taken, {"r": 1}, job_result=job_result, ended=True)


def succeeded(store, **changes):
    """A job of one island that has its configuration."""
    (search,) = islands(store, 1, **changes)
    store.complete(search, {}, then=[CONFIRM])
    confirm = claim(store, only(store, search.job.id, StageKind.CONFIRM))
    store.complete(confirm, {"finalists": []}, then=[FINISH])
    finish = claim(store, only(store, search.job.id, StageKind.FINISH))
    ends(store, finish, {"pattern": "2:4"}, "w")
    return store.get(search.job.id)


def searched(store, taken, *, trials=10):
    """End a search as a worker does: again, if another has moved the job; not if it is longer."""
    seen = store.get(taken.job.id)
    while seen.trials == trials:
        if store.complete(taken, {"r": 1}, then=[CONFIRM], seen=seen):
            return True
        seen = store.get(taken.job.id)
    return False


def only(store, job_id, kind):
    """The id of a job's only stage of this kind."""
    (stage,) = store.get(job_id).of_kind(kind)
    return stage.id


def remove(store, job_id, *, visible_to=None):
    """Delete a job that has nothing elsewhere."""
    with store.deleting(job_id, visible_to=visible_to):
        pass


def runnable(store):
    """The stages that an entry of the queue waits for and stands for, by id."""
    with store.database.transaction() as connection:
        rows = connection.execute(
            text(
                "SELECT s.id FROM procrastinate_jobs q JOIN pho.stages s ON s.queue_id = q.id "
                "AND s.id = (q.args->>'stage_id')::bigint WHERE q.status = 'todo' ORDER BY s.id"
            )
        )
        return [row.id for row in rows]


def everything(store):
    """All rows of all jobs, and of the queue."""
    with store.database.transaction() as connection:
        tables = [
            connection.execute(select(table).order_by(table.c.id)).all()
            for table in (jobs, stages, events)
        ]
        queue = connection.exec_driver_sql("SELECT * FROM procrastinate_jobs ORDER BY id").all()
        return [*tables, queue]


@contextmanager
def unchanged(store):
    """What happens inside leaves all rows of all jobs, and of the queue, as they are."""
    before = everything(store)
    yield
    assert everything(store) == before


def told(store, job_id):
    """What the events of a job say, in their order."""
    return [event.data for event in store.events(job_id)]


def together(*calls):
    """What the calls give that threads make at the same moment: values, or what was raised."""
    ready = threading.Barrier(len(calls))

    def run(call):
        ready.wait(10)
        try:
            return call()
        except Exception as error:  # the caller looks at it
            return error

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(run, calls))


def until_someone_waits_for_a_lock(store):
    """Return once a transaction is held up by another one."""
    waiting = text(
        "SELECT count(*) FROM pg_stat_activity "
        "WHERE wait_event_type = 'Lock' AND datname = current_database()"
    )
    for _ in range(500):
        with store.database.transaction() as connection:
            if connection.execute(waiting).scalar_one():
                return
        time.sleep(0.01)
    raise AssertionError("nobody waits for a lock")


class TestSubmit:
    """Jobs come in once, whole, and within their limits."""

    def test_a_new_job_is_queued_and_its_first_stage_waits(self, store):
        job = submit(store, priority=3)

        assert (job.state, job.stage, job.priority, job.trials) == (JobState.QUEUED, None, 3, 10)
        assert [(s.kind, s.state, s.attempt) for s in job.stages] == [
            (StageKind.CALIBRATE, StageState.WAITING, 0)
        ]
        assert runnable(store) == [job.stages[0].id]
        assert told(store, job.id) == [{"state": "queued"}]
        assert job.created_at.utcoffset() is not None

    def test_document_is_kept_in_its_order(self, store):
        spec = {"z": 1, "a": [0.1, None, True], "m": {"y": "\0 \ud800 é", "b": 1e-300}}
        job = submit(store, spec)

        assert store.get(job.id).spec == spec
        assert [*job.spec] == ["z", "a", "m"]
        assert [*job.spec["m"]] == ["y", "b"]

    def test_a_key_that_was_used_before_gives_the_job_of_that_time(self, store):
        first = submit(store, {"a": 1, "b": 2}, idempotency_key="k")
        with unchanged(store):
            assert submit_any(store, {"b": 2, "a": 1}, idempotency_key="k") == (first, False)
        job = submit(store, {"trials": 10}, idempotency_key="extended")
        store.ask(job.id, "extend", trials=5)
        again = submit_any(store, {"trials": 10}, idempotency_key="extended")

        assert again == (store.get(job.id), False)

    def test_requests_at_once_with_the_same_key_make_one_job_of_one_document(self, store):
        same = together(*[lambda: submit_any(store, idempotency_key="k")] * 8)
        others = together(
            *(lambda n=n: submit_any(store, {"n": n}, idempotency_key="o") for n in range(6))
        )
        (won,) = (answer for answer in others if isinstance(answer, tuple))

        assert sorted(new for _, new in same) == [False] * 7 + [True]
        assert len({job.id for job, _ in same}) == 1
        assert [type(a) for a in others].count(IdempotencyKeyReused) == 5
        assert [job.spec for job in store.page()] == [won[0].spec, same[0][0].spec]
        assert len(runnable(store)) == 2

    def test_same_key_while_its_job_is_deleted(self, store):
        old = submit(store, idempotency_key="k")
        store.ask(old.id, "cancel")
        engine, deleted = store.database.engine, []

        def delete_once(_, __, statement, *___):
            if statement.startswith("INSERT INTO pho.jobs") and not deleted:
                deleted.append(old.id)
                remove(store, old.id)  # on another connection

        event.listen(engine, "after_cursor_execute", delete_once)
        try:
            job, new = submit_any(store, idempotency_key="k")
        finally:
            event.remove(engine, "after_cursor_execute", delete_once)

        assert new
        assert [j.id for j in store.page()] == [job.id]

    def test_keys_and_limits_of_owners_are_their_own(self, store):
        owners = [KeyStore(store.database).create(n, sees_all=False)[0].id for n in "ab"]
        for owner in [None, *owners]:
            submit(store, {"of": str(owner)}, owner_id=owner, limits=ONE_JOB, idempotency_key="k")

        assert len(store.page()) == 3

    def test_the_job_over_the_limit_leaves_nothing_behind(self, store):
        two = Limits(unfinished=2)
        job, _ = (submit(store, limits=two) for _ in range(2))
        with unchanged(store), pytest.raises(TooManyJobs):
            submit_any(store, {"other": 1}, limits=two, idempotency_key="k")
        store.ask(job.id, "cancel")

        job = submit(store, limits=two, idempotency_key="k")
        assert job.state is JobState.QUEUED
        assert submit_any(store, limits=two, idempotency_key="k") == (job, False)

    def test_limit_counts_what_is_not_over(self, store):
        succeeded(store)
        store.fail(begun(store), ERROR, retry=False)
        store.ask(submit(store).id, "cancel")
        store.ask(submit(store, limits=ONE_JOB).id, "pause")
        with pytest.raises(TooManyJobs):
            submit_any(store, limits=ONE_JOB)

        assert len(store.page()) == 4

    def test_limit_at_once(self, store, monkeypatch):
        counted = threading.Barrier(2)

        def enqueue_after_both(*args, **kwargs):
            with suppress(threading.BrokenBarrierError):  # the other one waits for us: as it should
                counted.wait(1)
            return enqueue(*args, **kwargs)

        monkeypatch.setattr(storage.rows, "enqueue", enqueue_after_both)
        answers = together(*[lambda: submit_any(store, limits=ONE_JOB)] * 2)

        assert [type(a) for a in answers].count(TooManyJobs) == 1
        assert len(store.page()) == 1

    def test_cut_before_the_commit(self, store, monkeypatch):
        """A job is there as a whole, or not at all."""

        def cut(connection, *args, **kwargs):
            number = enqueue(connection, *args, **kwargs)
            pid = connection.exec_driver_sql("SELECT pg_backend_pid()").scalar_one()
            with store.database.transaction() as other:
                other.execute(select(func.pg_terminate_backend(pid, 5000)))
            return number

        monkeypatch.setattr(storage.rows, "enqueue", cut)
        with unchanged(store), pytest.raises(DatabaseGone):
            submit(store)


class TestReading:
    """Pages, and who sees what."""

    def test_page_by_page_each_job_comes_once_though_new_ones_arrive(self, store):
        made = [submit(store) for _ in range(5)]
        seen = []
        while page := store.page(before=seen[-1].number if seen else None, limit=2):
            seen += page
            submit(store)

        assert [job.id for job in seen] == [job.id for job in reversed(made)]
        assert len({job.name for job in made}) == 5  # though their documents are the same

    @pytest.mark.parametrize("owned", [False, True])
    def test_what_a_key_may_not_see_is_not_there(self, store, owned):
        mine, yours = (KeyStore(store.database).create(n, sees_all=False)[0].id for n in "ab")
        job = submit(store, owner_id=yours if owned else None)
        for call in (
            lambda: store.get(job.id, visible_to=mine),
            lambda: store.ask(job.id, "cancel", visible_to=mine),
            lambda: store.ask(job.id, "extend", visible_to=mine, trials=1),
            lambda: remove(store, job.id, visible_to=mine),
        ):
            with unchanged(store), pytest.raises(NoSuchJob):
                call()


class TestClaim:
    """A stage is one worker's, until it is another's."""

    def test_the_first_claim_sets_the_job_running(self, store):
        job = submit(store)
        taken = claim(store, job.stages[0].id)

        assert (taken.attempt, taken.stage.state) == (1, StageState.RUNNING)
        assert (taken.stage.worker_id, taken.stage.failures) == (WORKER, 0)
        assert (taken.job.state, taken.job.stage) == (JobState.RUNNING, StageKind.CALIBRATE)
        assert taken.job == store.get(job.id)
        assert taken.job.started_at is not None
        assert told(store, job.id)[1:] == [{"stage": "calibrate"}, {"state": "running"}]

    def test_an_entry_gives_a_right_to_its_own_stage_alone(self, store):
        one, two = islands(store, 2)
        with unchanged(store):
            assert store.claim(one.stage.id, queue_id(store, two.stage.id), OTHER) is None

    def test_outdated_entry_and_a_dead_worker(self, store):
        job = submit(store)
        stage = job.stages[0].id
        outdated = queue_id(store, stage)
        store.ask(job.id, "pause")
        store.ask(job.id, "resume")
        taken = claim(store, stage)

        assert store.claim(stage, outdated, OTHER) is None
        assert store.watch(taken) is JobState.RUNNING
        assert store.get(job.id).stages[0].failures == 0

    def test_a_job_that_goes_while_a_claim_waits_is_nothing_to_do(self, store):
        job = submit(store)
        stage = job.stages[0].id
        entry = queue_id(store, stage)
        with ThreadPoolExecutor(1) as pool:
            with store.database.transaction() as connection:
                connection.execute(delete(jobs).where(jobs.c.id == job.id))
                waiting = pool.submit(store.claim, stage, entry, WORKER)
                until_someone_waits_for_a_lock(store)

            assert waiting.result(10) is None

    def test_a_running_stage_that_comes_again_had_its_worker_die(self, store):
        first = begun(store)
        second = claim(store, first.stage.id, OTHER)

        assert (second.attempt, second.stage.failures) == (2, 1)
        assert second.stage.worker_id == OTHER
        assert second.stage.started_at == first.stage.started_at
        assert second.job.started_at == first.job.started_at
        assert [each.get("type") for each in told(store, first.job.id)[3:]] == ["WorkerLost", None]

    def test_two_workers_with_the_same_entry_get_different_attempts(self, store):
        stage = submit(store).stages[0].id
        taken = together(lambda: claim(store, stage), lambda: claim(store, stage, OTHER))
        first, second = sorted(taken, key=lambda c: c.attempt)

        assert (first.attempt, second.attempt) == (1, 2)
        with pytest.raises(LostClaim):
            store.complete(first, {})
        assert store.complete(second, {})

    def test_after_as_many_dead_workers_the_job_fails_and_says_why(self, store):
        first = begun(store, max_attempts=2)
        claim(store, first.stage.id)
        gone = store.claim(first.stage.id, queue_id(store, first.stage.id), WORKER)
        job = store.get(first.job.id)

        assert gone is None
        assert job.state is JobState.FAILED
        assert job.error is not None
        assert (job.error["type"], job.error["stage"]) == ("WorkerLost", "calibrate")
        assert job.error["message"].startswith("2 workers died")
        assert (job.stages[0].state, job.stages[0].failures) == (StageState.FAILED, 2)
        assert told(store, job.id)[-1] == {"state": "failed", "error": job.error}
        assert job.finished_at is not None

    @pytest.mark.parametrize("put_down", [JobStore.hand_back, JobStore.give_up, JobStore.end_turn])
    def test_put_down_is_no_failure(self, store, put_down):
        first = begun(store, max_attempts=1)
        entry = queue_id(store, first.stage.id)
        comes_again_with_its_entry = put_down(store, first)
        has_its_entry = queue_id(store, first.stage.id) == entry
        again = claim(store, first.stage.id, OTHER)

        assert has_its_entry is bool(comes_again_with_its_entry)
        assert has_its_entry is (put_down is JobStore.hand_back)
        assert (again.attempt, again.stage.failures) == (2, 0)

    def test_a_stage_comes_again_once_its_worker_has_gone(self, store):
        stage = at_work(store).stage.id
        entry = queue_id(store, stage)
        store.enter_worker(OTHER, name="other", device="cpu", kinds=[CALIBRATE.kind])
        kept = not store.give_again(entry, alive_s=60.0)
        meanwhile = runnable(store), store.stalled(60.0)
        store.remove_worker(WORKER)

        assert kept
        assert meanwhile == ([], [])
        assert store.stalled(60.0) == [entry]
        assert store.give_again(entry, alive_s=60.0)
        assert runnable(store) == [stage]
        assert store.give_again(entry, alive_s=60.0)  # it stands for nothing any more
        assert runnable(store) == [stage]

    def test_an_entry_is_stalled_once_its_worker_is_silent_or_gone(self, store):
        lost, other = (at_work(store, worker).stage.id for worker in (WORKER, OTHER))
        silent, gone = queue_id(store, lost), queue_id(store, other)
        late(store, WORKER, 9)
        before = store.stalled(5.0)
        store.remove_worker(OTHER)

        assert before == [silent]
        assert sorted(store.stalled(5.0)) == [silent, gone]
        assert store.give_again(silent, alive_s=5.0)
        assert store.stalled(5.0) == [gone]  # the old entry is out of the queue
        assert runnable(store) == [lost]

    def test_put_down_by_a_worker_that_goes_before_the_queue_hears_of_it(self, store):
        first = at_work(store)
        store.hand_back(first)
        store.remove_worker(WORKER)

        assert store.give_again(queue_id(store, first.stage.id), alive_s=60.0)
        assert runnable(store) == [first.stage.id]

    @pytest.mark.parametrize(("verb", "then"), [("pause", "paused"), ("cancel", "cancelled")])
    def test_dead_worker_of_a_job_on_its_way_out(self, store, verb, then):
        first = begun(store)

        assert store.ask(first.job.id, verb).state == f"{verb.removesuffix('e')}" + (
            "ing" if verb == "pause" else "ling"
        )
        assert comes_again(store, first) is None
        job = store.get(first.job.id)
        assert job.state == then
        assert (job.stages[0].state, job.stages[0].worker_id) == (StageState.WAITING, None)
        assert told(store, job.id)[-1] == {"state": then}

    def test_a_job_is_settled_only_when_its_last_worker_is_out(self, store):
        one, two = islands(store, 2)
        store.ask(one.job.id, "pause")
        comes_again(store, one)

        assert store.get(one.job.id).state is JobState.PAUSING
        assert store.hand_back(two) is False
        assert store.get(one.job.id).state is JobState.PAUSED

    @pytest.mark.parametrize("finished", ["complete", "succeed", "fail"])
    def test_a_finished_stages_entry_does_nothing(self, store, finished):
        taken = begun(store)
        WRITES[finished](store, taken)
        with unchanged(store):
            assert comes_again(store, taken) is None


WRITES: dict[str, Callable[[JobStore, Claim], Any]] = {
    "progress": lambda s, c: s.progress(c, done=7, elapsed_s=9.0, best_value=0.5),
    "complete": lambda s, c: s.complete(c, {"r": 1}, then=[CONFIRM]),
    "moved": lambda s, c: s.complete(c, {"r": 1}, seen=replace(c.job, trials=1)),
    "succeed": lambda s, c: ends(s, c, None, "w"),
    "retry": lambda s, c: s.fail(c, ERROR, retry=True),
    "fail": lambda s, c: s.fail(c, ERROR, retry=False),
    "hand_back": lambda s, c: s.hand_back(c),
    "give_up": lambda s, c: s.give_up(c),
    "end_turn": lambda s, c: s.end_turn(c),
    "fence": lambda s, c: s.fence(c).__enter__(),
}


def comes_again(store, taken):
    """What another worker gets of a stage whose worker the queue takes for dead."""
    return store.claim(taken.stage.id, queue_id(store, taken.stage.id), OTHER)


def too_many_die(store, lost):
    """The job has failed, since too many workers were taken for dead."""
    with store.database.transaction() as connection:
        connection.execute(update(jobs).values(max_attempts=1))
    comes_again(store, lost)


# How a worker has lost its stage; who only looks is told of the first four, too.
LOSSES: dict[str, Callable[[JobStore, Claim], Any]] = {
    "another has it": comes_again,
    "another did it": lambda s, c: s.complete(claim(s, c.stage.id, OTHER), {}, then=[CONFIRM]),
    "another failed": lambda s, c: s.fail(claim(s, c.stage.id, OTHER), ERROR, retry=False),
    "the job is gone": lambda s, c: (
        s.ask(c.job.id, "cancel"), comes_again(s, c), remove(s, c.job.id),
    ),
    "resumed": lambda s, c: (
        s.ask(c.job.id, "pause"), comes_again(s, c), s.ask(c.job.id, "resume"),
    ),
    "too many died": too_many_die,
    "it did it itself": lambda s, c: s.complete(c, {"of": "mine"}, then=[CONFIRM]),
}  # fmt: skip


class TestLostClaim:
    """Who lost a stage can write no more."""

    @pytest.mark.parametrize("lost_since", LOSSES)
    def test_each_write_of_the_old_attempt_is_refused_and_writes_nothing(self, store, lost_since):
        lost = begun(store)
        LOSSES[lost_since](store, lost)
        for write in [*WRITES.values(), *([JobStore.watch] if lost_since in [*LOSSES][:4] else [])]:
            with unchanged(store), pytest.raises(LostClaim):
                write(store, lost)


class TestFence:
    """What is written elsewhere, by Optuna, is written by the stage's worker alone."""

    def test_nobody_gets_the_stage_until_the_fence_is_left(self, store):
        first = begun(store)
        with ThreadPoolExecutor(1) as pool:
            with store.fence(first):
                second = pool.submit(claim, store, first.stage.id, OTHER)
                until_someone_waits_for_a_lock(store)
                held_off = not second.done()

            assert held_off
            taken = second.result(10)
        assert taken.attempt == 2
        with pytest.raises(ZeroDivisionError), store.fence(taken):
            raise ZeroDivisionError  # which comes out as it is
        assert store.complete(taken, {})

    def test_does_not_hold_off_users_nor_the_other_islands(self, store):
        search, other = islands(store, 2)
        with ThreadPoolExecutor(1) as pool, store.fence(search):
            pausing = pool.submit(store.ask, search.job.id, "pause").result(10)
            resumed = pool.submit(store.ask, search.job.id, "resume").result(10)
            extended = pool.submit(store.ask, search.job.id, "extend", trials=5).result(10)
            done = pool.submit(store.complete, other, {}, then=[CONFIRM]).result(10)

        assert done
        assert [j.state for j in (pausing, resumed, extended)] == ["pausing", "running", "running"]
        assert extended.trials == 15

    def test_a_job_is_not_deleted_under_a_worker_that_writes(self, store):
        one, two = islands(store, 2)
        store.fail(two, ERROR, retry=False)
        with ThreadPoolExecutor(1) as pool:
            with store.fence(one):
                deleted = pool.submit(remove, store, one.job.id)
                until_someone_waits_for_a_lock(store)
                held_off = not deleted.done()
            deleted.result(10)

        assert held_off
        assert store.page() == []


class TestWork:
    """Progress, ends and failures of stages."""

    def test_progress_is_stored_told_and_answered_with_the_state(self, store):
        (search,) = islands(store, 1)
        state = store.progress(search, done=4, elapsed_s=1.5, best_value=0.25)
        (stage,) = store.get(search.job.id).of_kind(StageKind.SEARCH)
        last = store.events(search.job.id)[-1]

        assert state is JobState.RUNNING
        assert (stage.done, stage.elapsed_s, stage.best_value) == (4, 1.5, 0.25)
        assert (last.kind, last.data) == (
            "progress",
            {"stage": "search", "number": 0, "done": 4, "best_value": 0.25},
        )

    @pytest.mark.parametrize("verb", ["pause", "cancel"])
    def test_progress_tells_of_a_verb(self, store, verb):
        taken = begun(store)
        asked = store.ask(taken.job.id, verb).state

        assert store.progress(taken, done=1, elapsed_s=1.0, best_value=None) is asked
        assert store.watch(taken) is asked
        assert not asked.may_work

    def test_what_follows_at_once_waits_in_the_queue(self, store):
        first = begun(store)
        searches = [NewStage(kind=StageKind.SEARCH, number=i, params={"p": i}) for i in range(3)]
        done = store.complete(first, {"b": 1, "a": [2]}, then=searches)
        job = store.get(first.job.id)
        made = job.of_kind(StageKind.SEARCH)

        assert done
        assert runnable(store) == [s.id for s in made]
        assert [(s.number, (s.params or {})["p"]) for s in made] == [(0, 0), (1, 1), (2, 2)]
        assert [*(job.stages[0].result or {}).items()] == [("b", 1), ("a", [2])]
        assert job.stages[0].state is StageState.DONE
        assert (job.stages[0].worker_id, job.state) == (None, JobState.RUNNING)

    def test_a_stage_that_exists_already_stays_as_it_is(self, store):
        one, two = islands(store, 2)
        store.complete(one, {"mine": 1})
        before = everything(store)
        store.complete(two, {}, then=[NewStage(kind=StageKind.SEARCH, number=0, params={"x": 1})])
        after = everything(store)

        assert after[1][:2] == before[1][:2]
        assert after[3] == before[3]

    def test_what_was_decided_before_another_end_or_an_extension_stores_nothing(self, store):
        one, two = islands(store, 2)
        (search,) = islands(store, 1)
        store.complete(two, {"r": 2})
        store.ask(search.job.id, "extend", trials=5)
        for old in (one, search):
            with unchanged(store):
                assert store.complete(old, {"r": 1}, then=[CONFIRM], seen=old.job) is False
        assert store.complete(one, {"r": 1}, seen=store.get(one.job.id)) is True
        assert searched(store, search, trials=15)

    def test_islands_that_end_at_once_make_what_follows_exactly_once(self, store):
        for count in (2, 5, 8):
            claims = islands(store, count)
            answers = together(*(lambda c=c: searched(store, c) for c in claims))
            job = store.get(claims[0].job.id)
            (confirm,) = job.of_kind(StageKind.CONFIRM)

            assert answers == [True] * count
            assert runnable(store).count(confirm.id) == 1
            assert claim(store, confirm.id).attempt == 1

    def test_islands_and_an_extension_at_once(self, store):
        for _ in range(4):
            claims = islands(store, 2)
            *done, extended = together(
                *(lambda c=c: searched(store, c) for c in claims),
                lambda c=claims[0]: store.ask(c.job.id, "extend", trials=5),
            )
            job = store.get(claims[0].job.id)
            searching = [s for s in job.of_kind(StageKind.SEARCH) if s.state is not StageState.DONE]

            assert set(map(type, done)) == {bool}
            if isinstance(extended, StateConflict):
                assert (searching, job.trials) == ([], 10)
            else:
                assert (len(searching), job.trials) == (2, 15)
                assert job.of_kind(StageKind.CONFIRM) == []

    def test_an_island_that_ends_after_another_failed_is_kept(self, store):
        one, two = islands(store, 2)
        store.fail(one, ERROR, retry=False)
        store.complete(two, {"r": 2}, then=[CONFIRM])
        job = store.get(one.job.id)

        assert job.state is JobState.FAILED
        assert [s.state for s in job.of_kind(StageKind.SEARCH)] == ["failed", "done"]
        assert job.of_kind(StageKind.CONFIRM) == []

    def test_what_follows_while_pausing_waits_for_the_resume_while_cancelling_for_nothing(
        self, store
    ):
        cancelled, first = begun(store), begun(store)
        store.ask(cancelled.job.id, "cancel")
        store.complete(cancelled, {}, then=[NewStage(kind=StageKind.SEARCH)])
        assert store.get(cancelled.job.id).state is JobState.CANCELLED
        assert only(store, cancelled.job.id, StageKind.SEARCH) not in runnable(store)
        store.ask(first.job.id, "pause")
        store.complete(first, {}, then=[NewStage(kind=StageKind.SEARCH)])
        paused = store.get(first.job.id).state
        search = only(store, first.job.id, StageKind.SEARCH)
        waiting = search in runnable(store)
        store.ask(first.job.id, "resume")

        assert paused is JobState.PAUSED
        assert not waiting
        assert runnable(store).count(search) == 1

    def test_the_configuration_is_kept_in_its_order_with_warnings(self, store):
        taken = begun(store)
        best = {"z": 0.1 + 0.2, "a": {"y": 1, "b": "\ud800\0"}}
        ends(store, taken, best, "one", "two")
        job = store.get(taken.job.id)

        assert job.best == best
        assert [*job.best] == ["z", "a"]
        assert job.warnings == ["one", "two"]
        assert job.state is JobState.SUCCEEDED
        assert (job.stages[0].state, job.stages[0].result) == (StageState.DONE, {"r": 1})
        assert job.finished_at is not None
        assert told(store, job.id)[-1] == {"state": "succeeded"}

    @pytest.mark.parametrize(
        ("verb", "then", "best"), [("pause", "succeeded", {"b": 1}), ("cancel", "cancelled", None)]
    )
    def test_paused_while_its_last_stage_ends_a_job_has_succeeded_cancelled_it_has_no_result(
        self, store, verb, then, best
    ):
        taken = begun(store)
        store.ask(taken.job.id, verb)
        ends(store, taken)
        job = store.get(taken.job.id)

        assert (job.state, job.best) == (then, best)
        assert job.stages[0].state is StageState.DONE
        assert told(store, job.id)[-1] == {"state": then}

    def test_an_attempt_that_may_be_retried_puts_the_stage_down_the_lasts_error_is_the_jobs(
        self, store
    ):
        error = {"type": "Boom", "message": "\ud800 \0 '; drop table jobs", "layer": "a.0"}
        first = begun(store, max_attempts=2)
        comes_again_once = store.fail(first, error, retry=True)
        job, last = store.get(first.job.id), store.events(first.job.id)[-1]
        assert (job.state, job.error) == (JobState.RUNNING, None)
        assert (job.stages[0].state, job.stages[0].failures) == (StageState.WAITING, 1)
        assert (last.kind, last.data) == ("retry", {**error, "stage": "calibrate", "attempts": 1})
        again = store.fail(claim(store, first.stage.id), error, retry=True)
        job = store.get(first.job.id)

        assert (comes_again_once, again) == (True, False)
        assert job.state is JobState.FAILED
        assert job.error == {**error, "stage": "calibrate", "attempts": 2}
        assert job.stages[0].state is StageState.FAILED
        assert told(store, job.id)[-1] == {"state": "failed", "error": job.error}

    def test_an_attempt_is_an_attempt_however_it_ended(self, store):
        first = begun(store, max_attempts=2)
        second = claim(store, first.stage.id)

        assert store.fail(second, ERROR, retry=True) is False
        assert store.get(first.job.id).state is JobState.FAILED

    @pytest.mark.parametrize("put_down", ["hand_back", "give_up", "end_turn", "retry", "fail"])
    @pytest.mark.parametrize(("verb", "then"), [("pause", "paused"), ("cancel", "cancelled")])
    def test_put_down_on_the_way_out_of_its_job_a_stage_does_not_come_again(
        self, store, verb, then, put_down
    ):
        taken = begun(store)
        store.ask(taken.job.id, verb)

        assert not WRITES[put_down](store, taken)
        assert store.get(taken.job.id).state == then
        assert runnable(store) == []


def test_parts_of_a_calibration_tell_how_many_are_done(store):
    parts = [
        NewStage(kind=StageKind.CALIBRATE, number=100 + i, params={"part_of": 0}) for i in range(2)
    ]
    taken = begun(store)
    store.complete(taken, {}, then=parts)
    for part in store.get(taken.job.id).shards:
        store.complete(claim(store, part.id), {})
    job = store.get(taken.job.id)

    assert [stage.id for stage in job.of_kind(StageKind.CALIBRATE)] == [taken.stage.id]
    told = [event.data for event in store.events(job.id) if event.kind == "progress"]
    assert [(each["number"], each["done"]) for each in told] == [(0, 1), (0, 2)]


class TestResume:
    """What was put down is taken up again, once."""

    def test_resumed_before_it_was_handed_back(self, store):
        taken = begun(store)
        entry = queue_id(store, taken.stage.id)
        before = everything(store)[3]
        store.ask(taken.job.id, "pause")
        store.ask(taken.job.id, "resume")

        assert store.hand_back(taken) is True
        assert queue_id(store, taken.stage.id) == entry
        assert everything(store)[3] == before

    def test_resumed_by_several_at_once_each_stage_has_one_entry(self, store):
        claims = islands(store, 2)
        store.ask(claims[0].job.id, "pause")
        for taken in claims:
            store.hand_back(taken)
        known = len(everything(store)[3])
        together(*[lambda: store.ask(claims[0].job.id, "resume")] * 4)

        assert runnable(store) == [c.stage.id for c in claims]
        assert len(everything(store)[3]) == known + 2

    def test_however_often_it_is_paused_it_has_one_entry_with_the_lock_and_priority_of_the_first(
        self, store
    ):
        job = submit(store, priority=7)
        (first,) = everything(store)[3]
        for _ in range(3):
            store.ask(job.id, "pause")
            store.ask(job.id, "resume")
        (last,) = everything(store)[3]

        assert store.claim(job.stages[0].id, last.id, WORKER) is not None
        assert (last.lock, last.priority) == (first.lock, first.priority)
        assert first.lock == "bundle"
        assert (last.queue_name, last.args) == (first.queue_name, first.args)

    def test_a_failed_job_goes_on_with_what_is_not_done(self, store):
        one, two, three = islands(store, 3)
        store.complete(one, {"r": 1})
        store.hand_back(two)
        store.fail(three, ERROR, retry=False)
        known = {row.id for row in everything(store)[3]}
        job = store.ask(one.job.id, "resume")
        new = [row for row in everything(store)[3] if row.id not in known]

        assert (job.state, job.error, job.finished_at) == (JobState.QUEUED, None, None)
        assert [s.state for s in job.of_kind(StageKind.SEARCH)] == ["done", "waiting", "waiting"]
        assert [s.failures for s in job.stages] == [0] * 4
        assert [row.args for row in new] == [
            {"stage_id": two.stage.id}, {"stage_id": three.stage.id}
        ]  # fmt: skip

    def test_failed_with_a_busy_worker(self, store):
        one, two = islands(store, 2)
        store.fail(one, ERROR, retry=False)
        entry = queue_id(store, two.stage.id)
        store.ask(one.job.id, "resume")

        assert queue_id(store, two.stage.id) == entry
        assert store.complete(two, {})
        assert two.stage.id not in [row.args["stage_id"] for row in everything(store)[3]]

    def test_failed_for_dead_workers_or_while_pausing_it_has_all_attempts_again(self, store):
        dead = begun(store, max_attempts=1)
        store.claim(dead.stage.id, queue_id(store, dead.stage.id), WORKER)
        store.ask(dead.job.id, "resume")
        again = claim(store, dead.stage.id)
        assert (again.attempt, again.stage.failures) == (2, 0)
        taken = begun(store)
        store.ask(taken.job.id, "pause")
        store.fail(taken, ERROR, retry=False)
        paused = store.get(taken.job.id)
        job = store.ask(taken.job.id, "resume")

        assert paused.error is not None
        assert (job.state, job.error) == (JobState.QUEUED, None)
        assert claim(store, taken.stage.id).attempt == 2


def at_confirm(store):
    """A job whose finalists are being chosen."""
    (search,) = islands(store, 1)
    store.complete(search, {}, then=[CONFIRM])
    return claim(store, only(store, search.job.id, StageKind.CONFIRM)).job


def at_perplexity(store):
    """A job one of whose finalists is being measured."""
    job = at_confirm(store)
    confirm = claim(store, only(store, job.id, StageKind.CONFIRM))
    measure = [NewStage(kind=StageKind.PERPLEXITY, number=i) for i in range(2)]
    store.complete(confirm, {"finalists": [0, 1]}, then=measure)
    (first, _) = store.get(job.id).of_kind(StageKind.PERPLEXITY)
    return claim(store, first.id).job


def at_finish(store):
    """A job whose best is being chosen."""
    job = at_confirm(store)
    confirm = claim(store, only(store, job.id, StageKind.CONFIRM))
    store.complete(confirm, {"finalists": []}, then=[FINISH])
    return claim(store, only(store, job.id, StageKind.FINISH)).job


def end(store, job_id):
    """Do all that the queue has for a job; the kinds of stages, in the order in which they ran."""
    ran = []
    while waiting := [s for s in store.get(job_id).stages if s.id in runnable(store)]:
        stage = max(waiting, key=lambda s: (s.kind.rank, -s.id))  # as the queue gives them out
        taken = claim(store, stage.id)
        ran.append(stage.kind)
        if stage.kind is StageKind.FINISH:
            ends(store, taken, {})
        elif stage.kind is StageKind.SEARCH:
            store.complete(taken, {}, then=[CONFIRM])
        else:
            store.complete(taken, {}, then=[FINISH])
    return ran


class TestExtend:
    """More trials, as long as the search is not over or the job is."""

    def test_a_job_that_waits_gets_more_trials_in_its_document_too(self, store):
        job = submit(store, {"b": 1, "trials": 10, "a": 2})
        queue = everything(store)[3]
        extended = store.ask(job.id, "extend", trials=5)

        assert (extended.state, extended.trials) == (JobState.QUEUED, 15)
        assert [*extended.spec.items()] == [("b", 1), ("trials", 15), ("a", 2)]
        assert everything(store)[3] == queue

    def test_islands_that_are_done_begin_again(self, store):
        one, two = islands(store, 2)
        store.complete(one, {"r": 1}, then=[CONFIRM])
        extended = store.ask(one.job.id, "extend", trials=5)

        assert extended.state is JobState.RUNNING
        assert [s.state for s in extended.of_kind(StageKind.SEARCH)] == ["waiting", "running"]
        assert runnable(store) == [one.stage.id]
        assert store.complete(two, {}, then=[CONFIRM])
        assert end(store, one.job.id) == ["search", "confirm", "finish"]

    def test_a_paused_job_stays_paused_with_more_trials(self, store):
        one, two = islands(store, 2)
        store.complete(one, {}, then=[CONFIRM])
        store.ask(one.job.id, "pause")
        store.hand_back(two)
        extended = store.ask(one.job.id, "extend", trials=5)
        idle = runnable(store)
        store.ask(one.job.id, "resume")

        assert (extended.state, extended.trials, idle) == (JobState.PAUSED, 15, [])
        assert runnable(store) == [one.stage.id, two.stage.id]
        assert end(store, one.job.id) == ["search", "search", "confirm", "finish"]
        assert store.get(one.job.id).state is JobState.SUCCEEDED

    def test_a_job_that_has_succeeded_searches_on(self, store):
        job = succeeded(store)
        extended = store.ask(job.id, "extend", trials=5)

        assert (extended.state, extended.trials) == (JobState.QUEUED, 15)
        assert extended.finished_at is None
        assert extended.best == job.best  # until there is a better one
        store.ask(job.id, "pause")
        assert store.ask(job.id, "extend", trials=5).trials == 20
        store.ask(job.id, "resume")
        assert end(store, job.id) == ["search", "confirm", "finish"]
        assert store.get(job.id).state is JobState.SUCCEEDED

    def test_measured_finalists_are_not_measured_again(self, store):
        job = at_perplexity(store)
        for stage in job.of_kind(StageKind.PERPLEXITY):
            store.complete(claim(store, stage.id), {"perplexity": 1.0}, then=[FINISH])
        ends(store, claim(store, only(store, job.id, StageKind.FINISH)), {})
        extended = store.ask(job.id, "extend", trials=5)
        kept = extended.of_kind(StageKind.PERPLEXITY)

        assert [(s.state, s.result) for s in kept] == [("done", {"perplexity": 1.0})] * 2
        assert end(store, job.id) == ["search", "confirm", "finish"]

    @pytest.mark.parametrize("pause", [False, True])
    def test_confirm_that_waits_waits_again(self, store, pause):
        claims = islands(store, 2)
        job_id = claims[0].job.id
        for taken in claims:
            store.complete(taken, {}, then=[CONFIRM])
        if pause:
            store.ask(job_id, "pause")
        with suppress(StateConflict):  # or it is too late: that is all right as well
            store.ask(job_id, "extend", trials=5)
        if pause:
            store.ask(job_id, "resume")
        ran = end(store, job_id)

        assert ran in (["confirm", "finish"], ["search", "search", "confirm", "finish"])
        assert store.get(job_id).state is JobState.SUCCEEDED

    def test_a_job_gets_no_more_trials_than_it_may_have(self, store):
        job = submit(store)
        with unchanged(store), pytest.raises(TooManyTrials, match="10 trials and 6 more are"):
            store.ask(job.id, "extend", trials=6, max_trials=15)
        assert store.ask(job.id, "extend", trials=5, max_trials=15).trials == 15

    def test_extensions_at_once_do_not_get_past_the_limit(self, store):
        job = submit(store)
        answers = together(*[lambda: store.ask(job.id, "extend", trials=5, max_trials=20)] * 4)

        assert [type(a) for a in answers].count(TooManyTrials) == 2
        assert store.get(job.id).trials == 20

    @pytest.mark.parametrize("reach", [at_confirm, at_perplexity, at_finish])
    def test_too_late(self, store, reach):
        """Once the finalists are being chosen, a job is not extended, and stays as it is."""
        job = reach(store)
        with unchanged(store), pytest.raises(StateConflict, match=f"it is at {job.stage}") as told:
            store.ask(job.id, "extend", trials=5)

        assert told.value.state is JobState.RUNNING

    def test_nor_is_one_that_was_paused_while_it_measured(self, store):
        job = at_perplexity(store)
        measuring = next(s for s in job.stages if s.state is StageState.RUNNING)
        store.ask(job.id, "pause")
        store.hand_back(Claim(job=job, stage=measuring))
        with unchanged(store), pytest.raises(StateConflict):
            store.ask(job.id, "extend", trials=5)

        assert store.get(job.id).state is JobState.PAUSED


class TestDelete:
    """A job goes with all that it had."""

    def test_stages_and_events_go_with_their_job(self, store):
        job, other = succeeded(store), succeeded(store)
        kept = told(store, other.id)
        remove(store, job.id)
        left = everything(store)

        assert [row.id for row in left[0]] == [other.id]
        assert {row.job_id for row in left[1]} == {row.job_id for row in left[2]} == {other.id}
        assert told(store, other.id) == kept
        with pytest.raises(NoSuchJob):
            store.get(job.id)

    def test_if_what_is_elsewhere_cannot_be_deleted_the_job_stays(self, store):
        job = succeeded(store)
        with unchanged(store), pytest.raises(ZeroDivisionError), store.deleting(job.id) as going:
            raise ZeroDivisionError

        assert going == job

    @pytest.mark.parametrize("second", [remove, lambda store, job_id: store.ask(job_id, "resume")])
    def test_a_second_deletion_or_a_resume_waits_and_then_finds_nothing(self, store, second):
        taken = begun(store)
        store.fail(taken, ERROR, retry=False)
        with ThreadPoolExecutor(1) as pool:
            with store.deleting(taken.job.id):
                asked = pool.submit(second, store, taken.job.id)
                until_someone_waits_for_a_lock(store)
                held_off = not asked.done()
            with pytest.raises(NoSuchJob):
                asked.result(10)

        assert held_off
        assert everything(store) == [[], [], [], []]


class TestEvents:
    """Whoever reads the events after the last one that was seen misses none."""

    def test_no_reader_misses_an_event_while_stages_write(self, store):
        claims = islands(store, 3)
        job_id = claims[0].job.id
        writing = threading.Event()
        writing.set()

        def write(taken):
            for done in range(25):
                store.progress(taken, done=done, elapsed_s=1.0, best_value=None)

        def read():
            seen = [0]
            while True:
                more = writing.is_set()
                page = store.events(job_id, after=seen[-1], limit=7)
                assert len(page) <= 7
                seen += [e.id for e in page]
                if not page and not more:
                    return seen[1:]

        with ThreadPoolExecutor(2) as pool:
            readers = [pool.submit(read) for _ in range(2)]
            wrote = together(*(lambda c=c: write(c) for c in claims))
            writing.clear()
            seen = [reader.result(30) for reader in readers]
        whole = [e.id for e in store.events(job_id, limit=10_000)]

        assert wrote == [None] * 3
        assert len(whole) == 4 + 75
        assert seen == [whole] * 2


class TestWorkers:
    """Who is there, and at what."""

    def enter(self, store, worker=WORKER):
        """A worker reports."""
        store.enter_worker(worker, name="w", device="cpu", kinds=[StageKind.SEARCH])

    def test_a_worker_that_reported_is_listed_with_nothing_to_do(self, store):
        self.enter(store)
        (record,) = store.workers(alive_s=30)

        assert (record.id, record.name, record.device) == (WORKER, "w", "cpu")
        assert record.stages == ["search"]
        assert (record.job_id, record.stage) == (None, None)
        assert record.heartbeat_at.utcoffset() is not None

    def test_only_those_that_reported_lately_are_listed_again_with_the_next_report(self, store):
        self.enter(store)
        self.enter(store, OTHER)
        (before, _) = store.workers(alive_s=30)
        late(store, WORKER, 31)
        listed = [[r.id for r in store.workers(alive_s=s)] for s in (0, 30, 60)]
        self.enter(store)
        (record, _) = store.workers(alive_s=30)

        assert listed == [[], [OTHER], [WORKER, OTHER]]
        assert record.started_at == before.started_at
        assert record.heartbeat_at > before.heartbeat_at

    def test_those_not_heard_of_for_a_day_are_forgotten_once_another_starts(self, store):
        self.enter(store)
        self.enter(store, OTHER)
        lost = []
        for hours in (0, 23, 25):
            late(store, OTHER, hours * 3600)
            lost.append(store.lost_workers(alive_s=30))
        with store.database.transaction() as connection:  # as procrastinate does
            connection.execute(select(func.procrastinate_prune_stalled_workers_v1(LOST_FOR_S)))

        assert lost == [0, 1, 0]
        assert [r.id for r in store.workers(alive_s=1e6)] == [WORKER]

    def test_a_worker_that_went_or_whose_process_was_seen_to_end_is_not_listed(self, store):
        stage = at_work(store, name=worker_name(7)).stage.id
        store.enter_worker(OTHER, name=worker_name(77), device="cpu", kinds=[CALIBRATE.kind])
        store.forget_worker(worker_name(7))

        assert [r.id for r in store.workers(alive_s=30)] == [OTHER]
        for _ in range(2):
            store.remove_worker(OTHER)
        assert store.workers(alive_s=30) == []
        assert store.give_again(queue_id(store, stage), alive_s=60.0)
        assert runnable(store) == [stage]

    @pytest.mark.parametrize(
        "stop",
        [
            *(WRITES[how] for how in ("complete", "succeed", "retry", "fail", "hand_back")),
            comes_again,
            too_many_die,
        ],
    )
    def test_a_worker_whose_stage_has_ended_or_was_given_away_is_idle(self, store, stop):
        self.enter(store)
        taken = begun(store)
        stop(store, taken)
        (record,) = store.workers(alive_s=30)

        assert (record.job_id, record.stage) == (None, None)

    def test_a_workers_job_and_stage_are_listed_while_it_is_at_it(self, store):
        self.enter(store)
        self.enter(store, OTHER)
        taken = begun(store)
        doing = {r.id: (r.job_id, r.stage) for r in store.workers(alive_s=30)}
        begun(store)  # the database went away before it could hand back the first

        assert doing == {WORKER: (taken.job.id, StageKind.CALIBRATE), OTHER: (None, None)}
        assert [r.id for r in store.workers(alive_s=30)] == [WORKER, OTHER]


def test_users_workers_and_readers_at_once_make_no_deadlock(store):
    claims = islands(store, 4, max_attempts=1_000)
    job_id = claims[0].job.id

    def work(taken):
        for done in range(9):
            try:
                with store.fence(taken):
                    pass
                store.progress(taken, done=done, elapsed_s=1.0, best_value=None)
                if done % 3 == 2:
                    store.hand_back(taken)
            except LostClaim:
                pass
            taken = store.claim(taken.stage.id, queue_id(store, taken.stage.id), WORKER) or taken

    def ask():
        for turn in range(9):
            for verb in ("pause", "resume"):
                store.ask(job_id, verb)
            with suppress(StateConflict):
                store.ask(job_id, "extend", trials=turn)

    def read():
        for _ in range(9):
            store.page()
            store.workers(alive_s=30)
            store.counts()

    answers = together(*(lambda c=c: work(c) for c in claims), ask, ask, read)

    assert answers == [None] * 7
