"""The minutes of a job as it runs: what took longer leaves less, and something is always done."""

from dataclasses import replace
from functools import partial

import pytest

from pho_service.models.data_sets import TextSource
from pho_service.models.loading import load_model
from pho_service.pipeline.minutes import Clock, machine_of, slower
from pho_service.planning.costs import QUICK, named_machine
from pho_service.planning.shapes import read_shapes
from pho_service.progress import BlocksTrained, LinearsPruned
from pho_service.spec.job import JobSpec
from pho_service.spec.minutes import AFTER_CALIBRATION, MOST_PASSES, SIZES


@pytest.fixture
def shapes(model_folder):
    return read_shapes(str(model_folder))


@pytest.fixture
def machine():
    """One on which the tiny model takes minutes."""
    rates = {"products": 1e5, "float_products": 1e5, "bandwidth": 1e5, "copies": 1e5}
    return replace(named_machine("cpu"), **rates, uncertainty=1.25, quick=QUICK, cores=2)


@pytest.fixture
def begun(model_folder, shapes, machine):
    """The clock of a job, and how to let time pass."""

    def begin(minutes, **fields):
        spec = JobSpec.model_validate(
            {"model": str(model_folder), "pattern": "0.5", "minutes": minutes, **fields}
        )
        passed = [0.0]
        clock = Clock(spec, shapes, machine, lambda: passed[0])
        return spec, clock, passed

    return begin


def least_minutes(begun, **fields):
    return begun(0.01, **fields)[1].plan.own_seconds() / 60


def calibrated(spec, clock, passed, seconds):
    """The sizes of a job whose calibration has taken so many seconds."""
    passed[0] += seconds
    sizes = clock.plan.spec.sizes
    again = spec.sized({p: s for p, s in sizes.items() if p not in AFTER_CALIBRATION})
    return clock.calibrated(again, anew=True)


def test_a_calibration_that_took_longer_leaves_fewer_finalists_to_prune_in_full(begun):
    minutes = 12 * least_minutes(begun)
    found = []
    for times in (0.5, 1.0, 2.0):
        spec, clock, passed = begun(minutes, calibration={"samples": 8})
        plan = clock.plan
        planned = plan.own_seconds() - plan.own_seconds(calibrated=True)
        found.append(calibrated(spec, clock, passed, times * planned))
        assert found[-1].free_sizes == []
        assert found[-1].calibration == plan.spec.calibration
    in_full = [spec.request(0).pruned_in_full(5, spec.pruning()) for spec in found]

    assert in_full == sorted(in_full, reverse=True)
    assert in_full[0] > in_full[-1]


def test_a_winner_is_trained_in_fewer_passes_where_time_is_short_but_in_one_at_least(begun):
    _, clock, passed = begun(4 * least_minutes(begun))
    whole = clock.passes_left(2)
    passed[0] = 0.99 * 60 * clock.plan.spec.minutes

    assert whole > 2  # the preset's
    assert clock.passes_left(2) == 1
    passed[0] *= 2
    assert clock.left_s < 0
    assert clock.passes_left(2) == 1


def test_a_training_that_takes_longer_goes_on_in_one_pass_where_the_rest_needs_the_time(begun):
    _, clock, passed = begun(4 * least_minutes(begun))
    costs = clock.plan.costs
    block_s = costs.training() / 10
    trained = partial(BlocksTrained, blocks=10, shorter=(5,))
    once_s = clock._costs(clock._trained_work(1)).training() / 10
    begins = clock.trains_on(trained(done=0, passes=2, block_s=None))
    passed[0] = 60 * clock.plan.spec.minutes - costs.perplexity() - costs.reported()
    passed[0] -= 5 * block_s

    assert begins
    assert clock.trains_on(trained(done=5, passes=2, block_s=block_s))
    assert not clock.trains_on(trained(done=5, passes=2, block_s=5 * block_s))
    assert clock.trains_on(trained(done=9, passes=2, block_s=4.9 * block_s))
    assert not clock.trains_on(trained(done=9, passes=2, block_s=5.1 * block_s))
    assert not clock.trains_on(trained(done=0, passes=2, block_s=None))
    assert clock.trains_on(trained(done=5, passes=1, block_s=once_s))
    assert not clock.trains_on(trained(done=5, passes=1, block_s=9 * once_s))


def test_passes_that_were_asked_for_are_not_made_more_nor_those_before_a_recovery(begun):
    minutes = 40 * least_minutes(begun)
    trained = {"reconstruction": {"method": "block", "passes": 2}}
    _, clock, _ = begun(minutes)
    _, asked, _ = begun(minutes, steps=trained)
    _, recovered, _ = begun(minutes, prune=True, recovery={})

    assert clock.passes_left(2) == MOST_PASSES
    assert asked.passes_left(2) == recovered.passes_left(2) == 2


def test_passes_have_the_time_of_a_recovery_that_would_be_too_short(begun):
    recovered = {"prune": True, "recovery": {}}
    minutes = 8 * least_minutes(begun)
    _, clock, passed = begun(minutes, **recovered)
    _, enough, _ = begun(40 * minutes, **recovered)
    passed[0] = 0.9 * 60 * minutes

    assert clock.plan.work.recovery is None
    assert clock.recovery_s() == 0
    assert enough.plan.work.recovery is not None
    assert enough.recovery_s() > 0
    passed[0] = 0.1 * 60 * minutes
    assert clock.passes_left(2) == MOST_PASSES


def test_a_preset_that_trains_nothing_has_finalists_pruned_in_full_as_well(begun):
    minutes = 40 * least_minutes(begun, preset="crepe-plus")
    _, clock, _ = begun(minutes, preset="crepe-plus")

    assert clock.plan.work.steps.needs_text
    assert clock.in_full(3) == 3


def test_a_race_that_took_longer_leaves_fewer_to_prune_in_full_but_one_at_least(begun):
    minutes, counts = 16 * least_minutes(begun), []
    for times in (0.5, 3.0, 30.0):
        spec, clock, passed = begun(minutes, calibration={"samples": 8})
        plan = clock.plan
        passed[0] = plan.own_seconds() - plan.own_seconds(calibrated=True)
        clock.calibrated(spec.sized(plan.spec.sizes), anew=False)
        passed[0] += times * 0.2 * 60 * minutes
        counts.append(clock.in_full(5))
        assert 1 <= clock.passes(2) <= MOST_PASSES

    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[-1] == 1


def test_finalists_that_take_longer_than_planned_are_the_last_ones(begun):
    counts = []
    for times in (1, 3, 30):
        _, clock, passed = begun(40 * least_minutes(begun), calibration={"samples": 8})
        one_s = clock.plan.costs.measured()
        count = 0
        while count < 100 and clock.another(count):
            count, passed[0] = count + 1, passed[0] + times * one_s
        counts.append(count)
        assert not clock.another(count)
        assert clock.passes(2) >= 1
        over_s = passed[0] - 60 * clock.plan.spec.minutes
        assert over_s < times * one_s or count == 1

    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[-1] >= 1


def test_a_finalist_that_takes_longer_than_planned_is_given_up_for_the_training(begun):
    _, clock, passed = begun(4 * least_minutes(begun))
    one_s = clock.plan.costs.measured()
    pruned = partial(LinearsPruned, before=1, linears=10)
    enough_s = 1.5 * (one_s + clock._training_s(1))
    passed[0] = clock._search_left_s - enough_s

    assert clock.another_left(1)
    assert clock.prunes_on(pruned(done=2, linear_s=one_s / 10))
    assert clock.prunes_on(pruned(done=2, linear_s=1.5 * one_s / 10))
    assert not clock.prunes_on_left(pruned(done=2, linear_s=2 * one_s / 10))
    assert clock.another(0)
    passed[0] += 3 * one_s
    assert not clock.prunes_on(pruned(done=9, linear_s=3 * one_s / 10))
    assert clock.plan.costs.measured() == one_s
    assert clock._costs(clock.plan.work).measured() == pytest.approx(3 * one_s / 0.9)  # learnt


def test_a_clock_that_stands_or_jumps_changes_rates_within_bounds(begun, machine):
    spec, clock, passed = begun(4 * least_minutes(begun))
    jumped = calibrated(spec, clock, passed, 1e9)

    assert slower(machine, 1e9).products == machine.products / 8
    assert slower(machine, 1e-9).products == machine.products * 4
    assert jumped.in_full == 1


def test_rates_are_those_of_the_model_itself(model_folder, shapes):
    model = load_model(str(model_folder), device="cpu")
    spec = JobSpec.model_validate({"model": str(model_folder), "pattern": "0.5"})
    machine = machine_of(model, shapes, spec)

    assert machine.uncertainty < named_machine("cpu").uncertainty
    assert machine.products != named_machine("cpu").products


def test_of_a_short_text_some_windows_are_left_to_confirm_on(begun, model_folder, texts):
    model = load_model(str(model_folder), device="cpu")
    _, clock, _ = begun(1e5)
    asked = clock.plan.spec.calibration.samples

    text = TextSource(path=str(texts["calibration"]))
    assert clock.fit_text(model, text, [], SIZES)
    spec = clock.plan.spec
    assert 0 < spec.calibration.samples < asked
    assert spec.calibration.context_length < 1024
    assert not clock.fit_text(model, text, [], SIZES)


def test_where_a_text_is_short_its_time_is_planned_for_more_finalists(begun, monkeypatch):
    _, clock, _ = begun(40 * least_minutes(begun), confirm={"text": "c.jsonl"})
    chosen, in_full = clock.plan.spec.calibration, clock.plan.work.in_full
    monkeypatch.setattr(
        "pho_service.pipeline.minutes._tokens", lambda *_: 16 * chosen.context_length
    )

    assert clock.fit_text(None, None, [], SIZES)
    assert clock.plan.spec.calibration.samples == 16 < chosen.samples
    assert clock.plan.work.in_full > in_full
    assert clock.plan.own_seconds() <= clock.left_s


def test_a_short_text_never_gives_more_windows_than_there_is_time_for(begun, monkeypatch):
    _, clock, _ = begun(1e-6, prune=True)
    chosen = clock.plan.spec.calibration
    monkeypatch.setattr(
        "pho_service.pipeline.minutes._tokens", lambda *_: 15 * chosen.context_length
    )
    clock.fit_text(None, None, [], ["calibration/samples"])

    assert clock.plan.spec.calibration.samples <= chosen.samples


@pytest.mark.parametrize(("recovers", "confirmed"), [(True, 6), (False, 16)])
def test_a_confirmation_leaves_a_recovery_its_windows_of_a_short_text(
    recovers, confirmed, begun, monkeypatch
):
    job = {"prune": True, "recovery": {} if recovers else None}
    _, clock, _ = begun(40 * least_minutes(begun), **job)
    length = clock.plan.spec.calibration.context_length
    monkeypatch.setattr("pho_service.pipeline.minutes._tokens", lambda *_: 24 * length)

    assert clock.fit_text(None, None, [], SIZES)
    spec = clock.plan.spec
    assert (spec.calibration.samples, spec.confirm.windows) == (24 - 6 - 6 * recovers, confirmed)


def test_the_least_of_a_text_that_has_more_is_not_cut_into_shorter_windows(
    begun, model_folder, texts, tmp_path
):
    model = load_model(str(model_folder), device="cpu")
    _, clock, _ = begun(1e-6, confirm={"text": "c.jsonl"})
    (tmp_path / "long.jsonl").write_text(40 * texts["calibration"].read_text())
    text, spec = TextSource(path=str(tmp_path / "long.jsonl")), clock.plan.spec

    assert not clock.fit_text(model, text, [text], SIZES)
    assert clock.plan.spec == spec
