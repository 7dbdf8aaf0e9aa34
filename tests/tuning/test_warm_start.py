"""A search that starts from what was found elsewhere."""

from dataclasses import replace

import numpy as np
import optuna
import pytest

from pho_service.errors import InvalidInput
from pho_service.spec.baselines import reference_methods
from pho_service.spec.objective import SAMPLERS
from pho_service.spec.pattern import Coefficients, Pattern
from pho_service.spec.space import SearchSpace
from pho_service.spec.steps import Candidate, Steps
from pho_service.tuning.plan import Outcome, SearchPlan, SearchRequest
from pho_service.tuning.samplers import CmaSampler
from pho_service.tuning.search import ranked, run_search

PATTERN = Pattern.parse("0.5", "layer")
SPACE = SearchSpace()
NEAR = {
    "neighbourhood_share": 0.45, "row_share": 0.4, "activation_exponent": 0.85,
    "gradient_exponent": 0.35, "kernel_size": 9, "allocation": "uniform", "allocation_spread": 0.2,
}  # fmt: skip
FAR = {**NEAR, "neighbourhood_share": 0.0, "activation_exponent": 1.5, "kernel_size": 3}
COLD = SearchPlan(pattern=PATTERN, space=SPACE, trials=60, seed=1)
WARM = replace(COLD, warm_start=(FAR, NEAR))

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")


def evaluate(candidates):
    """A smooth objective with its minimum near ``NEAR``."""
    points = [SPACE.params(candidate) for candidate in candidates]
    return [
        Outcome(
            value=1 + (p["neighbourhood_share"] - 0.5) ** 2 + (p["row_share"] - 0.4) ** 2
            + (p["activation_exponent"] - 0.8) ** 2 + (p["gradient_exponent"] - 0.4) ** 2
            + 0.1 * (p["kernel_size"] != 9)
        )
        for p in points
    ]  # fmt: skip


def run(plan, study=None):
    study = study or optuna.create_study()
    return sorted(run_search(study, plan, evaluate), key=lambda r: r.number)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_what_was_found_elsewhere_is_rated_right_after_the_baselines(sampler):
    plan = replace(WARM, sampler=sampler, trials=9)
    trials = run(plan)
    first = len(plan.baselines())

    for trial, params in zip(trials[first:], (FAR, NEAR), strict=False):
        assert {k: trial.params[k] for k in params} == pytest.approx(params)
        assert trial.candidate.method == "crepe"


def test_from_a_good_start_a_search_comes_sooner_to_what_a_cold_one_finds_in_the_end():
    saved = []
    for seed in range(3):
        cold, warm = (run(replace(plan, seed=seed)) for plan in (COLD, WARM))
        goal = min(r.value for r in cold)
        saved.append(len(cold) - next((r.number for r in warm if r.value <= goal), len(cold)))

    assert np.median(saved) > 10


def test_the_first_generation_lies_around_the_best_of_what_was_given_on_this_model():
    trials = run(WARM)
    first = len(WARM.baselines()) + 2
    shares = [r.params["neighbourhood_share"] for r in trials[first : first + 8]]

    assert all(abs(share - 0.45) < 0.2 for share in shares)


@pytest.mark.parametrize("end", [0.0, 1.0])
def test_a_start_at_an_end_of_a_range_does_not_leave_the_search_there(end):
    start = {**NEAR, "neighbourhood_share": end, "row_share": end}
    sampler = CmaSampler(seed=0, search_space=SPACE.distributions(), start=start)
    study = optuna.create_study(sampler=sampler)
    points = [study.ask(SPACE.distributions()).params for _ in range(8)]

    for name in ("neighbourhood_share", "row_share"):
        assert np.std([p[name] for p in points]) > 0.005
        assert all(abs(p[name] - end) < 0.2 for p in points)


def test_a_start_among_names_is_likelier_than_the_others_which_are_still_tried():
    space = SearchSpace(allocations=("uniform", "fisher", "owl"), allocation_spread=(0.1, 0.3))
    start = {**NEAR, "allocation": "owl"}
    sampler = CmaSampler(seed=0, search_space=space.distributions(), start=start)
    study = optuna.create_study(sampler=sampler)
    drawn = [study.ask(space.distributions()).params["allocation"] for _ in range(300)]

    assert 0.5 < drawn.count("owl") / 300 < 0.8
    assert set(drawn) == {"uniform", "fisher", "owl"}


def test_an_interrupted_warm_search_ends_as_an_uninterrupted_one():
    whole = run(WARM)
    study = optuna.create_study()
    calls = 0

    def interrupted(candidates):
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return evaluate(candidates)

    with pytest.raises(KeyboardInterrupt):
        run_search(study, WARM, interrupted)
    run_search(study, WARM, evaluate)

    assert sorted(ranked(study, WARM), key=lambda r: r.number) == whole


def test_if_nothing_that_was_given_can_be_rated_the_search_is_as_cold_as_any():
    def failing(candidates):
        share = [SPACE.params(c)["neighbourhood_share"] for c in candidates]
        return [
            Outcome(value=None, failure="no") if s == 0.45 else outcome
            for s, outcome in zip(share, evaluate(candidates), strict=True)
        ]

    plan = replace(COLD, warm_start=(NEAR,))
    study = optuna.create_study()
    run_search(study, plan, failing)
    cold = run(COLD)
    first = len(COLD.baselines())

    assert [t.params for t in study.trials[first + 1 : first + 9]] == [
        r.params for r in cold[first : first + 8]
    ]


def candidate(pattern=PATTERN, **changes):
    values = {
        "row": 0.2, "column": 0.3, "neighbourhood": 0.5, "kernel_size": 7,
        "activation_exponent": 2.5, "gradient_exponent": 0.4,
    }  # fmt: skip
    coefficients = Coefficients(**{**values, **changes})
    return Candidate(method="crepe", coefficients=coefficients, pattern=pattern)


def test_what_lies_outside_of_the_space_is_moved_to_its_nearest_point_baselines_add_nothing():
    request = SearchRequest(pattern=PATTERN, warm_start=(candidate(), candidate()))
    (point,) = request.plan((3, 5, 9)).warm_start

    assert point["activation_exponent"] == 1.5
    assert point["kernel_size"] == 5
    assert point["neighbourhood_share"] == 0.5
    assert point["row_share"] == pytest.approx(0.4)
    baselines = (*reference_methods(PATTERN).values(), *COLD.baselines())
    assert {c.pattern.scope.value for c in baselines} == {"row", "layer"}
    # every search begins with them
    assert SearchRequest(pattern=PATTERN, warm_start=baselines).plan((3,)).warm_start == ()


@pytest.mark.parametrize("other", [Pattern.parse("2:4"), Pattern.parse("0.5", "row")])
def test_what_was_found_for_another_pattern_or_scope_is_refused_and_trials_without_room(other):
    request = SearchRequest(pattern=PATTERN, warm_start=(candidate(other),))

    with pytest.raises(InvalidInput, match=rf"is for {other} in scope row, but .* scope layer"):
        request.plan((3,))
    with pytest.raises(InvalidInput, match=r"the first 8 are the baselines and what the search"):
        replace(WARM, trials=7)


def test_only_the_score_is_taken_over_all_else_is_as_the_search_says():
    trials = run(replace(WARM, steps=Steps(repruning="swaps")))

    assert {r.candidate.steps.repruning for r in trials} == {"swaps"}
