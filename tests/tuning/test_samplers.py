"""Optuna's own cases for our sampler, and that it is worth having."""

import statistics
import warnings

import numpy as np
import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.samplers import RandomSampler
from optuna.testing.pytest_samplers import (
    BasicSamplerTestCase,
    RelativeSamplerTestCase,
    SingleOnlySamplerTestCase,
)

from pho_service.spec.objective import SearchOptions
from pho_service.tuning.samplers import POPULATION, CmaSampler, make_sampler

SPACE = {
    "a": FloatDistribution(-1, 1),
    "b": FloatDistribution(-1, 1),
    "c": FloatDistribution(-1, 1),
    "k": CategoricalDistribution((3, 5, 9, 15)),
}


class TestOptunaCases(BasicSamplerTestCase, RelativeSamplerTestCase, SingleOnlySamplerTestCase):
    @pytest.fixture
    def sampler(self):
        return CmaSampler


def rotated_quadratic(params):
    """An ill-conditioned bowl in coordinates that no axis is parallel to, and a best kernel."""
    rotation, _ = np.linalg.qr(np.random.default_rng(7).normal(size=(3, 3)))
    y = rotation @ (np.array([params["a"], params["b"], params["c"]]) - 0.3)
    return float((y**2 * [1, 10, 100]).sum() + (params["k"] != 9))


def best_of(sampler, trials):
    study = optuna.create_study(sampler=sampler)
    for _ in range(trials):
        trial = study.ask(SPACE)
        study.tell(trial, rotated_quadratic(trial.params))
    return study.best_value


def test_at_160_trials_cma_es_is_far_better_than_random_search():
    cma = statistics.median(best_of(CmaSampler(seed=s, search_space=SPACE), 160) for s in range(5))
    random = statistics.median(best_of(RandomSampler(seed=s), 160) for s in range(5))

    assert cma < random / 5


@pytest.mark.parametrize("name", ["cmaes", "tpe", "random", "qmc"])
def test_the_same_seed_gives_the_same_candidates_another_seed_gives_others(name):
    def drawn(seed):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study = optuna.create_study(
                sampler=make_sampler(name, SearchOptions(seed=seed), search_space=SPACE)
            )
            params = []
            for _ in range(20):
                trial = study.ask(SPACE)
                params.append(trial.params)
                study.tell(trial, rotated_quadratic(trial.params))
        return params

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


def test_a_failed_trial_does_not_stop_a_generation_nor_does_the_same_value_of_everything():
    study = optuna.create_study(sampler=CmaSampler(seed=0, search_space=SPACE))
    for number in range(160):
        trial = study.ask(SPACE)
        if number % 4 == 0:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
        else:
            study.tell(trial, rotated_quadratic(trial.params))

    assert study.best_value < 0.1
    study, drawn = optuna.create_study(sampler=CmaSampler(seed=0, search_space=SPACE)), set()
    for _ in range(40):
        trial = study.ask(SPACE)
        drawn.add(trial.params["a"])
        study.tell(trial, 1.0)
    assert len(drawn) > 20


def test_a_cma_es_that_is_told_of_another_ones_points_goes_on_where_that_one_does():
    def mean(seed, adopted):
        sampler = CmaSampler(seed=seed, search_space=SPACE)
        study = optuna.create_study(sampler=sampler)
        for i in range(4 * POPULATION):
            trial = study.ask(SPACE)
            point = trial.params
            if adopted:
                point = adopted[i]
                sampler.adopt(trial.number, point)
            study.tell(trial, rotated_quadratic(point))
            drawn.append(point)
        assert sampler._optimizer is not None
        return np.asarray(sampler._optimizer._mean)

    drawn = []
    leader = mean(1, [])
    follower = mean(2, [*drawn])
    alone = mean(2, [])

    assert follower[:3] == pytest.approx(leader[:3], abs=1e-6)
    assert follower[3] == pytest.approx(leader[3], abs=0.2)  # of a kernel to the next: not drawn
    assert alone[:3] != pytest.approx(leader[:3], abs=1e-3)
