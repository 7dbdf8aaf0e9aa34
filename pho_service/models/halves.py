"""
A calibration that stops as soon as its two halves rank candidates alike.

The windows are taken in doublings, and every second one counts for the other half. After each
doubling random candidates are rated by the proxy on either half alone. If both rank them alike,
what both halves together say will hardly change with more text.
"""

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr
from torch import Tensor

from pho_service.pruning.bundle import ProxyBundle, sample_bundle
from pho_service.pruning.proxy import ProxyEvaluator
from pho_service.pruning.statistics import Collector, PrunableLinear, Statistics
from pho_service.pruning.sums import shard_seed
from pho_service.spec.calibration import CalibrationSettings
from pho_service.spec.candidate import Candidate
from pho_service.spec.pattern import Pattern
from pho_service.spec.score import Coefficients

FIRST = 8  # windows before the first comparison
COMPARED = 50  # candidates
ROWS = 8  # of each linear that they are rated on
ALIKE = 0.98  # Spearman's correlation of both halves' ratings, at least
REGRET = 0.01  # of the one half's best, rated by the other, over that one's own best, at most
PATTERN = Pattern.parse("0.5", "layer")

# (windows, how many of them are run backward, seed of the projection)
Gather = Callable[[Tensor, int, int], Collector]


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """
    How alike two halves of a calibration rank candidates.

    Attributes:
        windows: Number of windows of both halves together.
        spearman: Rank correlation of their ratings.
        regret: The larger of two: how much worse the best of one half is in the other's eyes than
            that one's own best.
    """

    windows: int
    spearman: float
    regret: float

    @property
    def is_enough(self) -> bool:
        """Tell whether more text will hardly change the ranking."""
        return self.spearman >= ALIKE and self.regret <= REGRET

    def to_dict(self) -> dict[str, Any]:
        """As JSON values, for the bundle."""
        return asdict(self)


def gather_until_alike(
    gather: Gather,
    linears: Mapping[str, PrunableLinear],
    windows: Tensor,
    fisher_windows: int,
    settings: CalibrationSettings,
) -> tuple[Collector, list[Agreement]]:
    """
    Gather sums over windows until both halves of them rank candidates alike.

    Args:
        gather: Gives the sums of some windows.
        linears: Linears of the model.
        windows: (windows, tokens), int64: all that may be taken, at least 2.
        fisher_windows: How many of all would be run backward; of fewer, the same share.
        settings: Settings of the calibration.

    Returns:
        The sums of all windows that were taken, and the agreement after each doubling; the last
        one says how many windows those are.
    """
    halves = [Collector(linears, settings.projection_rows, settings.seed) for _ in range(2)]
    share = fisher_windows / len(windows)
    agreements: list[Agreement] = []
    taken = part = 0
    for count in doublings(len(windows)):
        for number, half in enumerate(halves):
            mine = windows[taken + number : count : 2]
            backward = max(1, round(share * len(mine)))
            half.add(gather(mine, backward, shard_seed(settings.seed, part)).sums())
            part += 1
        taken = count
        agreements.append(_agreement(linears, halves, windows[:count], settings))
        if agreements[-1].is_enough:
            break
    total = Collector(linears, settings.projection_rows, settings.seed)
    for half in halves:
        total.add(half.sums())
    return total, agreements


def doublings(windows: int) -> Iterator[int]:
    """After how many windows halves are compared: 8, 16, 32 and so on, the last time after all."""
    count = FIRST
    while count < windows:
        yield count
        count *= 2
    yield windows


def _agreement(
    linears: Mapping[str, PrunableLinear],
    halves: list[Collector],
    windows: Tensor,
    settings: CalibrationSettings,
) -> Agreement:
    tokens = windows.shape[1]
    sizes = [len(windows[number::2]) for number in range(2)]
    first, second = (
        _statistics(linears, half, size, size * tokens, settings)
        for half, size in zip(halves, sizes, strict=True)
    )
    kernel = settings.kernel_sizes[len(settings.kernel_sizes) // 2]
    bundle = sample_bundle(
        linears, first, rows_per_layer=ROWS, kernel_sizes=(kernel,), seed=settings.seed
    )
    candidates = _candidates(kernel, settings.seed)
    ratings = [_blends(each, candidates) for each in (bundle, _with(bundle, second))]
    regret = max(
        float(theirs[mine.argmin()] / theirs.min() - 1) for mine, theirs in (ratings, ratings[::-1])
    )
    return Agreement(
        windows=len(windows), spearman=float(spearmanr(*ratings).statistic), regret=regret
    )


def _statistics(
    linears: Mapping[str, PrunableLinear],
    half: Collector,
    sequences: int,
    tokens: int,
    settings: CalibrationSettings,
) -> Statistics:
    """What one half says; its sums stay as they are, to be added to."""
    copy = Collector(linears, settings.projection_rows, settings.seed)
    copy.add(half.sums())
    copy.finish_inputs(sequences=sequences, tokens=tokens)
    return copy.finish()


def _with(bundle: ProxyBundle, statistics: Statistics) -> ProxyBundle:
    """The same sampled rows, with what other windows say of inputs and gradients."""
    layers = [
        replace(
            layer,
            input_index=statistics.input_of[layer.name],
            fisher=statistics.fisher[layer.name],
        )
        for layer in bundle.layers
    ]
    return replace(bundle, layers=layers, inputs=statistics.inputs)


def _candidates(kernel: int, seed: int) -> list[Candidate]:
    """Scores drawn evenly over the default search space."""
    draw = random.Random(seed)  # noqa: S311 - a sample, not a secret
    found = []
    for _ in range(COMPARED):
        neighbourhood, row = draw.random(), draw.random()
        coefficients = Coefficients(
            row=(1 - neighbourhood) * row,
            column=(1 - neighbourhood) * (1 - row),
            neighbourhood=neighbourhood,
            kernel_size=kernel,
            activation_exponent=draw.uniform(0.1, 1.3),
            gradient_exponent=draw.uniform(0.0, 0.7),
        )
        found.append(Candidate(method="crepe", coefficients=coefficients, pattern=PATTERN))
    return found


def _blends(bundle: ProxyBundle, candidates: list[Candidate]) -> NDArray[np.float64]:
    return np.array([rating.blend for rating in ProxyEvaluator(bundle).evaluate(candidates)])
