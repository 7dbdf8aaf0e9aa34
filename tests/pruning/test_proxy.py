"""Proxy ratings, against a slow float64 reference that masks the whole model."""

import math
from dataclasses import replace

import pytest
import torch

from pho_service.errors import BundleError, NumericalError
from pho_service.pruning.bundle import sample_bundle
from pho_service.pruning.layer_errors import BATCH
from pho_service.pruning.masks import linear_masks
from pho_service.pruning.proxy import ProxyEvaluator, ProxyRating
from pho_service.pruning.scores import layer_importance
from pho_service.spec.pattern import Coefficients, Pattern
from pho_service.spec.steps import Allocation, Candidate, Steps

COEFFICIENTS = {
    "magnitude": Coefficients(
        row=1, column=0, neighbourhood=0, activation_exponent=0, normalisation="none"
    ),
    "ria": Coefficients(row=1, column=1, neighbourhood=0, normalisation="sum"),
    "crepe": Coefficients(
        row=0.4, column=1, neighbourhood=0.8, kernel_size=5, activation_exponent=0.7,
        gradient_exponent=0.3,
    ),
}  # fmt: skip
PATTERNS = [("0.5", "row"), ("0.6", "layer"), ("0.5", "global"), ("2:4", "row")]


def candidate_of(name, pattern, scope):
    return Candidate(
        method="crepe", coefficients=COEFFICIENTS[name], pattern=Pattern.parse(pattern, scope)
    )


ALL_CANDIDATES = [
    candidate_of(name, pattern, scope) for name in COEFFICIENTS for pattern, scope in PATTERNS
]


def bundle_of(linears, statistics, rows_per_layer=0, seed=0):
    """A bundle of some rows (0: all) of each linear."""
    return sample_bundle(
        linears, statistics, rows_per_layer=rows_per_layer, kernel_sizes=(3, 5), seed=seed
    )


def rate(bundle, candidate):
    return ProxyEvaluator(bundle).evaluate([candidate])[0]


def slow_rating(linears, statistics, candidate):
    """Mask every linear of the model and add up D H D^T row by row, in float64."""
    fisher = absolute = blend = geometric = 0.0
    relative = {}
    for name, masked in linear_masks(linears, statistics, candidate):
        mask = masked.keep
        root = statistics.inputs[statistics.input_of[name]].root.double()
        gram = root.T @ root
        energy = layer_error = layer_fisher = 0.0
        for i, row in enumerate(linears[name].weight.double()):
            gone = torch.where(mask[i], 0, row)
            error = float(gone @ gram @ gone)
            layer_error += error
            row_energy = float(row @ gram @ row)
            layer_fisher += float(statistics.fisher[name][i]) * error
            blend += float(statistics.fisher[name][i]) * error * (error / row_energy) ** 0.5
            energy += row_energy
        fisher += layer_fisher
        absolute += layer_error
        relative[name] = layer_error / energy
        geometric += (layer_fisher * relative[name]) ** 0.5
    kinds = {name.rpartition(".")[2] for name in relative}
    of_kind = {k: [v for name, v in relative.items() if name.endswith(f".{k}")] for k in kinds}
    return ProxyRating(
        fisher=fisher,
        relative=sum(relative.values()),
        absolute=absolute,
        blend=blend,
        geometric=geometric,
        gini=None,
        error_by_kind={k: sum(values) / len(values) for k, values in of_kind.items()},
    )


@pytest.mark.parametrize(("pattern", "scope"), PATTERNS)
@pytest.mark.parametrize("name", COEFFICIENTS)
def test_with_all_rows_and_the_gram_matrix_a_rating_is_the_exact_error_of_the_whole_model(
    linears, statistics, name, pattern, scope
):
    candidate = candidate_of(name, pattern, scope)
    expected = slow_rating(linears, statistics, candidate)
    rating = rate(bundle_of(linears, statistics), candidate)

    assert rating.fisher == pytest.approx(expected.fisher, rel=1e-4)
    assert rating.relative == pytest.approx(expected.relative, rel=1e-4)
    assert rating.absolute == pytest.approx(expected.absolute, rel=1e-4)
    assert rating.blend == pytest.approx(expected.blend, rel=1e-3)
    assert rating.geometric == pytest.approx(expected.geometric, rel=1e-4)
    assert rating.error_by_kind == pytest.approx(expected.error_by_kind, rel=1e-4)


SHARED_OUT = [
    *((*each, "uniform") for each in PATTERNS),
    ("0.5", "row", "owl"),
    ("1:4", "row", "owl"),
]


@pytest.mark.parametrize(("pattern", "scope", "method"), SHARED_OUT)
def test_sparsities_are_those_of_the_masks(linears, statistics, pattern, scope, method):
    steps = Steps(allocation=Allocation(method=method, spread=0.25))
    candidate = replace(candidate_of("crepe", pattern, scope), steps=steps)
    found = ProxyEvaluator(bundle_of(linears, statistics)).layer_sparsities(candidate)
    masks = linear_masks(linears, statistics, candidate)

    assert found == pytest.approx(
        {name: 1 - float(mask.keep.float().mean()) for name, mask in masks}
    )


def test_sampled_rows(linears, statistics):
    """Ratings on a quarter of the rows are, on average over samples, near those on all rows."""
    candidates = [candidate_of("crepe", pattern, scope) for pattern, scope in PATTERNS]
    exact = ProxyEvaluator(bundle_of(linears, statistics)).evaluate(candidates)
    sampled = [
        ProxyEvaluator(bundle_of(linears, statistics, 8, seed)).evaluate(candidates)
        for seed in range(40)
    ]

    # one sample's fisher rating has a relative standard deviation of 0.14, so 0.022 over 40
    for whole, *parts in zip(exact, *sampled, strict=True):
        for measure in ("fisher", "relative", "absolute"):
            mean = sum(getattr(rating, measure) for rating in parts) / len(parts)
            assert mean == pytest.approx(getattr(whole, measure), rel=0.07)


def test_list_equals_one_by_one(linears, statistics):
    evaluator = ProxyEvaluator(bundle_of(linears, statistics, 8))
    together = evaluator.evaluate(ALL_CANDIDATES, with_gini=True)
    one_by_one = [evaluator.evaluate([c], with_gini=True)[0] for c in reversed(ALL_CANDIDATES)]
    again = ProxyEvaluator(evaluator.bundle).evaluate(ALL_CANDIDATES, with_gini=True)

    assert together == one_by_one[::-1]
    assert together == again


def test_more_than_a_batch_come_in_order(linears, statistics):
    evaluator = ProxyEvaluator(bundle_of(linears, statistics, 8))
    scores = [
        replace(COEFFICIENTS["crepe"], activation_exponent=i / 10) for i in range(2 * BATCH + 3)
    ]
    many = [replace(candidate_of("crepe", "0.5", "layer"), coefficients=s) for s in scores]

    alone = [evaluator.evaluate([c])[0].blend for c in many]

    # MKL's products depend on their shape.
    found = [rating.blend for rating in evaluator.evaluate(many)]
    assert found == pytest.approx(alone, rel=1e-6)


@pytest.mark.parametrize(("pattern", "scope"), PATTERNS[2:])
def test_gini(linears, statistics, pattern, scope):
    """Gini is that of the scores with removed ones at 0, averaged over layers by weights."""
    candidate = candidate_of("crepe", pattern, scope)
    total = 0.0
    for name, masked in linear_masks(linears, statistics, candidate):
        mask, weight = masked.keep, linears[name].weight
        score = layer_importance(
            weight, activation_norm=statistics.activation_norm(name), layer=name,
            fisher=statistics.fisher[name], coefficients=candidate.coefficients,
        )  # fmt: skip
        x = torch.where(mask, score, 0).double().flatten()
        differences = (x[:, None] - x).abs().mean()
        total += float(differences / (2 * x.mean())) * weight.numel()
    bundle = bundle_of(linears, statistics)
    evaluator = ProxyEvaluator(bundle)
    (rating,), (plain,) = (evaluator.evaluate([candidate], with_gini=g) for g in (True, False))

    assert rating.gini == pytest.approx(total / bundle.weights, rel=1e-4)
    assert plain == replace(rating, gini=None)


@pytest.mark.parametrize("change", [{}, {"neighbourhood": 0}, {"normalisation": "none"}])
def test_a_kernel_size_without_window_means_is_refused_unless_no_window_is_used(
    linears, statistics, change
):
    bundle = bundle_of(linears, statistics)
    fields = {"row": 1, "column": 1, "neighbourhood": 1, **change}
    known, unknown = (
        replace(ALL_CANDIDATES[0], coefficients=Coefficients(**fields, kernel_size=k))
        for k in (3, 7)
    )

    if change:
        assert rate(bundle, unknown) == rate(bundle, known)
    else:
        with pytest.raises(BundleError, match=r"kernel size 7, only for 3, 5"):
            rate(bundle, unknown)


def test_a_nan_names_its_first_linear_scores_that_overflow_theirs(linears, statistics):
    broken = [replace(entry, root=entry.root.clone()) for entry in statistics.inputs]
    broken[3].root[0, 0] = math.nan  # of the first block's down_proj
    overflowing = Coefficients(row=1e30, column=1e30, neighbourhood=1e30, activation_exponent=300)

    with pytest.raises(NumericalError, match=r"layers\.0\.mlp\.down_proj"):
        rate(bundle_of(linears, replace(statistics, inputs=broken)), ALL_CANDIDATES[0])
    with pytest.raises(NumericalError, match=r"layers\.0\.self_attn\.q_proj: a score"):
        rate(bundle_of(linears, statistics), replace(ALL_CANDIDATES[0], coefficients=overflowing))


def test_global_ties(linears, statistics):
    """In scope global a rating is exact also where many plain scores equal the threshold."""
    mostly_dead = [replace(e, activation_norm=e.activation_norm.clone()) for e in statistics.inputs]
    for entry in mostly_dead:
        entry.activation_norm[torch.arange(len(entry.activation_norm)) % 4 > 0] = 0
    tied = replace(statistics, inputs=mostly_dead)
    candidate = candidate_of("magnitude", "0.5", "global")
    expected = slow_rating(linears, tied, candidate)

    assert rate(bundle_of(linears, tied), candidate).absolute == pytest.approx(
        expected.absolute, rel=1e-4
    )


def test_a_gpu_rates_what_the_cpu_rates(linears, statistics, pretended_gpu):
    candidates = [
        replace(candidate, steps=Steps(allocation=Allocation(method=method, unit="block")))
        for candidate in ALL_CANDIDATES[-len(PATTERNS) :]
        for method in ("uniform", "owl", "fisher", "curves")
        if method == "uniform" or candidate.pattern.scope != "global"
    ]
    bundle = bundle_of(linears, statistics, rows_per_layer=8)
    on_gpu, on_cpu = ProxyEvaluator(bundle, "cuda"), ProxyEvaluator(bundle)
    found = on_gpu.evaluate(candidates, with_gini=True)
    expected = on_cpu.evaluate(candidates, with_gini=True)

    assert on_gpu.stacks[0].rows.device == pretended_gpu.device
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.blend == pytest.approx(theirs.blend, rel=1e-5)
        assert mine.gini == pytest.approx(theirs.gini, rel=1e-4)
    errors = [evaluator.layer_errors(candidates[0]) for evaluator in (on_gpu, on_cpu)]
    assert errors[0] == pytest.approx(errors[1], rel=1e-3)
