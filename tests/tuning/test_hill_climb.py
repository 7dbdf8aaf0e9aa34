"""Optuna's own cases for the hill climb, and that it climbs as it says, without a waste."""

import math

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.testing.pytest_samplers import (
    BasicSamplerTestCase,
    RelativeSamplerTestCase,
    SingleOnlySamplerTestCase,
)
from optuna.trial import TrialState

from pho_service.spec.space import RIA, SearchSpace
from pho_service.tuning.samplers import HillClimbSampler

LINE = {"x": FloatDistribution(0, 1)}
SPACE = {
    "a": FloatDistribution(-1, 1),
    "b": FloatDistribution(0, 4),
    "k": CategoricalDistribution((3, 5, 9, 15)),
}


class TestOptunaCases(BasicSamplerTestCase, RelativeSamplerTestCase, SingleOnlySamplerTestCase):
    @pytest.fixture
    def sampler(self):
        return HillClimbSampler


def climbed(sampler, space, loss, *, direction="minimize", most=1000):
    """The study of a climb to its end; None is a failed trial."""
    study = optuna.create_study(sampler=sampler, direction=direction)
    while len(study.trials) < most and not sampler.is_exhausted(study):
        trial = study.ask(dict(space))
        value = loss(trial.params)
        if value is None:
            study.tell(trial, state=TrialState.FAIL)
        else:
            study.tell(trial, value)
    return study


def climbed_on_line(loss, start):
    sampler = HillClimbSampler(search_space=LINE, start={"x": start})
    return [t.params["x"] for t in climbed(sampler, LINE, lambda p: loss(p["x"])).trials]


def bowl(params):
    window = {3: 2, 5: 1, 9: 0, 15: 1}[params["k"]]
    return float((params["a"] - 0.3) ** 2 + (params["b"] - 1.1) ** 2 + 0.1 * window)


@pytest.mark.parametrize(
    ("loss", "start", "points"),
    [
        # up, up again after a success, down; then half the step, until 1/32 of the range
        (lambda x: abs(x - 0.6), 0.25,
         [0.25, 0.5, 0.75,  # 1/4: up is better, up again is not; down is known
          0.625,  # 1/8: better; up and down of it are known
          0.6875, 0.5625,  # 1/16: neither
          0.65625, 0.59375]),  # 1/32: down is better
        # a point that cannot be rated is not stepped on, and not tried again
        (lambda x: None if x > 0.6 else abs(x - 0.6), 0.25,
         [0.25, 0.5, 0.75, 0.625, 0.375, 0.5625, 0.59375]),
        (lambda _: None, 0.5, [0.5, 0.75, 0.25, 0.625, 0.375, 0.5625, 0.4375, 0.53125, 0.46875]),
    ],
)  # fmt: skip
def test_steps_by_hand(loss, start, points):
    assert climbed_on_line(loss, start) == points


@pytest.mark.parametrize(
    ("loss", "start", "first"),
    [
        *((lambda x: x, start, [first])
          for start, first in ((-7, 0.0), (0.0, 0.0), (0.5, 0.5), (9, 1.0))),
        # any value is better than a start that failed: 0.75 is stepped on, then 0.625
        (lambda x: None if x == 0.5 else 1000 + x, 0.5, [0.5, 0.75, 1.0, 0.875, 0.625]),
    ],
)  # fmt: skip
def test_a_climb_begins_where_it_is_told_to(loss, start, first):
    assert climbed_on_line(loss, start)[: len(first)] == first


def test_of_listed_values_only_those_beside_the_present_one_are_tried_other_steps_are_exact():
    space = {"k": CategoricalDistribution((3, 5, 9, 15, 21))}
    sampler = HillClimbSampler(search_space=space, start={"k": 9})
    tried = [t.params["k"] for t in climbed(sampler, space, lambda p: abs(p["k"] - 9)).trials]
    line = {"x": FloatDistribution(0, 1.5)}
    sampler = HillClimbSampler(search_space=line, start={"x": 0.5})
    points = [t.params["x"] for t in climbed(sampler, line, lambda p: -p["x"]).trials]

    assert tried == [9, 15, 5]
    assert points[:3] == [0.5, 0.875, 1.25]  # not 0.8749999999999999


def test_no_point_is_rated_twice_and_each_step_changes_one_coordinate():
    sampler = HillClimbSampler(search_space=SPACE, start={"a": -1, "b": 4})
    points = [t.params for t in climbed(sampler, SPACE, bowl).trials]

    assert len({tuple(p.values()) for p in points}) == len(points)
    for number, point in enumerate(points[1:], 1):
        changed = [sum(point[n] != earlier[n] for n in SPACE) for earlier in points[:number]]

        assert min(changed) == 1


def test_at_the_end_no_last_step_along_a_coordinate_up_or_down_is_better():
    sampler = HillClimbSampler(search_space=SPACE, start={"a": 0.9, "b": 0.2})
    study = climbed(sampler, SPACE, bowl)
    best = study.best_params
    nearby = [
        {**best, name: min(max(best[name] + sign * width / 32, low), low + width)}
        for name, low, width in (("a", -1, 2), ("b", 0, 4))
        for sign in (1, -1)
    ]

    assert all(bowl(point) >= study.best_value for point in nearby)
    assert study.ask(SPACE).params == study.best_params  # a climb that is over gives it again


def test_a_sampler_that_knows_nothing_but_the_trials_asks_for_the_same_next_ones():
    whole = climbed(HillClimbSampler(search_space=SPACE), SPACE, bowl).trials
    for cut in (1, 7, len(whole) - 1):
        fresh = HillClimbSampler(search_space=SPACE)
        study = optuna.create_study(sampler=fresh)
        study.add_trials(whole[:cut])

        assert study.ask(SPACE).params == whole[cut].params


@pytest.mark.parametrize(
    ("space", "params", "without"),
    [
        (SearchSpace(), {"neighbourhood_share": 0.0}, {"kernel_size", "allocation_spread"}),
        (SearchSpace(), {"neighbourhood_share": 1.0}, {"row_share", "allocation_spread"}),
        (SearchSpace(), {"neighbourhood_share": 0.5}, {"allocation_spread"}),
        (SearchSpace(), {"neighbourhood_share": 0.5, "allocation": "owl"}, set()),
    ],
)
def test_effective(space, params, without):
    """What changes no mask beside the other values is not a part of the point."""
    point = {**RIA, "kernel_size": 3, **params}

    assert point.keys() - space.effective(point).keys() == without


def test_from_ria_no_window_without_a_neighbourhood_and_no_spread_of_a_uniform_allocation():
    space = SearchSpace(allocations=("uniform", "fisher"), allocation_spread=(0.05, 0.4))
    distributions = space.distributions()
    sampler = HillClimbSampler(search_space=distributions, start=RIA, effective=space.effective)
    study = climbed(
        sampler, distributions, lambda p: (p["neighbourhood_share"] - 0.7) ** 2 + p["kernel_size"]
    )
    seen = {tuple(sorted(space.effective(t.params).items())) for t in study.trials}
    shares = [t.params["neighbourhood_share"] for t in study.trials]

    assert len(seen) == len(study.trials)
    assert study.trials[0].params == {**RIA, "kernel_size": 3}
    assert {t.params["kernel_size"] for t, s in zip(study.trials, shares, strict=True) if s} == {
        3, 5
    }  # fmt: skip
    assert math.isclose(study.best_params["neighbourhood_share"], 0.7, abs_tol=1 / 32)
