"""
A curve: perplexity against sparsity, and its points as a table.
"""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from pho_service.report.charts import BLUE, GREY, METHOD_COLOURS, Chart, as_json
from pho_service.report.section import Section
from pho_service.report.tables import Table

Points = Sequence[Mapping[str, Any]]


def curve_section(document: Mapping[str, Any]) -> Section:
    """The chart and the table of a curve."""
    points, how = document["points"], document["confirmation"]
    texts = [
        f"Perplexities are of {how['tokens']} tokens of {how['text']['source']}, in windows of "
        f"{how['context_length']}. What was found was chosen on them, so it is a little better "
        "there than on other text."
    ]
    seconds = document["calibration"]["seconds"]
    if seconds is not None:
        texts.append(f"The calibration took {seconds:.1f} s, once for all points.")
    return Section(
        id="curve",
        title="Perplexity against sparsity",
        texts=texts,
        tables=[curve_table(points, document["dense"])],
        charts=[curve_chart(points, document["dense"])],
    )


def curve_table(points: Points, dense: float) -> Table:
    """A row for each point."""
    return Table(
        caption=f"Perplexity at each sparsity; the dense model has {dense:.4f}",
        columns=("pattern", "scope", "found", "rise", "Wanda", "RIA", "proxy", "trials", "seconds"),
        rows=[
            (
                each["pattern"], each["scope"], f"{each['perplexity']:.4f}", f"{each['rise']:+.1%}",
                _number(each["wanda"]), _number(each["ria"]), f"{each['proxy']:.6g}",
                str(each["trials"]), f"{each['seconds']:.1f}",
            )
            for each in points
        ],
        note="Seconds are of search, confirmation, Wanda and RIA, without the calibration.",
    )  # fmt: skip


def curve_chart(points: Points, dense: float) -> Chart:
    """
    Perplexity against sparsity: a line through the ratios, N:M beside it.

    Args:
        points: JSON values of each.
        dense: The dense model's perplexity.
    """
    import plotly.graph_objects as go

    figure = go.Figure()
    ratios = [each for each in points if ":" not in each["pattern"]]
    groups = [each for each in points if ":" in each["pattern"]]
    series = (("found", "perplexity", BLUE), *((m, m, METHOD_COLOURS[m]) for m in ("wanda", "ria")))
    for name, key, colour in series:
        for some, mode, symbol in ((ratios, "lines+markers", "circle"), (groups, "markers", "x")):
            if some:
                figure.add_scatter(
                    x=[each["sparsity"] for each in some],
                    y=[each[key] for each in some],
                    text=[escape(each["pattern"]) for each in some],
                    mode=mode,
                    marker={"color": colour, "symbol": symbol, "size": 9},
                    line={"color": colour},
                    hovertemplate="%{text}<br>%{y:.5g}<extra></extra>",
                    name=f"{name}, N:M" if some is groups else name,
                )
    ends = [min(0.0, *(p["sparsity"] for p in points)), max(p["sparsity"] for p in points)]
    figure.add_scatter(
        x=ends, y=[dense, dense], mode="lines", line={"color": GREY, "dash": "dot"},
        hoverinfo="skip", name="dense",
    )  # fmt: skip
    first, last = points[0], points[-1]
    return Chart(
        id="curve-perplexity",
        title="Perplexity by sparsity",
        text=f"From {first['perplexity']:.5g} at {first['pattern']} to {last['perplexity']:.5g} at "
        f"{last['pattern']}; dense {dense:.5g}. Lower is better. The table has the numbers.",
        figure=as_json(figure, x="share of the weights removed", y="perplexity", log_y=True),
    )


def _number(value: float | None) -> str:
    """A perplexity; nothing where a method has none."""
    return "" if value is None else f"{value:.4f}"
