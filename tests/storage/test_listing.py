"""Lists of jobs: filtered, sorted and counted."""

from collections.abc import Callable

import pytest

from storage.jobs import NewJob
from storage.keys import KeyStore
from storage.listing import SORTS, JobFilter, best_columns, columns_of
from storage.records import JobRecord, JobState, NewStage, StageKind
from storage.tables import jobs

Submit = Callable[..., JobRecord]


@pytest.fixture
def submit(store):
    """Submit a job of a model and a pattern, with more of its document and of its record."""

    def make(model="org/a", pattern="0.5", *, name="job", owner_id=None, **spec):
        document = {"model": model, "pattern": pattern, "islands": 1, **spec}
        first = NewStage(kind=StageKind.CALIBRATE)
        new = NewJob(spec=document, name=name, stages=[first], trials=1, max_attempts=1)
        return store.submit(new, owner_id=owner_id)[0]

    return make


def measured(store, job, **values):
    """Give a job what it is sorted by, as if it had succeeded."""
    with store.database.transaction() as connection:
        connection.execute(jobs.update().where(jobs.c.id == job.id).values(values))


def test_each_filter_leaves_the_jobs_for_which_it_holds(store, submit):
    first = submit("org/a", "0.5", name="Alpha 100%")
    second = submit("org/b", "2:4", name="beta_1", more_models=["org/a"])
    third = submit("org/b", "", name="gamma", patterns=["0.5", "2:4"])
    store.ask(third.id, "pause")

    def listed(**given):
        return [job.id for job in store.page(JobFilter(**given))][::-1]  # type: ignore[misc]

    assert listed(models=["org/a"]) == [first.id, second.id]
    assert listed(models=["org"]) == []
    assert listed(patterns=["2:4"]) == [second.id, third.id]
    assert listed(models=["org/a"], patterns=["2:4"]) == [second.id]
    assert listed(models=["org/a", "org/b"]) == [first.id, second.id, third.id]
    assert listed(name="ALPHA") == [first.id]
    assert listed(name="0%") == [first.id]
    assert listed(name="a_1") == [second.id]
    assert listed(name=str(third.id)[:11].upper()) == [third.id]
    assert listed(name="-") == []
    assert listed(states=[JobState.PAUSED], patterns=["0.5"]) == [third.id]
    assert listed(models=["a\0b"]) == listed(name="a\0b") == []


def test_jobs_come_in_the_order_of_a_value_either_way(store, submit):
    made = [
        submit("org/b", "0.7", name="Zeta"),
        submit("org/A", "0.5", name="alpha"),
        submit("org/c", "2:4", name="beta"),
        submit("org/a", "0.5", name="alpine"),
    ]
    for job, value in zip(made[:2], (2.0, 1.0), strict=True):
        measured(store, job, perplexity=value, rise=value, gain=value)
    store.ask(made[0].id, "cancel")
    store.ask(made[1].id, "pause")
    ascending = {
        "created": [0, 1, 2, 3], "name": [1, 3, 2, 0], "model": [3, 1, 0, 2],
        "pattern": [3, 1, 0, 2], "state": [3, 2, 1, 0], "perplexity": [1, 0, 3, 2],
        "rise": [1, 0, 3, 2], "gain": [1, 0, 3, 2],
    }  # fmt: skip
    descending = {
        "created": [3, 2, 1, 0], "name": [0, 2, 3, 1], "model": [2, 0, 3, 1],
        "pattern": [2, 0, 3, 1], "state": [0, 1, 3, 2], "perplexity": [0, 1, 3, 2],
        "rise": [0, 1, 3, 2], "gain": [0, 1, 3, 2],
    }  # fmt: skip
    places = {job.id: place for place, job in enumerate(made)}
    found = {sort: [places[job.id] for job in store.page(sort=sort)] for sort in SORTS}
    page = store.page(sort="perplexity", skip=1, limit=2)

    assert found == {**ascending, **{f"-{name}": wanted for name, wanted in descending.items()}}
    assert [places[job.id] for job in page] == [0, 3]


def test_jobs_are_counted_by_state_model_and_pattern(store, submit):
    mine = KeyStore(store.database).create("mine", sees_all=False)[0].id
    for pattern in ("0.5", "0.7", "0.5"):
        submit("org/a", pattern, owner_id=mine)
    paused = submit("org/b", "0.5", owner_id=mine)
    store.ask(paused.id, "pause")
    submit("org/c")
    found = store.facets(JobFilter(visible_to=mine, models=["org/a"], patterns=["0.5"]))
    everything = store.facets(JobFilter(), limit=2)

    assert found.states == {JobState.QUEUED: 2}
    assert found.models == [("org/a", 2), ("org/b", 1)]
    assert found.patterns == [("0.5", 2), ("0.7", 1)]
    assert everything.models == [("org/a", 3), ("org/b", 1)]
    assert store.facets(JobFilter(models=["org/c"]), limit=2).models == [("org/c", 1), ("org/a", 3)]


def test_searches_transfers_several_patterns_and_targets_are_found_by_all_that_they_name():
    transfer = {"models": ["m", "n"], "configuration": {"pattern": "2:4"}}
    best = {
        "perplexities": {"dense": 20.0, "pruned": 25.0, "ria": 40.0, "wanda": None},
        "confirmation": {"perplexity": 25.0},
    }

    assert columns_of({"model": "m", "pattern": "0.5", "patterns": None, "target": None}) == {
        "models": ["m"], "patterns": ["0.5"], "labels": [],
    }  # fmt: skip
    assert columns_of({"model": "m", "more_models": ["n"], "patterns": ["0.5", "2:4"]}) == {
        "models": ["m", "n"], "patterns": ["0.5", "2:4"], "labels": [],
    }  # fmt: skip
    assert columns_of({"model": "m", "target": {"perplexity_rise": 0.1}})["patterns"] == ["target"]
    assert columns_of(transfer) == {"models": ["m", "n"], "patterns": ["2:4"], "labels": []}
    assert best_columns(best) == {"perplexity": 25.0, "rise": 0.25, "gain": 0.375}
    assert best_columns({"confirmation": None}) == best_columns(None)
    assert best_columns({"confirmation": {"perplexity": 3.0}})["perplexity"] == 3.0
    assert {*best_columns(None).values()} == {None}


def test_jobs_are_listed_by_all_labels_or_by_the_name_of_one(store, submit):
    first = submit(labels={"team": "a", "run": "1"})
    second = submit(labels={"team": "b"})
    submit()

    def listed(*labels):
        return [job.id for job in store.page(JobFilter(labels=labels))]

    assert listed("team") == [second.id, first.id]
    assert listed("team=a") == listed("team=a", "run") == [first.id]
    assert listed("team=a", "run=2") == listed("tea") == listed("a\0b") == []
