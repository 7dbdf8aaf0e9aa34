"""
Tables that read well in a terminal and in a notebook.
"""

import html
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Table:
    """
    Rows of text under headings.

    Attributes:
        columns: The headings.
        rows: A cell for each heading; None is an empty one.
        title: One line above.
        notes: Lines below.
        numbers: Whether all columns but the first are aligned right.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    title: str = ""
    notes: Sequence[str] = ()
    numbers: bool = True

    def __str__(self) -> str:
        """Aligned columns."""
        cells = [list(self.columns), *self._cells()]
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
        """The same as Markdown."""
        rule = "---:" if self.numbers else "---"
        lines = [
            f"| {' | '.join(map(_escaped, self.columns))} |",
            f"| {' | '.join(['---', *[rule] * (len(self.columns) - 1)])} |",
            *(f"| {' | '.join(map(_escaped, row))} |" for row in self._cells()),
        ]
        title = [f"**{_escaped(self.title)}**", ""] if self.title else []
        notes = ["", *map(_escaped, self.notes)] if self.notes else []
        return "\n".join([*title, *lines, *notes])

    def html(self) -> str:
        """The same as HTML, with nothing in it that is not text."""
        head = "".join(f"<th>{html.escape(each)}</th>" for each in self.columns)
        body = "".join(
            f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>"
            for row in self._cells()
        )
        notes = "".join(f"<p>{html.escape(note)}</p>" for note in self.notes)
        title = f"<caption>{html.escape(self.title)}</caption>" if self.title else ""
        return f"<table>{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{notes}"

    def _cells(self) -> list[list[str]]:
        return [["" if cell is None else str(cell) for cell in row] for row in self.rows]


class Shown(ABC):
    """Something with a table, shown as one in terminals and notebooks."""

    @abstractmethod
    def _shown(self) -> Table:
        """The table."""

    def __repr__(self) -> str:
        return str(self._shown())

    def _repr_markdown_(self) -> str:
        return self._shown().markdown()

    def _repr_html_(self) -> str:
        return self._shown().html()


def number(value: float | None, form: str) -> str | None:
    """A number in a format of Python; None stays None."""
    return None if value is None else format(value, form)


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ")
