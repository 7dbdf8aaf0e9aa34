"""Published methods by name, and configurations taken apart."""

from dataclasses import replace

import pytest

from pho_service.errors import InvalidInput
from pho_service.spec import baselines
from pho_service.spec.baselines import (
    named_baselines,
    reference_methods,
    shown_baselines,
    step_by_step,
)
from pho_service.spec.configuration import Configuration
from pho_service.spec.pattern import Linears, Pattern, Scope
from pho_service.spec.steps import Reconstruction, Steps

HALF = Pattern.parse("0.5", "row")
NM = Pattern.parse("2:4")


def test_by_default_they_are_shown_as_published_too_at_n_m_also_permuted():
    half = {each.method for each in shown_baselines(None, HALF)}
    nm = shown_baselines(None, NM)
    plain = {each.method for each in nm if each.steps.permutation == "none"}
    sequential = {"wanda-sequential", "ria-row-sequential"}

    assert {name for name in half if name.endswith("-sequential")} == {
        *sequential, "ria-layer-sequential",
    }  # fmt: skip
    assert {name for name in plain if name.endswith("-sequential")} == sequential
    assert {"magnitude", "wanda", "ria-layer", "owl-wanda", "sparsegpt"} <= half
    assert not {"dsnot", "admm", "alps", "owl-sparsegpt"} & half
    assert half - plain == {"ria-layer", "ria-layer-sequential", "owl-wanda"}
    assert {each.method for each in nm} == {*plain, *(f"{name}-permuted" for name in plain)}


def test_a_name_says_which_steps_a_method_takes_all_stands_for_every_one():
    linears = Linears(ignore=("*.o_proj",))
    (one, two) = shown_baselines(
        ["ria-row-sequential-permuted", "sparsegpt", "sparsegpt"], NM, linears
    )
    every = shown_baselines(["all"], NM)

    assert one.steps == Steps(linears=linears, statistics="sequential", permutation="score")
    assert two.steps == Steps(linears=linears, update="sparsegpt")
    assert [each.method for each in every] == [*named_baselines(NM)]
    assert Configuration.of(one).candidate() == one


@pytest.mark.parametrize(
    ("name", "pattern", "message"),
    [
        ("wnada", "0.5", r"method 'wnada' is not one of those at 0\.5\. Near: wanda"),
        ("owl-wanda", "2:4", r"OWL has no row at N:M"),
        ("wanda-permuted", "0.5", r"order of channels only matters to N:M\. Take 'wanda'"),
        ("sparsegpt-sequential", "0.5", r"in any case\. Take 'sparsegpt'"),
    ],
)
def test_a_method_that_is_not_there_is_refused(name, pattern, message):
    with pytest.raises(InvalidInput, match=message):
        shown_baselines([name], Pattern.parse(pattern))


@pytest.mark.parametrize("scope", ["row", "layer", "global"])
@pytest.mark.parametrize("at_the_end", [True, False])
def test_another_published_score_changes_nothing_that_verdicts_measure_by(
    monkeypatch, scope, at_the_end
):
    pattern = Pattern.parse("0.5", scope)
    references = reference_methods(pattern)
    more = [
        (f"{method}-{own}", coefficients, own)
        for method, coefficients, _ in baselines._SCORES
        for own in Scope
    ]
    rows = [*baselines._SCORES, *more] if at_the_end else [*more, *baselines._SCORES]
    rows = [*{method: (method, *rest) for method, *rest in rows}.values()]
    monkeypatch.setattr(baselines, "_SCORES", tuple(rows))

    assert reference_methods(pattern) == references
    assert references["wanda"].method == "wanda"
    assert references["ria"].method == ("ria-row" if scope == "row" else "ria-layer")


def test_an_ablation_adds_one_step_after_the_other_and_ends_with_the_candidate_itself():
    steps = Steps(
        linears=Linears(ignore=("*.o_proj",)),
        permutation="score",
        repruning="swaps",
        update="least-squares",
        reconstruction=Reconstruction(method="block"),
    )
    whole = replace(named_baselines(NM)["wanda"], steps=steps)
    rows = step_by_step("mine", whole)

    assert [name for name, _ in rows] == [
        "mine: score", "mine: + permutation score", "mine: + re-pruning swaps",
        "mine: + update least-squares", "mine: + reconstruction block",
    ]  # fmt: skip
    assert rows[0][1].steps == Steps(linears=steps.linears)
    assert rows[-1][1] == whole
