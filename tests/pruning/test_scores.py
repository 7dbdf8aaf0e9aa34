"""Importance scores, against slow float64 loops and the formulas of the papers."""

import math
from dataclasses import replace

import pytest
import torch

from pho_service.errors import NumericalError
from pho_service.pruning.masks import line_mask
from pho_service.pruning.scores import (
    gini,
    importance,
    layer_importance,
    sampled_window_mean,
    window_mean,
)
from pho_service.spec.pattern import Coefficients, Pattern, Scope

OUT, IN = 20, 32
RIA = Coefficients(row=1, column=1, neighbourhood=0, activation_exponent=0.5, normalisation="sum")
WANDA = Coefficients(row=1, column=0, neighbourhood=0, activation_exponent=1, normalisation="none")
MAGNITUDE = replace(WANDA, activation_exponent=0)
EQUAL = Coefficients(row=1, column=1, neighbourhood=1)


def random_layer():
    """A weight, RIA's s_j (mean square of an input channel) and a Fisher weight per row."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(OUT, IN, generator=generator)
    squares = torch.randn(IN, generator=generator, dtype=torch.float64).mul(2).exp()
    fisher = torch.randn(OUT, generator=generator).exp()
    return weight, squares, fisher


def scored(weight, squares, coefficients, fisher=None):
    return layer_importance(
        weight, activation_norm=squares.sqrt().float(), fisher=fisher, coefficients=coefficients,
        layer="blocks.4.up_proj",
    )  # fmt: skip


def score_of(coefficients):
    weight, squares, fisher = random_layer()
    return scored(weight, squares, coefficients, fisher)


def published_ria(weight, squares):
    """(|W| / column sum + |W| / row sum) * sqrt(s_j) ** 0.5, as RIA's paper writes it."""
    row_sums = [sum(map(abs, row)) for row in weight]
    column_sums = [sum(map(abs, column)) for column in zip(*weight, strict=True)]
    return [
        [
            (abs(w) / column_sums[j] + abs(w) / row_sums[i]) * math.sqrt(squares[j]) ** 0.5
            for j, w in enumerate(row)
        ]
        for i, row in enumerate(weight)
    ]


def published_wanda(weight, squares):
    """|W| * sqrt(s_j), as Wanda's paper writes it."""
    return [[abs(w) * math.sqrt(squares[j]) for j, w in enumerate(row)] for row in weight]


def published_magnitude(weight, squares):  # noqa: ARG001  # one shape
    return [[abs(w) for w in row] for row in weight]


def kept_by_sorting(line, removed):
    """What stays of a line when the ``removed`` lowest go; on a tie the lower index stays."""
    order = sorted(range(len(line)), key=lambda i: (line[i], -i))
    gone = set(order[:removed])
    return [i not in gone for i in range(len(line))]


def published_mask(formula, pattern, scope):
    """The mask of a published formula on ``random_layer``, and how many weights it keeps."""
    weight, squares, _ = random_layer()
    scores = formula(weight.double().tolist(), squares.tolist())
    if ":" in pattern:
        keep, group = map(int, pattern.split(":"))
        lines = [row[i : i + group] for row in scores for i in range(0, IN, group)]
        removed = group - keep
    else:
        lines = scores if scope == "row" else [[s for row in scores for s in row]]
        removed = len(lines[0]) * int(pattern[-1]) // 10
    kept = [kept_by_sorting(line, removed) for line in lines]
    return torch.tensor(kept).view(OUT, IN), len(lines) * (len(lines[0]) - removed)


def product_mask(coefficients, pattern, scope):
    parsed = Pattern.parse(pattern, None if ":" in pattern else scope)
    score = score_of(coefficients)
    lines = score if parsed.scope is Scope.ROW else score.view(1, -1)
    return line_mask(lines, parsed).view(OUT, IN)


@pytest.mark.parametrize("pattern", ["0.1", "0.5", "0.7", "0.9", "1:4", "2:4", "4:8"])
@pytest.mark.parametrize(
    ("coefficients", "formula", "scope"),
    [
        (RIA, published_ria, "row"),
        (RIA, published_ria, "layer"),
        (WANDA, published_wanda, "row"),
        # Within a row its mean is a constant, so the row term alone with a = 1 selects as Wanda.
        (replace(WANDA, normalisation="mean"), published_wanda, "row"),
        (MAGNITUDE, published_magnitude, "layer"),
    ],
)
def test_crepe_keeps_the_very_weights_that_a_published_formula_keeps(
    coefficients, formula, scope, pattern
):
    expected, kept = published_mask(formula, pattern, scope)
    mask = product_mask(coefficients, pattern, scope)

    assert int(mask.sum()) == kept
    assert torch.equal(mask, expected)


@pytest.mark.parametrize("normalisation", ["mean", "sum"])
def test_all_terms_give_the_documented_formula_in_float64(normalisation):
    coefficients = Coefficients(
        row=0.7, column=1.3, neighbourhood=0.4, kernel_size=5, activation_exponent=0.6,
        gradient_exponent=0.3, normalisation=normalisation,
    )  # fmt: skip
    weight, squares, fisher = random_layer()
    a = weight.double().abs()
    expected = torch.empty(OUT, IN, dtype=torch.float64)
    for i in range(OUT):
        for j in range(IN):
            window = a[max(i - 2, 0) : i + 3, max(j - 2, 0) : j + 3]
            row, column = (
                (a[i].sum(), a[:, j].sum())
                if normalisation == "sum"
                else (a[i].mean(), a[:, j].mean())
            )
            r = 0.7 * a[i, j] / row + 1.3 * a[i, j] / column + 0.4 * a[i, j] / window.mean()
            expected[i, j] = r * squares[j].sqrt() ** 0.6 * fisher[i].double() ** 0.3

    torch.testing.assert_close(score_of(coefficients).double(), expected, rtol=1e-5, atol=0)


def test_layers_in_one_stack_score_as_each_does_alone():
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(3, 6, 8, generator=generator)
    norms = torch.rand(3, 8, generator=generator)
    fishers = torch.rand(3, 6, generator=generator)
    magnitude = weights.abs()
    scores = (replace(EQUAL, gradient_exponent=0.5), RIA, replace(EQUAL, kernel_size=5), WANDA)
    stacked = importance(
        magnitude[:, None],
        row_mean=magnitude.mean(dim=2)[:, None],
        column_mean=magnitude.mean(dim=1)[:, None],
        window_means=torch.stack(
            [torch.stack([window_mean(m, k) for m in magnitude]) for k in (3, 5)]
        )[:, :, None],
        windows=[0, 0, 1, 0],
        activation_norm=(norms**2).sqrt()[:, None],
        fisher=fishers[:, None],
        out_features=6,
        coefficients=scores,
    )
    for number, coefficients in enumerate(scores):
        alone = [
            scored(w, x**2, coefficients, f)
            for w, x, f in zip(weights, norms, fishers, strict=True)
        ]

        assert torch.equal(stacked[:, number, 0], torch.stack(alone))


@pytest.mark.parametrize("kernel_size", [3, 5, 9])
@pytest.mark.parametrize("shape", [(7, 10), (1, 6), (6, 1), (3, 3)])
def test_window_mean(shape, kernel_size):
    """A window's mean is over the neighbours that exist, at borders and in tiny layers too."""
    magnitude = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    reach = kernel_size // 2
    expected = torch.empty(shape, dtype=torch.float64)
    for i in range(shape[0]):
        for j in range(shape[1]):
            near = [
                float(magnitude[y, x])
                for y in range(i - reach, i + reach + 1)
                for x in range(j - reach, j + reach + 1)
                if 0 <= y < shape[0] and 0 <= x < shape[1]
            ]
            expected[i, j] = sum(near) / len(near)

    torch.testing.assert_close(window_mean(magnitude, kernel_size).double(), expected)
    rows = torch.arange(0, shape[0], 3)
    found = sampled_window_mean(magnitude, kernel_size, rows)
    torch.testing.assert_close(found.double(), expected[rows])


@pytest.mark.parametrize("coefficients", [RIA, WANDA, EQUAL])
def test_weights_on_a_dead_channel_go_first_unless_the_activation_exponent_is_0(coefficients):
    weight, squares, _ = random_layer()
    squares[5] = 0
    mask = line_mask(scored(weight, squares, coefficients), Pattern(sparsity=1 / IN))

    assert not bool(mask[:, 5].any())
    assert int((~mask).sum()) == OUT
    assert torch.equal(scored(weight, squares, MAGNITUDE), score_of(MAGNITUDE))


@pytest.mark.parametrize(
    ("coefficients", "what"), [(RIA, "weights"), (EQUAL, "weights"), (RIA, "norm")]
)
def test_weights_whose_sum_is_not_finite_and_a_norm_that_is_nan_are_refused(coefficients, what):
    weight, squares, _ = random_layer()
    if what == "weights":
        weight[2] = 3e38
    else:
        squares[0] = math.nan

    with pytest.raises(NumericalError, match=r"blocks\.4\.up_proj"):
        scored(weight, squares, coefficients)


def test_a_bfloat16_weight_scores_in_float32_exactly_as_its_values_do():
    weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    half, full = (scored(w, torch.arange(1.0, 17.0), EQUAL) for w in (weight, weight.float()))

    assert half.dtype is torch.float32
    assert torch.equal(half, full)


@pytest.mark.parametrize("pattern", ["0.3", "0.5", "2:4"])
def test_gradient_exponent_cancels_in_row(pattern):
    without, with_fisher = (
        product_mask(replace(EQUAL, gradient_exponent=b), pattern, "row") for b in (0, 0.7)
    )

    assert torch.equal(without, with_fisher)


def test_gini_is_half_the_mean_absolute_difference_over_the_mean_of_zeros_0():
    values = torch.rand(3, 40, generator=torch.Generator().manual_seed(0)) ** 3
    expected = [
        sum(abs(a - b) for a in line for b in line) / (2 * len(line) * sum(line))
        for line in values.double().tolist()
    ]

    assert gini(values).tolist() == pytest.approx(expected, rel=1e-5)
    assert float(gini(torch.zeros(4))) == 0
