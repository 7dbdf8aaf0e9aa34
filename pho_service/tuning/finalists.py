"""
Candidates of a search that are looked at again, and a race between them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student

from pho_service.tuning.plan import RatedCandidate
from pho_service.tuning.search import Islands
from storage.studies import record_of

What = Literal["divergence", "perplexity"]
TRAINED = "trained"  # begins the names of records of trials that were measured only as trained


def finalists(rated: Sequence[RatedCandidate], count: int) -> list[RatedCandidate]:
    """The candidates that are looked at again: ``count`` different ones, and all baselines."""
    # The objective and the second opinion propose the best that they have left, in turn: which of
    # them ranks better depends on the model, and perplexity decides between them afterwards.
    #
    # Late generations of a search are nearly copies of its best; measuring copies would be a waste.
    # A candidate is different if one of its values differs by 0.05 or more, or its kernel size or
    # allocation does. Where each measurement takes a calibration of its own (re-pruning, weight
    # updates), baselines get one only if they are among the best.
    costly = any(c.candidate.steps.needs_text for c in rated)
    contenders = [c for c in rated if costly or c.candidate.method == "crepe"]
    judged = [(c.second_opinion, c) for c in contenders if c.second_opinion is not None]
    orders = (iter(contenders), (c for _, c in sorted(judged, key=lambda pair: pair[0])))
    chosen: list[RatedCandidate] = []
    for order in islice(cycle(orders), 2 * count):  # twice, should the second have none to propose
        if len(chosen) < count:
            chosen += islice(
                (c for c in order if all(_differ(c.params, f.params) for f in chosen)), 1
            )
    passed_over = {c.number for c in contenders} - {c.number for c in chosen}
    return [c for c in rated if c.number not in passed_over]


def _differ(a: dict[str, Any], b: dict[str, Any]) -> bool:
    if any(a[k] != b[k] for k in ("kernel_size", "allocation", "method")):
        return True
    return any(abs(a[k] - b[k]) >= 0.05 for k in a if isinstance(a[k], float))


@dataclass(frozen=True, kw_only=True)
class Divergences:
    """Divergences of candidates from the dense model."""

    # Mean Kullback-Leibler divergence in nats, by number of the trial.
    by_number: Mapping[int, float] = field(default_factory=dict)
    tokens: int | None = None  # Predictions that it is the mean of; None if nothing was compared


def confirmed_before(
    islands: Islands, rated: Sequence[RatedCandidate], *, text_sha256: str
) -> list[RatedCandidate]:
    """The candidates whose perplexity on a text their study holds already."""
    # They stay finalists, so that a longer search never ends with a worse result than the shorter
    # one that it extends.
    records = [record_of(study) for study in islands.studies]

    def texts_of(number: int) -> list[Any]:
        (_, trial), record = islands.place(number), records[islands.of_island(number)]
        names = f"perplexity:{trial}", f"{TRAINED}:{trial}"
        return [record.get(name, {}).get("text_sha256") for name in names]

    return [candidate for candidate in rated if text_sha256 in texts_of(candidate.number)]


def united(
    rated: Sequence[RatedCandidate], *groups: Sequence[RatedCandidate]
) -> list[RatedCandidate]:
    """The candidates of several groups, each once, in the order of ``rated``."""
    numbers = {candidate.number for group in groups for candidate in group}
    return [candidate for candidate in rated if candidate.number in numbers]


# A race of finalists on a text, in which most of them need not be measured on all windows.
LEVEL = 0.01  # chance of an error in a single test; see :func:`is_behind` for a whole race
GROWTH = 1.25  # of the windows seen from one look to the next

Blocks = Sequence[float]  # losses of a window, summed over runs of its tokens
Losses = Mapping[int, Blocks]  # by number of the window


def race_order(windows: int, seed: int) -> list[int]:
    """The numbers of a text's windows in the order in which finalists are measured on them."""
    return [int(number) for number in np.random.default_rng(seed).permutation(windows)]


def race_looks(windows: int, first: int) -> list[int]:
    """After how many windows finalists are compared, the last time after all of them."""
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
    """Return the finalists that may still turn out to be the best."""
    blocks = {
        number: np.array([block for window in seen for block in window_losses[window]])
        for number, window_losses in losses.items()
    }
    leader = min(blocks, key=lambda number: float(blocks[number].sum()))
    apart: dict[bytes, int] = {}
    for number, values in blocks.items():  # those that prune alike have the very same losses
        apart.setdefault(values.tobytes(), number)
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
