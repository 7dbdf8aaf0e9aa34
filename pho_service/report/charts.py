"""
The charts of a report: drawings with a title and a sentence that says the same in words.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from pho_service.report.data import Report, ReportTrial
from pho_service.report.drawing import (
    Bar,
    Drawing,
    Mark,
    Series,
    bars,
    heat_map,
    plot,
    worth_showing,
)
from pho_service.report.layers import LayerCell
from pho_service.spec.quality import ProxyQuality

MOST_POINTS = 1000  # of a line or a cloud: more are not seen, and make the page slow
_T = TypeVar("_T")
ALIKE = 1e-3  # a difference in sparsity that is none
METHODS = ("dense", "wanda", "ria", "transferred", "own")  # in this order; each has a look


@dataclass(frozen=True, kw_only=True)
class Chart:
    """
    A figure of the page.

    Attributes:
        id: Id of its element.
        title: A heading in few words.
        text: What it shows, for those who do not see it.
        drawing: The chart itself.
    """

    id: str
    title: str
    text: str
    drawing: Drawing


def history_chart(report: Report) -> Chart | None:
    """The objective of every trial, and the best so far; None without trials."""
    known = [t for t in report.trials if t.value is not None and math.isfinite(t.value)]
    if not known:
        return None
    better = max if report.maximised else min
    best: list[float] = []
    for trial in known:
        value = trial.value or 0.0
        best.append(value if not best else better(best[-1], value))
    line = _thinned([*zip(known, best, strict=True)])
    series = [
        _trials("found", "dot", [t for t in known if not t.is_baseline]),
        _trials("baseline", "diamond", [t for t in known if t.is_baseline]),
        Series(
            name="best so far",
            look="best",
            points=[(trial.number, value, "") for trial, value in line],
            mark=None,
            line="steps",
        ),
    ]
    values = [trial.value or 0.0 for trial in known]
    within = worth_showing(values, maximised=report.maximised)
    beyond = sum(not within[0] <= value <= within[1] for value in values)
    first = next(trial for trial, value in zip(known, best, strict=True) if value == best[-1])
    return Chart(
        id="history",
        title="Objective by trial",
        text=f"{len(known)} rated trials. The best value, {best[-1]:.6g}, is that of trial "
        f"{first.number}; the first trial had {best[0]:.6g}. "
        + ("Higher" if report.maximised else "Lower")
        + " is better."
        + (f" {beyond} that are far worse are drawn at the edge." if beyond else ""),
        drawing=plot(series, x="trial", y=report.objective, log_y=True, within=within),
    )


def _trials(name: str, mark: Mark, trials: Sequence[ReportTrial]) -> Series:
    points = [(t.number, t.value or 0.0, f"{_named(t)}: {t.value:.6g}") for t in _thinned(trials)]
    return Series(name=name, look=name, points=points, mark=mark)


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
        text=f"{_words(first).capitalize()} matters most, with {report.importance[first]:.0%}: how "
        "much each parameter decides whether a candidate is among the best tenth (PED-ANOVA).",
        drawing=bars([("", shown)]),
    )


def confirmed_chart(report: Report) -> Chart | None:
    """The proxy of what was confirmed against its perplexity; None where nothing was."""
    measured = [trial for trial in report.measured if trial.value is not None]
    if not measured or report.objective == "perplexity":
        return None
    winner = report.winner
    kinds: tuple[tuple[str, Mark, list[ReportTrial]], ...] = (
        ("found", "dot", [t for t in measured if not t.is_baseline]),
        ("baseline", "diamond", [t for t in measured if t.is_baseline]),
        ("chosen", "ring", [t for t in measured if t == winner]),
    )
    series = [
        Series(
            name=name,
            look=name,
            mark=mark,
            points=[
                (
                    t.value or 0.0,
                    t.perplexity or 0.0,
                    f"{_named(t)}: proxy {t.value:.6g}, perplexity {t.perplexity:.5g}",
                )
                for t in some
            ],
        )
        for name, mark, some in kinds
    ]
    best, worst = measured[0], measured[-1]
    return Chart(
        id="confirmed",
        title="Proxy against perplexity",
        text=f"{len(measured)} candidates have a perplexity: from {best.perplexity:.5g} "
        f"({_named(best)}) to {worst.perplexity:.5g} ({_named(worst)}).",
        drawing=plot(series, x=report.objective, y="perplexity"),
    )


def layer_charts(
    number: int, model: str, cells: Sequence[LayerCell], *, several: bool
) -> list[Chart]:
    """
    Heat maps of error and, where it differs, of sparsity over blocks and kinds of linears.

    Args:
        number: Number of the model.
        model: Its name.
        cells: Cells of the model.
        several: Whether there are other models.
    """
    of_model = f" on {model}" if several else ""
    worst = max(cells, key=lambda cell: cell.error)
    least = min(cells, key=lambda cell: cell.sparsity)
    most = max(cells, key=lambda cell: cell.sparsity)
    errors = Chart(
        id=f"errors-{number}",
        title=f"Error of each linear{of_model}",
        text=f"Relative to the energy of its output. The largest is {worst.error:.3g}, of "
        f"{_place(worst)}; the smallest {min(cell.error for cell in cells):.3g}.",
        drawing=_heat_map(cells, "error"),
    )
    if most.sparsity - least.sparsity < ALIKE:
        return [errors]
    sparsities = Chart(
        id=f"sparsities-{number}",
        title=f"Sparsity of each linear{of_model}",
        text=f"From {least.sparsity:.1%} in {_place(least)} to {most.sparsity:.1%} in "
        f"{_place(most)}.",
        drawing=_heat_map(cells, "sparsity"),
    )
    return [errors, sparsities]


def transfer_chart(
    rows: Sequence[tuple[str, Mapping[str, float | None]]],
    what: Literal["perplexity", "proxy"],
) -> Chart | None:
    """
    What a configuration was worth on other models, beside the other methods.

    Args:
        rows: The name of a model, and what was measured by method.
        what: Was measured.
    """
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
                    text=f"{value:.4g}",
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
        text=f"Bars of the {what} by method, for {len(rows)} "
        f"{'model' if len(rows) == 1 else 'models'}; lower is better. The table has the numbers.",
        drawing=bars(groups),
    )


def validation_charts(
    proxies: Mapping[str, Sequence[float]],
    perplexities: Sequence[float],
    qualities: Mapping[str, ProxyQuality],
) -> list[Chart]:
    """
    Each proxy against perplexity, and how well it ranks in words.

    Args:
        proxies: The values of the candidates, by proxy.
        perplexities: Perplexities of the same candidates.
        qualities: By proxy.
    """
    charts = []
    for number, (name, values) in enumerate(proxies.items()):
        quality = qualities[name]
        low, high = quality.spearman_interval
        points = [
            (proxy, perplexity, f"proxy {proxy:.6g}, perplexity {perplexity:.5g}")
            for proxy, perplexity in zip(values, perplexities, strict=True)
        ]
        charts.append(
            Chart(
                id=f"proxy-{number}",
                title=name,
                text=f"Spearman {quality.spearman:+.2f} (95 %: {low:+.2f} to {high:+.2f}), Kendall "
                f"{quality.kendall:+.2f}, regret of the top {quality.top_k} {quality.regret:.1%}.",
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


def timings_chart(seconds: Mapping[str, float]) -> Chart | None:
    """Seconds of work by stage; None where none is known."""
    if not seconds:
        return None
    longest = max(seconds, key=lambda name: seconds[name])
    shown = [
        Bar(label=name, look="found", value=each, text=f"{each:.3g} s")
        for name, each in seconds.items()
    ]
    return Chart(
        id="timings",
        title="Seconds of work by stage",
        text=f"{sum(seconds.values()):.3g} s in all, most of it in {longest}. The table has the "
        "numbers.",
        drawing=bars([("", shown)]),
    )


def _heat_map(cells: Sequence[LayerCell], what: Literal["error", "sparsity"]) -> Drawing:
    blocks = [*dict.fromkeys(cell.block for cell in cells)]
    kinds = [*dict.fromkeys(cell.kind for cell in cells)]
    form = ".4g" if what == "error" else ".2%"
    return heat_map(
        _short(kinds),
        _short(blocks),
        {
            (kinds.index(cell.kind), blocks.index(cell.block)): (
                getattr(cell, what),
                f"{_place(cell)}: {getattr(cell, what):{form}}",
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
