"""
The importance of every weight of a linear layer: CRePE, with RIA, Wanda and magnitude inside it.

One formula serves whole layers and the sampled rows of a proxy bundle: it
takes the means that it divides by instead of computing them.
"""

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, avg_pool2d

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
    # A window is a product of a run of rows and a run of columns, so its mean is a mean of means.
    along_rows = avg_pool2d(
        magnitude[None, None], (1, kernel_size), stride=1, padding=(0, reach),
        count_include_pad=False,
    )  # (1, 1, out_features, in_features)  # fmt: skip
    along_both = avg_pool2d(
        along_rows, (kernel_size, 1), stride=1, padding=(reach, 0), count_include_pad=False
    )
    return along_both[0, 0]


def sampled_window_mean(magnitude: Tensor, kernel_size: int, rows: Tensor) -> Tensor:
    """
    The rows ``rows`` of :func:`window_mean`, at the price of those rows.

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
    return avg_pool1d(total / exist, kernel_size, stride=1, padding=reach, count_include_pad=False)


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
    if not bool(torch.isfinite(score).all()):
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
