"""
Selection of the weights that stay: exact counts, and ties that fall alike on every device.

A mask is True where a weight is kept. Among equal scores the lower index
stays, whatever the device or the number of threads. What is written here in
torch runs on any device; on the CPU compiled kernels mark the same, faster.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from pho_service.pruning import kernels

_ROUNDING = 1e-3  # weights; sums of fractional weights in float64 are surer than this


def keep_highest(score: Tensor, removed: int | Tensor) -> Tensor:
    """
    Remove the lowest scores of every line.

    Args:
        score: (lines, n), float32, no NaN. Each line competes for itself.
        removed: How many of each line go, 0 <= removed <= n: one number for
            all, or (lines,), int64.

    Returns:
        (lines, n), bool, exactly ``n - removed`` True in each line.

    Raises:
        ValueError: ``removed`` out of range.
    """
    lines, n = score.shape
    numbers = torch.as_tensor(removed)
    outside = numbers[(numbers < 0) | (numbers > n)]
    if len(outside):
        raise ValueError(f"removed={int(outside[0])} is not in 0..{n}")
    numbers = _beside(score, numbers).expand(lines)
    if score.device.type == "cpu":
        return kernels.keep_highest(score, numbers)
    return plain_keep_highest(score, numbers)


def _beside(score: Tensor, numbers: Tensor) -> Tensor:
    """Numbers on the device of the scores; a single one of the CPU gets there without a wait."""
    if numbers.dim() or numbers.device == score.device:
        return numbers.to(score.device)
    return torch.full((), int(numbers), device=score.device)


def plain_keep_highest(score: Tensor, removed: Tensor) -> Tensor:
    """:func:`keep_highest` in torch alone; ``removed`` is (lines,), int64, in range."""
    n = score.shape[-1]
    last = (removed - 1).clamp_min(0)[:, None]
    threshold = score.sort(dim=-1).values.gather(-1, last)  # (lines, 1)
    threshold = threshold.masked_fill(removed[:, None] == 0, -torch.inf)
    keep = score > threshold
    spare = (n - removed)[:, None] - keep.sum(dim=-1, keepdim=True)  # ties that still may stay
    tied = score == threshold
    return keep | (tied & (tied.cumsum(dim=-1) <= spare))


def nm_mask(score: Tensor, *, keep: int | Tensor, group: int) -> Tensor:
    """
    Mark the weights that an N:M pattern keeps ("2:4" is ``keep=2, group=4``).

    Each row is cut into runs of ``group`` neighbouring input channels; in
    every run the ``keep`` highest scores stay.

    Args:
        score: (..., in_features), float32, no NaN. Only the order inside a
            run counts.
        keep: N, weights kept per run, 1 <= keep < group: one number for all,
            or int64 in the shape of ``score`` without its last dimension.
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
    numbers = torch.as_tensor(keep)
    outside = numbers[(numbers < 1) | (numbers >= group)]
    if len(outside.reshape(-1)):
        raise ValueError(
            f"keep={int(outside.reshape(-1)[0])}, group={group}: 1 <= keep < group must hold"
        )
    if in_features % group:
        raise ValueError(f"in_features={in_features} is not a multiple of M={group}")
    lines = score.reshape(-1, in_features)
    numbers = _beside(score, numbers).expand(score.shape[:-1]).reshape(-1)
    mask = kernels.nm_mask if score.device.type == "cpu" else plain_nm_mask
    return mask(lines, numbers, group).view(score.shape)


def plain_nm_mask(score: Tensor, keep: Tensor, group: int) -> Tensor:
    """:func:`nm_mask` in torch alone, of (lines, in_features) and (lines,), int64, in range."""
    return beaten_by(score, group) < keep[:, None]


def beaten_by(score: Tensor, group: int) -> Tensor:
    """(lines, in_features), int8: how many of its run come before each of these scores."""
    runs = score.view(len(score), -1, group)
    count = torch.zeros_like(runs, dtype=torch.int8)
    for i in range(group):
        rival = runs[..., i : i + 1]
        count[..., :i] += rival > runs[..., :i]
        count[..., i + 1 :] += rival >= runs[..., i + 1 :]  # on a tie the lower index wins
    return count.view(score.shape)


def threshold_of(
    scores: Callable[[], Iterable[tuple[Tensor, float | Tensor]]], removed: float
) -> float:
    """
    Find the score below which ``removed`` weights lie, without holding all scores at once.

    A radix selection over the 32 bits of non-negative floats, in two passes of
    65,536 counts: exact, and the same on every device.

    Args:
        scores: Gives, each time that it is called, the same (values, weight)
            pairs: values float32 >= 0 of any shape; weight is how many weights
            of the model each value stands for. If values differ in that,
            values are (lines, n) and weight is (lines,), float64.
        removed: How many weights lie at or below the threshold, >= 0.

    Returns:
        The smallest score t such that the weights scoring <= t number at least
        ``removed``.
    """
    if removed <= 0:
        return 0.0
    prefix, below = 0, 0.0
    for shift in (16, 0):  # of two, because scores may have to be made again for each
        counts = torch.zeros(1 << 16, dtype=torch.float64)
        for values, weight in scores():
            add_digits(values, weight, shift=shift, width=16, prefix=prefix, counts=counts)
        reached = counts.cumsum(dim=0)
        last = int(counts.nonzero()[-1])
        digit = min(int((reached < removed - below - _ROUNDING).sum()), last)
        below += float(reached[digit] - counts[digit])
        prefix = (prefix << 16) | digit
    return float(torch.tensor(prefix, dtype=torch.int32).view(torch.float32))


def add_digits(
    values: Tensor, weight: float | Tensor, *, shift: int, width: int, prefix: int, counts: Tensor
) -> None:
    """
    Add up weights by a digit of each value's bits: one pass of a radix selection.

    Args:
        values: float32 >= 0, of any shape, or (lines, n).
        weight: Weight of each value, or (lines,), float64, of those of each line.
        shift: Bits below the digit.
        width: Bits of the digit.
        prefix: What the bits above it must be for a value to count.
        counts: (2**width,), float64, on the CPU; is added to.
    """
    weights = torch.as_tensor(weight, dtype=torch.float64).reshape(-1)
    add = kernels.add_digits if values.device.type == "cpu" else plain_add_digits
    add(values.reshape(len(weights), -1), weights, shift, width, prefix, counts)


def plain_add_digits(
    values: Tensor, weights: Tensor, shift: int, width: int, prefix: int, counts: Tensor
) -> None:
    """:func:`add_digits` in torch alone, of (lines, n) and (lines,)."""
    digits = values.view(torch.int32) >> shift  # (lines, n)
    inside = digits >> width == prefix
    weight = weights.to(values.device)[:, None].expand(values.shape)[inside]
    bins = 1 << width
    counts += torch.bincount(digits[inside] & (bins - 1), weights=weight, minlength=bins).cpu()


def count_below(score: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """
    Count the scores of each line, (lines, n), float32, that are below a threshold, and those that
    equal it: two of (lines,), int64, on the CPU.
    """
    if score.device.type == "cpu":
        return kernels.count_below(score, threshold)
    return (score < threshold).sum(dim=1).cpu(), (score == threshold).sum(dim=1).cpu()
