"""Pruning some linears of a model, and some of them by a share of their own."""

from dataclasses import replace

import pytest
import torch

from pho_service.errors import InvalidInput
from pho_service.pruning.bundle import sample_bundle
from pho_service.pruning.masks import layer_score, linear_masks
from pho_service.pruning.proxy import ProxyEvaluator
from pho_service.spec.pattern import Coefficients, Linears, Pattern
from pho_service.spec.steps import Allocation, Candidate, Steps

CREPE = Coefficients(row=0.4, column=1, neighbourhood=0.8, kernel_size=5, gradient_exponent=0.3)
LEFT_OUT = Linears(ignore=["*.o_proj", "re:.*layers\\.0\\.mlp\\..*"])
FISHER = Allocation(method="fisher", spread=0.3)
SHARED = [
    ("0.5", "row", Steps()),
    ("0.5", "global", Steps()),
    ("0.5", "layer", Steps(allocation=FISHER)),
    ("0.5", "row", Steps(allocation=Allocation(method="owl", unit="block"))),
    ("2:4", "row", Steps(permutation="score")),
    ("2:4", "row", Steps(allocation=replace(FISHER, spread=0.25))),
]


def candidate_of(pattern, scope, steps, linears):
    return Candidate(
        method="crepe",
        coefficients=CREPE,
        pattern=Pattern.parse(pattern, scope),
        steps=replace(steps, linears=linears),
    )


def bundle_of(linears, statistics):
    return sample_bundle(linears, statistics, rows_per_layer=0, kernel_sizes=(3, 5), seed=0)


def stays(name):
    return not name.endswith("o_proj") and not (".layers.0." in name and ".mlp." in name)


@pytest.mark.parametrize(("pattern", "scope", "steps"), SHARED)
def test_the_rest_is_a_model_of_its_own(linears, statistics, pattern, scope, steps):
    rest = {name: linear for name, linear in linears.items() if stays(name)}
    some = candidate_of(pattern, scope, steps, LEFT_OUT)
    alone = candidate_of(pattern, scope, steps, Linears())
    masks, expected = (
        {n: m.keep for n, m in linear_masks(these, statistics, each)}
        for these, each in ((linears, some), (rest, alone))
    )
    rating, wanted = (
        ProxyEvaluator(bundle_of(these, statistics)).evaluate([each], with_gini=True)[0]
        for these, each in ((linears, some), (rest, alone))
    )

    assert len(masks) == len(rest) == 9
    assert list(masks) == list(expected)
    assert all(torch.equal(mask, expected[name]) for name, mask in masks.items())
    assert rating == wanted


@pytest.mark.parametrize(("pattern", "scope", "steps"), SHARED)
def test_a_linear_by_hand_loses_exactly_its_share_its_lowest_scores_the_rest_is_as_without_it(
    linears, statistics, pattern, scope, steps
):
    value, own = ("3:4", 0.25) if ":" in pattern else (0.3, 0.3)
    by_hand = [name for name in linears if name.endswith("down_proj")]
    some = candidate_of(pattern, scope, steps, Linears(sparsities={"*.down_proj": value}))
    rest = {name: linear for name, linear in linears.items() if name not in by_hand}
    masks = {n: m.keep for n, m in linear_masks(linears, statistics, some)}
    alone = candidate_of(pattern, scope, steps, Linears())
    expected = {n: m.keep for n, m in linear_masks(rest, statistics, alone)}

    assert all(torch.equal(masks[name], mask) for name, mask in expected.items())
    for name in by_hand:
        score = layer_score(linears, statistics, name, CREPE)
        if ":" not in pattern:
            lines = score if scope == "row" else score.view(1, -1)
            assert torch.equal(masks[name].view_as(lines), without_lowest(lines, own))
        elif steps.permutation == "none":
            groups = score.view(-1, 4)
            assert torch.equal(masks[name].view(-1, 4), without_lowest(groups, own))
        else:
            assert float(masks[name].float().mean()) == 1 - own
    found = ProxyEvaluator(bundle_of(linears, statistics)).layer_sparsities(some)
    assert found == pytest.approx(
        {name: float((~mask).float().mean()) for name, mask in masks.items()}, abs=1e-6
    )


def without_lowest(lines, share):
    """All but so much of each line, by sorting."""
    count = int(share * lines.shape[1] + 1e-9)
    keep = torch.ones_like(lines, dtype=torch.bool)
    return keep.scatter_(1, lines.argsort(dim=1)[:, :count], value=False)


@pytest.mark.parametrize(("pattern", "scope", "steps"), SHARED)
def test_with_all_rows_a_rating_is_the_exact_error_of_the_linears_that_are_pruned_by_hand_or_not(
    linears, statistics, pattern, scope, steps
):
    value = "3:4" if ":" in pattern else 0.3
    choice = replace(LEFT_OUT, sparsities={"*.layers.1.*.down_proj": value, "*.k_proj": value})
    some = candidate_of(pattern, scope, replace(steps, permutation="none"), choice)
    evaluator = ProxyEvaluator(bundle_of(linears, statistics))
    plain = replace(some, steps=Steps())
    before, rating, after = evaluator.evaluate([plain, some, plain])
    expected = dict.fromkeys(linears, 0.0)
    absolute = 0.0
    for name, found in linear_masks(linears, statistics, some):
        mask = found.keep
        root = statistics.inputs[statistics.input_of[name]].root.double()
        weight = linears[name].weight.double()
        error = float((root @ (weight * ~mask).T).square().sum())
        absolute += error
        expected[name] = error / float((root @ weight.T).square().sum())

    assert rating.absolute == pytest.approx(absolute, rel=1e-4)
    assert rating.relative == pytest.approx(sum(expected.values()), rel=1e-4)
    assert evaluator.layer_errors(some) == pytest.approx(expected, rel=1e-4)
    assert before == after == ProxyEvaluator(bundle_of(linears, statistics)).evaluate([plain])[0]


def test_widths_of_what_is_left_out(linears, statistics):
    whole = bundle_of(linears, statistics)
    wide = candidate_of("2:64", "row", Steps(), Linears())  # hidden states are 32 wide
    only = candidate_of("2:64", "row", Steps(), Linears(targets=["*.down_proj"]))

    with pytest.raises(InvalidInput, match=r"q_proj: in_features=32 is not a multiple of M=64"):
        ProxyEvaluator(whole).evaluate([wide])
    assert len(dict(linear_masks(linears, statistics, only))) == 2
    assert ProxyEvaluator(whole).evaluate([only])[0].absolute > 0
