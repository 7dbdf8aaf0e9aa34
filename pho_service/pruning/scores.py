"""
The importance of every weight of a linear layer: CRePE, with RIA, Wanda and magnitude inside it.

One formula serves whole layers and the sampled rows of a proxy bundle: it
takes the means that it divides by instead of computing them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, pad

from pho_service.errors import NumericalError
from pho_service.pruning import kernels
from pho_service.spec.pattern import Coefficients

TINY = 1e-30  # smallest denominator: a row of zeros scores 0, not NaN


def window_mean(magnitude: Tensor, kernel_size: int) -> Tensor:
    """
    Average every weight's neighbourhood, itself included.

    At the borders the sum is divided by the number of neighbours that exist,
    so border weights look neither more nor less important.

    Args:
        magnitude: (out_features, in_features), float32, >= 0.
        kernel_size: k of the k x k window, odd.

    Returns:
        (out_features, in_features), float32.

    Source:
        Our reading of CRePE (arXiv:2606.01544), whose kernel is not public.
    """
    reach = kernel_size // 2
    padded = pad(magnitude, (reach, reach, reach, reach))
    total = _run_sums(_run_sums(padded, kernel_size, dim=0), kernel_size, dim=1)
    rows, columns = (_run_lengths(n, reach, magnitude.device) for n in magnitude.shape)
    return total.div_(rows[:, None]).div_(columns)


def _run_sums(values: Tensor, length: int, dim: int) -> Tensor:
    """The sum of each run of ``length`` neighbours."""
    # Sums of runs of 1, 2, 4, ... are made from each other, and those in the binary form of
    # ``length`` put behind each other: additions grow with the logarithm of the length, and nothing
    # is taken away again, as running sums do, so nothing is lost to rounding.
    count = values.shape[dim] - length + 1
    total: Tensor | None = None
    begin, width, runs = 0, 1, values  # runs: sums of ``width`` neighbours
    while True:
        if length & width:
            part = runs.narrow(dim, begin, count)
            total = part if total is None else total + part
            begin += width
        if begin == length:
            assert total is not None
            return total
        width_left = runs.shape[dim] - width
        runs = runs.narrow(dim, 0, width_left) + runs.narrow(dim, width, width_left)
        width *= 2


def _run_lengths(count: int, reach: int, device: torch.device) -> Tensor:
    """Number of neighbours within ``reach`` that exist, for each of ``count`` places."""
    place = torch.arange(count, device=device)
    return place.clamp(max=reach) + (count - 1 - place).clamp(max=reach) + 1


def sampled_window_mean(magnitude: Tensor, kernel_size: int, rows: Tensor) -> Tensor:
    """
    The rows ``rows`` of :func:`window_mean`, at the price of those rows.

    None is below :data:`TINY`: what a bundle keeps can be divided by.
    """
    reach = kernel_size // 2
    total = torch.zeros(len(rows), magnitude.shape[1], device=magnitude.device)
    exist = torch.zeros(len(rows), 1, device=magnitude.device)
    for offset in range(-reach, reach + 1):
        at = rows + offset
        inside = (at >= 0) & (at < magnitude.shape[0])
        total[inside] += magnitude[at[inside]]
        exist[inside] += 1
    means = avg_pool1d(total / exist, kernel_size, stride=1, padding=reach, count_include_pad=False)
    return means.clamp_min_(TINY)


def importance(
    magnitude: Tensor,  # (I, L, R, n)
    *,
    row_mean: Tensor,  # (I, L, R)
    column_mean: Tensor,  # (I, L, n)
    window_means: Tensor,  # (K, I, L, R, n)
    windows: Sequence[int],
    activation_norm: Tensor,  # (I, L, n)
    fisher: Tensor | None,  # (I, L, R); None if its exponents are 0
    out_features: int | Tensor,  # (I, L, 1) if the layers differ
    coefficients: Sequence[Coefficients],
    out: Tensor | None = None,
) -> Tensor:
    """
    Score weights in C ways: the higher, the more a weight matters.

    Args:
        magnitude: |W| of R output rows, float32, of I * L layers that are n wide.
        row_mean: Mean of |W| over the input channels of each row.
        column_mean: Mean of |W| over *all* output rows of the layer.
        window_means: What :func:`window_mean` gives for these rows with K kernel sizes, at
            least :data:`TINY`.
        windows: The one of them that each score takes, if its coefficient is not 0.
        activation_norm: Square root of the mean over sequences of the squares
            summed over tokens, per input channel.
        fisher: E[(dL/dy)^2] of each output row.
        out_features: Output rows of the whole layer (the length of a column).
        coefficients: How much each part counts, of each score.
        out: Where the scores are written, if given; contiguous.

    Returns:
        (I, C, L, R, n), float32. A dead input channel (activation_norm 0)
        scores 0 unless the activation exponent is 0.

    Source:
        RIA: Zhang et al. 2024, eq. 4 (``normalisation="sum"``, 1, 1, 0, a = 0.5).
        Wanda: Sun et al. 2023, eq. 1 (``"none"``, a = 1). The neighbourhood
        term and the means are our form of CRePE (arXiv:2606.01544). F-WANDA
        (arXiv:2608.00481) has the Fisher weight of a row decide how many weights
        the row keeps; here it is a factor of the score.
    """
    if fisher is None:
        if any(c.gradient_exponent for c in coefficients):
            raise ValueError("a gradient exponent needs Fisher row weights")
        fisher = torch.ones_like(row_mean)
    inputs, linears, rows, n = magnitude.shape
    if out is None:
        out = magnitude.new_empty(inputs, len(coefficients), linears, rows, n)
    row_terms, column_terms = [], []
    for c in coefficients:
        row_unit, column_unit = row_mean, column_mean
        if c.normalisation == "sum":
            row_unit, column_unit = row_mean * n, column_mean * out_features
        row_terms.append(c.row / row_unit.clamp_min(TINY))
        column_terms.append(c.column / column_unit.clamp_min(TINY))
        if c.normalisation == "none":
            row_terms[-1].fill_(c.row + c.column + c.neighbourhood)
            column_terms[-1].zero_()
    combine = kernels.combine_terms if magnitude.device.type == "cpu" else plain_combine_terms
    combine(
        magnitude,
        torch.stack(row_terms),
        torch.stack(column_terms),
        [0.0 if c.normalisation == "none" else c.neighbourhood for c in coefficients],
        window_means,
        windows,
        torch.stack([activation_norm**c.activation_exponent for c in coefficients]),
        torch.stack([fisher**c.gradient_exponent for c in coefficients]),
        out,
    )
    return out


def plain_combine_terms(
    magnitude: Tensor,
    row_terms: Tensor,
    column_terms: Tensor,
    neighbourhoods: Sequence[float],
    window_means: Tensor,
    windows: Sequence[int],
    activations: Tensor,
    fishers: Tensor,
    out: Tensor,
) -> None:
    """
    A * (row + column + neighbourhood / window mean) * activation * fisher, in torch alone.

    Args:
        magnitude: A, (I, L, R, n).
        row_terms, fishers: (C, I, L, R).
        column_terms, activations: (C, I, L, n).
        neighbourhoods: C of them.
        window_means: (K, I, L, R, n).
        windows: Which of them is whose, where the neighbourhood is not 0.
        out: (I, C, L, R, n), is written.
    """
    one = torch.ones((), device=magnitude.device)
    for number, neighbourhood in enumerate(neighbourhoods):
        score = torch.add(
            row_terms[number][..., None], column_terms[number][..., None, :], out=out[:, number]
        )
        if neighbourhood:
            score.addcdiv_(one, window_means[windows[number]], value=neighbourhood)
        score.mul_(magnitude)
        score.mul_(activations[number][..., None, :]).mul_(fishers[number][..., None])


def layer_importance(
    weight: Tensor,
    *,
    activation_norm: Tensor,
    fisher: Tensor | None,
    coefficients: Coefficients,
    layer: str,
) -> Tensor:
    """
    Score all weights of one linear.

    Args:
        weight: (out_features, in_features), any floating dtype, finite.
        activation_norm: (in_features,), float32, >= 0.
        fisher: (out_features,), float32, >= 0, or None.

    Returns:
        (out_features, in_features), float32, on ``weight.device``.

    Raises:
        NumericalError: A score, or a sum that it is divided by, is NaN or infinite.
    """
    magnitude = weight.float().abs()
    row_mean = magnitude.mean(dim=1)
    if coefficients.normalisation != "none":
        # An infinite mean would make 0 of the largest weights' scores.
        _check_finite(float(row_mean.sum()) * weight.shape[1], layer)
    means = magnitude  # which is not looked at
    if coefficients.neighbourhood and coefficients.normalisation != "none":
        means = window_mean(magnitude, coefficients.kernel_size).clamp_min_(TINY)
    score = importance(
        magnitude[None, None],
        row_mean=row_mean[None, None],
        column_mean=magnitude.mean(dim=0)[None, None],
        window_means=means[None, None, None],
        windows=[0],
        activation_norm=activation_norm.to(weight.device)[None, None],
        fisher=None if fisher is None else fisher.to(weight.device)[None, None],
        out_features=weight.shape[0],
        coefficients=[coefficients],
    ).view(weight.shape)
    _check_finite(float(score.max()), layer)  # a NaN is the maximum; no score is negative
    return score


def _check_finite(value: float, layer: str) -> None:
    if not abs(value) <= torch.finfo(torch.float32).max:
        raise NumericalError(
            f"{layer}: a score is NaN or infinite. Check the layer's weights and the "
            "calibration activations for NaN, infinity or values beyond float32.",
            layer=layer,
        )


def gini(values: Tensor) -> Tensor:
    """
    How unequal values are: 0 if all are the same, towards 1 if one has it all.

    Values are (..., n), float32, >= 0. Where all of them are 0, it is 0.

    Source:
        Gini 1912, by the sorted-rank formula. Summaries of arXiv:2606.01544
        name it as the paper's proxy, over the scores after pruning.
    """
    n = values.shape[-1]
    ordered = values.sort(dim=-1).values
    rank = torch.arange(1, n + 1, device=values.device, dtype=torch.float32)
    total = ordered.sum(dim=-1)
    weighted = (ordered * ((2 * rank - n - 1) / n)).sum(dim=-1)
    return torch.where(
        total > 0,
        weighted / total.clamp_min(torch.finfo(torch.float32).tiny),
        torch.zeros_like(total),
    )
