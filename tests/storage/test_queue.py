"""The queue: what is given out when, and that no life of a job loses a stage."""

import random
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import procrastinate
import psycopg
import pytest
from sqlalchemy import delete, func, select, text

from storage.claims import JobResult
from storage.jobs import JobStore, NewJob
from storage.keys import KeyStore
from storage.queue import TASK, enqueue
from storage.records import JobState, NewStage, StageKind, StageState, StateConflict
from storage.tables import jobs

CALIBRATE, SEARCH, FINISH = StageKind.CALIBRATE, StageKind.SEARCH, StageKind.FINISH


@pytest.fixture(scope="module")
def database(shared_database):
    """One for all tests of this file."""
    return shared_database


@pytest.fixture(autouse=True)
def store(database):
    """No jobs, and nothing in the queue."""
    with database.transaction() as connection:
        connection.execute(delete(jobs))
        connection.exec_driver_sql("DELETE FROM procrastinate_jobs")
    return JobStore(database)


def put(database, stage_id, kind, *, priority=0, lock=None):
    """The id of a new entry."""
    with database.transaction() as connection:
        return enqueue(connection, stage_id, kind, priority=priority, lock=lock)


def fetch(database, *kinds):
    """(entry, stage) that procrastinate gives to a worker of these kinds, or of all; or nothing."""
    query = text(
        "SELECT id, (args->>'stage_id')::bigint AS stage_id "
        "FROM procrastinate_fetch_job_v2(CAST(:kinds AS varchar[]), NULL)"
    )
    with database.transaction() as connection:
        row = connection.execute(query, {"kinds": list(kinds) or None}).one()
        return None if row.id is None else (row.id, row.stage_id)


def finish(database, entry):
    """A worker is through with an entry."""
    with database.transaction() as connection:
        query = text("SELECT procrastinate_finish_job_v1(:id, 'succeeded', true)")
        connection.execute(query, {"id": entry})


def retry(database, entry):
    """An entry comes again: its worker asked for it, or died."""
    with database.transaction() as connection:
        query = text("SELECT procrastinate_retry_job_v2(:id, now(), NULL, NULL, NULL)")
        connection.execute(query, {"id": entry})


def in_order(database):
    """The stages in the order in which a worker of all kinds gets them."""
    given = []
    while (entry := fetch(database)) is not None:
        given.append(entry[1])
        finish(database, entry[0])
    return given


def new_keys(store, names):
    return [KeyStore(store.database).create(name, sees_all=False)[0].id for name in names]


def submitted(store, priority=0, *, kind=CALIBRATE, lock=None, owner_id=None):
    """A job whose first stage is in the queue."""
    first = NewStage(kind=kind, lock=lock)
    new = NewJob(spec={}, name="n", stages=[first], trials=1, max_attempts=1, priority=priority)
    return store.submit(new, owner_id=owner_id)[0]


def first_stages(*jobs):
    return [job.stages[0].id for job in jobs]


def taken(store, job=None):
    """A worker's entry and its claim, after it took the first in the queue, which is the job's."""
    entry, stage_id = fetch(store.database)
    claim = store.claim(stage_id, entry, uuid.uuid4())
    assert claim is not None
    assert job is None or claim.job.id == job.id
    return entry, claim


class TestEntries:
    """What an entry is, and when it is one."""

    def test_a_worker_of_procrastinate_finds_an_entry(self, database):
        entry = put(database, 17, SEARCH, lock="l")
        connector = procrastinate.SyncPsycopgConnector(conninfo=database.conninfo)
        with procrastinate.App(connector=connector).open() as app:
            (found,) = app.job_manager.list_jobs(queue="search", status="todo")

        assert (found.id, found.task_name, found.task_kwargs) == (entry, TASK, {"stage_id": 17})
        assert found.lock == "l"

    def test_an_entry_is_not_given_out_before_the_commit(self, database):
        with database.transaction() as connection:
            entry = enqueue(connection, 1, SEARCH, priority=0, lock=None)
            before = fetch(database)

        assert before is None
        assert fetch(database) == (entry, 1)

    def test_the_commit_wakes_workers_of_the_kind(self, database):
        listening = psycopg.connect(database.conninfo, autocommit=True)
        with listening:
            listening.execute('LISTEN "procrastinate_queue_v1#search"')
            put(database, 1, CALIBRATE)
            put(database, 2, SEARCH)
            notices = [n.payload for n in listening.notifies(timeout=60, stop_after=1)]

        assert len(notices) == 1
        assert '"job_inserted"' in notices[0]


class TestOrder:
    """Who comes first."""

    def test_jobs_that_have_begun_end_before_new_ones_begin(self, database):
        for stage_id, kind in enumerate(StageKind):
            put(database, stage_id, kind)
        search = fetch(database, SEARCH, CALIBRATE)  # a worker gets only the kinds that it does
        retry(database, search[0])

        assert search[1] == [*StageKind].index(SEARCH)
        assert in_order(database) == [*reversed(range(len(StageKind)))]

    @pytest.mark.parametrize(("high", "low"), [(1, 0), (0, -1), (100, 99), (-99, -100)])
    def test_priority_goes_before_kind(self, database, high, low):
        """The first stage of a job goes before the last of one with a lower priority."""
        put(database, 1, FINISH, priority=low)
        put(database, 2, CALIBRATE, priority=high)

        assert in_order(database) == [2, 1]

    def test_of_the_same_kind_and_priority_the_oldest_goes_first(self, database):
        for stage_id in (5, 3, 4):
            put(database, stage_id, SEARCH)

        assert in_order(database) == [5, 3, 4]

    def test_workers_that_fetch_at_once_get_different_entries(self, database):
        for stage_id in range(20):
            put(database, stage_id, SEARCH)
        with ThreadPoolExecutor(8) as pool:
            given = [f.result() for f in [pool.submit(fetch, database) for _ in range(28)]]
        stages = [entry[1] for entry in given if entry is not None]

        assert len(stages) == len(set(stages))
        assert {*stages, *in_order(database)} == set(range(20))

    def test_entries_with_the_same_lock_run_one_after_the_other(self, database):
        for stage_id, lock in ((1, "a"), (2, "a"), (3, "b"), (4, None), (5, None)):
            put(database, stage_id, CALIBRATE, lock=lock)
        given = [fetch(database) for _ in range(5)]
        finish(database, given[0][0])

        assert [entry and entry[1] for entry in given] == [1, 3, 4, 5, None]
        dead = fetch(database)
        assert dead[1:] == (2,)
        retry(database, dead[0])
        assert in_order(database) == [2]

    def test_a_search_after_its_turn_stands_behind(self, database, store):
        first = submitted(store, kind=SEARCH)
        entry, claim = taken(store, first)
        second, urgent = submitted(store), submitted(store, 1)
        ended = store.end_turn(claim)
        finish(database, entry)
        third = submitted(store)

        assert ended is False
        assert store.get(first.id).stages[0].state is StageState.WAITING
        assert in_order(database) == first_stages(urgent, second, first, third)

    def test_so_do_its_other_islands_that_wait(self, database, store):
        job = submitted(store)
        entry, claim = taken(store, job)
        store.complete(claim, {}, then=[NewStage(kind=SEARCH, number=i) for i in range(3)])
        finish(database, entry)
        entry, claim = taken(store, job)
        taken(store, job)  # by another worker, which keeps it
        waiting = submitted(store)
        store.end_turn(claim)
        finish(database, entry)
        islands = store.get(job.id).of_kind(SEARCH)

        assert in_order(database) == [waiting.stages[0].id, islands[0].id, islands[2].id]

    def test_after_its_turn_a_keys_next_stages_and_its_other_jobs_let_another_key_in(
        self, database, store
    ):
        mine, yours = new_keys(store, "ab")
        job, other = (submitted(store, owner_id=mine) for _ in range(2))
        paused, theirs, later = (submitted(store, owner_id=yours) for _ in range(3))
        store.ask(paused.id, "pause")
        entry, claim = taken(store, job)
        points = [NewStage(kind=StageKind.POINT, number=i) for i in range(2)]
        store.complete(claim, {}, then=points)
        store.next_turn([CALIBRATE], claim.job, over=True)
        finish(database, entry)
        first, second = (stage.id for stage in store.get(job.id).of_kind(StageKind.POINT))

        assert in_order(database) == [
            *first_stages(theirs), first, second, *first_stages(other, later)
        ]  # fmt: skip

    def test_when_a_job_ends_the_key_is_let_in_that_was_not_served_for_longest(
        self, database, store
    ):
        """However soon: a key with many small jobs has no turn to spend on all of them."""
        keys = new_keys(store, "abcd")
        for key in keys:
            for _ in range(3):
                submitted(store, owner_id=key)
        served = []
        for _ in range(12):
            entry, claim = taken(store)
            served.append(keys.index(claim.job.owner_id))
            store.complete(claim, {}, ended=True)
            store.next_turn([CALIBRATE], claim.job)
            finish(database, entry)

        assert served == [0, 1, 2, 3] * 3

    def test_its_jobs_are_let_in_one_after_the_other(self, database, store):
        """One that waits for its first turn comes before the later stages of one that had some."""
        begun = [submitted(store) for _ in range(3)]
        for i, job in enumerate(begun[:2]):
            entry, claim = taken(store, job)
            store.complete(claim, {}, then=[NewStage(kind=StageKind.POINT)])
            store.next_turn([*StageKind], claim.job, over=True)
            finish(database, entry)

            assert fetch(database)[1:] == (begun[i + 1].stages[0].id,)
            with database.transaction() as connection:
                connection.exec_driver_sql("UPDATE procrastinate_jobs SET status = 'todo'")

    def test_a_job_goes_on_while_its_turn_lasts(self, database, store):
        mine, yours = new_keys(store, "ab")
        job = submitted(store, owner_id=mine)
        entry, claim = taken(store, job)
        theirs = submitted(store, owner_id=yours)
        store.complete(claim, {}, then=[NewStage(kind=SEARCH)])
        store.next_turn([*StageKind], claim.job)
        finish(database, entry)
        (search,) = store.get(job.id).of_kind(SEARCH)

        assert in_order(database) == [search.id, theirs.stages[0].id]

    def test_but_not_for_a_worker_that_cannot_do_what_is_left_of_it(self, database, store):
        keys = new_keys(store, "ab")
        first, _, theirs = (submitted(store, owner_id=key) for key in [keys[0], *keys])
        entry, claim = taken(store, first)
        store.complete(claim, {}, then=[NewStage(kind=SEARCH)])
        store.next_turn([CALIBRATE], claim.job)
        finish(database, entry)

        assert fetch(database, CALIBRATE)[1:] == (theirs.stages[0].id,)

    def test_workers_that_begin_at_once_let_in_a_key_each(self, database, store):
        """And what they let in is next, though they are killed before they take it."""
        keys = new_keys(store, "abc")
        of_keys = [[submitted(store, owner_id=key) for _ in range(4)] for key in keys]
        for _ in range(6):
            store.next_turn([CALIBRATE])
        order = in_order(database)

        assert order[:4] == [own[number].stages[0].id for number in (0, 1) for own in of_keys][:4]

    @pytest.mark.parametrize("beginning", [1, 3])
    def test_keys_are_served_in_turn_though_every_worker_is_killed(self, store, beginning):
        """Also if more are killed before they take what they let in: the oldest job is not next."""
        keys = new_keys(store, "abcd")
        for key in keys:
            for _ in range(8):
                submitted(store, owner_id=key)
        served = []
        for _ in range(12):
            for _ in range(beginning):
                store.next_turn([CALIBRATE])  # as a worker does that begins
            served.append(keys.index(taken(store)[1].job.owner_id))

        assert served == [0, 1, 2, 3] * 3

    def test_no_key_is_let_in_before_a_more_urgent_job(self, database, store):
        keys = new_keys(store, "ab")
        low, high = (submitted(store, i, owner_id=key) for i, key in enumerate(keys))
        for _ in range(3):
            store.next_turn([CALIBRATE])

        assert in_order(database) == first_stages(high, low)

    def test_a_dead_workers_stage_is_the_next(self, database, store):
        entry, claim = taken(store, submitted(store))
        since, urgent = submitted(store), submitted(store, 1)
        store.give_again(entry, alive_s=0.0)

        assert in_order(database) == first_stages(urgent, claim.job, since)

    def test_another_waits_if_this_worker_could_take_it(self, store):
        _, claim = taken(store, submitted(store))
        alone = store.another_waits(claim, [CALIBRATE])
        submitted(store, -1)
        less_urgent = store.another_waits(claim, [CALIBRATE])
        waiting = submitted(store)

        assert (alone, less_urgent) == (False, False)
        assert store.another_waits(claim, [CALIBRATE, FINISH])
        assert not store.another_waits(claim, [SEARCH])
        store.ask(waiting.id, "pause")
        assert not store.another_waits(claim, [CALIBRATE])
        taken(store, submitted(store, 1, lock="a"))
        submitted(store, lock="a")  # waits for somebody else
        assert not store.another_waits(claim, [CALIBRATE])

    def test_lock_of_a_paused_job(self, database, store):
        paused, waiting = (submitted(store, lock="a") for _ in "ab")
        store.ask(paused.id, "pause")

        assert in_order(database) == first_stages(waiting)

    @pytest.mark.parametrize("action", ["pause", "cancel"])
    def test_what_waits_leaves_with_its_job_and_what_a_worker_has_stays(
        self, database, store, action
    ):
        entry, claim = taken(store, job := submitted(store))
        store.complete(claim, {}, then=[NewStage(kind=SEARCH, number=i) for i in range(3)])
        finish(database, entry)
        entry, _ = taken(store, job)
        store.ask(job.id, action)

        with database.transaction() as connection:
            rows = connection.exec_driver_sql("SELECT id FROM procrastinate_jobs").scalars().all()
        assert rows == [entry]

    @pytest.mark.parametrize(
        ("action", "end"), [("pause", JobState.PAUSED), ("cancel", JobState.CANCELLED)]
    )
    def test_whose_worker_died_stays_until_it_is_put_down(self, database, store, action, end):
        entry, _ = taken(store, job := submitted(store))
        store.give_again(entry, alive_s=0)
        busy = store.ask(job.id, action)
        again, stage_id = fetch(database)

        assert not busy.state.may_work
        assert busy.state is not end
        assert store.claim(stage_id, again, uuid.uuid4()) is None
        assert store.get(job.id).state is end


class Life:
    """One job of two islands, users who ask for this and that, and workers that fail and die."""

    def __init__(self, database, seed):
        self.database = database
        self.store = JobStore(database)
        self.random = random.Random(seed)
        self.busy = []  # (entry, claim) of workers at work
        self.dead = []  # entries of workers that died
        first = NewStage(kind=CALIBRATE, lock="bundle")
        new = NewJob(spec={}, name="n", stages=[first], trials=10, max_attempts=3)
        self.job_id = self.store.submit(new)[0].id

    @property
    def state(self):
        """Of the job."""
        return self.store.get(self.job_id).state

    def fetch(self):
        """A worker takes the next entry, if there is one."""
        given = fetch(self.database)
        if given is None:
            return
        entry, stage_id = given
        claim = self.store.claim(stage_id, entry, uuid.uuid4())
        if claim is None:
            finish(self.database, entry)
            return
        self.check(claim)
        self.busy.append((entry, claim))

    def check(self, claim):
        """No stage begins before those are done that it builds upon."""
        before = [s for s in claim.job.stages if s.kind.rank < claim.stage.kind.rank]
        assert {s.state for s in before} <= {StageState.DONE}, (claim.stage.kind, claim.job.stages)

    def work(self):
        """A worker does its stage, puts it down if the job may not work, fails or dies."""
        if not self.busy:
            return
        entry, claim = self.busy.pop(self.random.randrange(len(self.busy)))
        luck = self.random.random()
        if luck < 0.15:
            self.dead.append(entry)
        elif luck < 0.25:
            self.end(entry, again=self.store.fail(claim, {"type": "E"}, retry=luck < 0.2))
        elif luck < 0.35:
            self.end(entry, again=self.store.end_turn(claim))
        elif not self.store.watch(claim).may_work and self.random.random() < 0.8:
            self.end(entry, again=self.store.hand_back(claim))
        else:
            self.complete(claim)
            self.end(entry, again=False)

    def complete(self, claim):
        """Do a stage as the workers do it."""
        if claim.stage.kind is FINISH:
            self.store.complete(claim, {}, job_result=JobResult(best={}, warnings=[]), ended=True)
            return
        then = [NewStage(kind=FINISH)]
        if claim.stage.kind is CALIBRATE:
            then = [NewStage(kind=SEARCH, number=i) for i in range(2)]
        elif claim.stage.kind is SEARCH:
            then = [NewStage(kind=StageKind.CONFIRM)]
        elif claim.stage.kind is StageKind.CONFIRM:
            numbers = self.random.sample(range(4), 2)
            then = [NewStage(kind=StageKind.PERPLEXITY, number=i) for i in numbers]
        seen = claim.job
        while not self.store.complete(claim, {}, then=then, seen=seen):
            seen = self.store.get(self.job_id)  # another stage was done, or it was extended

    def end(self, entry, *, again):
        """What procrastinate does with an entry that a worker is through with."""
        (retry if again else finish)(self.database, entry)

    def ask(self):
        """A user asks for something, allowed or not."""
        verb = self.random.choice(["pause", "pause", "resume", "resume", "extend"])
        with suppress(StateConflict):
            self.store.ask(self.job_id, verb, trials=5)

    def revive(self):
        """The entries of dead workers come again."""
        while self.dead:
            retry(self.database, self.dead.pop())

    def settle(self):
        """From now on all goes well: what is there is done, and nobody asks for anything else."""
        self.revive()
        while self.busy:
            entry, claim = self.busy.pop()
            self.complete(claim)
            self.end(entry, again=False)
        if self.state in (JobState.PAUSED, JobState.PAUSING, JobState.FAILED):
            self.store.ask(self.job_id, "resume")
        while self.waiting():
            self.fetch()
            while self.busy:
                entry, claim = self.busy.pop()
                self.complete(claim)
                self.end(entry, again=False)

    def waiting(self):
        """How many entries are in the queue."""
        query = select(func.count()).select_from(text("procrastinate_jobs"))
        with self.database.transaction() as connection:
            return int(connection.execute(query).scalar_one())


class TestLife:
    """No order of events leaves a job with nobody to do its work."""

    @pytest.mark.parametrize(
        "seed", [*range(5), *(pytest.param(n, marks=pytest.mark.thorough) for n in range(5, 25))]
    )
    def test_resumed_and_left_alone_a_job_succeeds(self, database, seed):
        life = Life(database, seed)
        for _ in range(60):
            step = life.random.choices(
                [life.fetch, life.work, life.ask, life.revive], weights=[5, 5, 1, 1]
            )
            step[0]()
        life.settle()
        job = life.store.get(life.job_id)

        assert job.state is JobState.SUCCEEDED
        assert {s.state for s in job.stages} == {StageState.DONE}

    @pytest.mark.parametrize("seed", range(3))
    def test_cancelled_once_its_entries_came_by(self, database, seed):
        life = Life(database, seed)
        for _ in range(life.random.randrange(1, 12)):
            life.fetch()
            if life.random.random() < 0.5:
                life.work()
        if life.state in (JobState.SUCCEEDED, JobState.FAILED):
            pytest.fail("this seed is over too early: take another")
        life.store.ask(life.job_id, "cancel")
        life.dead += [entry for entry, _ in life.busy]  # all die at once
        life.busy.clear()
        life.revive()
        while life.waiting():
            life.fetch()

        assert life.state is JobState.CANCELLED
        assert life.store.get(life.job_id).of_kind(FINISH) == []
