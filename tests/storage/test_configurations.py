"""The library's table: what a job leaves in it, and who sees it."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from pretended_user import take

import storage.claims
import storage.configurations
from storage.claims import JobResult
from storage.configurations import ConfigurationStore, NoSuchConfiguration, keep, keep_transfer
from storage.jobs import NewJob
from storage.keys import KeyStore
from storage.records import LostClaim, NewStage, StageKind

BEST = {"pattern": "0.5", "scope": "layer", "coefficients": {"row": 0.1 + 0.2, "ü": [None, 1]}}
FINISH = NewStage(kind=StageKind.FINISH)


@pytest.fixture
def library(database):
    return ConfigurationStore(database)


@pytest.fixture
def owners(database):
    return [KeyStore(database).create(name, sees_all=False)[0].id for name in ("a", "b")]


def finishing(store, owner_id=None):
    """The claim on the last stage of a new job."""
    new = NewJob(spec={"trials": 1}, name="job", stages=[FINISH], trials=1, max_attempts=1)
    job, _ = store.submit(new, owner_id=owner_id)
    return take(store, job.id, StageKind.FINISH)


def succeeded(store, best=BEST, owner_id=None):
    """A new job that has found this."""
    claim = finishing(store, owner_id)
    store.complete(claim, {}, job_result=JobResult(best=best, warnings=[]), ended=True)
    return store.get(claim.job.id)


def added(library, owner_id=None, **changes):
    """A new entry that was imported."""
    entry, new = library.add({**BEST, **changes}, transfers=[], owner_id=owner_id)
    assert new
    return entry


def test_a_lost_stage_leaves_nothing(store, library):
    claim = finishing(store)
    store.hand_back(claim)

    with pytest.raises(LostClaim):
        store.complete(claim, {}, job_result=JobResult(best=BEST, warnings=[]), ended=True)
    assert library.all() == []


def test_a_job_that_cannot_be_ended_leaves_nothing_in_the_library_and_is_where_it_was(
    store, library, monkeypatch
):
    claim = finishing(store)

    def broken(*_arguments, **_more):
        raise ZeroDivisionError

    monkeypatch.setattr(storage.claims, "set_state", broken)

    with pytest.raises(ZeroDivisionError):
        store.complete(claim, {}, job_result=JobResult(best=BEST, warnings=[]), ended=True)
    assert library.all() == []
    assert store.get(claim.job.id).best is None


def test_what_is_found_is_in_the_library_once_and_outlives_its_job_as_that_does_the_entry(
    store, library
):
    first, second = succeeded(store), succeeded(store)
    with store.deleting(first.id):
        pass
    (entry,) = library.all()
    there = library.get(entry.id)
    library.delete(entry.id)

    assert (entry.document, entry.job_id, entry.transfers) == (BEST, first.id, [])
    assert first.best == second.best == BEST
    assert there == entry
    assert library.all() == []
    assert store.page() == [store.get(second.id)] == [second]


def test_imported_at_once(library, owners):
    """The same is one entry for each owner, whatever the order of keys, with all transfers."""
    added(library)
    added(library, owners[1])
    added(library, coefficients={"row": 0.3, "ü": [None, 1]})  # another last bit

    def load(number):
        document = dict(reversed(BEST.items())) if number % 2 else BEST
        return library.add(document, transfers=[{"target": f"t{number}"}], owner_id=owners[0])[0].id

    with ThreadPoolExecutor(8) as pool:
        (mine,) = set(pool.map(load, range(16)))
    transfers = library.get(mine).transfers

    assert len(library.all()) == 4
    assert sorted(t["target"] for t in transfers) == sorted(f"t{i}" for i in range(16))


def test_what_was_measured_elsewhere_is_added_once(library):
    one, two = {"target": "one", "n": 0.1 + 0.2}, {"target": "two", "ü": [None]}
    first, _ = library.add(BEST, transfers=[one], owner_id=None)
    both, _ = library.add(BEST, transfers=[two, one, two], owner_id=None)

    assert first.transfers == [one]
    assert (both.id, both.transfers) == (first.id, [one, two])
    assert library.get(first.id) == both


def test_a_transfer_is_its_owners(library, owners):
    entries = [added(library, owner) for owner in (*owners, None)]
    with library.database.transaction() as connection:
        keep_transfer(connection, BEST, {"target": "t"}, owner_id=owners[1])

    assert [library.get(e.id).transfers for e in entries] == [[], [{"target": "t"}], []]


def test_what_is_kept_is_there_if_its_transaction_is(library):
    with pytest.raises(ZeroDivisionError), library.database.transaction() as connection:  # noqa: PT012
        assert keep(connection, BEST, owner_id=None, job_id=None)[1]
        raise ZeroDivisionError

    assert library.all() == []


def test_a_key_finds_its_own_alone(library, owners):
    mine, theirs = added(library, owners[0]), added(library, owners[1])
    nobodys = added(library)

    assert library.all(visible_to=owners[0]) == [mine]
    assert library.get(mine.id, visible_to=owners[0]) == mine
    for entry in (theirs, nobodys):
        with pytest.raises(NoSuchConfiguration):
            library.get(entry.id, visible_to=owners[0])
        with pytest.raises(NoSuchConfiguration):
            library.delete(entry.id, visible_to=owners[0])
    assert library.all() == [nobodys, theirs, mine]
    library.delete(mine.id, visible_to=owners[0])
    assert library.all() == [nobodys, theirs]
    for forget in (library.get, library.delete):
        with pytest.raises(NoSuchConfiguration):
            forget(mine.id)
    assert added(library, owners[0]).id != mine.id


def test_of_too_many_entries_those_of_the_asked_pattern_come_first_then_the_newest(
    library, owners, monkeypatch
):
    monkeypatch.setattr(storage.configurations, "CONSIDERED", 4)
    patterns = ("2:4", "0.5", "2:4", "0.6", "0.6", "0.6", "0.7")
    entries = [added(library, owners[0], pattern=p, n=i) for i, p in enumerate(patterns)]
    added(library, owners[1], pattern="2:4")

    def numbers(pattern):
        found = library.all(pattern=pattern, visible_to=owners[0])
        assert all(entry in entries for entry in found)
        return [entry.document["n"] for entry in found]

    assert numbers("2:4") == [2, 0, 6, 5]
    assert numbers("0.5") == [1, 6, 5, 4]
    assert numbers("0.9") == [6, 5, 4, 3]
    assert numbers(None) == [6, 5, 4, 3]
    for document in ({"x": 1}, {"pattern": None}):  # what names no pattern comes last
        library.add(document, transfers=[], owner_id=owners[1])
    theirs = library.all(pattern="2:4", visible_to=owners[1])
    assert [entry.document.get("pattern", "-") for entry in theirs] == ["2:4", None, "-"]
