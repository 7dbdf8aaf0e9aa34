"""
Windows that no calibration has seen: texts may be the same, or share documents.
"""

import torch
from torch import Tensor

RUN = 32  # tokens in a row that two texts do not share by chance
SHORTEST = 8  # of a run, in windows that are shorter than four of them
_BASE = 6_364_136_223_846_793_005  # odd, so that it has an inverse modulo 2^64
_INVERSE = pow(_BASE, -1, 2**64) - 2**64  # as a signed number; negative, as it is above 2^63
_CHUNK = 64  # windows that are looked at together


def apart(windows: Tensor, others: Tensor, most: int | None = None) -> Tensor:
    """
    Return the windows that share no run of 32 tokens with others, in their order.

    In windows of fewer than 128 tokens a quarter of one is a run, but no less than 8 tokens.

    Args:
        windows: (windows, context_length), int64.
        others: (any, context_length), int64: what must not be seen again.
        most: Stop when there are so many.

    Returns:
        (up to ``most``, context_length), int64; none may be left.
    """
    seen = _runs(others).unique()
    kept: list[Tensor] = []
    count = 0
    for chunk in windows.split(_CHUNK):
        fresh = chunk[~torch.isin(_runs(chunk), seen).any(dim=1)]
        kept.append(fresh)
        count += len(fresh)
        if most is not None and count >= most:
            break
    return torch.cat([windows[:0], *kept])[:most]


def _runs(windows: Tensor) -> Tensor:
    """
    Return a number for each run of tokens: (windows, context_length - run + 1), int64.

    The polynomial hash of Rabin and Karp, modulo 2^64, from sums along the window.
    """
    count, length = windows.shape
    run = min(length, RUN, max(SHORTEST, length // 4))
    powers = torch.full((length,), _BASE, dtype=torch.int64).cumprod(dim=0)
    inverse = torch.full((length - run + 1,), _INVERSE, dtype=torch.int64).cumprod(dim=0)
    terms = (windows + 1) * powers
    sums = torch.cat([torch.zeros(count, 1, dtype=torch.int64), terms.cumsum(dim=1)], dim=1)
    return (sums[:, run:] - sums[:, :-run]) * inverse
