"""
What follows the score: permutation by error, re-pruning, weight updates, one linear at a time.

All of it needs the full second moment of the linear's input, which a proxy
bundle has only as a projection.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import Tensor

from pho_service.pruning.dsnot import dsnot_refine
from pho_service.pruning.error_permutation import PermutedLinear, permute_for_error
from pho_service.pruning.masks import LinearMask, mask_of
from pho_service.pruning.scores import TINY
from pho_service.pruning.swaps import swap_refine
from pho_service.pruning.weight_update import (
    inverse_factor,
    least_squares_update,
    obs_update,
    sparsegpt,
)
from pho_service.spec.pattern import Pattern
from pho_service.spec.steps import Steps

_CG_STEPS = 10  # of conjugate gradients from OBS on; 20 lowered the error by 1 % more


@dataclass(frozen=True, kw_only=True)
class ScoredLinear:
    """
    A linear between its score and the further steps.

    Attributes:
        name: For messages.
        weight: (out_features, in_features), float32, dense.
        score: Of the same shape; None where no step looks at it.
        fisher: (out_features,), float32.
        mask: What score, allocation and permutation remove.
    """

    name: str
    weight: Tensor
    score: Tensor | None
    fisher: Tensor
    mask: LinearMask


@dataclass(frozen=True, kw_only=True)
class InputMoments:
    """
    The input that some linears share, over all calibration tokens.

    Attributes:
        gram: (in_features, in_features), float32, E[x x^T].
        mean: (in_features,), float32, E[x].
        activation_norm: (in_features,), float32. Square root of the mean over
            sequences of the squares summed over tokens.
    """

    gram: Tensor
    mean: Tensor
    activation_norm: Tensor


def finish(
    linears: list[ScoredLinear], moments: InputMoments, pattern: Pattern, steps: Steps
) -> Iterator[tuple[str, LinearMask, Tensor]]:
    """
    Take the linears that read one input through the steps after the score.

    Args:
        linears: All that read it.
        moments: Of the input, as the pruned model before it gives it.
        pattern: What is pruned.
        steps: Permutation ``error``, re-pruning and update are done here.

    Yields:
        Name, final mask and final weights (float32, zero where the mask is False).

    Raises:
        NumericalError: The second moment cannot be inverted; names the layer.
    """
    if steps.permutation == "error":
        linears = _permuted(linears, moments, pattern)
    order = linears[0].mask.order  # one for all that read the input
    ordered = moments if order is None else _reordered(moments, order)
    factor = None
    if steps.update != "none":
        factor = inverse_factor(ordered.gram, layer=linears[0].name)
    for linear in linears:
        weight = _columns(linear.weight, order)
        keep = _columns(linear.mask.keep, order)
        keep = _repruned(weight, keep, ordered, pattern, steps)
        if steps.update == "none":
            changed = weight * keep
        else:
            assert factor is not None
            keep, changed = _updated(
                weight, keep, factor, ordered.gram, linear.mask.group_keep, pattern, steps
            )
        mask = replace(linear.mask, keep=_natural(keep, order))
        yield linear.name, mask, _natural(changed, order)


def _permuted(
    linears: list[ScoredLinear], moments: InputMoments, pattern: Pattern
) -> list[ScoredLinear]:
    """The same linears with masks of the channel order that makes the least error."""
    scores = [linear.score for linear in linears if linear.score is not None]
    order = permute_for_error(
        [
            PermutedLinear(weight=linear.weight, score=score, fisher=linear.fisher)
            for linear, score in zip(linears, scores, strict=True)
        ],
        moments.gram,
        keep=pattern.keep,
        group=pattern.group,
    )
    return [
        replace(linear, mask=mask_of(score, pattern, linear.mask.group_keep, order))
        for linear, score in zip(linears, scores, strict=True)
    ]


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


def _updated(
    weight: Tensor,
    keep: Tensor,
    factor: Tensor,
    gram: Tensor,
    group_keep: int,
    pattern: Pattern,
    steps: Steps,
) -> tuple[Tensor, Tensor]:
    """Final mask and weights."""
    if steps.update in ("obs", "least-squares"):
        changed = obs_update(weight, keep, factor)
        if steps.update == "least-squares":
            changed = least_squares_update(weight, keep, gram, start=changed, steps=_CG_STEPS)
        return keep, changed
    if pattern.group:
        changed, keep = sparsegpt(weight, factor, keep=group_keep, group=pattern.group)
    else:
        changed, keep = sparsegpt(weight, factor, removed=int((~keep).sum()))
    return keep, changed


def _reordered(moments: InputMoments, order: Tensor) -> InputMoments:
    return InputMoments(
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
