"""
ALPS: mask and weights of a linear together, by ADMM with a growing penalty.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from pho_service.pruning.normalised import DAMPING, Normalised
from pho_service.pruning.support import Support

_PENALTY = 0.1  # rho at the start
_MOST = 300  # iterations
_EVERY = 3  # iterations between two looks at how much the mask changes
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
        """
        Return the spectrum of E[x x^T], (in_features, in_features), float32, damped by 0.01 of
        its mean diagonal.

        Raises:
            NumericalError: NaN or infinity in ``gram``; names ``layer``.
        """
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
        weight: (out_features, in_features), any floating dtype, finite.
        spectrum: Spectrum of the second moments of its input.
        support: How many weights stay, and which compete. The published one lets
            all weights of a linear compete, or those of an N:M run.

    Returns:
        The new weights, (out_features, in_features), float32, and the mask,
        bool, True = kept, with the counts of ``support``. The same on every run.

    Raises:
        ValueError: Shapes do not fit.

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
        if iteration % _EVERY:
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
            penalty = min(penalty * _growth(changed / stays), 1e6)
        if iteration > _SETTLED_AFTER and changed < _SETTLED * stays:
            break
        inverse = spectrum.inverse(penalty)
    mask = support.choose(free.square())
    return spectrum.input.unscaled(free * mask), mask


def _growth(changed: float) -> float:
    """What the penalty grows by, when this share of the weights that stay has changed."""
    return next((factor for share, factor in _GROWTH if changed > share), _LAST_GROWTH)
