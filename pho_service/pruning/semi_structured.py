"""
Weights in torch's format for 2:4: two of each four neighbours, and where they stood.
"""

import warnings

import torch
from torch import Tensor

KEEP, GROUP = 2, 4  # the only pattern that GPUs have kernels for


def to_semi_structured(weight: Tensor) -> Tensor:
    """
    Turn a weight into torch's semi-structured tensor, which multiplies as the weight does.

    Args:
        weight: (out_features, in_features), 16-bit, on a GPU, contiguous; at most two of
            each four neighbours of a row are not zero. More are lost without a word: see
            :func:`broken_groups`.

    Raises:
        RuntimeError: A dtype or a shape that torch's kernels do not take, or no kernels.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that it is a prototype
        found: Tensor = torch.sparse.to_sparse_semi_structured(weight)
        return found


def broken_groups(weight: Tensor) -> int:
    """
    Count the groups of four neighbouring inputs that keep more than two weights.

    Args:
        weight: (out_features, in_features). All groups count as broken where in_features is not
            a multiple of four.
    """
    out_features, in_features = weight.shape
    if in_features % GROUP:
        return out_features * -(-in_features // GROUP)
    kept = weight.ne(0).view(out_features, -1, GROUP).sum(dim=-1, dtype=torch.uint8)
    return int((kept > KEEP).count_nonzero())
