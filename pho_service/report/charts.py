"""
The charts of a report: plotly's figures with a title and a sentence that says the same in words.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any, Literal

from pho_service.report.data import Report, ReportTrial
from pho_service.report.layers import LayerCell
from pho_service.spec.quality import ProxyQuality

if TYPE_CHECKING:
    import plotly.graph_objects as go

MOST_POINTS = 2000  # of a line or a cloud: more are not seen, and make the page slow
ALIKE = 1e-3  # a difference in sparsity that is none
BLUE, ORANGE, GREEN, GREY = "#0072b2", "#d55e00", "#00785a", "#6b7280"
# Told apart by those who see no colours well, too.
METHOD_COLOURS = {
    "dense": "#9ca3af", "wanda": "#e69f00", "ria": "#56b4e9", "transferred": BLUE, "own": GREEN,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Chart:
    """
    A figure of the page.

    Attributes:
        id: Of its element.
        title: A heading in few words.
        text: What it shows, for those who do not see it.
        figure: Plotly's data and layout as JSON values.
    """

    id: str
    title: str
    text: str
    figure: dict[str, Any]


def history_chart(report: Report) -> Chart | None:
    """The objective of every trial, and the best so far; None without trials."""
    import plotly.graph_objects as go

    known = [trial for trial in report.trials if trial.value is not None]
    if not known:
        return None
    better = max if report.maximised else min
    best: list[float] = []
    for trial in known:
        value = trial.value or 0.0
        best.append(value if not best else better(best[-1], value))
    figure = go.Figure()
    for name, colour, symbol, baseline in (
        ("found", BLUE, "circle", False),
        ("baseline", ORANGE, "diamond", True),
    ):
        some = _thinned([trial for trial in known if trial.is_baseline is baseline])
        figure.add_scatter(
            x=[trial.number for trial in some],
            y=[trial.value for trial in some],
            text=[escape(_named(trial)) for trial in some],
            mode="markers",
            marker={"color": colour, "symbol": symbol, "size": 9 if baseline else 6},
            hovertemplate="%{text}<br>%{y:.6g}<extra></extra>",
            name=name,
        )
    line = _thinned([*zip(known, best, strict=True)])
    figure.add_scatter(
        x=[trial.number for trial, _ in line],
        y=[value for _, value in line],
        mode="lines",
        line={"color": GREY, "shape": "hv", "width": 2},
        hoverinfo="skip",
        name="best so far",
    )
    first = next(trial for trial, value in zip(known, best, strict=True) if value == best[-1])
    return Chart(
        id="history",
        title="Objective by trial",
        text=f"{len(known)} rated trials. The best value, {best[-1]:.6g}, is that of trial "
        f"{first.number}; the first trial had {best[0]:.6g}. "
        + ("Higher" if report.maximised else "Lower")
        + " is better.",
        figure=as_json(
            figure,
            x="trial",
            y=escape(report.objective),
            log_y=all((trial.value or 0) > 0 for trial in known),
        ),
    )


def importance_chart(report: Report) -> Chart | None:
    """How much each parameter mattered; None where that is not known."""
    import plotly.graph_objects as go

    if not report.importance:
        return None
    names = [*report.importance][::-1]
    figure = go.Figure()
    figure.add_bar(
        x=[report.importance[name] for name in names],
        y=[escape(_words(name)) for name in names],
        orientation="h",
        marker={"color": BLUE},
        text=[f"{report.importance[name]:.0%}" for name in names],
        textposition="auto",
        hoverinfo="skip",
    )
    first = next(iter(report.importance))
    return Chart(
        id="importance",
        title="Importance of each coefficient",
        text=f"Most important is the {_words(first)}, with {report.importance[first]:.0%}: how "
        "much each parameter decides whether a candidate is among the best tenth (PED-ANOVA). "
        "The table has all.",
        figure=as_json(figure, x="importance", y="", height=60 + 44 * len(names)),
    )


def confirmed_chart(report: Report) -> Chart | None:
    """The proxy of what was confirmed against its perplexity; None where nothing was."""
    import plotly.graph_objects as go

    measured = [trial for trial in report.measured if trial.value is not None]
    if not measured or report.objective == "perplexity":
        return None
    winner = report.winner
    figure = go.Figure()
    for name, colour, symbol, some in (
        ("found", BLUE, "circle", [t for t in measured if not t.is_baseline]),
        ("baseline", ORANGE, "diamond", [t for t in measured if t.is_baseline]),
        ("chosen", GREEN, "circle-open", [t for t in measured if t == winner]),
    ):
        figure.add_scatter(
            x=[trial.value for trial in some],
            y=[trial.perplexity for trial in some],
            text=[escape(_named(trial)) for trial in some],
            mode="markers",
            marker={
                "color": colour, "symbol": symbol, "size": 18 if name == "chosen" else 10,
                "line": {"width": 2} if name == "chosen" else {},
            },
            hovertemplate="%{text}<br>proxy %{x:.6g}, perplexity %{y:.5g}<extra></extra>",
            name=name,
        )  # fmt: skip
    best, worst = measured[0], measured[-1]
    return Chart(
        id="confirmed",
        title="Proxy against perplexity",
        text=f"{len(measured)} candidates have a perplexity: from {best.perplexity:.5g} "
        f"({_named(best)}) to {worst.perplexity:.5g} ({_named(worst)}).",
        figure=as_json(figure, x=escape(report.objective), y="perplexity"),
    )


def layer_charts(
    number: int, model: str, cells: Sequence[LayerCell], *, several: bool
) -> list[Chart]:
    """
    Heat maps of error and, where it differs, of sparsity over blocks and kinds of linears.

    Args:
        number: Of the model.
        model: Its name.
        cells: Of the model.
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
        figure=_heat_map(cells, "error"),
    )
    if most.sparsity - least.sparsity < ALIKE:
        return [errors]
    sparsities = Chart(
        id=f"sparsities-{number}",
        title=f"Sparsity of each linear{of_model}",
        text=f"From {least.sparsity:.1%} in {_place(least)} to {most.sparsity:.1%} in "
        f"{_place(most)}.",
        figure=_heat_map(cells, "sparsity"),
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
    import plotly.graph_objects as go

    if not rows:
        return None
    figure = go.Figure()
    for method, colour in METHOD_COLOURS.items():
        known = [(name, values[method]) for name, values in rows if values.get(method) is not None]
        if known:
            figure.add_bar(
                x=[escape(name) for name, _ in known],
                y=[value for _, value in known],
                marker={"color": colour},
                text=[f"{value:.4g}" for _, value in known],
                name={"own": "own best"}.get(method, method),
                hovertemplate="%{x}<br>%{y:.5g}<extra></extra>",
            )
    return Chart(
        id=f"transfer-{what}",
        title=f"By {what}, on each model",
        text=f"Bars of the {what} by method, for {len(rows)} "
        f"{'model' if len(rows) == 1 else 'models'}; lower is better. The table has the numbers.",
        figure=as_json(figure, x="", y=what),
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
        perplexities: Of the same candidates.
        qualities: By proxy.
    """
    import plotly.graph_objects as go

    charts = []
    for number, (name, values) in enumerate(proxies.items()):
        quality = qualities[name]
        low, high = quality.spearman_interval
        figure = go.Figure()
        figure.add_scatter(
            x=[*values],
            y=[*perplexities],
            mode="markers",
            marker={"color": BLUE, "size": 7},
            hovertemplate="proxy %{x:.6g}, perplexity %{y:.5g}<extra></extra>",
        )
        document = as_json(figure, x="proxy", y="perplexity", log_y=True)
        if min(values) > 0 and name != "gini":  # Gini is a share
            document["layout"]["xaxis"] |= {"type": "log", "tickformat": "~g"}
        charts.append(
            Chart(
                id=f"proxy-{number}",
                title=name,
                text=f"Spearman {quality.spearman:+.2f} (95 %: {low:+.2f} to {high:+.2f}), Kendall "
                f"{quality.kendall:+.2f}, regret of the top {quality.top_k} {quality.regret:.1%}.",
                figure=document,
            )
        )
    return charts


def timings_chart(seconds: Mapping[str, float]) -> Chart | None:
    """Seconds of work by stage; None where none is known."""
    import plotly.graph_objects as go

    if not seconds:
        return None
    names = [*seconds][::-1]
    figure = go.Figure()
    figure.add_bar(
        x=[seconds[name] for name in names],
        y=names,
        orientation="h",
        marker={"color": BLUE},
        text=[f"{seconds[name]:.3g} s" for name in names],
        textposition="auto",
        hoverinfo="skip",
    )
    longest = max(seconds, key=lambda name: seconds[name])
    return Chart(
        id="timings",
        title="Seconds of work by stage",
        text=f"{sum(seconds.values()):.3g} s in all, most of it in {longest}. The table has the "
        "numbers.",
        figure=as_json(figure, x="seconds", y="", height=60 + 44 * len(names)),
    )


def _heat_map(cells: Sequence[LayerCell], what: Literal["error", "sparsity"]) -> dict[str, Any]:
    import plotly.graph_objects as go

    blocks = [*dict.fromkeys(cell.block for cell in cells)]
    kinds = [*dict.fromkeys(cell.kind for cell in cells)]
    values = {(cell.block, cell.kind): getattr(cell, what) for cell in cells}
    known = [[values.get((block, kind)) for block in blocks] for kind in kinds]
    bar: dict[str, Any] = {"thickness": 12, "orientation": "h", "y": -0.2, "yanchor": "top"}
    shown: list[list[float | None]] = known
    if what == "error":  # they differ by orders of magnitude
        least = min((v for v in values.values() if v > 0), default=1e-12)
        shown = [[None if v is None else math.log10(max(v, least)) for v in row] for row in known]
        low, high = math.log10(least), math.log10(max(least, *values.values()))
        ticks = [low + (high - low) * i / 3 for i in range(4)]
        bar |= {"tickvals": ticks, "ticktext": [f"{10**tick:.2g}" for tick in ticks]}
    else:
        bar |= {"tickformat": ".0%"}
    figure = go.Figure()
    figure.add_heatmap(
        x=_short(blocks),
        y=_short(kinds),
        z=shown,
        customdata=known,
        colorscale="Cividis",
        colorbar=bar,
        xgap=1,
        ygap=1,
        hovertemplate="%{y}, block %{x}<br>"
        + ("%{customdata:.4g}" if what == "error" else "%{customdata:.2%}")
        + "<extra></extra>",
    )
    figure.update_yaxes(autorange="reversed", type="category")
    figure.update_xaxes(type="category", nticks=10)
    return as_json(figure, x="block", y="", height=150 + 30 * len(kinds))


def _short(names: Sequence[str]) -> list[str]:
    """The last part of each name where these differ; safe in plotly, which reads tags."""
    last = [name.rpartition(".")[2] for name in names]
    return [escape(name) for name in (last if len({*last}) == len(last) else names)]


def _thinned(points: list[Any]) -> list[Any]:
    """At most so many, evenly, the last among them."""
    step = math.ceil(len(points) / MOST_POINTS)
    return points if step <= 1 else [*reversed(points[::-step])]


def _named(trial: ReportTrial) -> str:
    name = trial.method if trial.is_baseline else "found"
    return f"{name}, trial {trial.number}"


def _place(cell: LayerCell) -> str:
    return f"{cell.block}.{cell.kind}" if cell.block else cell.kind


def _words(name: str) -> str:
    return name.replace("_", " ")


def as_json(
    figure: "go.Figure", *, x: str, y: str, height: int = 380, log_y: bool = False
) -> dict[str, Any]:
    """A figure in the looks of the page: readable on a phone, nothing that moves when touched."""
    figure.update_layout(
        template="plotly_white",
        height=height,
        autosize=True,
        dragmode=False,
        margin={"l": 8, "r": 8, "t": 8, "b": 8},
        font={"family": "system-ui, sans-serif", "size": 13, "color": "#1f2937"},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
    )
    figure.update_xaxes(title=x, automargin=True, fixedrange=True)
    figure.update_yaxes(title=y, automargin=True, fixedrange=True)
    if log_y:
        figure.update_yaxes(type="log", dtick="D2", tickformat="~g")
    document: dict[str, Any] = figure.to_plotly_json()
    return document
