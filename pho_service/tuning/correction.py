"""
How a cheap proxy is corrected by a few dear measurements: where it is wrong about each number.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from cmaes import CMA
from numpy.typing import NDArray

from pho_service.spec.document import JsonDocument, number

Array = NDArray[np.float64]
Proxies = Callable[[Array], Array]  # (points, numbers) -> (points,)

SLOPE = (1.0, 0.3)  # mean and deviation that are expected of b, see next_point
LEANING = 0.3  # deviation that is expected of each of w
MISFIT = 0.02  # deviation of log value that the model leaves unexplained
WIDTH = 0.3  # deviation of the optimiser's first points ...
PRICE = 0.03  # ... and what each number of that size costs, as log value: small ones are preferred

_GENERATIONS = 20
_POPULATION = 12


@dataclass(frozen=True, kw_only=True)
class MeasuredPoint:
    """A point whose value is known."""

    point: Array  # (numbers,)
    proxy: float  # Proxy of the point, > 0
    value: float  # What was measured there, > 0


@dataclass(frozen=True, kw_only=True)
class Correction(JsonDocument):
    """Result of the corrections of a search."""

    corrects: int  # Number of the trial that they started from, the best by the proxy
    # Number of the corrected candidate that is nearest to the dense model; None if none is nearer
    # than the one they started from.
    trial: int | None
    # Divergences of the start and of the nearest, in nats; equal if the start is the nearest.
    divergences: tuple[float, float]
    count: int  # How many were measured, failed ones included
    tokens: int  # Predictions that divergences are the mean of

    def __str__(self) -> str:
        before, after = self.divergences
        what = f"{self.count} allocations compared with the dense model on {self.tokens} tokens"
        if self.trial is None:
            return f"{what}: none is nearer than trial {self.corrects}, {number(before)}"
        found = f"{number(after)} at trial {self.trial}"
        return f"{what}: {number(before)} at trial {self.corrects}, {found}"


def next_point(
    measured: Sequence[MeasuredPoint], proxies: Proxies, *, seed: Sequence[int]
) -> Array:
    """
    Propose where to measure next.

    The value is modelled as ``log value = a + b * log proxy + w . point``, relative to the first
    point: the proxy knows how an error grows, and each number's w says how wrong it is about that
    number. One model is drawn from what the measurements leave possible, and the proposal is where
    its value is least: while little is known proposals lie apart, and later they come together.

    Source:
        Thompson's sampling; for linear models Agrawal & Goyal 2013, arXiv:1209.3352.
    """
    start = measured[0]
    center = start.point
    generator = np.random.default_rng(seed)
    slope, leaning = _drawn(measured, generator)

    def cost(points: Array) -> Array:
        rise = np.log(proxies(center + points) / start.proxy)
        price = PRICE * np.square(points / WIDTH).sum(axis=1)
        return np.asarray(slope * rise + points @ leaning + price)

    return np.round(center + _least(cost, len(center), int(generator.integers(2**31))), 4)


def _drawn(
    measured: Sequence[MeasuredPoint], generator: np.random.Generator
) -> tuple[float, Array]:
    """b and w of a model that fits, drawn at random: Bayesian linear regression."""
    start = measured[0]
    numbers = len(start.point)
    points = np.array([each.point - start.point for each in measured[1:]]).reshape(-1, numbers)
    rises = np.log([each.proxy / start.proxy for each in measured[1:]])
    values = np.log([each.value / start.value for each in measured[1:]])
    features = np.column_stack([rises, points])
    expected = np.array([SLOPE[0], *np.zeros(numbers)])
    prior = np.diag(np.array([SLOPE[1], *np.full(numbers, LEANING)]) ** -2.0)
    precision = prior + features.T @ features / MISFIT**2
    mean = np.linalg.solve(precision, prior @ expected + features.T @ values / MISFIT**2)
    # Of deviates e, L^-T e has the covariance (L L^T)^-1.
    root = np.linalg.cholesky(precision)
    found = mean + np.linalg.solve(root.T, generator.standard_normal(1 + numbers))
    return max(float(found[0]), 0.1), found[1:]


def _least(cost: Callable[[Array], Array], numbers: int, seed: int) -> Array:
    """Where ``cost`` is least, by a CMA-ES that begins at zeros."""
    optimizer = CMA(mean=np.zeros(numbers), sigma=WIDTH, seed=seed, population_size=_POPULATION)
    best, least = np.zeros(numbers), float(cost(np.zeros((1, numbers)))[0])
    for _ in range(_GENERATIONS):
        points = np.array([optimizer.ask() for _ in range(_POPULATION)])
        costs = cost(points)
        optimizer.tell(list(zip(points, costs.tolist(), strict=True)))
        if costs.min() < least:
            best, least = points[costs.argmin()], float(costs.min())
    return best
