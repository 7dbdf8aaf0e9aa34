"""
Measurements of a linear for allocations: its scores' sum, outliers and counts, its error curve.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from pho_service.errors import NumericalError
from pho_service.pruning.selection import add_digits, keep_highest, nm_mask

CURVE_ROWS = 64  # output rows of a linear that its error curve is computed on
DIGIT_BITS = 11  # of a score's 31; three digits select one

_BINS = 1 << DIGIT_BITS


@dataclass(frozen=True, kw_only=True)
class LinearSize:
    """
    Attributes:
        name: As the model calls it: ``model.layers.3.self_attn.q_proj``.
        out_features: Width of the outputs of the whole linear.
        in_features: Width of the inputs of the whole linear.
        rows: Output rows that are there; each stands for out_features / rows.
    """

    name: str
    out_features: int
    in_features: int
    rows: int

    @property
    def weights(self) -> int:
        """Number of weights of the whole linear."""
        return self.out_features * self.in_features

    @property
    def weights_per_value(self) -> float:
        """Weights that each weight of the rows that are there stands for."""
        return self.out_features / self.rows


class View(Protocol):
    """One linear or several, and what allocations measure of each."""

    @property
    def linears(self) -> Sequence[LinearSize]:
        """Sizes of the linears, in the order of all that is measured."""

    def wanda_sums(self) -> list[float]:
        """The sum of the scores A * x of each linear's rows, in float64."""

    def outliers(self, limits: Sequence[float]) -> list[int]:
        """Number of scores A * x of each linear's rows above its limit."""

    def digit_counts(self, shift: int, prefix: int) -> list[Tensor]:
        """
        Count each linear's scores A * x * sqrt(g) by a digit of their bits: (2048,), float64.

        The digit has 11 bits, above ``shift`` others; the bits above it must be ``prefix`` for a
        score to count.
        """

    def error_curves(self, grid: Sequence[float], group: int) -> list[list[float]]:
        """
        The Fisher-weighted error g_i * D_i H D_i^T of each linear's output at each sparsity.

        D is what pruning by A * x * sqrt(g) within the layer, or in groups of M, removes.
        """


# A fresh pass over all linears, few in memory at a time, in the same order each time.
Views = Callable[[], Iterable[View]]


@dataclass(frozen=True, kw_only=True)
class LayerView:
    """
    One linear as an allocation sees it: all of its rows, or a sample of them.

    Attributes:
        name: As the model calls it: ``model.layers.3.self_attn.q_proj``.
        out_features: Width of the outputs of the whole layer.
        rows: (R, in_features), float32. Weights of R output rows; each row
            stands for out_features / R.
        activation_norm: (in_features,), float32, >= 0.
        fisher: (R,), float32, >= 0. E[(dL/dy)^2] of these rows.
        root: (m, in_features), float32. ``root.T @ root`` is the second moment
            of the input, or has it as its expectation.
    """

    name: str
    out_features: int
    rows: Tensor
    activation_norm: Tensor
    fisher: Tensor
    root: Tensor

    @property
    def linears(self) -> Sequence[LinearSize]:
        """This one."""
        rows, n = self.rows.shape
        size = LinearSize(name=self.name, out_features=self.out_features, in_features=n, rows=rows)
        return [size]

    @cached_property
    def fisher_score(self) -> Tensor:
        """
        (R, in_features), float32: A * x * sqrt(g), computed once.

        Raises:
            NumericalError: It is NaN or infinite.
        """
        score = self.rows.abs().mul_(self.activation_norm).mul_(self.fisher.sqrt()[:, None])
        return _finite(score, self.name)

    def wanda_sums(self) -> list[float]:
        """See :class:`View`."""
        return [float(self._wanda_score().sum(dtype=torch.float64))]

    def outliers(self, limits: Sequence[float]) -> list[int]:
        """See :class:`View`."""
        (limit,) = limits
        return [int((self._wanda_score() > limit).sum())]

    def digit_counts(self, shift: int, prefix: int) -> list[Tensor]:
        """See :class:`View`."""
        counts = torch.zeros(_BINS, dtype=torch.float64)
        add_digits(
            self.fisher_score, 1.0, shift=shift, width=DIGIT_BITS, prefix=prefix, counts=counts
        )
        return [counts]

    def error_curves(self, grid: Sequence[float], group: int) -> list[list[float]]:
        """See :class:`View`."""
        view = self._sampled()
        score = view.fisher_score  # (r, in_features)
        curve = []
        for sparsity in grid:
            if group:
                keep = nm_mask(score, keep=round((1 - sparsity) * group), group=group)
            else:
                removed = round(sparsity * score.numel())
                keep = keep_highest(score.view(1, -1), removed).view_as(score)
            change = view.rows.masked_fill(keep, 0) @ view.root.T  # (r, m)
            error = change.square().sum(dim=1) @ view.fisher
            curve.append(float(error) * view.out_features / len(view.rows))
        require_finite_curve(curve, view.name)
        return [curve]

    def _wanda_score(self) -> Tensor:
        """A * x, (R, in_features), in memory of its own."""
        return _finite(self.rows.abs().mul_(self.activation_norm), self.name)

    def _sampled(self) -> "LayerView":
        """At most CURVE_ROWS rows of the linear, evenly spaced."""
        index = curve_rows(len(self.rows), self.rows.device)
        return replace(self, rows=self.rows[index], fisher=self.fisher[index])


def curve_rows(rows: int, device: torch.device) -> Tensor:
    """Which of so many rows an error curve is computed on: at most CURVE_ROWS, evenly spaced."""
    count = min(CURVE_ROWS, rows)
    return torch.arange(count, device=device) * rows // count


def require_finite_scores(highest: float, layer: str) -> None:
    """Raise NumericalError if the highest score of a layer, NaN if any is, is not finite."""
    if not math.isfinite(highest):
        raise NumericalError(
            f"{layer}: a score is NaN or infinite. Check the layer's weights and the "
            "calibration statistics for NaN, infinity or values beyond float32.",
            layer=layer,
        )


def require_finite_curve(curve: Sequence[float], layer: str) -> None:
    """Raise NumericalError if an error of a layer's curve is not finite."""
    if not all(map(math.isfinite, curve)):
        raise NumericalError(
            f"{layer}: the error of the pruned layer is NaN or infinite. Check the "
            "calibration statistics for NaN, infinity or values beyond float32.",
            layer=layer,
        )


def _finite(score: Tensor, layer: str) -> Tensor:
    require_finite_scores(float(score.amax()), layer)  # scores are >= 0
    return score
