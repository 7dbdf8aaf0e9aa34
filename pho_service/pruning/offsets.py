"""
Offsets of an allocation: which linears keep more than its method gives them, and which less.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pho_service.spec.allocation import Allocation
from pho_service.spec.pattern import Pattern

MAX_SPARSITY = 0.995  # no linear loses more, unless the pattern itself does

_BISECTIONS = 64
_SATURATED = 40.0  # log-odds of 1 in float64


def block_of(name: str) -> str:
    """
    Name the block of a linear: of ``model.layers.3.mlp.up_proj`` it is ``model.layers.3``.

    Args:
        name: Name of the linear, with dots.

    Returns:
        The name up to and including its first purely numeric component. A
        name without one is a block of its own.
    """
    parts = name.split(".")
    for i, part in enumerate(parts):
        if part.isdecimal():
            return ".".join(parts[: i + 1])
    return name


def kind_of(name: str) -> str:
    """Name the kind of a linear, the last part of its name: ``up_proj``."""
    return name.rpartition(".")[2]


def offset(
    names: Sequence[str],
    sizes: Tensor,
    sparsity: Tensor,
    allocations: Sequence[Allocation],
    pattern: Pattern,
) -> Tensor:
    """
    What units should lose after the offsets of each of several allocations.

    They are added to the log-odds of the share that each unit keeps, and one number is taken from
    all of them, so that within the bounds the model loses what the pattern says.

    Args:
        names: Names of the units, in the model's order; a block has the name of one of its linears.
        sizes: (units,), float64: weights of each.
        sparsity: (units,), float64, by the method of all the allocations.
        allocations: A of them, of one spread.
        pattern: What the whole model loses.

    Returns:
        (A, units), float64, weights.
    """
    low, high = bounds(pattern, allocations[0].spread)
    kept_more = _kept_more(names, allocations)
    odds = sparsity.clamp(1 - MAX_SPARSITY, MAX_SPARSITY).logit() - kept_more  # (A, units)
    target = float(sizes.sum()) * pattern.sparsity

    def lost(shift: Tensor) -> Tensor:
        return (odds + shift).sigmoid().clamp(low, high) * sizes

    reach = odds.abs().amax(dim=1, keepdim=True) + _SATURATED
    return shifted(lost, -reach, reach, target)


def _kept_more(names: Sequence[str], allocations: Sequence[Allocation]) -> Tensor:
    """(A, units), float64: what allocations add to the log-odds of the share that is kept."""
    kinds = [kind_of(name) for name in names]
    blocks = torch.tensor(numbered([block_of(name) for name in names]), dtype=torch.float64)
    depth = blocks / blocks.max().clamp_min(1) * 2 - 1  # -1 .. 1
    legendre = torch.stack([depth, (3 * depth**2 - 1) / 2])
    heights = [[*each.depth, 0.0, 0.0][: len(legendre)] for each in allocations]
    curves = torch.tensor(heights, dtype=torch.float64) @ legendre
    offsets = [[each.offsets.get(kind, 0.0) for kind in kinds] for each in allocations]
    return torch.tensor(offsets, dtype=torch.float64) + curves


def shifted(lost: Callable[[Tensor], Tensor], less: Tensor, more: Tensor, target: float) -> Tensor:
    """
    What units lose at the shift where it adds up to ``target``.

    Args:
        lost: (..., units), float64: the weights that each unit loses at a shift; rises with it.
        less: (..., 1): a shift at which too few are lost.
        more: (..., 1): one at which too many are.
        target: Weights to remove in all.
    """
    for _ in range(_BISECTIONS):
        middle = (less + more) / 2
        few = lost(middle).sum(dim=-1, keepdim=True) < target
        less, more = torch.where(few, middle, less), torch.where(few, more, middle)
    return between(lost(less), lost(more), target)


def between(lower: Tensor, upper: Tensor, target: float) -> Tensor:
    """On the straight line from ``lower`` to ``upper``, the point that adds up to ``target``."""
    gap = (upper - lower).sum(dim=-1, keepdim=True)
    share = (target - lower.sum(dim=-1, keepdim=True)) / gap
    return lower + torch.where(gap > 0, share, 0.0).clamp(0.0, 1.0) * (upper - lower)


def numbered(labels: list[str]) -> list[int]:
    """Equal labels get equal numbers, counted from 0 in the order of first sight."""
    seen: dict[str, int] = {}
    return [seen.setdefault(label, len(seen)) for label in labels]


def bounds(pattern: Pattern, spread: float) -> tuple[float, float]:
    """The least and the greatest sparsity of a unit; the pattern's own lies between them."""
    if pattern.group:
        kept = allowed_keeps(pattern, spread)
        return 1 - kept[-1] / pattern.group, 1 - kept[0] / pattern.group
    s = pattern.sparsity
    return max(0.0, s - spread), max(s, min(MAX_SPARSITY, s + spread))


def allowed_keeps(pattern: Pattern, spread: float) -> list[int]:
    """Every N within the spread, ascending; never 0 or M, which no mask can have."""
    slack = pattern.group * (spread + 1e-9)
    return [n for n in range(1, pattern.group) if abs(n - pattern.keep) <= slack]
