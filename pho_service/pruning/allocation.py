"""
The sparsity of each linear of a model, so that the whole model has the pattern's.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice, pairwise
from math import floor
from typing import TypeVar

import torch
from torch import Tensor

from pho_service.pruning.layer_view import DIGIT_BITS, LinearSize, View, Views
from pho_service.spec.pattern import Pattern
from pho_service.spec.steps import Allocation

T = TypeVar("T")

MAX_SPARSITY = 0.995  # no linear loses more, unless the pattern itself does

_BISECTIONS = 64
_SATURATED = 40.0  # log-odds of 1 in float64


def block_of(name: str) -> str:
    """
    Name the block of a linear: of ``model.layers.3.mlp.up_proj`` it is ``model.layers.3``.

    That is its name up to its first number. A name without one is a block of its own.
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
    allocation: Allocation,
    pattern: Pattern,
) -> Tensor:
    """
    What units should lose after the offsets of an allocation.

    They are added to the log-odds of the share that each unit keeps, and one number is taken from
    all of them, so that within the bounds the model loses what the pattern says.

    Args:
        names: Names of the units, in the model's order; a block has the name of one of its linears.
        sizes: (units,), float64: weights of each.
        sparsity: (units,), float64, by the method of the allocation.

    Returns:
        (units,), float64, weights.
    """
    low, high = bounds(pattern, allocation.spread)
    kept_more = _kept_more(names, allocation)
    odds = sparsity.clamp(1 - MAX_SPARSITY, MAX_SPARSITY).logit() - kept_more  # (units,)
    target = float(sizes.sum()) * pattern.sparsity

    def lost(shift: Tensor) -> Tensor:
        return (odds + shift).sigmoid().clamp(low, high) * sizes

    reach = odds.abs().amax(dim=0, keepdim=True) + _SATURATED
    return shifted(lost, -reach, reach, target)


def _kept_more(names: Sequence[str], allocation: Allocation) -> Tensor:
    """(units,), float64: what an allocation adds to the log-odds of the share that is kept."""
    blocks = torch.tensor(numbered([block_of(name) for name in names]), dtype=torch.float64)
    depth = blocks / blocks.max().clamp_min(1) * 2 - 1  # -1 .. 1
    legendre = torch.stack([depth, (3 * depth**2 - 1) / 2])
    heights = [[*allocation.depth, 0.0, 0.0][: len(legendre)]]
    curve = (torch.tensor(heights, dtype=torch.float64) @ legendre)[0]
    offsets = [
        sum(allocation.offsets.get(key, 0.0) for key in {kind_of(name), name}) for name in names
    ]
    return torch.tensor(offsets, dtype=torch.float64) + curve


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


GRID_POINTS = 12  # sparsities on an error curve

_SHIFTS = (22, 11, 0)  # of the lowest bits of a score's three digits
_ROUNDING = 1e-3  # weights; sums of fractional weights in float64 are surer than this


def allocate(views: Views, pattern: Pattern, allocation: Allocation) -> dict[str, int]:
    """
    Give each linear its number: the weights that it loses, or for N:M the N that it keeps of M.

    Sparsities lie in max(0, s - spread) .. min(0.995, s + spread), s being the
    pattern's. One linear's scores are held at a time; ``uniform`` and
    ``curves`` take one pass over the linears, ``owl`` two and ``fisher`` three,
    with 16 KiB of counts a linear.

    For N:M only whole N within 1 .. M - 1 and the spread are used: 2:4 stays
    2:4 in every linear unless the spread is at least 0.25. A unit first gets
    the N below what its method asks for; then, largest remainder first, units
    get one more while the model's total allows it, round after round until
    none fits. So the model never keeps more weights than the pattern, and less
    by under one M-th of the smallest unit that could still keep more. What a
    large unit's rounding leaves over may go to a small one that did not ask.

    Args:
        views: Gives the linears, with distinct names.
        pattern: What the whole model loses. Its scope is not looked at.

    Returns:
        For a ratio: how many weights each linear loses. They add up to
        ``pattern.removed`` of all weights of the model, and each linear is in
        the bounds within one weight. For N:M: N for each linear. In the order
        of ``views``.

    Raises:
        InvalidInput: N:M does not divide an input width; names the layer.
        NumericalError: A score or an error is NaN or infinite; names the layer.
        ValueError: No linears, or two of one name.

    Source:
        Yin et al. 2024, arXiv:2310.05175 (OWL: outliers by the block mean; theirs centres
        without weights, so that the model misses its sparsity if units differ in size,
        and does not clip). ``fisher`` and ``curves`` are ours; LSA (openreview
        xq3lza5IjN) takes one point of such a curve, the error at 50 %.
    """
    low, high = bounds(pattern, allocation.spread)
    if allocation.is_even or low == high:
        model, _ = _scan(views, pattern, "linear", lambda _: [])
        return _uniform(model, pattern)
    if allocation.method == "uniform":
        model, _ = _scan(views, pattern, allocation.unit, lambda _: [])
        targets = model.sizes * pattern.sparsity
    elif allocation.method == "owl":
        model, targets = _owl(views, pattern, allocation)
    elif allocation.method == "fisher":
        model, targets = _fisher(views, pattern, allocation)
    else:
        model, targets = _curves(views, pattern, allocation)
    if allocation.offsets or allocation.depth:
        firsts = [model.names[members[0]] for members in model.members]
        targets = offset(firsts, model.sizes, targets / model.sizes, allocation, pattern)
    if pattern.group:
        return _whole_groups(model, targets, pattern, allocation.spread)
    sparsity = (targets / model.sizes).tolist()
    shares = [
        sparsity[unit] * size for unit, size in zip(model.unit_of, model.linear_sizes, strict=True)
    ]
    return dict(zip(model.names, apportion(shares, pattern.removed(model.weights)), strict=True))


def apportion(shares: Sequence[float | Fraction], total: int) -> list[int]:
    """
    Round shares to whole numbers that add up to ``total``: the largest remainders go up.

    Where remainders are equal, the earlier go up. If no rounding adds up, it is a ``ValueError``.
    """
    numbers = [floor(share) for share in shares]
    missing = total - sum(numbers)
    if not 0 <= missing <= len(numbers):
        raise ValueError(f"shares that add up to {float(sum(shares))} cannot be rounded to {total}")
    for i in sorted(range(len(numbers)), key=lambda i: numbers[i] - shares[i])[:missing]:
        numbers[i] += 1
    return numbers


@dataclass(frozen=True, kw_only=True)
class _Model:
    """The linears of one pass, and the units that they form."""

    names: list[str]
    linear_sizes: list[int]  # weights of each linear
    weights_per_value: list[float]  # how many weights each row's value stands for
    unit_of: list[int]  # of each linear
    members: list[list[int]]  # the linears of each unit
    sizes: Tensor  # (units,), float64: weights of each unit

    @property
    def weights(self) -> int:
        return sum(self.linear_sizes)

    def by_unit(self, values: Sequence[float]) -> Tensor:
        """Add up one value a linear: (units,), float64."""
        return _added_up(values, self.unit_of, len(self.sizes))


def _added_up(values: Sequence[float], group_of: list[int], groups: int) -> Tensor:
    sums = torch.zeros(groups, dtype=torch.float64)
    return sums.index_add_(0, torch.tensor(group_of), torch.tensor(values, dtype=torch.float64))


def _scan(
    views: Views, pattern: Pattern, unit: str, measure: Callable[[View], list[T]]
) -> tuple[_Model, list[T]]:
    """One pass: what the linears are, and ``measure`` of each."""
    linears: list[LinearSize] = []
    measured: list[T] = []
    for view in views():
        for linear in view.linears:
            pattern.check_width(linear.in_features, linear.name)
        linears += view.linears
        measured += measure(view)
    names = [linear.name for linear in linears]
    sizes = [linear.weights for linear in linears]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"{len(names)} linears of {len(set(names))} names: nothing to allocate to")
    unit_of = numbered(names if unit == "linear" else [block_of(name) for name in names])
    members: list[list[int]] = [[] for _ in range(max(unit_of) + 1)]
    for i, number in enumerate(unit_of):
        members[number].append(i)
    model = _Model(
        names=names,
        linear_sizes=sizes,
        weights_per_value=[linear.weights_per_value for linear in linears],
        unit_of=unit_of,
        members=members,
        sizes=_added_up(sizes, unit_of, len(members)),
    )
    return model, measured


def _target(model: _Model, pattern: Pattern) -> float:
    """The weights to remove, before rounding."""
    return model.weights * pattern.sparsity


def _uniform(model: _Model, pattern: Pattern) -> dict[str, int]:
    if pattern.group:
        return dict.fromkeys(model.names, pattern.keep)
    sparsity = Fraction(repr(pattern.sparsity))  # its decimal digits, as Pattern.removed has them
    shares = [sparsity * size for size in model.linear_sizes]
    return dict(zip(model.names, apportion(shares, pattern.removed(model.weights)), strict=True))


def _whole_groups(
    model: _Model, targets: Tensor, pattern: Pattern, spread: float
) -> dict[str, int]:
    """Round what each unit should lose to N kept of M; the rule is in :func:`allocate`."""
    allowed = allowed_keeps(pattern, spread)
    sizes = [int(size) for size in model.sizes.tolist()]
    ideal = (pattern.group * (1 - targets / model.sizes)).tolist()
    keeps = [max(floor(keep), allowed[0]) for keep in ideal]  # 1.9999... may stand for 2
    spare = pattern.keep * sum(sizes) - sum(k * n for k, n in zip(keeps, sizes, strict=True))
    order = sorted(range(len(keeps)), key=lambda i: keeps[i] - ideal[i])
    for _ in range(pattern.group):
        for i in order:
            if keeps[i] < allowed[-1] and sizes[i] <= spare:
                keeps[i] += 1
                spare -= sizes[i]
    return {name: keeps[unit] for name, unit in zip(model.names, model.unit_of, strict=True)}


def _owl(views: Views, pattern: Pattern, allocation: Allocation) -> tuple[_Model, Tensor]:
    """Weights that each unit loses, (units,), float64: fewer where many scores are outliers."""
    model, sums = _scan(views, pattern, allocation.unit, lambda view: view.wanda_sums())
    blocks = numbered([block_of(name) for name in model.names])
    count = max(blocks) + 1
    weighted = [value * w for value, w in zip(sums, model.weights_per_value, strict=True)]
    mean = _added_up(weighted, blocks, count) / _added_up(model.linear_sizes, blocks, count)
    limits = iter([allocation.outlier_ratio * float(mean[block]) for block in blocks])
    counts = [
        count
        for view in views()
        for count in view.outliers(list(islice(limits, len(view.linears))))
    ]
    above = [count * w for count, w in zip(counts, model.weights_per_value, strict=True)]
    outliers = model.by_unit(above) / model.sizes  # D of each unit
    low, high = bounds(pattern, allocation.spread)
    kept_more = 2 * allocation.spread * _from_0_to_1(outliers)
    target = _target(model, pattern)

    def lost(shift: Tensor) -> Tensor:
        return (shift - kept_more).clamp(low, high) * model.sizes

    reach = float(kept_more.max()) + high
    least, most = (torch.tensor([shift], dtype=torch.float64) for shift in (low, reach))
    return model, shifted(lost, least, most, target)


def _from_0_to_1(values: Tensor) -> Tensor:
    """Move and stretch, so that the least is 0 and the greatest 1; equal values become 0."""
    width = values.max() - values.min()
    return (values - values.min()) / width if width > 0 else torch.zeros_like(values)


def _fisher(views: Views, pattern: Pattern, allocation: Allocation) -> tuple[_Model, Tensor]:
    """Weights that each unit loses, (units,), float64, under one threshold for all."""
    # A radix selection over the bits of the scores, as :func:`selection.threshold_of`, but with
    # counts of each linear: the sum of the units' clipped counts rises with the threshold as an
    # unclipped one does. Scores that equal the threshold go in equal shares everywhere.

    model, counts = _scan(
        views, pattern, allocation.unit, lambda view: view.digit_counts(_SHIFTS[0], prefix=0)
    )
    low, high = (bound * model.sizes for bound in bounds(pattern, allocation.spread))
    target = _target(model, pattern)
    below, prefix = torch.zeros_like(model.sizes), 0
    for shift in _SHIFTS:
        if shift != _SHIFTS[0]:
            counts = [row for view in views() for row in view.digit_counts(shift, prefix)]
        digit, below, equal = _digit(model, counts, below, low, high, target)
        prefix = (prefix << DIGIT_BITS) | digit
    return model, between(below.clamp(low, high), (below + equal).clamp(low, high), target)


def _digit(
    model: _Model, counts: list[Tensor], below: Tensor, low: Tensor, high: Tensor, target: float
) -> tuple[int, Tensor, Tensor]:
    """Find the digit in which the units' clipped counts reach ``target``."""
    arrays = [linear.cumsum_(dim=0).numpy() for linear in counts]  # no higher digit

    def up_to(digit: int) -> Tensor:
        weights = zip(arrays, model.weights_per_value, strict=True)
        return model.by_unit([float(array[digit]) * w for array, w in weights])

    def reached(digit: int) -> float:
        return float((below + up_to(digit)).clamp(low, high).sum())

    bins = len(arrays[0])
    digit = min(bisect_left(range(bins), target - _ROUNDING, key=reached), bins - 1)
    before = up_to(digit - 1) if digit else torch.zeros_like(below)
    return digit, below + before, up_to(digit) - before


def _curves(views: Views, pattern: Pattern, allocation: Allocation) -> tuple[_Model, Tensor]:
    """
    What each unit should lose, (units,), float64: where all error curves rise equally steeply.
    """
    # Among convex curves this is where the sum of the errors is least. For N:M the curve's points
    # are the errors at each allowed N.
    low, high = bounds(pattern, allocation.spread)
    if pattern.group:
        keeps = reversed(allowed_keeps(pattern, allocation.spread))
        grid = [1 - n / pattern.group for n in keeps]
    else:
        grid = torch.linspace(low, high, GRID_POINTS, dtype=torch.float64).tolist()
    model, curves = _scan(
        views, pattern, allocation.unit, lambda view: view.error_curves(grid, pattern.group)
    )
    errors = torch.stack(
        [model.by_unit(column) for column in zip(*curves, strict=True)], dim=1
    )  # (units, points)
    rises = [_convex_rises(grid, curve) for curve in errors.tolist()]
    slopes = torch.tensor(rises, dtype=torch.float64) / model.sizes[:, None]  # error a weight
    widths = model.sizes[:, None] * torch.tensor(grid, dtype=torch.float64).diff()
    return model, _filled(slopes, widths, low * model.sizes, _target(model, pattern))


def _convex_rises(grid: list[float], curve: list[float]) -> list[float]:
    """The slope of the lower convex hull of a curve between each two points of ``grid``."""

    def slope(i: int, j: int) -> float:
        return (curve[j] - curve[i]) / (grid[j] - grid[i])

    hull = [0]
    for j in range(1, len(grid)):
        while len(hull) > 1 and slope(hull[-2], hull[-1]) >= slope(hull[-1], j):
            hull.pop()
        hull.append(j)
    return [slope(i, j) for i, j in pairwise(hull) for _ in range(i, j)]


def _filled(slopes: Tensor, widths: Tensor, start: Tensor, target: float) -> Tensor:
    """Take the pieces of all curves that rise least, until ``target`` weights are removed."""
    order = slopes.flatten().sort(stable=True)
    reached = float(start.sum()) + widths.flatten()[order.indices].cumsum(dim=0)
    last = min(int((reached < target - _ROUNDING).sum()), len(reached) - 1)
    multiplier = order.values[last]  # of Lagrange
    lower = start + (widths * (slopes < multiplier)).sum(dim=1)
    upper = start + (widths * (slopes <= multiplier)).sum(dim=1)
    return between(lower, upper, target)
