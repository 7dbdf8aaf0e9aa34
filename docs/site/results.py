"""
Draw the perplexities of SmolLM2-135M in docs/quality.md for the README: docs/results.svg.

    python docs/site/results.py
"""

import re
from html import escape
from math import log
from pathlib import Path

DOCS = Path(__file__).parents[1]
HEADING = "| SmolLM2-135M, dense 14.36 |"
DENSE = 14.36
RATIOS = ("50 %", "60 %", "70 %")
SHOWN = {  # method: its colour, in light and dark
    "Wanda": ("#9a6700", "#d4a72c"),
    "SparseGPT": ("#57606a", "#9ea7b3"),
    "`crepe-plus`": ("#1a7f37", "#4ac26b"),
    "`best`": ("#0550ae", "#6cb6ff"),
}
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 340, 70, 190, 46, 44  # pixels
TICKS = (15, 30, 60, 120, 240)
BOUNDS = (13.0, 400.0)  # perplexity, below and above

STYLE = """
text{font:14px system-ui,sans-serif;fill:#24292f}.axis{stroke:#d0d7de}
.dense{stroke:#24292f;stroke-dasharray:5 4}
@media(prefers-color-scheme:dark){text{fill:#e6edf3}.axis{stroke:#3d444d}.dense{stroke:#e6edf3}}
"""


def main() -> None:
    """Write the picture."""
    (DOCS / "results.svg").write_text(picture(table((DOCS / "quality.md").read_text())))


def table(page: str) -> dict[str, list[float]]:
    """Return the perplexity of each method that is shown, at each of ``RATIOS``."""
    first, *rows = page[page.index(HEADING) :].split("\n\n")[0].splitlines()
    columns = [_cells(first).index(ratio) for ratio in RATIOS]
    found = {_cells(row)[0]: _cells(row) for row in rows}
    return {name: [float(found[name][column]) for column in columns] for name in SHOWN}


def _cells(row: str) -> list[str]:
    return [cell.strip() for cell in row.strip("|").split("|")]


def picture(perplexities: dict[str, list[float]]) -> str:
    """Return the chart as SVG; its colours follow the reader's light or dark theme."""
    lines = [
        f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{_y(t):.1f}" y2="{_y(t):.1f}"/>'
        f'<text x="{LEFT - 10}" y="{_y(t) + 5:.1f}" text-anchor="end">{t}</text>'
        for t in TICKS
    ]
    lines += [
        f'<text x="{_x(i):.1f}" y="{HEIGHT - 16}" text-anchor="middle">{ratio} removed</text>'
        for i, ratio in enumerate(RATIOS)
    ]
    y = _y(DENSE)
    lines.append(
        f'<line class="dense" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text x="{WIDTH - RIGHT + 24}" y="{y + 5:.1f}">dense {DENSE}</text>'
    )
    style = STYLE
    for number, (name, values) in enumerate(perplexities.items()):
        light, dark = SHOWN[name]
        style += f".m{number}{{stroke:{light};fill:{light}}}"
        style += f"@media(prefers-color-scheme:dark){{.m{number}{{stroke:{dark};fill:{dark}}}}}\n"
        points = [(_x(i), _y(value)) for i, value in enumerate(values)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        lines.append(
            f'<polyline class="m{number}" style="fill:none" stroke-width="3" points="{path}"/>'
        )
        lines += [f'<circle class="m{number}" cx="{x:.1f}" cy="{y:.1f}" r="4"/>' for x, y in points]
        label = f"{name.strip('`')} {values[-1]:g}"
        lines.append(
            f'<text class="m{number}" style="stroke:none" x="{WIDTH - RIGHT + 24}" '
            f'y="{points[-1][1] + 5:.1f}">{escape(label)}</text>'
        )
    title = "Perplexity of SmolLM2-135M by the share of weights that were removed"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">'
        f"<title>{title}</title><style>{re.sub(chr(10) + '+', chr(10), style)}</style>\n"
        f'<text x="{LEFT}" y="24">{title}</text>\n' + "\n".join(lines) + "\n</svg>\n"
    )


def _x(index: int) -> float:
    return LEFT + 40 + index * (WIDTH - LEFT - RIGHT - 60) / (len(RATIOS) - 1)


def _y(perplexity: float) -> float:
    low, high = map(log, BOUNDS)
    return HEIGHT - BOTTOM - (log(perplexity) - low) / (high - low) * (HEIGHT - TOP - BOTTOM)


if __name__ == "__main__":
    main()
