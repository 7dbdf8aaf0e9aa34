"""
The charts of a result: drawings with a title and a sentence that says the same in words.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, Literal, TypeVar

from pho_service.shown.parts import (
    Bar,
    Chart,
    Dot,
    Drawing,
    Mark,
    Series,
    bars,
    heat_map,
    plot,
    worth_showing,
)
from pho_service.shown.report import LayerCell, Report, ReportTrial
from pho_service.spec.configuration import ProxyQuality
from pho_service.spec.document import number, percent

FEWEST_POINTS = 3  # of a plot: two are told in a sentence
MOST_POINTS = 500  # of a line or a cloud: more are not seen, and make the page slow
_T = TypeVar("_T")
ALIKE = 1e-3  # a difference in sparsity that is none
METHODS = ("dense", "wanda", "ria", "transferred", "own")  # in this order; each has a look


def best_so_far(values: Sequence[float], *, maximised: bool) -> list[float]:
    return [*accumulate(values, max if maximised else min)]


def history_chart(report: Report) -> Chart | None:
    """The objective of every trial, and the best so far; None of a few trials."""
    rated = [t for t in report.trials if t.value is not None and math.isfinite(t.value)]
    if len(rated) < FEWEST_POINTS:
        return None
    values = [trial.value or 0.0 for trial in rated]
    best = best_so_far(values, maximised=report.maximised)
    if report.is_cut:  # whose order says nothing
        return None
    series = [
        _trials("found", "dot", [t for t in rated if not t.is_baseline]),
        _trials("baseline", "diamond", [t for t in rated if t.is_baseline]),
        _course("best so far", "best", [trial.number for trial in rated], best),
    ]
    within = worth_showing(values, maximised=report.maximised)
    beyond = sum(not within[0] <= value <= within[1] for value in values)
    return Chart(
        id="history",
        title="Objective by trial",
        text=f"{len(rated)} rated trials. The best value, {number(best[-1])}, is that of trial "
        f"{rated[best.index(best[-1])].number}; the first trial had {number(best[0])}. "
        + ("Higher" if report.maximised else "Lower")
        + " is better."
        + (f" {beyond} that are far worse are drawn at the edge." if beyond else ""),
        drawing=plot(series, x="trial", y=report.objective, log_y=True, within=within),
    )


def searches_chart(searches: Sequence[tuple[str, Sequence[float], bool]]) -> Chart | None:
    """The best so far of each search, all on one scale; None if all have but a few trials."""
    # A search has a name, its values in the order of its trials, and whether it is maximised.
    drawn = [each for each in searches if len(each[1]) >= FEWEST_POINTS]
    if not drawn:
        return None
    ranges = [worth_showing(values, maximised=m) for _, values, m in drawn]
    series = [
        _course(name, f"line-{place}", range(len(values)), best_so_far(values, maximised=m))
        for place, (name, values, m) in enumerate(searches, 1)
        if len(values) >= FEWEST_POINTS
    ]
    within = min(low for low, _ in ranges), max(high for _, high in ranges)
    longest = max(len(values) for _, values, _ in searches)
    return Chart(
        id="searches",
        title="Best objective so far",
        text=f"The best objective so far of each job, over {longest} trials. Objectives of "
        "different models or patterns do not compare.",
        drawing=plot(series, x="trial", y="objective", within=within),
    )


def _trials(name: str, mark: Mark, trials: Sequence[ReportTrial]) -> Series:
    points = [
        _dot(
            t, t.number, t.value,
            number(t.value) + (f", perplexity {number(t.perplexity)}" if t.perplexity else ""),
        )
        for t in _thinned(trials)
    ]  # fmt: skip
    return Series(name=name, look=name, points=points, mark=mark)


def _dot(trial: ReportTrial, x: float | None, y: float | None, values: str) -> Dot:
    """A trial as a point that tells its values and its coefficients."""
    text = f"{_named(trial)}: {values}" + (f"; {trial.in_words}" if trial.params else "")
    return Dot(x or 0.0, y or 0.0, text, trial.number)


def _course(name: str, look: str, places: Sequence[int], best: Sequence[float]) -> Series:
    """A line in steps: where it changes, and its ends."""
    last = len(best) - 1
    turns = [i for i in range(len(best)) if i in (0, last) or best[i] != best[i - 1]]
    points = [Dot(places[i], best[i]) for i in _thinned(turns)]
    return Series(name=name, look=look, points=points, mark=None, line="steps")


def importance_chart(report: Report) -> Chart | None:
    """How much each parameter mattered; None where that is not known."""
    if not report.importance:
        return None
    first = next(iter(report.importance))
    shown = [
        Bar(label=_words(name), look="found", value=share, text=f"{share:.0%}")
        for name, share in report.importance.items()
    ]
    return Chart(
        id="importance",
        title="Importance of each coefficient",
        text=f"{_words(first).capitalize()} matters most, with {report.importance[first]:.0%}: "
        "how much each parameter decides whether a candidate is in the best tenth (PED-ANOVA).",
        drawing=bars([("", shown)]),
    )


def confirmed_chart(report: Report) -> Chart | None:
    """The proxy of what was confirmed against its perplexity; None where only a few were."""
    measured = [trial for trial in report.measured if trial.value is not None]
    if len(measured) < FEWEST_POINTS or report.objective == "perplexity":
        return None
    kinds: tuple[tuple[str, Mark, list[ReportTrial]], ...] = (
        ("found", "dot", [t for t in measured if not t.is_baseline]),
        ("baseline", "diamond", [t for t in measured if t.is_baseline]),
        ("chosen", "ring", [t for t in measured if t == report.winner]),
    )
    series = [
        Series(
            name="split" if report.is_cut and name == "baseline" else name, look=name, mark=mark,
            points=[
                _dot(
                    t, t.value, t.perplexity,
                    f"proxy {number(t.value)}, perplexity {number(t.perplexity)}",
                )
                for t in trials
            ],
        )
        for name, mark, trials in kinds
    ]  # fmt: skip
    best, worst = measured[0], measured[-1]
    return Chart(
        id="confirmed",
        title="Proxy against perplexity",
        text=f"{len(measured)} candidates have a perplexity: from {number(best.perplexity)} "
        f"({_named(best)}) to {number(worst.perplexity)} ({_named(worst)}).",
        drawing=plot(series, x=report.objective, y="perplexity"),
    )


def layer_charts(
    place: int, model: str, cells: Sequence[LayerCell], *, several: bool
) -> list[Chart]:
    """Maps of error and, where it differs, of sparsity over blocks and kinds of linears."""
    of_model = f" on {model}" if several else ""
    worst = max(cells, key=lambda cell: cell.error)
    least = min(cells, key=lambda cell: cell.sparsity)
    most = max(cells, key=lambda cell: cell.sparsity)
    errors = Chart(
        id=f"errors-{place}",
        title=f"Error by layer{of_model}",
        text=f"Relative to the energy of its output. The largest is {number(worst.error)}, of "
        f"{_place(worst)}; the smallest {number(min(cell.error for cell in cells))}.",
        drawing=_heat_map(cells, "error"),
    )
    if most.sparsity - least.sparsity < ALIKE:
        return [errors]
    sparsities = Chart(
        id=f"sparsities-{place}",
        title=f"Sparsity by layer{of_model}",
        text=f"From {percent(least.sparsity)} in {_place(least)} to {percent(most.sparsity)} in "
        f"{_place(most)}.",
        drawing=_heat_map(cells, "sparsity"),
    )
    return [errors, sparsities]


def transfer_chart(
    rows: Sequence[tuple[str, Mapping[str, float | None]]],
    what: Literal["perplexity", "proxy"],
) -> Chart | None:
    """A configuration on other models, by name, beside the other methods."""
    if not rows:
        return None
    groups = [
        (
            name,
            [
                Bar(
                    label={"own": "own best"}.get(method, method),
                    look=method,
                    value=value,
                    text=number(value),
                )
                for method in METHODS
                if (value := values.get(method)) is not None and math.isfinite(value)
            ],
        )
        for name, values in rows
    ]
    return Chart(
        id=f"transfer-{what}",
        title=f"By {what}, on each model",
        text=f"The {what} by method, for {len(rows)} "
        f"{'model' if len(rows) == 1 else 'models'}; lower is better.",
        drawing=bars(groups),
    )


def validation_charts(
    proxies: Mapping[str, Sequence[float]],
    perplexities: Sequence[float],
    qualities: Mapping[str, ProxyQuality],
) -> list[Chart]:
    """Each proxy of the candidates against their perplexity, and how well it ranks in words."""
    charts = []
    for place, (name, values) in enumerate(proxies.items()):
        quality = qualities[name]
        low, high = quality.spearman_interval
        points = [
            Dot(proxy, perplexity, f"proxy {number(proxy)}, perplexity {number(perplexity)}")
            for proxy, perplexity in zip(values, perplexities, strict=True)
        ]
        charts.append(
            Chart(
                id=f"proxy-{place}",
                title=name,
                text=f"Spearman {quality.spearman:+.2f} (95 %: {low:+.2f} to {high:+.2f}), Kendall "
                f"{quality.kendall:+.2f}, regret of the top {quality.top_k} "
                f"{percent(quality.regret)}.",
                drawing=plot(
                    [Series(name="candidate", look="found", points=points)],
                    x="proxy",
                    y="perplexity",
                    log_x=name != "gini",  # which is a share
                    log_y=True,
                ),
            )
        )
    return charts


def curves_chart(curves: Sequence[tuple[str, Sequence[Mapping[str, Any]]]]) -> Chart | None:
    """Perplexity against sparsity of several jobs; None where they have few, or one sparsity."""
    every = [point for _, points in curves for point in points]
    if len(every) < FEWEST_POINTS or len({point["sparsity"] for point in every}) < 2:
        return None
    series = [
        line
        for place, (name, points) in enumerate(curves, 1)
        for line in _joined(points, name, f"line-{place}", "perplexity")
    ]
    return Chart(
        id="curves",
        title="Perplexity by sparsity",
        text="The result of each job at each of its patterns. Perplexities of different texts or "
        "models do not compare.",
        drawing=plot(series, x="weights removed", y="perplexity", log_y=True, percent_x=True),
    )


def _joined(points: Sequence[Mapping[str, Any]], name: str, look: str, key: str) -> list[Series]:
    """A line through the points of ratios, and those of N:M beside it."""
    ratios, groups = (
        _marks([point for point in points if (":" in point["pattern"]) is of_groups], name, key)
        for of_groups in (False, True)
    )
    lines = [Series(name=name, look=look, points=ratios, line="straight")] if ratios else []
    if groups:
        lines.append(Series(name=f"{name}, N:M", look=look, points=groups, mark="cross"))
    return lines


def curve_chart(points: Sequence[Mapping[str, Any]], dense: float) -> Chart | None:
    """Perplexity against sparsity: a line through the ratios, N:M beside it; None of one point."""
    if len(points) < 2:  # each of which has baselines beside it
        return None
    series = [
        line
        for name, key in (("found", "perplexity"), ("wanda", "wanda"), ("ria", "ria"))
        for line in _joined(points, name, name, key)
    ]
    ends = [min(0.0, *(p["sparsity"] for p in points)), max(p["sparsity"] for p in points)]
    level = [Dot(end, dense) for end in ends]
    series.append(Series(name="dense", look="dense", points=level, mark=None, line="straight"))
    first, last = points[0], points[-1]
    return Chart(
        id="curve-perplexity",
        title="Perplexity by sparsity",
        text=f"From {number(first['perplexity'])} at {first['pattern']} to "
        f"{number(last['perplexity'])} at {last['pattern']}; dense {number(dense)}. Lower is "
        "better.",
        drawing=plot(series, x="weights removed", y="perplexity", log_y=True, percent_x=True),
    )


def _marks(points: Sequence[Mapping[str, Any]], name: str, key: str) -> list[Dot]:
    return [
        Dot(point["sparsity"], point[key], f"{name}, {point['pattern']}: {number(point[key])}")
        for point in points
        if point[key] is not None
    ]


def _heat_map(cells: Sequence[LayerCell], what: Literal["error", "sparsity"]) -> Drawing:
    blocks = [*dict.fromkeys(cell.block for cell in cells)]
    kinds = [*dict.fromkeys(cell.kind for cell in cells)]
    in_words = number if what == "error" else percent
    return heat_map(
        _short(kinds),
        _short(blocks),
        {
            (kinds.index(cell.kind), blocks.index(cell.block)): (
                getattr(cell, what),
                f"{_place(cell)}: {in_words(getattr(cell, what))}",
            )
            for cell in cells
        },
        log=what == "error",  # they differ by orders of magnitude
        title="block",
        form=".2g" if what == "error" else ".0%",
    )


def _short(names: Sequence[str]) -> list[str]:
    """The last part of each name where these differ."""
    last = [name.rpartition(".")[2] for name in names]
    return last if len({*last}) == len(last) else [*names]


def _thinned(points: Sequence[_T]) -> list[_T]:
    """At most so many, evenly, the last among them."""
    step = math.ceil(len(points) / MOST_POINTS)
    return [*points] if step <= 1 else [*reversed(points[::-step])]


def _named(trial: ReportTrial) -> str:
    name = trial.method if trial.is_baseline else "found"
    return f"{name}, trial {trial.number}"


def _place(cell: LayerCell) -> str:
    return f"{cell.block}.{cell.kind}" if cell.block else cell.kind


def _words(name: str) -> str:
    return name.replace("_", " ")
