"""
Steps after the mask: re-pruning and weight updates, one linear at a time.

All of it needs the full second moment of the linear's input, which a proxy
bundle has only as a projection.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self

from torch import Tensor

from pho_service.pruning.admm import (
    DAMPING,
    PUBLISHED_DAMPING,
    PUBLISHED_PENALTY,
    Masked,
    Normalised,
    Spectrum,
    admm,
    admm_refine,
    alps,
)
from pho_service.pruning.masks import LinearMask, Support
from pho_service.pruning.repruning import dsnot_refine, swap_refine
from pho_service.pruning.scores import TINY
from pho_service.pruning.weight_update import (
    inverse_factor,
    least_squares_update,
    obs_update,
    sparsegpt,
)
from pho_service.spec.pattern import Pattern, Scope
from pho_service.spec.steps import Steps

_CG_STEPS = 10  # of conjugate gradients from OBS on; 20 lowered the error by 1 % more


@dataclass(frozen=True, kw_only=True)
class MaskedLinear:
    """A linear between its first mask and the further steps."""

    name: str  # For messages
    weight: Tensor  # (out_features, in_features), float32, dense
    fisher: Tensor  # (out_features,), float32
    mask: LinearMask  # What score, allocation and permutation remove


@dataclass(frozen=True, kw_only=True)
class InputMoments:
    """
    The input that some linears share, over all calibration tokens.

    Attributes:
        gram: (in_features, in_features), float32, E[x x^T].
        mean: (in_features,), float32, E[x].
        activation_norm: (in_features,), float32. Square root of the mean over
            sequences of the squares summed over tokens.
        seen: Tokens that reached it; the means are over all tokens of the calibration.
    """

    gram: Tensor
    mean: Tensor
    activation_norm: Tensor
    seen: int

    def shrunk(self, shrinkage: float) -> Self:
        """
        The same with second moments that are nearer to their diagonal, the fewer the tokens.

        As if ``shrinkage * in_features`` more tokens had been seen whose inputs, each of the same
        size as here, have nothing to do with each other. What the tokens have in common only by
        chance then leads masks and weights less astray.

        Args:
            shrinkage: >= 0; 0 gives ``self``.

        Source:
            Ledoit and Wolf 2004, J. Multivariate Anal. 88, shrink a covariance, with a share that
            falls with the number of observations, too.
        """
        if not shrinkage:
            return self
        gram = self.gram * (self.seen / (self.seen + shrinkage * len(self.gram)))
        gram.diagonal().copy_(self.gram.diagonal())
        return replace(self, gram=gram)


def finish(
    linears: list[MaskedLinear], moments: InputMoments, pattern: Pattern, steps: Steps
) -> Iterator[tuple[str, LinearMask, Tensor]]:
    """
    Take the linears that read one input through the steps after the mask.

    The moments are those of the input as the pruned model before it gives it. What the steps say
    of re-pruning and updates is done here.

    Yields:
        Name, final mask and final weights (float32, zero where the mask is False).

    Raises:
        NumericalError: The second moment cannot be inverted; names the layer.
    """
    moments = moments.shrunk(steps.shrinkage)
    order = linears[0].mask.order  # one for all that read the input
    ordered = moments if order is None else _reordered(moments, order)
    solver = _Solver(ordered, steps, linears[0].name)
    refined = solver.refined([_masked(linear, order, pattern) for linear in linears])
    for linear in linears:
        masked = _masked(linear, order, pattern)
        if refined:
            start, keep = refined.pop(0)
        else:
            start, keep = None, _repruned(masked.weight, masked.keep, ordered, pattern, steps)
        keep, changed = solver.updated(replace(masked, keep=keep), start)
        mask = replace(linear.mask, keep=_natural(keep, order))
        yield linear.name, mask, _natural(changed, order)


def _masked(linear: MaskedLinear, order: Tensor | None, pattern: Pattern) -> Masked:
    """A linear in the channel order of its groups, with what its mask may change."""
    keep = _columns(linear.mask.keep, order)
    by_row = pattern.scope is Scope.ROW
    return Masked(
        weight=_columns(linear.weight, order),
        keep=keep,
        support=Support.of(keep, by_row=by_row, keep=linear.mask.group_keep, group=pattern.group),
        importance=None if by_row else linear.fisher.sqrt(),  # by them whole, 2 % worse
    )


def _repruned(
    weight: Tensor, keep: Tensor, moments: InputMoments, pattern: Pattern, steps: Steps
) -> Tensor:
    if steps.repruning == "swaps":
        return swap_refine(weight, keep, moments.gram, group=pattern.group)
    if steps.repruning == "dsnot":
        # Its threshold of 0.1 is meant for inputs summed over the tokens of a sequence.
        diagonal = moments.gram.diagonal()
        tokens = moments.activation_norm.square().sum() / diagonal.sum().clamp_min(TINY)
        return dsnot_refine(
            weight,
            keep,
            mean=moments.mean * tokens,
            variance=(diagonal - moments.mean.square()).clamp_min(0),
            activation_norm=moments.activation_norm,
            group=pattern.group,
        )
    return keep


class _Solver:
    """Factors of an input's second moments, made once for the linears that read it."""

    def __init__(self, moments: InputMoments, steps: Steps, layer: str) -> None:
        self.gram, self._steps, self._layer = moments.gram, steps, layer

    @cached_property
    def _factor(self) -> Tensor:
        return inverse_factor(self.gram, layer=self._layer)

    @cached_property
    def _spectrum(self) -> Spectrum:
        return Spectrum.of(self.gram, layer=self._layer)

    @cached_property
    def _published(self) -> tuple[Normalised, Tensor]:
        moments = Normalised.of(self.gram, damping=0, layer=self._layer)
        penalty = PUBLISHED_DAMPING + PUBLISHED_PENALTY
        return moments, moments.inverse(penalty, layer=self._layer)

    def refined(self, linears: list[Masked]) -> list[tuple[Tensor, Tensor]]:
        """Weights and masks by re-pruning ``admm``, which looks at all linears together."""
        if self._steps.repruning != "admm":
            return []
        moments = Normalised.of(self.gram, damping=DAMPING, layer=self._layer)
        return admm_refine(linears, moments, layer=self._layer)

    def updated(self, linear: Masked, start: Tensor | None) -> tuple[Tensor, Tensor]:
        weight, keep, support = linear.weight, linear.keep, linear.support
        update = self._steps.update
        if update == "none":
            return keep, weight * keep
        if update == "sparsegpt":
            removed = int(support.removed.sum())  # 0 with a group
            changed, keep = sparsegpt(
                weight, self._factor, removed=removed, keep=support.keep, group=support.group
            )
            return keep, changed
        if update == "admm":
            changed, keep = admm(weight, *self._published, support)
            return keep, changed
        if update == "alps":
            start, keep = alps(weight, self._spectrum, support)
        elif update == "obs" or start is None:
            start = obs_update(weight, keep, self._factor)
        if update == "obs":
            return keep, start
        return keep, least_squares_update(
            weight, keep, self.gram, start=start, damping=DAMPING, steps=_CG_STEPS
        )


def _reordered(moments: InputMoments, order: Tensor) -> InputMoments:
    return replace(
        moments,
        gram=moments.gram[order][:, order],
        mean=moments.mean[order],
        activation_norm=moments.activation_norm[order],
    )


def _columns(values: Tensor, order: Tensor | None) -> Tensor:
    """Input channels as they stand in ``order``."""
    return values if order is None else values[:, order]


def _natural(values: Tensor, order: Tensor | None) -> Tensor:
    """Input channels back in their own places."""
    return values if order is None else values[:, order.argsort()]
