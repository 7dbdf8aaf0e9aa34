"""
Which weights stay: exact counts, and ties that fall the same way on every device.

A mask is True where a weight is kept. Among equal scores the lower index
stays, whatever the device or the number of threads.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

_HALF = 1 << 16  # a float32 is selected in two digits of 16 bits
_ROUNDING = 1e-3  # weights; sums of fractional weights in float64 are surer than this


def keep_highest(score: Tensor, removed: int) -> Tensor:
    """
    Remove the ``removed`` lowest scores of every line.

    Args:
        score: (lines, n), float32, no NaN. Each line competes for itself.
        removed: 0 <= removed <= n.

    Returns:
        (lines, n), bool, exactly ``n - removed`` True in each line.

    Raises:
        ValueError: ``removed`` out of range.
    """
    n = score.shape[-1]
    if not 0 <= removed <= n:
        raise ValueError(f"removed={removed} is not in 0..{n}")
    if removed in (0, n):
        return torch.full_like(score, removed == 0, dtype=torch.bool)
    threshold = score.kthvalue(removed, dim=-1, keepdim=True).values
    keep = score > threshold
    excess = n - removed - keep.sum(dim=-1, keepdim=True)  # ties that still may stay
    if bool(excess.any()):
        tied = score == threshold
        keep |= tied & (tied.cumsum(dim=-1) <= excess)
    return keep


def nm_mask(score: Tensor, *, keep: int, group: int) -> Tensor:
    """
    Mark the weights that an N:M pattern keeps ("2:4" is ``keep=2, group=4``).

    Each row is cut into runs of ``group`` neighbouring input channels; in
    every run the ``keep`` highest scores stay.

    Args:
        score: (..., in_features), float32, no NaN. Only the order inside a
            run counts.
        keep: N, weights kept per run. 1 <= keep < group.
        group: M, length of a run. Divides in_features.

    Returns:
        The shape of ``score``, bool.

    Raises:
        ValueError: ``keep`` or ``group`` out of range, or in_features not a
            multiple of ``group``.

    Source:
        Mishra et al. 2021, arXiv:2104.08378 (2:4). Wanda's code instead counts
        the *pruned* weights: its 1-of-4 is ``keep=3`` here.
    """
    in_features = score.shape[-1]
    if not 1 <= keep < group:
        raise ValueError(f"keep={keep}, group={group}: 1 <= keep < group must hold")
    if in_features % group:
        raise ValueError(f"in_features={in_features} is not a multiple of M={group}")
    runs = score.reshape(*score.shape[:-1], in_features // group, group)
    beaten_by = torch.zeros_like(runs, dtype=torch.int8)
    for i in range(group):
        rival = runs[..., i : i + 1]
        beaten_by[..., :i] += rival > runs[..., :i]
        beaten_by[..., i + 1 :] += rival >= runs[..., i + 1 :]  # on a tie the lower index wins
    return (beaten_by < keep).reshape(score.shape)


def threshold_of(scores: Callable[[], Iterable[tuple[Tensor, float]]], removed: float) -> float:
    """
    Find the score below which ``removed`` weights lie, without holding all scores at once.

    A radix selection over the 32 bits of non-negative floats, in two passes of
    65,536 counts: exact, and the same on every device.

    Args:
        scores: Gives, each time that it is called, the same (values, weight)
            pairs: values float32 >= 0 of any shape; weight is how many weights
            of the model each value stands for.
        removed: How many weights lie at or below the threshold, >= 0.

    Returns:
        The smallest score t such that the weights scoring <= t number at least
        ``removed``.
    """
    if removed <= 0:
        return 0.0
    high, below = _digit(scores, removed, lambda bits: bits >> 16)
    low, _ = _digit(
        scores, removed - below,
        lambda bits: (bits & (_HALF - 1))[(bits >> 16) == high],
    )  # fmt: skip
    bits = torch.tensor((high << 16) | low, dtype=torch.int32)
    return float(bits.view(torch.float32))


def _digit(
    scores: Callable[[], Iterable[tuple[Tensor, float]]],
    removed: float,
    digit: Callable[[Tensor], Tensor],
) -> tuple[int, float]:
    """The digit in which the count reaches ``removed``, and the count below it."""
    counts = torch.zeros(_HALF, dtype=torch.float64)
    for values, weight in scores():
        digits = digit(values.reshape(-1).view(torch.int32))
        counts += torch.bincount(digits, minlength=_HALF).cpu().double() * weight
    reached = counts.cumsum(dim=0)
    last = int(counts.nonzero()[-1])
    found = min(int((reached < removed - _ROUNDING).sum()), last)
    return found, float(reached[found] - counts[found])
