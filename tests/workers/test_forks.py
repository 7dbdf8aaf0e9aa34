"""A fork goes on with the trials of another job in another space."""

import pytest

from pho_service.api import submission
from pho_service.api.service import Caller, Service
from pho_service.host.settings import read_settings
from storage.records import JobState, StageKind

CALLER = Caller(key_id=None, sees_all=True)
SPACE = {"activation_exponent": [0.3, 1.0]}


@pytest.fixture
def fork(hand):
    """Submit a job with what another one has found."""
    settings = read_settings(
        model_roots=(hand.folder,), text_roots=(hand.folder,), artifacts=str(hand.bundles)
    )
    service = Service(hand.store.database, settings, keys_needed=False)

    def submit(job, **changes):
        spec = {**job.spec, "fork_of": str(job.id), "search_space": SPACE, **changes}
        return submission.take(submission.JobSpec.model_validate(spec), service, CALLER, None)

    yield submit
    service.probe.close()


def searched(trials):
    return [trial for trial in trials if trial[4]["method"] == "crepe"]


@pytest.mark.parametrize("sampler", [pytest.param("cmaes", marks=pytest.mark.thorough), "tpe"])
def test_a_fork_goes_on_from_the_trials_in_its_space_the_same_each_time_without_its_parent(
    hand, small, fork, sampler
):
    job = hand.done(small(trials=22))
    inside = [
        trial for trial in searched(hand.trials(job)[0])
        if 0.3 <= trial[3]["activation_exponent"] <= 1.0
    ]  # fmt: skip
    children = [fork(job, trials=14, sampler=sampler) for _ in range(2)]
    with hand.store.deleting(job.id):
        pass
    first, second = (hand.until(child, None) for child in children)
    (trials,), (again,) = hand.trials(first), hand.trials(second)
    count = len(inside)

    assert 0 < count < len(searched(hand.trials(first)[0]))
    assert first.state is JobState.SUCCEEDED
    assert [trial[2] for trial in trials[:count]] == [trial[2] for trial in inside]
    assert len(trials) == count + 14
    assert trials == again
    assert all(0.3 <= t[3]["activation_exponent"] <= 1.0 for t in searched(trials))
    assert first.best["perplexities"] == second.best["perplexities"]
    assert first.best["search"]["fork"] == {"job": str(job.id), "trials": count, "rated": 16}
    assert first.warnings[-1].startswith(f"Fork of job {job.id}: the search began with {count} ")


def test_what_a_parent_found_inside_the_space_counts_in_each_island_once(hand, small, fork):
    job = hand.done(small(trials=22, confirm=None))
    child = hand.until(fork(job, trials=6, islands=2, search_space={}), None)
    best = min(t[2] for t in searched(hand.trials(job)[0]))

    assert child.best["objective"]["value"] <= best
    assert child.of_kind(StageKind.SEARCH)[0].done == 6


def test_a_file_that_has_changed_since_fails_the_fork_and_says_so(hand, small, fork):
    job = hand.done(small(confirm=None))
    text = hand.folder / "calibration.jsonl"
    text.write_text("".join(reversed(text.read_text().splitlines(keepends=True))))
    child = hand.work(fork(job, search_space={}))

    assert child.state is JobState.FAILED
    assert "a file has changed since" in child.error["message"]
