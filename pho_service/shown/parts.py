"""
Tables, charts and sentences that results are shown as, and how each is printed and drawn.
"""

import base64
import hashlib
import html
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cache
from typing import Any, Literal, NamedTuple, Self

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from pho_service.spec.document import format_bytes, format_count, number, percent

HEIGHT = 300.0  # of a plot, in pixels, with the room for its words; all are as wide as they may be
_LETTER = 7.0  # width of one, about
_STEP = 24.0  # the room left of a drawing is a multiple of it: a class of the style sheet each
_ROW = 24.0  # height of a bar, or of a row of a map
_CIVIDIS = (  # for those who see no colours well, too; dark is low
    (0, 34, 78), (18, 53, 112), (59, 73, 108), (87, 93, 109), (112, 113, 115), (138, 134, 120),
    (165, 156, 116), (195, 179, 105), (225, 204, 85), (254, 232, 56),
)  # fmt: skip

Mark = Literal["dot", "diamond", "ring", "cross"]


class Dot(NamedTuple):
    """A point of a plot, and what a pointer or a key that is on it is told."""

    x: float
    y: float
    text: str = ""
    trial: int | None = None  # Of a search, as the report counts them


@dataclass(frozen=True, kw_only=True)
class Shape:
    """An element of the drawing; its text is what a text says, or what a pointer is shown."""

    tag: str
    attributes: Mapping[str, str | float]
    text: str = ""
    inside: Sequence["Shape"] = ()

    def __html__(self) -> str:
        """The element, as templates take it without escaping it again."""
        inside = f"{escape(self.text)}"
        if self.text and self.tag != "text":
            inside = f"<title>{inside}</title>"
        inside += "".join(shape.__html__() for shape in self.inside)
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
    """
    A chart: its frame, which is axes and their words, and what is shown in it. Places across are
    in percent of the width that the page gives it, so that words and marks keep their size.
    """

    frame: Sequence[Shape]
    groups: Sequence[Marks]
    look: str = "plot"  # Its classes in the style sheet: they say how much room is around it
    height: float = HEIGHT


@dataclass(frozen=True, kw_only=True)
class Series:
    """Points of a plot."""

    name: str  # What the key calls it
    look: str  # Its class in the style sheet
    points: Sequence[Dot]
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
        (line, [dot._replace(y=min(max(dot.y, low), high)) for dot in _finite(line.points)])
        for line in series
    ]
    shown = [(line, points) for line, points in shown if points]
    dots = [dot for _, points in shown for dot in points]
    up = Scale([dot.y for dot in dots], log=log_y, start=100, end=0)
    across = Scale([dot.x for dot in dots], log=log_x, start=0, end=100)
    labels = [(_tick(value), up.at(value)) for value in up.ticks()]
    frame = [_text(y, "0", "-10")]
    for label, at in labels:
        frame += [_line(at), _text(label, "-6", f"{at:g}%", "end", down=4)]
    for value in across.ticks():
        label = f"{value:.0%}" if percent_x else _tick(value)
        frame.append(_text(label, f"{across.at(value):g}%", "100%", "middle", down=17))
    frame.append(_text(x, "50%", "100%", "middle", down=36))
    return Drawing(
        frame=frame,
        groups=[_drawn(line, points, across, up) for line, points in shown],
        look=f"plot {_left(label for label, _ in labels)}",
    )


def bars(groups: Sequence[tuple[str, Sequence[Bar]]]) -> Drawing:
    """Draw horizontal bars, all on one scale; each group has a heading, empty for none."""
    every = [bar for _, group in groups for bar in group]
    longest = max((bar.value for bar in every), default=0.0)
    frame: list[Shape] = []
    drawn = []
    down = 0.0
    for heading, group in groups:
        if heading:
            frame.append(_text(heading, "0", f"{down + 16:g}"))
            down += _ROW
        for bar in group:
            share = 100 * max(0.0, bar.value / longest) if longest > 0 else 0.0
            shape = _rectangle(0, down + 3, max(0.5, share), _ROW - 6)
            drawn.append(Marks(name=bar.label, look=bar.look, shapes=[shape]))
            frame.append(_text(bar.label, "-8", f"{down + 16:g}", "end"))
            frame.append(_text(bar.text, f"{share:.1f}%", f"{down + 16:g}", right=6))
            down += _ROW
    left = _left(bar.label for bar in every)
    return Drawing(frame=frame, groups=drawn, look=f"bars {left}", height=max(down, _ROW))


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
    width = 100 / len(columns)
    shapes = []
    for (row, column), (value, text) in cells.items():
        share = (place(value) - low) / (high - low) if high > low else 0.5
        shapes.append(
            _rectangle(column * width, row * _ROW, 0.94 * width, _ROW - 2, _colour(share), text)
        )
    below = len(rows) * _ROW
    every = -(-len(columns) // 10)
    frame = [_text(name, "-8", f"{row * _ROW + 15:g}", "end") for row, name in enumerate(rows)]
    for nth, name in enumerate(columns[::every]):
        at = f"{(nth * every + 0.5) * width:.1f}%"
        frame.append(_text(name, at, f"{below + 14:g}", "middle"))
    frame.append(_text(title, "50%", f"{below + 32:g}", "middle"))
    for nth in range(40):
        frame.append(_rectangle(nth * 2.5, below + 42, 2.6, 10, _colour(nth / 39)))
    for nth in range(4):
        value = low + (high - low) * nth / 3
        anchor = "start" if nth == 0 else "end" if nth == 3 else "middle"
        label = format(10.0**value if log else value, form)
        frame.append(_text(label, f"{100 * nth / 3:.1f}%", f"{below + 68:g}", anchor))
    group = Marks(name="cells", look="cells", shapes=shapes)
    return Drawing(frame=frame, groups=[group], look=f"map {_left(rows)}", height=below + 74)


def _tick(value: float) -> str:
    return f"{value:,.0f}" if 1e3 <= abs(value) < 1e6 else f"{value:.4g}"


def _left(labels: Iterable[str]) -> str:
    """The class that leaves room for labels left of a drawing."""
    letters = max(map(len, labels), default=0)
    return f"left-{min(10, math.ceil((10 + _LETTER * letters) / _STEP))}"


def _drawn(series: Series, points: Sequence[Dot], across: Scale, up: Scale) -> Marks:
    places = [dot._replace(x=across.at(dot.x), y=up.at(dot.y)) for dot in points]
    shapes = []
    if series.line is not None and len(places) > 1:
        corners = [(places[0].x, places[0].y)]
        for dot in places[1:]:
            if series.line == "steps":
                corners.append((dot.x, corners[-1][1]))
            corners.append((dot.x, dot.y))
        joined = " ".join(f"{x:g},{y:g}" for x, y in dict.fromkeys(corners))
        line = Shape(tag="polyline", attributes={"points": joined})
        # Stretched to the width and height of the plot; marks and words are not.
        stretched = {"viewBox": "0 0 100 100", "preserveAspectRatio": "none"}
        shapes.append(Shape(tag="svg", attributes=stretched, inside=[line]))
    if series.mark is not None:
        shapes += [_mark(series.mark, dot) for dot in places]
    sample = (
        _symbol(series.mark) if series.mark else Shape(tag="path", attributes={"d": "M-8 0h16"})
    )
    return Marks(name=series.name, look=series.look, shapes=shapes, sample=sample)


def _mark(mark: Mark, dot: Dot) -> Shape:
    x, y = f"{dot.x:g}%", f"{dot.y:g}%"
    if mark in ("dot", "ring"):
        return _symbol(mark, dot, cx=x, cy=y)
    return Shape(tag="svg", attributes={"x": x, "y": y}, inside=[_symbol(mark, dot)])


def _symbol(mark: Mark, dot: Dot | None = None, **place: str) -> Shape:
    """A mark, around the origin if it has no place."""
    attributes: dict[str, str | float] = {**place, "class": mark}
    if mark in ("dot", "ring"):
        attributes["r"] = 4 if mark == "dot" else 8
    else:
        attributes["d"] = "M0-6 6 0 0 6-6 0z" if mark == "diamond" else "M-5-5 5 5M5-5-5 5"
    if dot is not None and dot.trial is not None:
        attributes["data-trial"] = dot.trial
    tag = "circle" if mark in ("dot", "ring") else "path"
    return Shape(tag=tag, attributes=attributes, text="" if dot is None else dot.text)


def _text(
    text: str, x: str, y: str, anchor: str = "start", *, right: float = 0, down: float = 0
) -> Shape:
    moved = {name: value for name, value in (("dx", right), ("dy", down)) if value}
    return Shape(tag="text", attributes={"x": x, "y": y, **moved, "text-anchor": anchor}, text=text)


def _line(at: float) -> Shape:
    ends: dict[str, str | float] = {"x1": 0, "x2": "100%", "y1": f"{at:g}%", "y2": f"{at:g}%"}
    return Shape(tag="line", attributes={**ends, "class": "grid"})


def _rectangle(
    x: float, y: float, width: float, height: float, fill: str = "", text: str = ""
) -> Shape:
    """A rectangle, whose place across and width are in percent."""
    attributes: dict[str, str | float] = {
        "x": f"{x:.4g}%", "y": round(y, 1), "width": f"{width:.4g}%", "height": round(height, 1)
    }  # fmt: skip
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
    return [dot for dot in points if math.isfinite(dot.x) and math.isfinite(dot.y)]


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
class Figure:
    """A value to be read first, and what it is."""

    value: str
    name: str
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Hero:
    """The result in some large figures, and where it stands between what it is compared with."""

    figures: Sequence[Figure]
    text: str = ""  # A sentence that says the same, for those who do not see the bar
    # On a bar, a look in the style sheet, words, and a place in percent each: the dense model, a
    # baseline, and the result; none where they are not known.
    places: Sequence[tuple[str, str, float]] = ()


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of a page under a heading."""

    id: str
    title: str
    hero: Hero | None = None  # Its tables tell the same with more figures, and are folded
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
        return bool(self.hero or self.tables or self.charts or self.events)


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
