"""
Optuna's distributions as samplers need them: lists of values, and ranges from 0 to 1.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)


def searchable(space: Mapping[str, BaseDistribution]) -> dict[str, BaseDistribution]:
    """What has more than one value, by name."""
    return {name: d for name, d in sorted(space.items()) if not d.single()}


def fixed(space: Mapping[str, BaseDistribution]) -> dict[str, Any]:
    """The only value of what has but one, by name."""
    return {
        name: d.choices[0] if isinstance(d, CategoricalDistribution) else d.low
        for name, d in space.items()
        if d.single()
        and isinstance(d, (CategoricalDistribution, FloatDistribution, IntDistribution))
    }


def listed(distribution: BaseDistribution) -> list[Any] | None:
    """All values of a distribution, or None if they are too many to list."""
    if isinstance(distribution, CategoricalDistribution):
        return list(distribution.choices)
    if isinstance(distribution, FloatDistribution) and distribution.step is not None:
        count = round((distribution.high - distribution.low) / distribution.step) + 1
        return [distribution.low + i * distribution.step for i in range(count)]
    if isinstance(distribution, IntDistribution) and not distribution.log:
        values = range(distribution.low, distribution.high + 1, distribution.step)
        return list(values) if len(values) <= 1000 else None
    return None


def ascending(values: Sequence[Any]) -> bool:
    """Whether these are numbers, each above the one before."""
    numbers = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values)
    return numbers and all(a < b for a, b in itertools.pairwise(values))


def from_unit(distribution: FloatDistribution | IntDistribution, unit: float) -> float | int:
    """Map 0..1 onto a range, evenly in the logarithm where the distribution says so."""
    low, high = float(distribution.low), float(distribution.high)
    if distribution.log:
        value = math.exp(math.log(low) + unit * (math.log(high) - math.log(low)))
    else:
        value = low + unit * (high - low)
    value = min(max(value, low), high)
    if isinstance(distribution, IntDistribution):
        steps = round((value - low) / distribution.step)
        return int(distribution.low + steps * distribution.step)
    return value


def to_unit(distribution: FloatDistribution | IntDistribution, value: float) -> float:
    """Where a value lies in its range, 0 to 1; one outside of it at the nearer end."""
    low, high = float(distribution.low), float(distribution.high)
    value = min(max(value, low), high)
    if distribution.log:
        return math.log(value / low) / math.log(high / low)
    return (value - low) / (high - low)
