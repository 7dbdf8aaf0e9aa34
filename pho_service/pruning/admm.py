"""
Masks and weights by ADMM, and by ALPS with its growing penalty.

A ``weight`` is (out_features, in_features), of any floating dtype, dense and finite; masks have its
shape, bool, True = kept; ``gram`` is E[x x^T], (in_features, in_features), float32, symmetric. New
weights are float32, the same on every run. A ``ValueError`` says which shapes do not fit, a
``NumericalError`` that second moments are not finite or not positive; ``layer`` is the name in it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from pho_service.errors import NumericalError
from pho_service.pruning.hardware import quick_dtype
from pho_service.pruning.masks import Support
from pho_service.pruning.weight_update import damped_diagonal

DAMPING = 0.01  # share of the mean diagonal that is added to it, as in the literature


@dataclass(frozen=True, kw_only=True)
class Normalised:
    """
    A damped Gram matrix with a diagonal of 1, and the scales that made it so.

    Weights times their input's scale give the same outputs on inputs divided by it. A magnitude of
    such a weight is Wanda's score.

    Attributes:
        gram: (in_features, in_features), float32, its diagonal 1.
        scale: (in_features,), float32, > 0: root of the damped diagonal.
    """

    gram: Tensor
    scale: Tensor

    @classmethod
    def of(cls, gram: Tensor, *, damping: float, layer: str) -> Self:
        """
        Normalise a Gram matrix after a share of its mean diagonal was added to it.

        An input that is always 0 stands alone and is scaled to almost 0, so its
        weights are the first to go. A matrix of zeros counts as the identity.
        """
        scale = damped_diagonal(gram, damping, layer=layer).sqrt()
        normalised = gram / scale / scale[:, None]
        normalised.diagonal().fill_(1)
        return cls(gram=normalised, scale=scale)

    def inverse(self, penalty: float, *, layer: str) -> Tensor:
        """(gram + penalty I)^-1, (in_features, in_features), float32, by float64 where it fails."""
        for dtype in (torch.float32, torch.float64):
            matrix = self.gram.to(dtype, copy=True)
            matrix.diagonal().add_(penalty)
            lower, failed = torch.linalg.cholesky_ex(matrix)
            del matrix
            if not bool(failed):
                inverse: Tensor = torch.cholesky_inverse(lower).float()
                return inverse
        raise NumericalError(
            f"{layer}: the second moments of its inputs are not positive definite with a penalty "
            f"of {penalty:g}, in float32 and in float64. Calibrate on more text.",
            layer=layer,
        )

    def scaled(self, weight: Tensor) -> Tensor:
        """The weights on scaled inputs, float32; raises ``ValueError`` if shapes do not fit."""
        if weight.dim() != 2 or weight.shape[1] != len(self.gram):
            raise ValueError(f"weight {tuple(weight.shape)} is not of in_features={len(self.gram)}")
        return weight.detach().float() * self.scale

    def unscaled(self, weight: Tensor) -> Tensor:
        """The weights on the inputs as they are."""
        return weight / self.scale


_FIRST, _LAST = 0.05, 1.0  # penalties at the first and the last step
_STEPS = 8  # of the penalty, each a constant factor; each needs an inverse, 12 left 0.3 % less
_EVERY = 6  # iterations for each; 24 in all left 2 to 3 % more error, 96 left 1 to 2 % less
_LEAST_ROW = 1e-3  # weight of an output row, as a share of the mean: no row is free to vanish

PUBLISHED_DAMPING = 0.1  # of the published ADMM, of its normalised diagonal
PUBLISHED_PENALTY = 1.0
_ITERATIONS, _GRADUAL = 20, 15


@dataclass(frozen=True, kw_only=True)
class Masked:
    """
    A linear whose mask is to become better.

    Attributes:
        weight: Its weights.
        keep: The mask to start from.
        support: What the new mask has in common with it.
        importance: (out_features,), float32, >= 0: what the squared error of an
            output counts for, such as Fisher row weights. None: all alike. It
            has a say where rows compete.
    """

    weight: Tensor
    keep: Tensor
    support: Support
    importance: Tensor | None = None


def admm_refine(
    linears: Sequence[Masked], moments: Normalised, *, layer: str
) -> list[tuple[Tensor, Tensor]]:
    """
    Find masks whose kept weights, changed for it, reproduce the dense outputs best.

    The penalty rho grows by a constant factor every six iterations, from 0.05
    to 1. So linears that read one input share its inverses, eight in all, and
    as only one is held at a time, they are gone through together. On a CPU that
    has units for it the products are in bfloat16, sums in float32: in seven
    linears of SmolLM2 errors differed by less than 0.1 % on the same text.

    Returns:
        For each linear its weights, 0 where removed, a good start for least squares; and the mask.

    Source:
        Meng et al. 2024, arXiv:2406.07831 (ALPS), whose penalty starts at 0.1 and follows
        how the mask of each linear changes, with an eigendecomposition; the weights of rows
        and the mask to start from are ours. Ended 1 to 4 % below its error, in as many
        iterations or fewer.
    """
    searches = [_Refinement.of(linear, moments) for linear in linears]
    growth = (_LAST / _FIRST) ** (1 / (_STEPS - 1))
    for step in range(_STEPS):
        penalty = _FIRST * growth**step
        inverse = moments.inverse(penalty, layer=layer)
        inverse = inverse.to(quick_dtype(inverse.device))
        for search in searches:
            if step:
                search.grow_(growth)
            for _ in range(_EVERY):
                search.iterate_(inverse, penalty)
        del inverse
    return [searches.pop(0).result(moments) for _ in linears]


class _Refinement:
    """The iterations of one linear, all of whose tensors are on scaled inputs and rows."""

    def __init__(self, dense: Tensor, keep: Tensor, support: Support, rows: Tensor | None) -> None:
        self.dense, self.support, self.rows = dense, support, rows
        self.removed = _negative(keep)
        self.state = torch.addcmul(dense, dense, self.removed)

    @classmethod
    def of(cls, linear: Masked, moments: Normalised) -> "_Refinement":
        dense, rows = moments.scaled(linear.weight), None
        if linear.importance is not None:
            share = linear.importance / linear.importance.mean()
            rows = torch.nan_to_num(share, nan=1.0).clamp_min(_LEAST_ROW).sqrt()[:, None]
            dense *= rows
        return cls(dense, linear.keep, linear.support, rows)

    def grow_(self, growth: float) -> None:
        """Count the multiplier in units of a penalty that has grown."""
        self.state.addcmul_(self.state, self.removed, value=1 - 1 / growth)

    def iterate_(self, inverse: Tensor, penalty: float) -> None:
        """B from D and U, then D and U from B."""
        # B - dense = rho (D - U - dense) (H + rho I)^-1
        moved = (self.state - self.dense).to(inverse.dtype) @ inverse
        pulled = torch.add(self.dense, moved, alpha=penalty)
        pulled.addcmul_(self.state, self.removed)  # B + U
        self.removed = _negative(self.support.choose(pulled.square()))
        self.state = torch.addcmul(pulled, pulled, self.removed, value=2)  # D = B + U, U = B + U

    def result(self, moments: Normalised) -> tuple[Tensor, Tensor]:
        """Weights on the inputs as they are, and their mask."""
        weight = moments.unscaled(self.state.addcmul_(self.state, self.removed))
        return weight if self.rows is None else weight / self.rows, self.removed == 0


def _negative(keep: Tensor) -> Tensor:
    """-1 where a weight is removed, and 0 elsewhere: a CPU multiplies far faster than it fills."""
    return keep.float().sub_(1)


def admm(
    weight: Tensor, moments: Normalised, inverse: Tensor, support: Support
) -> tuple[Tensor, Tensor]:
    """
    Choose which weights stay, and what they become, in 20 iterations with a gradual mask.

    In the first 15 of them more and more weights are removed, quickly at first;
    the last five only move the weights that stay.

    Args:
        moments: Second moments of its input, not damped.
        inverse: Inverse of ``moments`` for :data:`PUBLISHED_DAMPING`, :data:`PUBLISHED_PENALTY`.
        support: How many weights stay, and which compete.

    Returns:
        The new weights, and the mask, with the counts of ``support``.

    Source:
        Boza 2024, arXiv:2401.02938, algorithm 2: share 1 - (1 - t / 15)^3 of the sparsity in
        iteration t. Their code does so with N:M and with rows; if all
        weights of a linear compete it removes the whole share from the start, which left
        1 to 4 % more error.
    """
    dense = moments.scaled(weight)
    free, multiplier = dense, torch.zeros_like(dense)
    keep = torch.ones_like(dense, dtype=torch.bool)
    for iteration in range(1, _ITERATIONS + 1):
        pulled = free + multiplier
        if iteration <= _GRADUAL:
            share = 1 - (1 - iteration / _GRADUAL) ** 3
            keep = support.choose_part(pulled.abs(), share)
        masked = pulled * keep
        multiplier = pulled - masked
        moved = (masked - multiplier - dense) @ inverse
        free = torch.add(dense, moved, alpha=PUBLISHED_PENALTY)
    return moments.unscaled((free + multiplier) * keep), keep


# The constants of ALPS.
_PENALTY = 0.1  # rho at the start
_MOST = 300  # iterations
_CHANGE_EVERY = 3  # iterations between two looks at how much the mask changes
_SETTLED_AFTER = 30  # iterations before a mask that hardly changes is settled
_SETTLED = 0.0003  # share of the weights that stay
_GROWTH = ((0.1, 1.3), (0.005, 1.2))  # change beyond which share, and what the penalty grows by
_LAST_GROWTH = 1.1


@dataclass(frozen=True, kw_only=True)
class Spectrum:
    """
    A normalised Gram matrix with its eigenvectors: its inverse for any penalty is one product.

    Attributes:
        input: The matrix, and the scale of each input.
        values: (in_features,), float64, ascending.
        vectors: (in_features, in_features), float64, in columns.
    """

    input: Normalised
    values: Tensor
    vectors: Tensor

    @classmethod
    def of(cls, gram: Tensor, *, layer: str) -> Self:
        """Return the spectrum of a Gram matrix, damped by 0.01 of its mean diagonal."""
        matrix = Normalised.of(gram, damping=DAMPING, layer=layer)
        values, vectors = torch.linalg.eigh(matrix.gram.double())
        return cls(input=matrix, values=values, vectors=vectors)

    def inverse(self, penalty: float) -> Tensor:
        """(gram + penalty I)^-1, (in_features, in_features), float32."""
        product: Tensor = (self.vectors / (self.values + penalty)) @ self.vectors.T
        return product.float()


def alps(weight: Tensor, spectrum: Spectrum, support: Support) -> tuple[Tensor, Tensor]:
    """
    Choose which weights stay, and what they become, by ADMM; least squares goes on from there.

    Free weights B follow the dense outputs, masked weights D keep to the
    support, and a multiplier V pulls them together. The penalty rho grows
    while the mask changes, by less and less as it settles.

    Args:
        spectrum: Spectrum of the second moments of its input.
        support: How many weights stay, and which compete. The published one lets
            all weights of a linear compete, or those of an N:M run.

    Returns:
        The new weights, and the mask, with the counts of ``support``.

    Source:
        Meng et al. 2024, arXiv:2406.07831, algorithm 1, with the schedule and the
        constants of their code; algorithm 2 is
        :func:`~pho_service.pruning.weight_update.least_squares_update`, whose
        preconditioner is their normalisation. Ties fall to the
        lower index, and the weights of inputs that are always 0 are removed first.
    """
    dense = spectrum.input.scaled(weight)
    target = dense @ spectrum.input.gram  # (out_features, in_features)
    before = first = support.choose(dense.square())
    stays = max(int(first.count_nonzero()), 1)
    penalty, grown = _PENALTY, False
    inverse = spectrum.inverse(penalty)
    masked, multiplier = dense * first, torch.zeros_like(dense)
    for iteration in range(1, _MOST + 1):
        free = (target - multiplier + penalty * masked) @ inverse
        masked = free + multiplier / penalty
        mask = support.choose(masked.square())
        masked.masked_fill_(~mask, 0)
        multiplier += penalty * (free - masked)
        if iteration % _CHANGE_EVERY:
            continue
        changed = int((mask != before).count_nonzero())
        before = mask
        grown = grown or changed > 0.005 * stays
        if not grown:  # the penalty was too large to move: once more with a smaller one
            penalty /= 5
            if changed:
                masked, multiplier = dense * first, torch.zeros_like(dense)
        elif not changed:
            break
        else:
            grows = (growth for share, growth in _GROWTH if changed / stays > share)
            penalty = min(penalty * next(grows, _LAST_GROWTH), 1e6)
        if iteration > _SETTLED_AFTER and changed < _SETTLED * stays:
            break
        inverse = spectrum.inverse(penalty)
    mask = support.choose(free.square())
    return spectrum.input.unscaled(free * mask), mask
