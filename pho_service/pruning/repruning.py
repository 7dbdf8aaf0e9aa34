"""
What both ways to a better mask share: the error of a mask, and the rules for what they are given.

Weights of a row change places, its count of kept ones stays.
:mod:`~pho_service.pruning.swaps` lowers the reconstruction error itself and
needs the Gram matrix. :mod:`~pho_service.pruning.dsnot` balances the mean of
each output and needs three vectors.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from pho_service.pruning.chunks import chunk_size

_CHUNK = 1 << 22  # values of a temporary tensor on a CPU: 16 MiB in float32


def row_errors(weight: Tensor, mask: Tensor, gram: Tensor) -> Tensor:
    """
    Measure what a mask does to each output: D H D^T with D = weight * ~mask.

    Args:
        weight: (out_features, in_features), any floating dtype.
        mask: (out_features, in_features), bool. True = kept.
        gram: (in_features, in_features), float32: H = E[x x^T].

    Returns:
        (out_features,), float32: the mean over tokens of the squared change
        of each output.

    Raises:
        ValueError: Shapes that don't belong together, or a mask that isn't bool.
    """
    check_masked(weight, mask, group=0, gram=gram)
    errors = []
    for rows in row_chunks(weight, width=1):
        removed = weight[rows].float().masked_fill(mask[rows], 0)
        errors.append((removed @ gram * removed).sum(dim=1))
    return torch.cat(errors)


def check_masked(
    weight: Tensor,
    mask: Tensor,
    *,
    group: int,
    gram: Tensor | None = None,
    channels: tuple[Tensor, ...] = (),
) -> None:
    """
    Check what a mask is refined with.

    Raises:
        ValueError: Shapes that don't belong together, or a mask that isn't bool.
    """
    shape = tuple(weight.shape)
    if len(shape) != 2 or tuple(mask.shape) != shape or mask.dtype != torch.bool:
        raise ValueError(
            f"mask {tuple(mask.shape)} of {mask.dtype} must be bool, (out_features, in_features), "
            f"of the shape of weight {shape}"
        )
    n = shape[1]
    if gram is not None and tuple(gram.shape) != (n, n):
        raise ValueError(f"gram {tuple(gram.shape)} must be ({n}, {n}) for weight {shape}")
    for values in channels:
        if tuple(values.shape) != (n,):
            raise ValueError(f"a statistic {tuple(values.shape)} must be ({n},) for weight {shape}")
    if group and (group < 2 or n % group):
        raise ValueError(f"group={group} must be 0, or above 1 and divide in_features={n}")


def row_chunks(weight: Tensor, *, width: int) -> Iterator[slice]:
    """Cut rows so that ``width`` values for each of their weights fit a temporary tensor."""
    out_features, in_features = weight.shape
    step = max(1, chunk_size(weight.device, _CHUNK) // max(1, in_features * width))
    for start in range(0, out_features, step):
        yield slice(start, start + step)
