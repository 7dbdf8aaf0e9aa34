"""Importance scores, against slow float64 loops and the formulas of the papers."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

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

RATIOS = [f"0.{tenths}" for tenths in range(1, 10)]
GROUPS = ["1:4", "2:4", "4:8"]

Rows = list[list[float]]


def random_layer() -> tuple[Tensor, Tensor, Tensor]:
    """A weight, RIA's s_j (mean square of an input channel) and a Fisher weight per row."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(OUT, IN, generator=generator)
    squares = torch.randn(IN, generator=generator, dtype=torch.float64).mul(2).exp()
    fisher = torch.randn(OUT, generator=generator).exp()
    return weight, squares, fisher


def score_of(coefficients: Coefficients) -> Tensor:
    """The product's scores of ``random_layer``."""
    weight, squares, fisher = random_layer()
    return layer_importance(
        weight,
        activation_norm=squares.sqrt().float(),
        fisher=fisher,
        coefficients=coefficients,
        layer="layer",
    )


def published_ria(weight: Rows, squares: list[float]) -> Rows:
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


def published_wanda(weight: Rows, squares: list[float]) -> Rows:
    """|W| * sqrt(s_j), as Wanda's paper writes it."""
    return [[abs(w) * math.sqrt(squares[j]) for j, w in enumerate(row)] for row in weight]


def published_magnitude(weight: Rows, squares: list[float]) -> Rows:  # noqa: ARG001  # one shape
    """|W|."""
    return [[abs(w) for w in row] for row in weight]


def kept_by_sorting(line: list[float], removed: int) -> list[bool]:
    """What stays of a line when the ``removed`` lowest go; on a tie the lower index stays."""
    order = sorted(range(len(line)), key=lambda i: (line[i], -i))
    gone = set(order[:removed])
    return [i not in gone for i in range(len(line))]


def published_mask(
    formula: Callable[[Rows, list[float]], Rows], pattern: str, scope: str
) -> tuple[Tensor, int]:
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


def product_mask(coefficients: Coefficients, pattern: str, scope: str) -> Tensor:
    """The product's mask on ``random_layer``."""
    parsed = Pattern.parse(pattern, None if ":" in pattern else scope)
    score = score_of(coefficients)
    lines = score if parsed.scope is Scope.ROW else score.view(1, -1)
    return line_mask(lines, parsed).view(OUT, IN)


@pytest.mark.parametrize("scope", ["row", "layer"])
@pytest.mark.parametrize("pattern", RATIOS)
def test_ria_ratio(pattern: str, scope: str) -> None:
    """CRePE at (1, 1, 0), a = 0.5 with sums keeps the very weights that RIA's formula keeps."""
    expected, kept = published_mask(published_ria, pattern, scope)
    mask = product_mask(RIA, pattern, scope)

    assert int(mask.sum()) == kept
    assert torch.equal(mask, expected)


@pytest.mark.parametrize("pattern", GROUPS)
def test_ria_groups(pattern: str) -> None:
    """In N:M too, CRePE at RIA's coefficients keeps the very weights that RIA keeps."""
    expected, kept = published_mask(published_ria, pattern, "row")
    mask = product_mask(RIA, pattern, "row")

    assert int(mask.sum()) == kept
    assert torch.equal(mask, expected)


@pytest.mark.parametrize("pattern", RATIOS + GROUPS)
def test_wanda(pattern: str) -> None:
    """CRePE without normalisation at a = 1 keeps the very weights that Wanda keeps, row by row."""
    expected, kept = published_mask(published_wanda, pattern, "row")
    mask = product_mask(WANDA, pattern, "row")

    assert int(mask.sum()) == kept
    assert torch.equal(mask, expected)


@pytest.mark.parametrize("pattern", RATIOS + GROUPS)
def test_magnitude(pattern: str) -> None:
    """CRePE without normalisation and activations keeps the largest weights of the layer."""
    expected, kept = published_mask(published_magnitude, pattern, "layer")
    mask = product_mask(MAGNITUDE, pattern, "layer")

    assert int(mask.sum()) == kept
    assert torch.equal(mask, expected)


@pytest.mark.parametrize("pattern", RATIOS + GROUPS)
def test_row_term_is_wanda(pattern: str) -> None:
    """Within a row its mean is a constant, so the row term alone with a = 1 selects as Wanda."""
    row_only = Coefficients(row=1, column=0, neighbourhood=0, activation_exponent=1)
    expected, _ = published_mask(published_wanda, pattern, "row")

    assert torch.equal(product_mask(row_only, pattern, "row"), expected)


@pytest.mark.parametrize("normalisation", ["mean", "sum"])
def test_formula(normalisation: str) -> None:
    """All terms together give the documented formula, computed weight by weight in float64."""
    coefficients = Coefficients(
        row=0.7, column=1.3, neighbourhood=0.4, kernel_size=5, activation_exponent=0.6,
        gradient_exponent=0.3, normalisation=normalisation,  # type: ignore[arg-type]
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


def test_sums_are_scaled_means() -> None:
    """In a square layer sums and means differ by one factor, so both order weights alike."""
    weight = torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
    norm = torch.ones(16)
    by_mean, by_sum = (
        layer_importance(
            weight, activation_norm=norm, fisher=None, layer="layer",
            coefficients=replace(RIA, normalisation=normalisation),
        )
        for normalisation in ("mean", "sum")
    )  # fmt: skip

    torch.testing.assert_close(by_mean, 16 * by_sum)


def test_stacked_layers() -> None:
    """Layers of one shape that are scored in one stack, in many ways, score as each does alone."""
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
        activation_norm=norms[:, None],
        fisher=fishers[:, None],
        out_features=6,
        coefficients=scores,
    )
    for number, coefficients in enumerate(scores):
        alone = [
            layer_importance(w, activation_norm=x, fisher=f, coefficients=coefficients, layer="it")
            for w, x, f in zip(weights, norms, fishers, strict=True)
        ]

        assert torch.equal(stacked[:, number, 0], torch.stack(alone))


@pytest.mark.parametrize("kernel_size", [3, 5, 9])
@pytest.mark.parametrize("shape", [(7, 10), (1, 6), (6, 1), (3, 3)])
def test_window_mean(shape: tuple[int, int], kernel_size: int) -> None:
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


@pytest.mark.parametrize("kernel_size", [3, 5, 11])
def test_sampled_window_mean(kernel_size: int) -> None:
    """Window means of some rows equal those rows of all window means, border rows included."""
    magnitude = torch.rand(9, 12, generator=torch.Generator().manual_seed(0))
    rows = torch.tensor([0, 1, 4, 8])

    torch.testing.assert_close(
        sampled_window_mean(magnitude, kernel_size, rows), window_mean(magnitude, kernel_size)[rows]
    )


@pytest.mark.parametrize("factor", [2.0, 0.125])
def test_common_factor(factor: float) -> None:
    """A common factor of the three coefficients leaves the order of all weights alone."""
    base = Coefficients(row=0.3, column=0.5, neighbourhood=0.9)
    scaled = Coefficients(row=0.3 * factor, column=0.5 * factor, neighbourhood=0.9 * factor)

    assert torch.equal(
        score_of(base).flatten().argsort(stable=True),
        score_of(scaled).flatten().argsort(stable=True),
    )


@pytest.mark.parametrize("coefficients", [RIA, WANDA, EQUAL])
def test_dead_channel(coefficients: Coefficients) -> None:
    """Weights on an input channel that is always 0 go before all others."""
    weight, squares, _ = random_layer()
    squares[5] = 0
    score = layer_importance(
        weight, activation_norm=squares.sqrt().float(), fisher=None, coefficients=coefficients,
        layer="layer",
    )  # fmt: skip
    mask = line_mask(score, Pattern(sparsity=1 / IN))

    assert not bool(mask[:, 5].any())
    assert int((~mask).sum()) == OUT


def test_at_activation_exponent_0_a_dead_channel_counts_like_any_other() -> None:
    weight, squares, _ = random_layer()
    plain = score_of(MAGNITUDE)
    squares[5] = 0
    with_dead = layer_importance(
        weight, activation_norm=squares.sqrt().float(), fisher=None, coefficients=MAGNITUDE,
        layer="layer",
    )  # fmt: skip

    assert torch.equal(with_dead, plain)


def test_a_row_of_zeros_scores_0_however_large_the_coefficients_are() -> None:
    weight, squares, _ = random_layer()
    weight[3] = 0
    score = layer_importance(
        weight, activation_norm=squares.sqrt().float(), fisher=None, layer="layer",
        coefficients=Coefficients(row=5, column=1, neighbourhood=1),
    )  # fmt: skip

    assert bool((score[3] == 0).all())


@pytest.mark.parametrize("coefficients", [RIA, EQUAL])
def test_weights_beyond_sums(coefficients: Coefficients) -> None:
    """Weights that are finite, but add up to more than float32 holds, are refused: not pruned."""
    weight, squares, _ = random_layer()
    weight[2] = 3e38

    with pytest.raises(NumericalError, match=r"blocks\.4\.up_proj"):
        layer_importance(
            weight, activation_norm=squares.sqrt().float(), fisher=None,
            coefficients=coefficients, layer="blocks.4.up_proj",
        )  # fmt: skip


def test_an_activation_norm_that_is_nan_is_refused_with_the_name_of_the_layer() -> None:
    weight, squares, _ = random_layer()
    squares[0] = math.nan

    with pytest.raises(NumericalError, match="down_proj"):
        layer_importance(
            weight, activation_norm=squares.sqrt().float(), fisher=None, coefficients=RIA,
            layer="down_proj",
        )  # fmt: skip


def test_a_bfloat16_weight_scores_in_float32_exactly_as_its_values_do() -> None:
    weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    norm = torch.arange(1.0, 17.0)
    half, full = (
        layer_importance(w, activation_norm=norm, fisher=None, coefficients=EQUAL, layer="layer")
        for w in (weight, weight.float())
    )

    assert half.dtype is torch.float32
    assert torch.equal(half, full)


@pytest.mark.parametrize("pattern", ["0.3", "0.5", "2:4"])
def test_gradient_exponent_cancels_in_row(pattern: str) -> None:
    without, with_fisher = (
        product_mask(replace(EQUAL, gradient_exponent=b), pattern, "row") for b in (0, 0.7)
    )

    assert torch.equal(without, with_fisher)


def test_gradient_exponent_counts_in_layer() -> None:
    weight = torch.randn(1, 64, generator=torch.Generator().manual_seed(0)).repeat(2, 1)
    score = layer_importance(
        weight, activation_norm=torch.ones(64), fisher=torch.tensor([1.0, 4.0]),
        coefficients=replace(MAGNITUDE, gradient_exponent=0.5), layer="layer",
    )  # fmt: skip
    mask = line_mask(score.view(1, -1), Pattern(sparsity=0.5)).view(2, 64)

    torch.testing.assert_close(score[1], 2 * score[0])
    assert int(mask[1].sum()) > int(mask[0].sum())


@pytest.mark.parametrize("n", [2, 5, 100])
def test_gini_one_has_all(n: int) -> None:
    """If one of n values has it all, Gini is (n - 1) / n."""
    values = torch.zeros(n)
    values[n // 2] = 7

    assert float(gini(values)) == pytest.approx((n - 1) / n)


def test_gini_of_zeros_is_0_not_nan() -> None:
    assert float(gini(torch.zeros(4))) == 0


def test_gini_definition() -> None:
    """Line by line, Gini is half the mean absolute difference of all pairs over the mean."""
    values = torch.rand(3, 40, generator=torch.Generator().manual_seed(0)) ** 3
    expected = [
        sum(abs(a - b) for a in line for b in line) / (2 * len(line) * sum(line))
        for line in values.double().tolist()
    ]

    assert gini(values).tolist() == pytest.approx(expected, rel=1e-5)
