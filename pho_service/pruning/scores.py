"""
The importance of every weight of a linear layer: CRePE, with RIA, Wanda and magnitude inside it.

One formula serves whole layers and the sampled rows of a proxy bundle: it
takes the means that it divides by instead of computing them.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, pad

from pho_service.errors import NumericalError
from pho_service.spec import Coefficients

TINY = 1e-30  # smallest denominator: a row of zeros scores 0, not NaN
_ONE = torch.ones(())


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
    """
    The sum of each run of ``length`` neighbours.

    Sums of runs of 1, 2, 4, ... are made from each other, and those in the binary form of
    ``length`` put behind each other: additions grow with the logarithm of the length, and
    nothing is taken away again, as running sums do, so nothing is lost to rounding.

    Args:
        values: (out_features, in_features), float32.
        length: >= 2.
        dim: Along which the runs go.

    Returns:
        As ``values``, shorter by ``length - 1`` along ``dim``; not ``values`` itself.
    """
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
        left = runs.shape[dim] - width
        runs = runs.narrow(dim, 0, left) + runs.narrow(dim, width, left)
        width *= 2


def _run_lengths(count: int, reach: int, device: torch.device) -> Tensor:
    """How many of the neighbours within ``reach`` exist, for each of ``count`` places."""
    place = torch.arange(count, device=device)
    return place.clamp(max=reach) + (count - 1 - place).clamp(max=reach) + 1


def sampled_window_mean(magnitude: Tensor, kernel_size: int, rows: Tensor) -> Tensor:
    """
    The rows ``rows`` of :func:`window_mean`, at the price of those rows.

    None is below :data:`TINY`: what a bundle keeps can be divided by.

    Args:
        magnitude: (out_features, in_features), float32, >= 0.
        kernel_size: k of the k x k window, odd.
        rows: (r,), int64, output rows.

    Returns:
        (r, in_features), float32.
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
    magnitude: Tensor,  # (..., rows, in_features)
    *,
    row_mean: Tensor,  # (..., rows, 1)
    column_mean: Tensor,  # (..., 1, in_features)
    window_mean: Tensor | None,  # (..., rows, in_features); None if its coefficient is 0
    activation_norm: Tensor,  # (..., 1, in_features)
    fisher: Tensor | None,  # (..., rows, 1); None if its exponent is 0
    out_features: int | Tensor,  # (..., 1, 1) if the layers differ
    coefficients: Coefficients,
    out: Tensor | None = None,
) -> Tensor:
    """
    Score weights: the higher, the more a weight matters.

    Args:
        magnitude: |W| of some output rows, float32. Leading dimensions stack
            layers of one shape.
        row_mean: Mean of |W| over the input channels of each row.
        column_mean: Mean of |W| over *all* output rows of the layer.
        window_mean: What :func:`window_mean` gives for these rows, at least :data:`TINY`.
        activation_norm: Square root of the mean over sequences of the squares
            summed over tokens, per input channel.
        fisher: E[(dL/dy)^2] of each output row.
        out_features: Output rows of the whole layer (the length of a column).
        coefficients: How much each part counts.
        out: Where the scores are written, if given.

    Returns:
        (..., rows, in_features), float32. A dead input channel
        (activation_norm 0) scores 0 unless the activation exponent is 0.

    Source:
        RIA: Zhang et al. 2024, eq. 4 (``normalisation="sum"``, 1, 1, 0, a = 0.5).
        Wanda: Sun et al. 2023, eq. 1 (``"none"``, a = 1). The neighbourhood
        term and the means are our form of CRePE (arXiv:2606.01544).
    """
    c = coefficients
    score = _relative(magnitude, row_mean, column_mean, window_mean, out_features, c, out)
    if c.activation_exponent:
        score.mul_(activation_norm**c.activation_exponent)
    if c.gradient_exponent:
        if fisher is None:
            raise ValueError("a gradient exponent needs Fisher row weights")
        score.mul_(fisher**c.gradient_exponent)
    return score


def _relative(
    magnitude: Tensor,
    row_mean: Tensor,
    column_mean: Tensor,
    window_mean: Tensor | None,
    out_features: int | Tensor,
    c: Coefficients,
    out: Tensor | None,
) -> Tensor:
    """The weight term R of the score, in memory of its own or in ``out``."""
    if c.normalisation == "none":
        return torch.mul(magnitude, c.row + c.column + c.neighbourhood, out=out)
    row_unit, column_unit = row_mean, column_mean
    if c.normalisation == "sum":
        row_unit = row_mean * magnitude.shape[-1]
        column_unit = column_mean * out_features
    inverse = torch.add(
        c.row / row_unit.clamp_min(TINY), c.column / column_unit.clamp_min(TINY), out=out
    )  # (..., rows, in_features)
    if c.neighbourhood:
        if window_mean is None:
            raise ValueError("a neighbourhood coefficient needs window means")
        inverse.addcdiv_(_ONE.to(inverse.device), window_mean, value=c.neighbourhood)
    return inverse.mul_(magnitude)


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
        coefficients: How much each part counts.
        layer: Name for messages.

    Returns:
        (out_features, in_features), float32, on ``weight.device``.

    Raises:
        NumericalError: A score is NaN or infinite.
    """
    magnitude = weight.float().abs()
    needs_window = coefficients.neighbourhood and coefficients.normalisation != "none"
    score = importance(
        magnitude,
        row_mean=magnitude.mean(dim=1, keepdim=True),
        column_mean=magnitude.mean(dim=0, keepdim=True),
        window_mean=window_mean(magnitude, coefficients.kernel_size).clamp_min_(TINY)
        if needs_window
        else None,
        activation_norm=activation_norm.to(weight.device),
        fisher=None if fisher is None else fisher.to(weight.device)[:, None],
        out_features=weight.shape[0],
        coefficients=coefficients,
    )
    if not math.isfinite(float(score.max())):  # a NaN is the maximum; no score is negative
        raise NumericalError(
            f"{layer}: a score is NaN or infinite. Check the layer's weights and the "
            "calibration activations for NaN, infinity or values beyond float32.",
            layer=layer,
        )
    return score


def gini(values: Tensor) -> Tensor:
    """
    How unequal values are: 0 if all are the same, towards 1 if one has it all.

    Args:
        values: (..., n), float32, >= 0.

    Returns:
        (...,), float32. 0 where all values are 0.

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
