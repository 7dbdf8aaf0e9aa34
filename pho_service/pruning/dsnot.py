"""
Re-pruning as DSnoT does it: by the expected change of a row's sum, not by its error.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pho_service.pruning.repruning import check_masked, row_chunks
from pho_service.pruning.scores import TINY


def dsnot_refine(
    weight: Tensor,
    mask: Tensor,
    *,
    mean: Tensor,
    variance: Tensor,
    activation_norm: Tensor,
    group: int = 0,
    max_cycles: int = 50,
    threshold: float = 0.1,
    power: float = 1.0,
) -> Tensor:
    """
    Bring the mean of what each row lost towards 0, by swaps of a kept and a removed weight.

    A row's error is e = sum over removed j of W_j E[X_j]. In each cycle the
    removed weight with the highest W_j E[X_j] / Var[X_j]^power of e's sign comes
    back; of the kept weights whose W_j E[X_j] has the other sign, the one with
    the lowest Wanda score goes. A weight moves once at most. A row stops when
    abs(e) is at most ``threshold``, when the swap would not lower abs(e), or
    when no weight suits.

    Args:
        weight: (out_features, in_features), any floating dtype.
        mask: (out_features, in_features), bool. True = kept. Not changed.
        mean: (in_features,), float32: E[X_j] over tokens, in the unit that
            ``threshold`` counts in.
        variance: (in_features,), float32, >= 0: Var[X_j], the means between
            samples included.
        activation_norm: (in_features,), float32, >= 0, as Wanda's score takes it.
        group: M of an N:M pattern: swaps stay inside its runs of M neighbouring
            input channels. 0: unstructured.
        max_cycles: Most swaps of a row, >= 0.
        threshold: Largest abs(e) that is good enough, >= 0.
        power: Exponent of the variance. 0 leaves it out.

    Returns:
        (out_features, in_features), bool. Each row (each run, with a group)
        keeps as many weights as before; no row's abs(e) is larger.

    Raises:
        ValueError: Shapes that don't belong together, a mask that isn't bool,
            ``group``, ``max_cycles`` or ``threshold`` out of range.

    Source:
        DSnoT: Zhang et al. 2023, arXiv:2310.08915. Its code sums X over the
        tokens of a sequence: pass mean * tokens for its ``threshold`` of 0.1.
        It stops a row where e would change its sign, we where abs(e) would not
        fall. In an N:M run it removes the lowest score whatever its sign, and
        stops where that doesn't suit; we pass over runs without a suiting one.
    """
    check_masked(weight, mask, group=group, channels=(mean, variance, activation_norm))
    if max_cycles < 0 or not threshold >= 0:
        raise ValueError(f"max_cycles={max_cycles}, threshold={threshold}: neither may be negative")
    inverse = 1 / (variance**power).clamp_min(TINY)  # (in_features,)
    refined = mask.clone(memory_format=torch.contiguous_format)
    shares = weight.float().contiguous() * mean
    # A sum of all rows, so that no chunk changes how it rounds.
    errors = shares.masked_fill(mask, 0).sum(dim=1, dtype=torch.float64)
    for rows in row_chunks(weight, width=4):
        share, kept = shares[rows], mask[rows]
        balance = _Balance(
            origin=torch.arange(len(share), device=share.device),
            share=share,
            growth=(share * inverse).masked_fill(kept, 0),
            wanda=(weight[rows].float().abs() * activation_norm).masked_fill(~kept, torch.inf),
            error=errors[rows],
        )
        for _ in range(max_cycles):
            balance = _balanced(balance, refined[rows], group, threshold)
            if not len(balance.error):
                break
    return refined


@dataclass(frozen=True, kw_only=True)
class _Balance:
    """R rows that still improve; ``growth`` and ``wanda`` change in place."""

    origin: Tensor  # (R,), int64: where they stand in their chunk
    share: Tensor  # (R, n): W * mean, of the output's mean
    growth: Tensor  # (R, n): share / variance^power of what may come back, 0 elsewhere
    wanda: Tensor  # (R, n): Wanda's score of what may go, inf elsewhere
    error: Tensor  # (R,), float64: the sum of what is removed


def _balanced(rows: _Balance, mask: Tensor, group: int, threshold: float) -> _Balance:
    """Make one swap in each row, in ``mask`` too, and give the rows that made one."""
    sign = torch.where(rows.error > 0, 1.0, -1.0).float()[:, None]
    gain = rows.growth * sign
    cost = rows.wanda.masked_fill(rows.share * sign >= 0, torch.inf)
    if group:
        count, n = gain.shape
        cheapest = cost.view(count, n // group, group).min(dim=2)  # (R, runs)
        closed = torch.isinf(cheapest.values).repeat_interleave(group, dim=1)
        best = gain.masked_fill(closed, 0).max(dim=1)
        run = best.indices[:, None] // group
        out = (cheapest.indices.gather(1, run) + run * group)[:, 0]
        found = best.values > 0
    else:
        best, least = gain.max(dim=1), cost.min(dim=1)
        out = least.indices
        found = (best.values > 0) & torch.isfinite(least.values)
    back = best.indices
    each = torch.arange(len(sign), device=sign.device)
    error = rows.error + (rows.share[each, out].double() - rows.share[each, back].double())
    swap = found & (rows.error.abs() > threshold) & (error.abs() < rows.error.abs())
    # Read where it is not written, and without waiting for a GPU to count the swaps.
    mask[rows.origin, back] |= swap
    mask[rows.origin, out] &= ~swap
    rows.growth[each, back] = 0
    rows.wanda[each, out] = torch.inf
    rows = replace(rows, error=error)
    active = swap.nonzero()[:, 0]
    if len(active) == len(swap):
        return rows
    return _Balance(
        origin=rows.origin[active],
        share=rows.share[active],
        growth=rows.growth[active],
        wanda=rows.wanda[active],
        error=rows.error[active],
    )
