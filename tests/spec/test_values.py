"""Patterns, coefficients and baselines as plain values."""

import json
import math

import pytest

from pho_service.errors import InvalidInput
from pho_service.spec.baselines import comparison_baselines, search_baselines
from pho_service.spec.document import percent
from pho_service.spec.objective import Objective
from pho_service.spec.pattern import Coefficients, Pattern, Scope
from pho_service.spec.steps import Allocation, Candidate, Steps

PATTERNS = [
    Pattern.parse("0.5", "row"), Pattern.parse("0.5", "layer"), Pattern.parse("0.5", "global"),
    Pattern.parse("2:4"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "scope", "expected"),
    [
        ("0.5", None, Pattern(sparsity=0.5, scope=Scope.LAYER)),
        (".25", "row", Pattern(sparsity=0.25, scope=Scope.ROW)),
        ("7e-1", "global", Pattern(sparsity=0.7, scope=Scope.GLOBAL)),
        ("2:4", None, Pattern(sparsity=0.5, scope=Scope.ROW, keep=2, group=4)),
        ("1:4", "row", Pattern(sparsity=0.75, scope=Scope.ROW, keep=1, group=4)),
        ("63:64", None, Pattern(sparsity=1 / 64, scope=Scope.ROW, keep=63, group=64)),
    ],
)
def test_parse(text, scope, expected):
    """A ratio is the share removed, by default per layer; N:M keeps N of M, always per row."""
    assert Pattern.parse(text, scope) == expected


NO_PATTERN = [
    "0", "1", "-0.1", "nan", "abc", "", "50%", "0,5",
    "5:4", "4:4", "0:4", "1:65", "a:b", "2:", ":4", "2:4:8", "2.0:4",
]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "scope", "message"),
    [
        *((text, None, None) for text in NO_PATTERN),
        ("2:4", "layer", "scope"),  # it counts inside groups
        ("2:4", "global", "scope"),
        ("2:4", "model", "row, layer, global"),
        ("0.5", "model", "row, layer, global"),
    ],
)
def test_no_share_in_0_to_1_or_n_m_and_no_scope_or_one_too_wide_for_n_m_is_refused(
    text, scope, message
):
    with pytest.raises(InvalidInput, match=message):
        Pattern.parse(text, scope)


@pytest.mark.parametrize("text", ["0.5", "0.29", "2:4", "1:4"])
def test_a_patterns_text_is_what_it_was_parsed_from(text):
    assert str(Pattern.parse(text)) == text


@pytest.mark.parametrize(
    ("sparsity", "count", "expected"),
    [
        (0.29, 100, 29),
        (0.57, 100, 57),
        (0.5, 7, 3),
        (0.5, 0, 0),
        (1e-05, 100_000, 1),
        (0.6, 7_000_000_005, 4_200_000_003),
    ],
)
def test_decimal_digits_count_rounded_down(sparsity, count, expected):
    assert Pattern(sparsity=sparsity).removed(count) == expected


def test_n_m_removes_exactly_m_n_of_m_also_where_n_m_has_no_finite_decimal_form():
    wrong = [
        f"{keep}:{group}"
        for group in range(2, 65)
        for keep in range(1, group)
        if Pattern.parse(f"{keep}:{group}").removed(30 * group) != 30 * (group - keep)
    ]

    assert wrong == []


def test_a_ratio_can_be_counted_in_another_scope_n_m_stays_what_it_is():
    assert Pattern.parse("0.3", "row").within(Scope.GLOBAL) == Pattern.parse("0.3", "global")
    assert Pattern.parse("2:4").within(Scope.GLOBAL) == Pattern.parse("2:4")


def test_a_width_that_m_does_not_divide_is_refused_with_the_layers_name_a_ratio_takes_any():
    Pattern.parse("2:4").check_width(8, "up_proj")
    Pattern.parse("0.5").check_width(7, "up_proj")

    with pytest.raises(InvalidInput, match=r"up_proj: in_features=6 is not a multiple of M=4"):
        Pattern.parse("2:4").check_width(6, "up_proj")


def coefficients_with(**fields):
    return Coefficients(**{"row": 1, "column": 1, "neighbourhood": 1, **fields})


NUMBERS = ("row", "column", "neighbourhood", "activation_exponent", "gradient_exponent")
NO_NUMBERS = (-0.1, math.nan, math.inf, True, "1", None)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        *(({name: value}, name) for name in NUMBERS for value in NO_NUMBERS),
        *(({"kernel_size": value}, "kernel_size") for value in (4, 1, -3, 3.0, True, "3")),
        ({"row": 0, "column": 0.0, "neighbourhood": 0}, "all zero"),
        ({"normalisation": "max"}, "mean, sum, none"),
    ],
)
def test_a_coefficient_that_breaks_its_rule_is_refused_by_name(fields, message):
    with pytest.raises(InvalidInput, match=message):
        coefficients_with(**fields)


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: f"{p}-{p.scope}")
def test_every_pattern_knows_the_same_methods_but_for_owl(pattern):
    names = [candidate.method for candidate in comparison_baselines(pattern)]
    every = [candidate.method for candidate in comparison_baselines(Pattern.parse("0.5"))]

    assert len({*every}) == len(every)
    assert {"wanda", "owl-wanda", "sparsegpt"} <= {*every}
    assert names == [n for n in every if not (pattern.group and n.startswith("owl"))]


@pytest.mark.parametrize("pattern", PATTERNS[:3], ids=lambda p: p.scope)
def test_published_methods_keep_their_own_scope(pattern):
    patterns = {each.method: each.pattern for each in comparison_baselines(pattern)}
    known = {
        "magnitude": "layer", "wanda": "row", "ria-row": "row", "ria-layer": "layer",
        "crepe-equal": pattern.scope, "owl-wanda": "row", "dsnot": "row", "sparsegpt": "layer",
    }  # fmt: skip

    assert {name: patterns[name].scope for name in known} == known
    assert {p.sparsity for p in patterns.values()} == {pattern.sparsity}


@pytest.mark.parametrize("fisher", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: f"{p}-{p.scope}")
def test_no_baseline_of_a_search_counts_in_a_wider_scope_or_by_more_than_it_asks_for(
    pattern, *, fisher
):
    baselines = search_baselines(pattern, kernel_size=5, fisher=fisher)

    assert all(b.pattern.scope.width <= pattern.scope.width for b in baselines)
    assert {(b.pattern.sparsity, b.pattern.group) for b in baselines} == {
        (pattern.sparsity, pattern.group)
    }
    assert {b.coefficients.kernel_size for b in baselines} == {5}
    assert fisher or not any(b.coefficients.gradient_exponent for b in baselines)


@pytest.mark.parametrize(
    ("pattern", "wide"),
    [(PATTERNS[0], False), (PATTERNS[1], True), (PATTERNS[2], True), (PATTERNS[3], False)],
    ids=["row", "layer", "global", "2:4"],
)
def test_equal_baselines_are_listed_once(pattern, *, wide):
    baselines = search_baselines(pattern, kernel_size=5, fisher=True)
    names = [b.method for b in baselines]

    assert names[:3] == ["magnitude", "wanda", "ria-row"]
    assert ("ria-layer" in names, "fisher" in names) == (wide, wide)
    assert len({(b.coefficients, b.pattern) for b in baselines}) == len(baselines)


@pytest.mark.parametrize(
    ("fields", "label"),
    [
        ({}, "activation-reconstruction/blend"),
        ({"weighting": "fisher"}, "activation-reconstruction/fisher"),
        ({"name": "gini"}, "gini"),
        ({"name": "perplexity"}, "perplexity"),
    ],
)
def test_a_label_names_its_weighting_only_where_it_counts(fields, label):
    assert Objective(**fields).label == label


def candidate_with(pattern, **steps):
    coefficients = Coefficients(row=1, column=1, neighbourhood=1)
    return Candidate(
        method="x", coefficients=coefficients, pattern=Pattern.parse(*pattern.split()),
        steps=Steps(**steps),
    )  # fmt: skip


NAN = float("nan")
NO_BOUNDS = r"shrinkage=.* is not in 0\.\.1000"
NO_MASK = "repruning 'swaps' has no mask to start from"
SHRUNK = r"shrinkage=2 has nothing to shrink.* or leave it out"


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (Objective, {"name": "loss"}, "'loss' is not one of"),
        (Objective, {"weighting": "loss"}, "'loss' is not one of"),
        (Objective, {"name": "gini", "over": "mean"}, "gini has no common scale"),
        (Objective, {"name": "perplexity", "over": "mean"}, "perplexity has no common scale"),
        (Objective, {"over": "best"}, "over 'best' is not one of mean, worst"),
        (Allocation, {"method": "fair"}, "allocation 'fair' is not one of uniform, owl"),
        (Allocation, {"unit": "row"}, "allocation unit 'row' is not one of linear, block"),
        (Allocation, {"spread": 1.5}, r"allocation spread=1\.5 is not in 0\.\.1"),
        (Allocation, {"spread": NAN}, "allocation spread=nan is not in"),
        (Allocation, {"spread": True}, "allocation spread=True is not in"),
        (Allocation, {"outlier_ratio": 0.5}, r"allocation outlier_ratio=0\.5 is not in"),
        (Allocation, {"offsets": {"q_proj": 11.0}}, r"offset q_proj=11\.0 is not in -10\.\.10"),
        (Allocation, {"offsets": {"q_proj": NAN}}, "allocation offset q_proj=nan is not in"),
        (Allocation, {"offsets": {"a": 1.0}, "unit": "block"}, "'block' gives them one sparsity"),
        (Allocation, {"offsets": {"*.q_proj": 1.0}}, r"'\*.q_proj' is not the name of a linear"),
        (Allocation, {"offsets": {"q\x00": 1.0}}, "is not the name of a linear"),
        (Allocation, {"depth": (0.1, 0.2, 0.3)}, "depth has 3 numbers, and 2 are the most"),
        (Allocation, {"depth": (True,)}, r"allocation depth\[0\]=True is not in"),
        (candidate_with, {"pattern": "0.5", "permutation": "score"}, "'score' changes nothing"),
        (candidate_with, {"pattern": "0.5 global", "allocation": Allocation(method="owl")},
         "allocation 'owl' and scope"),
        *((Steps, {"repruning": "swaps", "update": update}, NO_MASK)
          for update in ("sparsegpt", "admm", "alps")),
        (Steps, {"repruning": "admm"}, "Take update 'least-squares', or repruning 'swaps'"),
        (Steps, {"permutation": "best"}, "permutation 'best' is not one of none"),
        (Steps, {"repruning": "all"}, "repruning 'all' is not one of none"),
        (Steps, {"update": "adam"}, "update 'adam' is not one of none"),
        *((Steps, {"update": "obs", "shrinkage": value}, NO_BOUNDS) for value in (1001, NAN, True)),
        *((Steps, {"shrinkage": 2, **fields}, SHRUNK)
          for fields in ({}, {"repruning": "dsnot"}, {"permutation": "score"})),
    ],
)  # fmt: skip
def test_a_value_that_breaks_a_rule_is_refused_with_the_rule(kind, fields, message):
    with pytest.raises(InvalidInput, match=message):
        kind(**fields)


def test_steps_survive_json_what_is_left_out_has_its_default():
    steps = Steps(allocation=Allocation(method="curves", spread=0.3), update="obs", shrinkage=0.5)

    assert Steps.from_dict(json.loads(json.dumps(steps.to_dict()))) == steps
    assert Steps.from_dict({}) == Steps()
    assert not {"statistics", "shrinkage"} & Steps(update="obs").to_dict().keys()
    assert Steps.from_dict(Steps(statistics="sequential").to_dict()).needs_text


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: f"{p}-{p.scope}")
def test_candidates_survive_json_and_keep_their_own_scopes(pattern):
    for candidate in comparison_baselines(pattern):
        stored = json.loads(json.dumps({**candidate.to_dict(), "seconds": 0.5}))
        assert Candidate.from_dict(stored, pattern) == candidate


def test_baselines_go_through_the_steps():
    steps = Steps(allocation=Allocation(method="fisher"), update="obs")
    baselines = search_baselines(
        PATTERNS[1], kernel_size=3, fisher=True, steps=steps, allocations=("fisher",)
    )

    assert {b.steps.update for b in baselines} == {"obs"}
    assert {b.method: b.steps.allocation.method for b in baselines if "fisher" in b.method} == {
        "fisher": "uniform", "fisher-bounded": "fisher",
    }  # fmt: skip


def test_steps_say_what_they_do_in_one_line_the_spread_only_where_it_has_an_effect():
    steps = Steps(allocation=Allocation(method="owl", spread=0.1), update="obs", shrinkage=0.5)

    assert str(steps) == (
        "allocation owl within 0.100, permutation none, re-pruning none, update obs, shrinkage 0.5"
    )
    assert "within" not in str(Steps())


def test_a_change_that_rounds_to_none_has_both_signs():
    assert [percent(share, signed=True) for share in (-0.0004, 0.0, 0.0004)] == ["±0%"] * 3
    assert percent(-0.0004) == "0.0%"
    assert [percent(0.0, signed=True, error=error) for error in (0.0, 0.001)] == [
        "±0%", "+0.0 ± 0.1%",
    ]  # fmt: skip
    assert [percent(share, signed=True) for share in (-0.003, 12.5)] == ["-0.3%", "+1,250.0%"]
