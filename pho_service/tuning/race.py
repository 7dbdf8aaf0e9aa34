"""
Which of several finalists is the best on a text, when most of them need not be measured on all.

All finalists are measured on the same windows of the text, in an order that a seed gives. At each
look the one with the lowest loss leads, and whoever is behind the leader by more than chance
explains is dropped. What is to be known is who would be first on exactly this text, so the more
of its windows are seen, the less is left to chance; on all of them nothing is.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student

LEVEL = 0.01  # chance of an error in a single test; see :func:`is_behind` for a whole race
GROWTH = 1.25  # of the windows seen from one look to the next

Blocks = Sequence[float]  # losses of a window, summed over runs of its tokens
Losses = Mapping[int, Blocks]  # by number of the window


def race_order(windows: int, seed: int) -> list[int]:
    """The numbers of a text's windows in the order in which finalists are measured on them."""
    return [int(number) for number in np.random.default_rng(seed).permutation(windows)]


def race_looks(windows: int, first: int) -> list[int]:
    """
    After how many windows finalists are compared, the last time after all of them.

    Args:
        windows: Number of windows of the text.
        first: Before the first look.
    """
    looks = [min(first, windows)]
    while looks[-1] < windows:
        looks.append(min(windows, max(looks[-1] + 1, int(looks[-1] * GROWTH))))
    return looks


def still_racing(
    losses: Mapping[int, Losses],
    seen: Sequence[int],
    *,
    windows: int,
    level: float = LEVEL,
) -> list[int]:
    """
    Those of the finalists that may still turn out to be the best.

    Args:
        losses: Losses of each finalist, by its number; they have all windows that are seen.
        seen: Numbers of the windows.
        windows: How many the text has.
        level: Chance with which one that is better than the leader is dropped.

    Returns:
        Their numbers, in the order of ``losses``; the leader is among them. The first of several
        with the very same losses stays for all.
    """
    blocks = {
        number: np.array([block for window in seen for block in own[window]])
        for number, own in losses.items()
    }
    leader = min(blocks, key=lambda number: float(blocks[number].sum()))
    apart: dict[bytes, int] = {}
    for number, own in blocks.items():  # those that prune alike have the very same losses
        apart.setdefault(own.tobytes(), number)
    return [
        number
        for number in apart.values()
        if not is_behind(blocks[number] - blocks[leader], len(seen), windows=windows, level=level)
    ]


def is_behind(
    differences: NDArray[np.float64], seen: int, *, windows: int, level: float = LEVEL
) -> bool:
    """
    Whether losses that are higher so far are higher on the whole text, beyond chance.

    A one-sided t-test of paired differences drawn without replacement: their mean has the standard
    error ``s / sqrt(n) * sqrt(1 - seen / windows)``. That is taken from the single blocks
    of tokens or from whole windows, whichever is larger, since the blocks of a window have a
    subject in common.

    Two finalists that are equal on the whole text are the hardest case. Over all looks of a race
    one of them is dropped for the other with a chance of about 5 % (simulated: 0.045 on 16
    windows of 8 blocks, 0.075 on 64 of 32). The better of two that differ is dropped less often.

    Args:
        differences: (seen * blocks of a window,), float64, window by window: a loss minus the
            leader's.
        seen: How many windows they are of.
        windows: How many the text has.
        level: Level of the test.

    Source:
        Cochran 1977, Sampling Techniques, section 2.6 (finite population correction).
    """
    mean = float(differences.mean())
    if mean <= 0 or len(differences) < 2:
        return False
    if seen == windows:
        return True
    error = float(differences.std(ddof=1)) / math.sqrt(len(differences))
    if seen > 1:
        by_window = differences.reshape(seen, -1).mean(axis=1)
        error = max(error, float(by_window.std(ddof=1)) / math.sqrt(seen))
    error *= math.sqrt(1 - seen / windows)
    return mean > float(student.isf(level, len(differences) - 1)) * error
