"""
Second moments with each input scaled to one size, as masks by ADMM want them.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from pho_service.errors import NumericalError

DAMPING = 0.01  # share of the mean diagonal that is added to it, as in the literature
_DEAD = 1e-15  # square of an input that is always 0, as a share of the mean: its weights go first


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
        Normalise a Gram matrix, which is left as it is.

        Args:
            gram: (in_features, in_features), float32, symmetric: E[x x^T]. An input
                that is always 0 stands alone and is scaled to almost 0, so its
                weights are the first to go. A matrix of zeros counts as the identity.
            damping: Share of the mean diagonal that is added to the diagonal, >= 0.
            layer: Name of the linear, for the message of an error.

        Raises:
            NumericalError: NaN or infinity in ``gram``.
        """
        if not bool(torch.isfinite(gram).all()):
            raise NumericalError(
                f"{layer}: the second moments of its inputs are NaN or infinite. Check the model's "
                "weights, or calibrate in float32 (--dtype float32).",
                layer=layer,
            )
        diagonal = gram.diagonal()
        added = damping * diagonal.mean()
        alone = torch.where(diagonal.mean() > 0, _DEAD * diagonal.mean(), 1)
        damped = torch.where(diagonal > 0, diagonal + added, alone)
        scale = damped.sqrt()
        normalised = gram / scale / scale[:, None]
        normalised.diagonal().fill_(1)
        return cls(gram=normalised, scale=scale)

    def inverse(self, penalty: float, *, layer: str) -> Tensor:
        """
        (gram + penalty I)^-1, (in_features, in_features), float32, in float64 where that fails.

        Raises:
            NumericalError: It is not positive definite in either; names ``layer``.
        """
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
