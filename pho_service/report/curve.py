"""
A curve: perplexity against sparsity, and its points as a table.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from pho_service.report.charts import Chart
from pho_service.report.drawing import Series, plot
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
    ratios = [each for each in points if ":" not in each["pattern"]]
    groups = [each for each in points if ":" in each["pattern"]]
    series = []
    for name, key in (("found", "perplexity"), ("wanda", "wanda"), ("ria", "ria")):
        if ratios:
            marks = _marks(ratios, name, key)
            series.append(Series(name=name, look=name, points=marks, line="straight"))
        if groups:
            marks = _marks(groups, name, key)
            series.append(Series(name=f"{name}, N:M", look=name, points=marks, mark="cross"))
    ends = [min(0.0, *(p["sparsity"] for p in points)), max(p["sparsity"] for p in points)]
    level = [(end, dense, "") for end in ends]
    series.append(Series(name="dense", look="dense", points=level, mark=None, line="straight"))
    first, last = points[0], points[-1]
    return Chart(
        id="curve-perplexity",
        title="Perplexity by sparsity",
        text=f"From {first['perplexity']:.5g} at {first['pattern']} to {last['perplexity']:.5g} at "
        f"{last['pattern']}; dense {dense:.5g}. Lower is better. The table has the numbers.",
        drawing=plot(series, x="weights removed", y="perplexity", log_y=True, percent_x=True),
    )


def _marks(points: Points, name: str, key: str) -> list[tuple[float, float, str]]:
    """The points of a method that has a perplexity there."""
    return [
        (each["sparsity"], each[key], f"{name}, {each['pattern']}: {each[key]:.5g}")
        for each in points
        if each[key] is not None
    ]


def _number(value: float | None) -> str:
    """A perplexity; nothing where a method has none."""
    return "" if value is None else f"{value:.4f}"
