"""The life of a job: what may be asked for in each state, by hand and on the database."""

import pytest
from sqlalchemy import select, update

from storage.jobs import JobStore, NewJob
from storage.records import VERBS, JobState, NewStage, StageKind, StageState, StateConflict, settled
from storage.tables import events, jobs, stages

# For each verb and state: what the job is then if no worker is busy with it, and if one is.
# States that are not here are a conflict.
EXPECTED = {
    ("cancel", "queued"): ("cancelled", "cancelling"),
    ("cancel", "running"): ("cancelled", "cancelling"),
    ("cancel", "pausing"): ("cancelled", "cancelling"),
    ("cancel", "paused"): ("cancelled", "cancelling"),
    ("cancel", "cancelling"): ("cancelled", "cancelling"),
    ("cancel", "cancelled"): ("cancelled", "cancelled"),
    ("pause", "queued"): ("paused", "pausing"),
    ("pause", "running"): ("paused", "pausing"),
    ("pause", "pausing"): ("paused", "pausing"),
    ("pause", "paused"): ("paused", "paused"),
    ("resume", "queued"): ("queued", "queued"),
    ("resume", "running"): ("running", "running"),
    ("resume", "pausing"): ("queued", "queued"),
    ("resume", "paused"): ("queued", "queued"),
    ("resume", "failed"): ("queued", "queued"),
    ("extend", "queued"): ("queued", "queued"),
    ("extend", "running"): ("running", "running"),
    ("extend", "paused"): ("paused", "paused"),
    ("extend", "succeeded"): ("queued", "queued"),
    ("delete", "paused"): ("paused", "paused"),
    ("delete", "cancelled"): ("cancelled", "cancelled"),
    ("delete", "succeeded"): ("succeeded", "succeeded"),
    ("delete", "failed"): ("failed", "failed"),
}
ALLOWED = [
    (verb, JobState(state), busy, JobState(then[busy]))
    for (verb, state), then in EXPECTED.items()
    for busy in (False, True)
]
ASKED = [case for case in ALLOWED if case[0] != "delete"]
REFUSED = [(verb, s) for verb in VERBS for s in JobState if (verb, s.value) not in EXPECTED]


@pytest.fixture(scope="module")
def store(shared_database):
    """The jobs of a database that the tests of this file share: each makes its own job."""
    return JobStore(shared_database)


def job_in(store, state, *, busy):
    """A job in this state, whose only stage, a search, is running or waits."""
    search = NewStage(kind=StageKind.SEARCH)
    job, _ = store.submit(NewJob(spec={}, name="n", stages=[search], trials=10, max_attempts=3))
    stage = StageState.RUNNING if busy else StageState.WAITING
    with store.database.transaction() as connection:
        connection.execute(update(jobs).where(jobs.c.id == job.id).values(state=state))
        connection.execute(update(stages).where(stages.c.job_id == job.id).values(state=stage))
    return job.id


def rows(store, job_id):
    with store.database.transaction() as connection:
        return [
            connection.execute(select(jobs).where(jobs.c.id == job_id)).all(),
            connection.execute(select(stages).where(stages.c.job_id == job_id)).all(),
            connection.execute(select(events).where(events.c.job_id == job_id)).all(),
            connection.exec_driver_sql("SELECT * FROM procrastinate_jobs ORDER BY id").all(),
        ]


def test_the_table_knows_the_verbs_and_transitions_of_the_drawing_and_no_others():
    known = {(verb, state.value) for verb, states in VERBS.items() for state in states}

    assert known == set(EXPECTED)


def test_without_a_worker_what_was_on_its_way_has_arrived_asked_again_nothing_changes():
    arrivals = {JobState.PAUSING: JobState.PAUSED, JobState.CANCELLING: JobState.CANCELLED}
    for state in JobState:
        assert settled(state, busy=False) is arrivals.get(state, state)
    for verb, states in VERBS.items():
        for state, then in states.items():
            for busy in (False, True):
                arrived = settled(then, busy=busy)

                assert settled(VERBS[verb][arrived], busy=busy) is arrived, state


def test_a_job_that_is_over_does_no_work_one_on_its_way_out_is_neither():
    over = {state.value for state in JobState if state.is_over}
    works = {state.value for state in JobState if state.may_work}

    assert over == {"cancelled", "succeeded", "failed"}
    assert works == {"queued", "running"}


@pytest.mark.parametrize(("verb", "state", "busy", "then"), ASKED)
def test_ask(store, verb, state, busy, then):
    """The store takes a job where the table says, gives it so, and tells it if it is news."""
    if busy and then is JobState.QUEUED:
        then = JobState.RUNNING  # it waits for no worker: it has one
    job_id = job_in(store, state, busy=busy)
    before = store.events(job_id)
    answer = store.ask(job_id, verb, trials=1 if verb == "extend" else 0)
    news = [event.data for event in store.events(job_id)[len(before) :]]

    assert answer == store.get(job_id)
    assert answer.state is then
    assert news == ([] if then is state else [{"state": then}])


@pytest.mark.parametrize(("verb", "state"), [case for case in REFUSED if case[0] != "delete"])
@pytest.mark.parametrize("busy", [False, True])
def test_all_else_is_a_conflict(store, verb, state, busy):
    job_id = job_in(store, state, busy=busy)
    before = rows(store, job_id)
    with pytest.raises(StateConflict, match=f"a job that is {state} cannot be") as caught:
        store.ask(job_id, verb, trials=1)

    assert caught.value.state is state
    assert rows(store, job_id) == before


@pytest.mark.parametrize("state", VERBS["delete"])
def test_a_job_that_is_over_or_paused_can_be_deleted(store, state):
    job_id = job_in(store, state, busy=False)
    with store.deleting(job_id):
        pass

    assert rows(store, job_id)[:3] == [[], [], []]


@pytest.mark.parametrize("state", [state for verb, state in REFUSED if verb == "delete"])
@pytest.mark.parametrize("busy", [False, True])
def test_what_may_work_is_not_deleted(store, state, busy):
    job_id = job_in(store, state, busy=busy)
    before = rows(store, job_id)
    entered = False
    with (
        pytest.raises(StateConflict, match=r"cannot be deleted\. Cancel it first\."),
        store.deleting(job_id),
    ):
        entered = True

    assert not entered
    assert rows(store, job_id) == before


def test_a_verb_that_is_not_in_the_table_is_a_programmers_fault(store):
    job_id = job_in(store, JobState.RUNNING, busy=False)
    before = rows(store, job_id)
    with pytest.raises(KeyError):
        store.ask(job_id, "explode")

    assert rows(store, job_id) == before
