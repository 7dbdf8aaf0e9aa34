"""
Draw docs/results.svg for the README from the perplexities in docs/measurements/quality.md.

    python docs/site/results.py
"""

import re
from html import escape
from math import log
from pathlib import Path

DOCS = Path(__file__).parents[1]
HEADING = "| SmolLM2-135M, Python's documentation |"
PATTERNS = ("50 %", "2:4", "70 %")
SHOWN = {  # method: its colour, in light and dark
    "Wanda, norms of the dense model": ("#9a6700", "#d4a72c"),  # the better of the two
    "SparseGPT": ("#57606a", "#9ea7b3"),
    "ADMM": ("#8250df", "#bc8cff"),
    "ALPS": ("#1a7f37", "#4ac26b"),
    "`best`": ("#0550ae", "#6cb6ff"),
}
WIDTH, HEIGHT, MARGIN, TOP, BOTTOM = 720, 340, 20, 76, 40  # pixels
BAR, GAP = 36, 6  # pixels: width of a bar, and between two of a pattern
MOST = 400.0  # perplexity at the top

STYLE = """
text{font:14px system-ui,sans-serif;fill:#24292f}.value{font-size:12px}.dense{stroke:#24292f}
@media(prefers-color-scheme:dark){text{fill:#e6edf3}.dense{stroke:#e6edf3}}
"""


def main() -> None:
    """Write the picture."""
    (DOCS / "results.svg").write_text(
        picture(*table((DOCS / "measurements" / "quality.md").read_text()))
    )


def table(page: str) -> tuple[float, dict[str, list[float]]]:
    """Return the dense perplexity, and that of each method shown, at each of ``PATTERNS``."""
    first, *rows = page[page.index(HEADING) :].split("\n\n")[0].splitlines()
    columns = [cells(first).index(pattern) for pattern in PATTERNS]
    found = {cells(row)[0]: cells(row) for row in rows}
    means = {
        name: [float(found[name][column].split()[0]) for column in columns]
        for name in ("dense", *SHOWN)
    }
    return means.pop("dense")[0], means


def cells(row: str) -> list[str]:
    """The cells of a row of a table."""
    return [cell.strip() for cell in row.strip("|").split("|")]


def picture(dense: float, perplexities: dict[str, list[float]]) -> str:
    """Return the chart as SVG; its colours follow the reader's light or dark theme."""
    floor = HEIGHT - BOTTOM
    lines = []
    style = STYLE
    for number, (name, values) in enumerate(perplexities.items()):
        light, dark = SHOWN[name]
        style += f".m{number}{{fill:{light}}}"
        style += f"@media(prefers-color-scheme:dark){{.m{number}{{fill:{dark}}}}}\n"
        left = MARGIN + number * 130
        lines.append(
            f'<rect class="m{number}" x="{left}" y="42" width="14" height="14"/>'
            f'<text x="{left + 20}" y="54">{escape(name.partition(",")[0].strip("`"))}</text>'
        )
        for group, value in enumerate(values):
            x, height = _x(group, number), _height(value, dense)
            lines.append(
                f'<rect class="m{number}" x="{x:.1f}" y="{floor - height:.1f}" width="{BAR}" '
                f'height="{height:.1f}"/><text class="value" x="{x + BAR / 2:.1f}" '
                f'y="{floor - height - 5:.1f}" text-anchor="middle">{_short(value)}</text>'
            )
    lines += [
        f'<text x="{_x(group, len(SHOWN) / 2) - GAP / 2:.1f}" y="{HEIGHT - 14}" '
        f'text-anchor="middle">{pattern}</text>'
        for group, pattern in enumerate(PATTERNS)
    ]
    lines.append(f'<path class="dense" d="M{MARGIN} {floor}H{WIDTH - MARGIN}"/>')
    title = f"Perplexity of SmolLM2-135M, pruned; bars begin at the dense model's {dense:g}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">'
        f"<title>{title}</title><style>{re.sub(chr(10) + '+', chr(10), style)}</style>\n"
        f'<text x="{MARGIN}" y="24">{title}</text>\n' + "\n".join(lines) + "\n</svg>\n"
    )


def _short(value: float) -> str:
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _x(group: int, place: float) -> float:
    """Left edge of a pattern's bar."""
    width = (WIDTH - 2 * MARGIN) / len(PATTERNS)
    bars = len(SHOWN) * (BAR + GAP) - GAP
    return MARGIN + group * width + (width - bars) / 2 + place * (BAR + GAP)


def _height(perplexity: float, dense: float) -> float:
    """In pixels; the axis is logarithmic."""
    return log(perplexity / dense) / log(MOST / dense) * (HEIGHT - TOP - BOTTOM)


if __name__ == "__main__":
    main()
