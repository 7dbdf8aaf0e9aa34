"""
Searches as they go, drawn: one with its trials as dots, and the best so far of each as a line.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from sqlalchemy import Connection

from pho_service.api.describe import study_names
from pho_service.api.points import is_several
from pho_service.report.drawing import Drawing, Series, plot, worth_showing
from storage import records as stored
from storage.trials import read_values

WIDTH, HEIGHT = 960.0, 200.0
DOTS = 400  # at most

Place = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Search:
    """
    What a search has rated.

    Attributes:
        values: Finite ones of all islands, in the order of their trials.
        maximised: Whether high values are good.
    """

    values: Sequence[float]
    maximised: bool

    @classmethod
    def read(cls, connection: Connection, job: stored.Job) -> Self:
        """
        The search of a job, from its studies.

        A transfer has none, and the values of a job with several patterns do not compare.
        """
        names = [] if is_several(job.spec) else study_names(job)
        trials = sorted(trial for name in names for trial in read_values(connection, name))
        return cls(
            values=[value for _, value in trials if math.isfinite(value)],
            maximised=job.spec.get("objective", {}).get("name") == "gini",
        )

    def best(self) -> list[float]:
        """The best so far, at each trial."""
        better = max if self.maximised else min
        found: list[float] = []
        for value in self.values:
            found.append(better(found[-1], value) if found else value)
        return found

    def range(self) -> tuple[float, float]:
        """The values that are drawn where they are; others lie at the edge."""
        return worth_showing(self.values, maximised=self.maximised)


@dataclass(frozen=True, kw_only=True)
class Chart:
    """
    A drawing of searches on one scale.

    Attributes:
        lines: The best so far of each, as the points of a line.
        top: The value at the top.
        bottom: The value at the bottom.
        trials: How many the longest has.
        width: In pixels.
        height: In pixels.
    """

    lines: Sequence[str]
    top: str
    bottom: str
    trials: int
    width: float = WIDTH
    height: float = HEIGHT


def draw_search(search: Search) -> Drawing | None:
    """Draw the trials of a search and the best so far; None before the second trial."""
    count = len(search.values)
    if count < 2:
        return None
    every = max(1, -(-count // DOTS))
    shown = [*reversed(range(count - 1, -1, -every))]
    best = search.best()
    dots = [(i, search.values[i], f"trial {i}: {search.values[i]:.6g}") for i in shown]
    line = [(i, best[i], "") for i in range(count) if i in (0, count - 1) or best[i] != best[i - 1]]
    series = [
        Series(name="trial", look="trials", points=dots),
        Series(name="best so far", look="best", points=line, mark=None, line="steps"),
    ]
    return plot(series, x="trial", y="objective", log_y=True, within=search.range())


def draw_searches(searches: Sequence[Search]) -> Chart | None:
    """
    Draw the best so far of searches, each with two trials or more.

    Returns:
        None if there is nothing to draw. A search with fewer trials has an empty line.
    """
    drawn = [search for search in searches if len(search.values) > 1]
    if not drawn:
        return None
    ends = [end for search in drawn for end in search.range()]
    low, high = min(ends), max(ends)
    height = (high - low) or abs(high) or 1.0
    trials = max(len(search.values) for search in drawn)

    def place(number: int, value: float) -> Place:
        inside = min(max(value, low), high)
        left = WIDTH * number / (trials - 1)
        return round(left, 1), round(HEIGHT * (high - inside) / height, 1)

    def line(search: Search) -> str:
        best = search.best()
        if len(best) < 2:
            return ""
        steps = [i for i in range(1, len(best)) if best[i] != best[i - 1]]
        corners = [place(0, best[0])]
        for i in steps:
            corners += [(place(i, best[i])[0], corners[-1][1]), place(i, best[i])]
        corners.append(place(len(best) - 1, best[-1]))
        return " ".join(f"{x:g},{y:g}" for x, y in corners)

    return Chart(
        lines=[line(search) for search in searches],
        top=f"{high:.4g}",
        bottom=f"{low:.4g}",
        trials=trials,
    )
