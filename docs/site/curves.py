"""
Draw docs/sizes.svg and docs/minutes.svg for the README from the tables of docs/measurements.

    python docs/site/curves.py
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from math import log

from results import DOCS, STYLE, cells

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 360, 50, 20, 84, 46  # pixels
LEGEND = 184  # pixels between two names of the legend
DARK = "@media(prefers-color-scheme:dark){"
COLOURS = (
    ("#0550ae", "#6cb6ff"), ("#57606a", "#9ea7b3"), ("#1a7f37", "#4ac26b"), ("#9a6700", "#d4a72c"),
)  # fmt: skip

FILES = "| dense | Q6_K, llama-quantize |"  # the first row of the table of files
ZEROS = "| Wanda, 50 % of the weights zero | Q8_0 |"  # behind it is the dense model in that type
MINUTES = "| SmolLM2-135M, 50 %, documentation |"

Point = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Points, joined unless they have names; the axis of values is logarithmic."""

    title: str
    below: str  # What the horizontal axis is
    lines: Mapping[str, Sequence[Point]]
    across: Sequence[float]  # Ticks of the horizontal axis, the ends first and last
    up: Sequence[float]  # Those of the values
    logarithmic: bool = False  # The horizontal axis, too
    names: Mapping[Point, str] = field(default_factory=dict)

    def svg(self) -> str:
        """The picture; its colours follow the reader's light or dark theme."""
        style = STYLE + ".grid{stroke:#8b949e55}.small{font-size:12px}\n"
        for number, colours in enumerate(COLOURS[: len(self.lines)]):
            for before, colour, behind in zip(("", DARK), colours, ("", "}\n"), strict=True):
                style += f"{before}.m{number}{{fill:{colour};stroke:{colour}}}{behind}"
        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">'
            f"<title>{escape(self.title)}</title><style>{style}</style>",
            _text(LEFT - 36, 24, self.title),
        ]
        for tick in self.up:
            y = self._y(tick)
            parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
            parts.append(_text(LEFT - 8, y + 4, f"{tick:g}", "end", "small"))
        for tick in self.across:
            parts.append(_text(self._x(tick), HEIGHT - 26, f"{tick:g}", "middle", "small"))
        for number, (name, points) in enumerate(self.lines.items()):
            left = LEFT + number * LEGEND
            parts.append(f'<g class="m{number}"><circle cx="{left}" cy="50" r="5"/>')
            parts.append(f"{self._marks(sorted(points))}</g>")
            parts.append(_text(left + 12, 55, name))
        for (x, y), name in self.names.items():
            parts.append(_text(self._x(x), self._y(y) - 8, name, "middle", "small"))
        parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, self.below, "middle"))
        return "\n".join([*parts, "</svg>\n"])

    def _marks(self, points: Sequence[Point]) -> str:
        places = [f"{self._x(x):.1f} {self._y(y):.1f}" for x, y in points]
        dots = [place.split() for place in places]
        marks = "".join(f'<circle cx="{x}" cy="{y}" r="4"/>' for x, y in dots)
        if not any(point in self.names for point in points):
            marks += f'<path d="M{"L".join(places)}" fill="none" stroke-width="2"/>'
        return marks

    def _x(self, value: float) -> float:
        first, last = self.across[0], self.across[-1]
        part = (value - first) / (last - first)
        if self.logarithmic:
            part = log(value / first) / log(last / first)
        return LEFT + part * (WIDTH - LEFT - RIGHT)

    def _y(self, value: float) -> float:
        part = log(value / self.up[0]) / log(self.up[-1] / self.up[0])
        return HEIGHT - BOTTOM - part * (HEIGHT - TOP - BOTTOM)


def _text(x: float, y: float, words: str, anchor: str = "start", look: str = "") -> str:
    shown = f' class="{look}"' if look else ""
    return f'<text{shown} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'


def sizes(page: str) -> Chart:
    """Bytes of files for llama.cpp against their perplexity."""
    ours, theirs, cut, zeros = (
        "PHO: --bytes",
        "llama.cpp's types",
        "PHO: cut, --bytes",
        "half zeros",
    )
    lines: dict[str, list[Point]] = {name: [] for name in (ours, theirs, cut, zeros)}
    names: dict[Point, str] = {}
    wanda, eight_bits = page[page.index(ZEROS) :].splitlines()[:2]
    mixes = page[page.index(FILES) :].split("\n\n")[0].splitlines()
    for row in (wanda, eight_bits, *mixes):
        model, kind, size, perplexity = cells(row)[:4]
        point = float(size), float(perplexity.strip("*"))
        by_bytes = ours if model == "dense" else cut
        line = zeros if row == wanda else by_bytes if "--bytes" in kind else theirs
        lines[line].append(point)
        if line in (theirs, zeros):
            names[point] = kind.partition(",")[0]
    return Chart(
        title="Perplexity of SmolLM2-135M in files for llama.cpp; dense in bf16: 13.9 in 271 MB",
        below="MB",
        lines=lines,
        across=(75, 90, 105, 120, 135, 150),
        up=(13.5, 15, 17, 20, 25, 28),
        names=names,
    )


def minutes(page: str) -> Chart:
    """Perplexity by the minutes that a method is given."""
    first, _, *rows = page[page.index(MINUTES) :].split("\n\n")[0].splitlines()
    given = [float(cell) for cell in cells(first)[1:]]
    lines = {}
    for name, *values in (cells(row) for row in rows):
        found = zip(given, values, strict=True)
        lines[name.replace("`", "")] = [(x, float(cell)) for x, cell in found if cell]
    return Chart(
        title="Perplexity of SmolLM2-135M at 50 %, by the minutes that each is given; dense: 14.4",
        below="minutes",
        lines=lines,
        across=given,
        up=(14.36, 15, 16, 17, 18.3),
        logarithmic=True,
    )


def main() -> None:
    """Write both pictures."""
    pages = DOCS / "measurements"
    (DOCS / "sizes.svg").write_text(sizes((pages / "quality.md").read_text()).svg())
    (DOCS / "minutes.svg").write_text(minutes((pages / "speed.md").read_text()).svg())


if __name__ == "__main__":
    main()
