"""
Draw which part of PHO imports which, and list its folders: docs/architecture.svg and .md.

    python docs/site/architecture.py

The list has the first sentence of each folder's docstring. The picture is that of the import graph.
A line that follows from others is left out: what imports the search need not be joined with what
the search imports. Every line goes down but those of ``UPWARDS``, which are dashed; other parts
that import each other are an error.
"""

import ast
import re
from collections.abc import Mapping
from graphlib import TopologicalSorter
from html import escape
from itertools import pairwise
from pathlib import Path

import grimp

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "architecture.md"
TREE = re.compile(r"(?<=\n## The tree\n\n```text\n).*?(?=```\n)", re.DOTALL)
LISTED = ("pho_service", "storage", "workers")
SENTENCE = re.compile(r"[.;](?=\s|$)")

PACKAGES = ("workers", "pho_service", "storage")
TOGETHER = {
    "errors": "host",
    "progress": "host",
    "__main__": "cli",
}  # modules that belong to no folder
PUBLIC = "interface"  # and the names that `import pho_service` gives
UPWARDS = {("spec", "tuning")}  # the document of a job builds the plan that it asks for
LABELS = {"host": "host, errors, progress", PUBLIC: "interface, __init__"}

WIDTH, ROW, BOX, HEIGHT, PAD, GAP = 820, 84, 128, 36, 16, 24  # pixels
SWEEPS = 8  # over the rows, until the boxes stand well

Graph = Mapping[str, set[str]]
Point = tuple[float, float]
Stop = tuple[str, str] | tuple[str, str, int]


def main() -> None:
    """Write the picture and the list."""
    PAGE.with_suffix(".svg").write_text(picture(imports()))
    PAGE.write_text(TREE.sub(lambda _: tree(), PAGE.read_text(), count=1))


def tree(root: Path = ROOT) -> str:
    """List the folders of the product, a line each: name and first sentence of the docstring."""
    packages = [path for name in LISTED for path in sorted((root / name).rglob("__init__.py"))]
    lines = ((path.parent.relative_to(root), _first_sentence(path)) for path in packages)
    return "".join(
        f"{'  ' * (len(folder.parts) - 1)}{folder.name + '/':22} {sentence}\n"
        for folder, sentence in lines
        if sentence
    )


def _first_sentence(path: Path) -> str:
    """What a file's docstring begins with, as plain text; empty if there is none."""
    docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
    paragraph = " ".join(docstring.partition("\n\n")[0].split())
    return re.sub(r":\w+:(?=`)|`", "", SENTENCE.split(paragraph)[0])


def imports() -> dict[str, set[str]]:
    """Which parts each part imports: the folders of ``pho_service``, and the other packages."""
    graph = grimp.build_graph(*PACKAGES, cache_dir=None)
    found: dict[str, set[str]] = {_part(module): set() for module in graph.modules}
    for module in graph.modules:
        for imported in graph.find_modules_directly_imported_by(module):
            found[_part(module)].add(_part(imported))
    return {part: below - {part} for part, below in found.items()}


def _part(module: str) -> str:
    package, *rest = module.split(".")
    if package != "pho_service":
        return package
    name = rest[0] if rest else PUBLIC
    return TOGETHER.get(name, name)


def picture(graph: Graph) -> str:
    """
    Return the graph as SVG: what others rest on is below.

    Raises:
        graphlib.CycleError: Parts import each other; names them.
    """
    upwards = [(part, below) for part, below in sorted(UPWARDS) if below in graph.get(part, ())]
    graph = {part: {b for b in graph[part] if (part, b) not in UPWARDS} for part in graph}
    order = [*TopologicalSorter(graph).static_order()]  # what is imported comes first
    reached: dict[str, set[str]] = {}
    level: dict[str, int] = {}
    for part in order:
        reached[part] = graph[part].union(*(reached[below] for below in graph[part]))
        level[part] = 1 + max((level[below] for below in graph[part]), default=-1)
    lines = [
        (part, below)
        for part in sorted(graph)
        for below in sorted(graph[part])
        if not any(below in reached[other] for other in graph[part])
    ]
    place = _places(level, lines)
    height = ROW * (max(level.values()) + 1) + PAD
    drawn = [_line([place[stop] for stop in _stops(level, *line)]) for line in lines]
    for part, below in upwards:  # beside the line that goes down
        (x, y), (to_x, to_y) = place[part, part], place[below, below]
        drawn.append(_line([(x + 2 * GAP, y), (to_x + 2 * GAP, to_y)], "4 3"))
    drawn += [_box(part, *place[part, part]) for part in sorted(graph)]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
            f'width="{WIDTH}" height="{height}" font-family="sans-serif" font-size="13">',
            f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>',
            *drawn,
            "</svg>\n",
        ]
    )


def _stops(level: Mapping[str, int], part: str, below: str) -> list[Stop]:
    """What a line passes: the part, its own place between the boxes of each row, and the other."""
    rows = range(level[part] - 1, level[below], -1)
    return [(part, part), *((part, below, row) for row in rows), (below, below)]


def _places(level: Mapping[str, int], lines: list[tuple[str, str]]) -> dict[Stop, Point]:
    """The middle of each stop: a row for each level, each stop near to what it is joined with."""
    rows: list[list[Stop]] = [[] for _ in range(max(level.values()) + 1)]
    joined: dict[Stop, list[Stop]] = {}
    for part in sorted(level):
        rows[level[part]].append((part, part))
    for part, below in lines:
        stops = _stops(level, part, below)
        for row, stop in zip(range(level[part], level[below] - 1, -1), stops, strict=True):
            if len(stop) == 3:
                rows[row].append(stop)
        for upper, lower in pairwise(stops):
            joined.setdefault(upper, []).append(lower)
            joined.setdefault(lower, []).append(upper)
    place: dict[Stop, Point] = {}
    for _ in range(SWEEPS):
        for number in [*range(len(rows) - 1, -1, -1), *range(len(rows))]:
            wanted = {}
            for stop in rows[number]:
                xs = [place[other][0] for other in joined.get(stop, []) if other in place]
                wanted[stop] = sum(xs) / len(xs) if xs else WIDTH / 2
            rows[number].sort(key=lambda stop: (wanted[stop], str(stop)))
            widths = [BOX + 28 if len(stop) == 2 else GAP for stop in rows[number]]
            free = (WIDTH - sum(widths)) / (len(widths) + 1)
            x = free
            for stop, width in zip(rows[number], widths, strict=True):
                y = (len(rows) - 1 - number) * ROW + PAD + HEIGHT / 2
                place[stop] = (round(x + width / 2), y)
                x += width + free
    return place


def _line(points: list[Point], dashes: str = "none") -> str:
    path = ""
    for (x, y), (to_x, to_y) in pairwise(points):
        side = HEIGHT / 2 if to_y > y else -HEIGHT / 2
        y, to_y = y + side, to_y - side
        half = (to_y - y) / 2
        path += f"{'L' if path else 'M'}{x:g} {y:g}"
        path += f"C{x:g} {y + half:g} {to_x:g} {to_y - half:g} {to_x:g} {to_y:g}"
    style = f'fill="none" stroke="#7986cb" stroke-width="1.4" stroke-dasharray="{dashes}"'
    return f'<path d="{path}" {style}/>'


def _box(part: str, x: float, y: float) -> str:
    label = escape(LABELS.get(part, part))
    width = BOX if len(label) < 16 else BOX + 40
    return (
        f'<rect x="{x - width / 2:g}" y="{y - HEIGHT / 2:g}" width="{width}" height="{HEIGHT}" '
        f'rx="6" fill="#e8eaf6" stroke="#3949ab"/>'
        f'<text x="{x:g}" y="{y + 5:g}" text-anchor="middle">{label}</text>'
    )


if __name__ == "__main__":
    main()
