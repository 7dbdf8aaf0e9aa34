"""
All linears of a bundle as allocations see them on a GPU: some launches for each stack of them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from pho_service.pruning.layer_view import (
    CURVE_ROWS,
    DIGIT_BITS,
    LinearSize,
    curve_rows,
    require_finite_curve,
    require_finite_scores,
)
from pho_service.pruning.selection import beaten_by
from pho_service.pruning.stacks import Stack

_BINS = 1 << DIGIT_BITS


@dataclass(frozen=True)
class StackedView:
    """
    Every linear of a bundle, on a device; it measures what a ``LayerView`` of each measures.

    Attributes:
        linears: In the order of the bundle.
        stacks: Stacks of these linears.
    """

    linears: Sequence[LinearSize]
    stacks: Sequence[Stack]

    def wanda_sums(self) -> list[float]:
        """See ``layer_view.View``."""
        sums = self._each(
            lambda stack: _scores(stack, 0.0).sum(dim=1, dtype=torch.float64)
        )  # (linears,)
        values: list[float] = sums.tolist()
        self._require_finite(values)  # a sum is not if a score is not
        return values

    def outliers(self, limits: Sequence[float]) -> list[int]:
        """See ``layer_view.View``."""
        of_all = torch.tensor(limits)

        def above(stack: Stack) -> Tensor:
            score = _scores(stack, 0.0)
            return (score > of_all[stack.positions, None].to(score.device)).sum(dim=1)

        counts: list[int] = self._each(above).tolist()
        return counts

    def digit_counts(self, shift: int, prefix: int) -> list[Tensor]:
        """See ``layer_view.View``."""
        self._require_finite(self._highest)

        def counted(stack: Stack) -> Tensor:
            score = _scores(stack, 0.5)
            digits = score.view(torch.int32) >> shift
            inside = (digits >> DIGIT_BITS == prefix).int()
            counts = inside.new_zeros(len(score), _BINS)
            return counts.scatter_add_(1, (digits & (_BINS - 1)).long(), inside)

        return list(self._each(counted).double())

    def error_curves(self, grid: Sequence[float], group: int) -> list[list[float]]:
        """See ``layer_view.View``."""
        self._require_finite(self._highest)
        errors = self._each(lambda stack: _error_curves(_sampled(stack), grid, group))
        scales = torch.tensor(
            [linear.out_features / min(CURVE_ROWS, linear.rows) for linear in self.linears],
            dtype=torch.float64,
        )
        curves: list[list[float]] = (errors * scales[:, None]).tolist()
        for linear, curve in zip(self.linears, curves, strict=True):
            require_finite_curve(curve, linear.name)
        return curves

    @cached_property
    def _highest(self) -> list[float]:
        """The highest score A * x * sqrt(g) of each linear."""
        values: list[float] = self._each(lambda stack: _scores(stack, 0.5).amax(dim=1)).tolist()
        return values

    def _each(self, measure: Callable[[Stack], Tensor]) -> Tensor:
        """What ``measure`` gives for the I * L linears of a stack, in the bundle's order."""
        found = torch.cat([measure(stack) for stack in self.stacks]).cpu()
        ordered = torch.empty_like(found)
        ordered[torch.cat([stack.positions for stack in self.stacks])] = found
        return ordered

    def _require_finite(self, highest: Sequence[float]) -> None:
        for linear, value in zip(self.linears, highest, strict=True):
            require_finite_scores(value, linear.name)


def _scores(stack: Stack, gradient_exponent: float) -> Tensor:
    """(I * L, R * n), float32: A * x * g**gradient_exponent of each linear."""
    return stack.plain_importance(gradient_exponent).flatten(0, 1).flatten(1)


def _sampled(stack: Stack) -> Stack:
    """At most CURVE_ROWS rows of each linear, evenly spaced."""
    rows = stack.rows.shape[2]
    index = curve_rows(rows, stack.rows.device)
    if len(index) == rows:
        return stack
    return replace(
        stack,
        rows=stack.rows[:, :, index],
        magnitude=stack.magnitude[:, :, index],
        fisher=stack.fisher[:, :, index],
    )


def _error_curves(stack: Stack, grid: Sequence[float], group: int) -> Tensor:
    """(I * L, points), float32: the error of each linear's rows at each sparsity."""
    score = stack.plain_importance(0.5)  # (I, L, R, n)
    if group:
        rank = beaten_by(score.view(-1, score.shape[-1]), group).view(score.shape)
        limits = [round((1 - sparsity) * group) for sparsity in grid]  # fewer are better
    else:
        rank = _rank_from_highest(score)
        values = score.shape[2] * score.shape[3]
        limits = [values - round(sparsity * values) for sparsity in grid]
    errors = []
    for kept in limits:
        keep = (rank < kept)[:, None]
        change = torch.empty_like(score)[:, None]
        lost = stack.row_errors(keep, out=change)[:, 0]  # (I, L, R)
        errors.append((lost * stack.fisher).sum(dim=-1))
    return torch.stack(errors, dim=-1).flatten(0, 1)


def _rank_from_highest(score: Tensor) -> Tensor:
    """(I, L, R, n), int64: how many scores of its linear come before one; of equals the first."""
    flat = score.flatten(2)
    order = flat.argsort(dim=-1, descending=True, stable=True)
    places = torch.arange(flat.shape[-1], device=flat.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, places).view(score.shape)
