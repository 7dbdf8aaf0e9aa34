"""The search space: a box over a simplex, its bounds and its border."""

import pytest

from pho_service.errors import InvalidInput
from pho_service.spec.baselines import search_baselines
from pho_service.spec.pattern import Pattern
from pho_service.spec.space import SearchSpace, parse_bounds
from pho_service.spec.steps import Allocation, Steps

PATTERN = Pattern.parse("0.5", "layer")
PARAMS = {
    "neighbourhood_share": 0.25, "row_share": 0.4, "activation_exponent": 0.7,
    "gradient_exponent": 0.3, "kernel_size": 9, "allocation": "owl", "allocation_spread": 0.1,
}  # fmt: skip


def test_the_two_shares_give_three_coefficients_that_add_up_to_1():
    c = SearchSpace().candidate(PARAMS, PATTERN, Steps()).coefficients

    assert (c.row, c.column, c.neighbourhood) == pytest.approx((0.3, 0.45, 0.25))
    assert (c.kernel_size, c.activation_exponent, c.gradient_exponent) == (9, 0.7, 0.3)


def test_a_candidate_gives_back_the_point_that_it_was_made_from():
    space = SearchSpace()

    assert space.params(space.candidate(PARAMS, PATTERN, Steps())) == pytest.approx(
        {**PARAMS, "method": "crepe"}
    )


@pytest.mark.parametrize("scope", ["row", "layer", "global"])
def test_every_baseline_is_a_point_of_the_recorded_distributions(scope):
    space = SearchSpace(kernel_sizes=(5, 9))
    distributions = space.recorded_distributions()
    pattern = Pattern.parse("0.5", scope)
    for candidate in search_baselines(pattern, kernel_size=5, fisher=True):
        params = space.params(candidate)

        assert params.keys() == distributions.keys()
        assert all(
            distributions[k]._contains(distributions[k].to_internal_repr(v))
            for k, v in params.items()
        )


def test_within_a_row_the_fisher_weight_cancels_so_it_is_not_searched():
    assert SearchSpace().fitted(Pattern.parse("2:4")).gradient_exponent == (0.0, 0.0)
    assert SearchSpace().fitted(PATTERN).gradient_exponent == (0.0, 1.0)


def test_bounds_are_read_from_text_one_value_fixes_it():
    space = SearchSpace(
        **parse_bounds(["activation_exponent=0.2:0.9", "gradient_exponent=0.5", "kernel_sizes=9,3"])
    )

    assert space.activation_exponent == (0.2, 0.9)
    assert space.gradient_exponent == (0.5, 0.5)
    assert space.kernel_sizes == (3, 9)
    # however they are listed, so that the same search has the same name
    assert parse_bounds(["allocations=fisher,uniform"]) == {"allocations": ("uniform", "fisher")}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("speed=1:2", "'speed' is not one of neighbourhood_share"),
        ("row_share", "not understood"),
        ("row_share=a:b", "not understood"),
        ("row_share=0.5:1.5", "0 <= low <= high <= 1 must hold"),
        ("row_share=0.9:0.1", "must hold"),
        ("activation_exponent=-1:1", "must hold"),
        ("activation_exponent=nan:1", "must hold"),
        ("kernel_sizes=4", "kernel_size=4 is not an odd whole number"),
        ("kernel_sizes=", "not understood"),
        ("allocations=fair", "not understood"),
        ("allocations=", "not understood"),
        ("allocation_spread=0.1:2", "0 <= low <= high <= 1 must hold"),
    ],
)
def test_what_breaks_a_rule_is_named_with_the_rule(text, message):
    with pytest.raises(InvalidInput, match=message):
        SearchSpace(**parse_bounds([text]))


def test_values_at_the_ends_of_their_ranges_are_named_a_fixed_value_has_no_border():
    space = SearchSpace(gradient_exponent=(0.0, 0.0))
    at_ends = {**PARAMS, "activation_exponent": 1.49, "gradient_exponent": 0.0, "kernel_size": 15}

    assert space.on_border({**PARAMS, "gradient_exponent": 0.0}) == []
    assert space.on_border(at_ends) == ["activation_exponent", "kernel_size"]


def test_where_no_wider_range_is_possible_or_nothing_would_change_there_is_no_border():
    space = SearchSpace(activation_exponent=(0.5, 4.0), kernel_sizes=(3, 9))
    least = {**PARAMS, "activation_exponent": 0.5, "row_share": 0.0, "kernel_size": 3}

    assert space.on_border(least) == ["activation_exponent"]
    assert space.on_border({**least, "activation_exponent": 4.0, "row_share": 1.0}) == []
    assert space.on_border({**PARAMS, "kernel_size": 9}) == ["kernel_size"]
    assert space.on_border({**PARAMS, "kernel_size": 9, "neighbourhood_share": 0.0}) == []


def test_the_allocation_is_the_points_all_other_steps_are_the_searchs():
    steps = Steps(allocation=Allocation(unit="block"), repruning="swaps")
    given = SearchSpace().candidate(PARAMS, PATTERN, steps).steps

    assert given == Steps(
        allocation=Allocation(method="owl", unit="block", spread=0.1), repruning="swaps"
    )


def test_where_no_allocation_is_searched_its_spread_has_no_effect_and_no_border():
    space = SearchSpace(allocation_spread=(0.1, 0.3)).fitted(PATTERN)
    both = SearchSpace(allocations=("uniform", "fisher"), allocation_spread=(0.1, 0.3))

    assert space.allocation_spread == (0.1, 0.1)
    assert both.fitted(PATTERN) == both
    assert both.on_border({**PARAMS, "allocation": "uniform", "allocation_spread": 0.3}) == []
    assert both.on_border({**PARAMS, "allocation": "fisher", "allocation_spread": 0.3}) == [
        "allocation_spread"
    ]
