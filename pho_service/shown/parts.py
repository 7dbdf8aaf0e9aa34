"""
Tables, charts and sentences that results are shown as, and how each is printed and drawn.
"""

import base64
import hashlib
import html
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cache
from typing import Any, Literal, Self

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from pho_service.spec.document import format_bytes, format_count, number, percent

WIDTH, HEIGHT = 480.0, 300.0  # of a chart, in the units of its view box
_TOP, _BOTTOM, _RIGHT = 24.0, 42.0, 12.0  # room around a plot
_LETTER = 7.0  # width of one, about
_ROW = 24.0  # height of a bar, or of a row of a map
_CIVIDIS = (  # for those who see no colours well, too; dark is low
    (0, 34, 78), (18, 53, 112), (59, 73, 108), (87, 93, 109), (112, 113, 115), (138, 134, 120),
    (165, 156, 116), (195, 179, 105), (225, 204, 85), (254, 232, 56),
)  # fmt: skip

Mark = Literal["dot", "diamond", "ring", "cross"]
Dot = tuple[float, float, str]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """An element of the drawing; its text is what a text says, or what a pointer is shown."""

    tag: str
    attributes: Mapping[str, str | float]
    text: str = ""

    def __html__(self) -> str:
        """The element, as templates take it without escaping it again."""
        inside = f"{escape(self.text)}"
        if self.text and self.tag != "text":
            inside = f"<title>{inside}</title>"
        pairs = "".join(f' {name}="{escape(value)}"' for name, value in self.attributes.items())
        return f"<{self.tag}{pairs}>{inside}</{self.tag}>"


@dataclass(frozen=True, kw_only=True)
class Marks:
    """Shapes that belong together: the marks of a series, or a bar."""

    name: str  # What a key calls it
    look: str  # Its class in the style sheet
    shapes: Sequence[Shape]
    sample: Shape | None = None  # What a key shows of it; None in a drawing without a key

    def __html__(self) -> str:
        inside = "".join(shape.__html__() for shape in self.shapes)
        return f'<g class="{escape(self.look)}" data-name="{escape(self.name)}">{inside}</g>'


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """A chart: its frame, which is axes and their words, and what is shown in it."""

    frame: Sequence[Shape]
    groups: Sequence[Marks]
    width: float = WIDTH
    height: float = HEIGHT


@dataclass(frozen=True, kw_only=True)
class Series:
    """Points of a plot."""

    name: str  # What the key calls it
    look: str  # Its class in the style sheet
    points: Sequence[Dot]  # x, y, and what a pointer over the mark is shown
    mark: Mark | None = "dot"  # None for a line alone
    # How the points are joined; None for marks alone.
    line: Literal["straight", "steps"] | None = None


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A bar, with a label in front of it and a text behind it; below 0 it has no length."""

    label: str
    look: str
    value: float
    text: str


def worth_showing(values: Sequence[float], *, maximised: bool) -> tuple[float, float]:
    """The range of most values: from the best to the worst of the better nine tenths."""
    # A few that are far worse would leave no room for the rest.
    ordered = sorted(values, reverse=maximised)
    ends = ordered[0], ordered[int(0.9 * (len(ordered) - 1))]
    return min(ends), max(ends)


class Scale:
    """Where values lie on an axis; it is logarithmic only if all of them are above 0."""

    def __init__(self, values: Sequence[float], *, log: bool, start: float, end: float) -> None:
        self._log = log and min(values) > 0
        low, high = min(map(self._place, values)), max(map(self._place, values))
        room = 0.04 * (high - low) or 0.05 * abs(high) or 1.0
        self._low, self._high = low - room, high + room
        self._start, self._end = start, end

    def _place(self, value: float) -> float:
        return math.log10(value) if self._log else value

    def at(self, value: float) -> float:
        share = (self._place(value) - self._low) / (self._high - self._low)
        return round(self._start + share * (self._end - self._start), 1)

    def ticks(self) -> list[float]:
        """Round values along the axis, about five."""
        low, high = self._low, self._high
        if not self._log:
            return _round_values(low, high)
        decades = range(math.floor(low), math.ceil(high) + 1)
        every = max(1, len(decades) // 6)
        steps = (1.0, 2.0, 5.0) if len(decades) < 4 else (1.0,)
        ticks = [m * 10.0**k for k in decades[::every] for m in steps]
        ticks = [value for value in ticks if low <= math.log10(value) <= high]
        return ticks if len(ticks) > 2 else _round_values(10.0**low, 10.0**high)


def plot(
    series: Sequence[Series],
    *,
    x: str,
    y: str,
    log_x: bool = False,
    log_y: bool = False,
    percent_x: bool = False,
    within: tuple[float, float] = (-math.inf, math.inf),
) -> Drawing:
    """Draw series on two axes; points that are not finite are left out."""
    # ``within`` is the lowest and the highest y: what lies beyond is drawn at the edge.
    low, high = within
    shown = [
        (line, [(x, min(max(y, low), high), text) for x, y, text in _finite(line.points)])
        for line in series
    ]
    shown = [(line, points) for line, points in shown if points]
    places = [point for _, points in shown for point in points]
    up = Scale([p[1] for p in places], log=log_y, start=HEIGHT - _BOTTOM, end=_TOP)
    labels = [(f"{value:.4g}", up.at(value)) for value in up.ticks()]
    left = 10 + _LETTER * max((len(label) for label, _ in labels), default=1)
    across = Scale([p[0] for p in places], log=log_x, start=left, end=WIDTH - _RIGHT)
    frame = [_text(y, 0, 12)]
    for label, at in labels:
        frame += [_line(left, at, WIDTH - _RIGHT, at), _text(label, left - 6, at + 4, "end")]
    for value in across.ticks():
        label = f"{value:.0%}" if percent_x else f"{value:.4g}"
        frame.append(_text(label, across.at(value), HEIGHT - _BOTTOM + 17, "middle"))
    frame.append(_text(x, (left + WIDTH - _RIGHT) / 2, HEIGHT - 6, "middle"))
    return Drawing(frame=frame, groups=[_drawn(line, pts, across, up) for line, pts in shown])


def bars(groups: Sequence[tuple[str, Sequence[Bar]]]) -> Drawing:
    """Draw horizontal bars, all on one scale; each group has a heading, empty for none."""
    every = [bar for _, group in groups for bar in group]
    longest = max((bar.value for bar in every), default=0.0)
    left = 10 + _LETTER * max((len(bar.label) for bar in every), default=0)
    right = WIDTH - 12 - _LETTER * max((len(bar.text) for bar in every), default=0)
    frame: list[Shape] = []
    drawn = []
    down = 0.0
    for heading, group in groups:
        if heading:
            frame.append(_text(heading, 0, down + 16))
            down += _ROW
        for bar in group:
            length = max(0.0, bar.value / longest * (right - left)) if longest > 0 else 0.0
            shape = _rectangle(left, down + 3, max(1.0, length), _ROW - 6)
            drawn.append(Marks(name=bar.label, look=bar.look, shapes=[shape]))
            frame.append(_text(bar.label, left - 8, down + 16, "end"))
            frame.append(_text(bar.text, left + length + 6, down + 16))
            down += _ROW
    return Drawing(frame=frame, groups=drawn, height=max(down, _ROW))


def heat_map(
    rows: Sequence[str],
    columns: Sequence[str],
    cells: Mapping[tuple[int, int], tuple[float, str]],
    *,
    log: bool,
    title: str,
    form: str,
) -> Drawing:
    """Draw a map: bright is high."""
    # A cell, by row and column, is a value and what a pointer over it is shown. With ``log``, equal
    # factors have equal steps of colour.
    values = [value for value, _ in cells.values()]
    least = min((value for value in values if value > 0), default=1e-12)
    place = (lambda value: math.log10(max(value, least))) if log else float
    low, high = place(min(values)), place(max(values))
    left = 8 + _LETTER * max(len(name) for name in rows)
    width = (WIDTH - left) / len(columns)
    shapes = []
    for (row, column), (value, text) in cells.items():
        share = (place(value) - low) / (high - low) if high > low else 0.5
        shapes.append(
            _rectangle(
                left + column * width, row * _ROW, 0.94 * width, _ROW - 2, _colour(share), text
            )
        )
    below = len(rows) * _ROW
    every = -(-len(columns) // 10)
    frame = [_text(name, left - 8, row * _ROW + 15, "end") for row, name in enumerate(rows)]
    for nth, name in enumerate(columns[::every]):
        frame.append(_text(name, left + (nth * every + 0.5) * width, below + 14, "middle"))
    frame.append(_text(title, (left + WIDTH) / 2, below + 32, "middle"))
    strip = (WIDTH - left) / 40
    for nth in range(40):
        colour = _colour(nth / 39)
        frame.append(_rectangle(left + nth * strip, below + 42, strip + 0.5, 10, colour))
    for nth in range(4):
        value = low + (high - low) * nth / 3
        anchor = "start" if nth == 0 else "end" if nth == 3 else "middle"
        label = format(10.0**value if log else value, form)
        frame.append(_text(label, left + (WIDTH - left) * nth / 3, below + 68, anchor))
    group = Marks(name="cells", look="cells", shapes=shapes)
    return Drawing(frame=frame, groups=[group], height=below + 74)


def _drawn(series: Series, points: Sequence[Dot], across: Scale, up: Scale) -> Marks:
    places = [(across.at(x), up.at(y), text) for x, y, text in points]
    shapes = []
    if series.line is not None and len(places) > 1:
        corners = [places[0][:2]]
        for x, y, _ in places[1:]:
            if series.line == "steps":
                corners.append((x, corners[-1][1]))
            corners.append((x, y))
        joined = " ".join(f"{x:g},{y:g}" for x, y in dict.fromkeys(corners))
        shapes.append(Shape(tag="polyline", attributes={"points": joined}))
    if series.mark is not None:
        shapes += [_mark(series.mark, *place) for place in places]
    line = Shape(tag="path", attributes={"d": "M-8 0h16"})
    sample = line if series.mark is None else _mark(series.mark, 0, 0, "")
    return Marks(name=series.name, look=series.look, shapes=shapes, sample=sample)


def _mark(mark: Mark, x: float, y: float, text: str) -> Shape:
    if mark in ("dot", "ring"):
        radius = 3.5 if mark == "dot" else 8
        attributes: dict[str, str | float] = {"cx": x, "cy": y, "r": radius}
        return Shape(tag="circle", attributes={**attributes, "class": mark}, text=text)
    drawn = "m0-6 6 6-6 6-6-6z" if mark == "diamond" else "m-5-5 10 10m0-10-10 10"
    return Shape(tag="path", attributes={"d": f"M{x:g} {y:g}{drawn}", "class": mark}, text=text)


def _text(text: str, x: float, y: float, anchor: str = "start") -> Shape:
    where: dict[str, str | float] = {"x": round(x, 1), "y": round(y, 1)}
    return Shape(tag="text", attributes={**where, "text-anchor": anchor}, text=text)


def _line(x1: float, y1: float, x2: float, y2: float) -> Shape:
    return Shape(tag="path", attributes={"d": f"M{x1:g} {y1:g}L{x2:g} {y2:g}", "class": "grid"})


def _rectangle(
    x: float, y: float, width: float, height: float, fill: str = "", text: str = ""
) -> Shape:
    place = {"x": x, "y": y, "width": width, "height": height}
    attributes: dict[str, str | float] = {name: round(v, 1) for name, v in place.items()}
    return Shape(tag="rect", attributes=attributes | ({"fill": fill} if fill else {}), text=text)


def _colour(share: float) -> str:
    """A colour between the lowest, 0, and the highest, 1."""
    place = min(max(share, 0.0), 1.0) * (len(_CIVIDIS) - 1)
    first = min(int(place), len(_CIVIDIS) - 2)
    mixed = (
        round(a + (place - first) * (b - a))
        for a, b in zip(_CIVIDIS[first], _CIVIDIS[first + 1], strict=True)
    )
    return "#" + "".join(f"{part:02x}" for part in mixed)


def _round_values(low: float, high: float) -> list[float]:
    """About five multiples of a round step between two values."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough)) if rough > 0 else 0.0
    if not (power > 0 and math.isfinite(power)):  # too near to each other, or too far apart
        return [low]
    step = power * next(m for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))
    first = math.ceil(low / step)
    multiples = [(first + i) * step for i in range(8)]
    return [0.0 if abs(value) < step / 2 else value for value in multiples if value <= high]


def _finite(points: Sequence[Dot]) -> list[Dot]:
    return [point for point in points if math.isfinite(point[0]) and math.isfinite(point[1])]


@dataclass(frozen=True)
class Table:
    """Rows of text under headings."""

    columns: Sequence[str]  # The headings; the first column has those of the rows
    rows: Sequence[Sequence[Any]]  # A cell for each heading; None is an empty one
    title: str = ""  # One line above
    notes: Sequence[str] = ()  # Sentences below
    numbers: bool = True  # Whether all columns but the first are aligned right
    marked: int | None = None  # The row to look at first; None where there is none
    texts: bool = False  # Whether cells are of people or models, and nothing in them is markup

    def __str__(self) -> str:
        cells = [list(self.columns), *self.cells]
        widths = [max(len(row[i]) for row in cells) for i in range(len(self.columns))]
        lines = [
            "  ".join(
                cell.rjust(width) if index and self.numbers else cell.ljust(width)
                for index, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in cells
        ]
        lines.insert(1, "  ".join("-" * width for width in widths))
        return "\n".join([*filter(None, [self.title]), *lines, *self.notes])

    def markdown(self) -> str:
        rule, cell_of = "---:" if self.numbers else "---", _literal if self.texts else _escaped
        lines = [
            f"| {' | '.join(map(_escaped, self.columns))} |",
            f"| {' | '.join(['---', *[rule] * (len(self.columns) - 1)])} |",
            *(f"| {' | '.join(map(cell_of, row))} |" for row in self.cells),
        ]
        title = [f"**{_escaped(self.title)}**", ""] if self.title else []
        notes = ["", *map(_escaped, self.notes)] if self.notes else []
        return "\n".join([*title, *lines, *notes])

    def html(self) -> str:
        head = "".join(f"<th>{html.escape(name)}</th>" for name in self.columns)
        body = "".join(
            f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>"
            for row in self.cells
        )
        notes = "".join(f"<p>{html.escape(note)}</p>" for note in self.notes)
        title = f"<caption>{html.escape(self.title)}</caption>" if self.title else ""
        return f"<table>{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{notes}"

    @property
    def cells(self) -> list[list[str]]:
        return [["" if cell is None else str(cell) for cell in row] for row in self.rows]

    def without_empty(self) -> Self:
        """The table without the columns in which nothing stands."""
        cells = self.cells
        return self.columns_but(
            [name for i, name in enumerate(self.columns) if not any(row[i] for row in cells)]
        )

    def columns_but(self, names: Sequence[str]) -> Self:
        places = [i for i, name in enumerate(self.columns) if name not in names]
        return replace(
            self,
            columns=[self.columns[i] for i in places],
            rows=[[row[i] for i in places] for row in self.cells],
        )


def pairs_table(title: str, heading: str, pairs: Sequence[tuple[str, str]]) -> Table:
    return Table((heading, "value"), pairs, title=title, numbers=False)


class Shown(ABC):
    """Something with a table, shown as one in terminals and notebooks."""

    @abstractmethod
    def _shown(self) -> Table:
        """The table."""

    def _records(self) -> Sequence[Any]:
        """The rows of a data frame: dataclasses, or values by the names of their columns."""
        table = self._shown()
        return [dict(zip(table.columns, row, strict=True)) for row in table.rows]

    def to_dataframe(self) -> Any:
        """Give the table as a data frame of pandas, which is to be installed."""
        try:
            import pandas  # type: ignore[import-untyped]
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "a data frame needs pandas: pip install pandas", name="pandas"
            ) from error
        return pandas.DataFrame(self._records())

    def __repr__(self) -> str:
        return str(self._shown())

    def _repr_markdown_(self) -> str:
        return self._shown().markdown()

    def _repr_html_(self) -> str:
        return self._shown().html()


@dataclass(frozen=True, repr=False)
class Drawn:
    """A page of HTML; a notebook shows it."""

    page: str

    def __repr__(self) -> str:
        size = format_bytes(len(self.page.encode()))
        return f"<page of {size}: a notebook shows it, plot(path) writes it>"

    def _repr_html_(self) -> str:
        style = "border: 0; width: 100%; height: 40rem"
        return f'<iframe srcdoc="{escape(self.page)}" title="plot" style="{style}"></iframe>'


@dataclass(frozen=True, kw_only=True)
class Chart:
    id: str
    title: str
    text: str  # What it shows, for those who do not see it
    drawing: Drawing


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of a page under a heading."""

    id: str
    title: str
    texts: Sequence[str] = ()  # Sentences; what is not known is said here
    tables: Sequence[Table] = ()
    charts: Sequence[Chart] = ()
    commands: Sequence[str] = ()  # To be run with the result, one a line
    # Documents as they are, with a caption each; they are folded.
    blocks: Sequence[tuple[str, str]] = ()
    events: Sequence[tuple[datetime, str]] = ()  # What happened, with the time; the newest first

    @property
    def is_known(self) -> bool:
        """Return whether it has more than a sentence on what is missing."""
        return bool(self.tables or self.charts or self.events)


def page(
    title: str,
    sections: Sequence[Section],
    *,
    lead: str = "",
    error: str | None = None,
    back: str | None = None,
) -> str:
    """Sections as one page of HTML that asks the network for nothing."""
    return (
        template_environment()
        .get_template("page.html")
        .render(
            title=title, lead=lead, error=error, back=back, sections=sections,
            policy=content_security_policy(), style=_style(),
        )
    )  # fmt: skip


@cache
def content_security_policy() -> str:
    """The policy that lets a page look as it does, without scripts and without the network."""
    return (
        f"default-src 'none'; style-src {policy_hash(_style())}; base-uri 'none'; "
        "form-action 'none'"
    )


@cache
def _style() -> Markup:
    return Markup(template_environment().get_template("page.css").render())  # noqa: S704 - ours


def policy_hash(source: str) -> str:
    """The source of a script or a style as a content security policy names it."""
    digest = base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
    return f"'sha256-{digest}'"


@cache
def template_environment(*folder: str) -> Environment:
    """
    Jinja for the templates here, and for those in a folder of another package: everything is
    escaped, nothing may be missing.
    """
    # A template is read once: a policy names what is in it by its hash, and both must be of one
    # time.
    loader = PackageLoader("pho_service.shown", ".")
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(*folder), loader]) if folder else loader,
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        auto_reload=False,
    )
    environment.filters |= {
        "number": number, "percent": percent, "quantity": format_count, "code": as_code,
    }  # fmt: skip
    return environment


def as_code(text: str) -> Markup:
    """A text in which what stands between backticks is code."""
    return Markup(re.sub(r"`+([^`]+)`+", r"<code>\1</code>", str(escape(text))))  # noqa: S704 - escaped


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ")


def _literal(text: str) -> str:
    """A text for Markdown in which every sign stands for itself."""
    return re.sub(r"[!-/:-@\[-`{-~]", r"\\\g<0>", " ".join(text.split()))
