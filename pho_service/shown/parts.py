"""
What a result is turned into once: tables, charts and sentences, in sections.

A table prints itself for a terminal, a notebook and Markdown; ``parts.html`` prints all of them on
pages, and a page of one file is made of them here.
"""

import base64
import hashlib
import html
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cache
from typing import Any, Self

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from pho_service.shown.drawing import Drawing
from pho_service.spec.numbers import number, percent


@dataclass(frozen=True)
class Table:
    """
    Rows of text under headings.

    Attributes:
        columns: The headings; the first column has those of the rows.
        rows: A cell for each heading; None is an empty one.
        title: One line above.
        notes: Sentences below.
        numbers: Whether all columns but the first are aligned right.
        marked: The row to look at first; None where there is none.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    title: str = ""
    notes: Sequence[str] = ()
    numbers: bool = True
    marked: int | None = None

    def __str__(self) -> str:
        """Aligned columns."""
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
        """The same as Markdown."""
        rule = "---:" if self.numbers else "---"
        lines = [
            f"| {' | '.join(map(_escaped, self.columns))} |",
            f"| {' | '.join(['---', *[rule] * (len(self.columns) - 1)])} |",
            *(f"| {' | '.join(map(_escaped, row))} |" for row in self.cells),
        ]
        title = [f"**{_escaped(self.title)}**", ""] if self.title else []
        notes = ["", *map(_escaped, self.notes)] if self.notes else []
        return "\n".join([*title, *lines, *notes])

    def html(self) -> str:
        """The same as HTML, with nothing in it that is not text."""
        head = "".join(f"<th>{html.escape(each)}</th>" for each in self.columns)
        body = "".join(
            f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>"
            for row in self.cells
        )
        notes = "".join(f"<p>{html.escape(note)}</p>" for note in self.notes)
        title = f"<caption>{html.escape(self.title)}</caption>" if self.title else ""
        return f"<table>{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{notes}"

    @property
    def cells(self) -> list[list[str]]:
        """The rows as text."""
        return [["" if cell is None else str(cell) for cell in row] for row in self.rows]

    def without_empty(self) -> Self:
        """The table without the columns in which nothing stands."""
        cells = self.cells
        return self.columns_but(
            [name for i, name in enumerate(self.columns) if not any(row[i] for row in cells)]
        )

    def columns_but(self, names: Sequence[str]) -> Self:
        """The table without some columns."""
        kept = [i for i, name in enumerate(self.columns) if name not in names]
        return replace(
            self,
            columns=[self.columns[i] for i in kept],
            rows=[[row[i] for i in kept] for row in self.cells],
        )


def pairs_table(title: str, heading: str, pairs: Sequence[tuple[str, str]]) -> Table:
    """Names and values."""
    return Table((heading, "value"), pairs, title=title, numbers=False)


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


@dataclass(frozen=True, kw_only=True)
class Chart:
    """
    A figure.

    Attributes:
        text: What it shows, for those who do not see it.
    """

    id: str
    title: str
    text: str
    drawing: Drawing


@dataclass(frozen=True, kw_only=True)
class Section:
    """
    A part of a page under a heading.

    Attributes:
        texts: Sentences; what is not known is said here.
        commands: To be run with the result, one a line.
        blocks: Documents as they are, with a caption each; they are folded.
        events: What happened, with the time; the newest first.
    """

    id: str
    title: str
    texts: Sequence[str] = ()
    tables: Sequence[Table] = ()
    charts: Sequence[Chart] = ()
    commands: Sequence[str] = ()
    blocks: Sequence[tuple[str, str]] = ()
    events: Sequence[tuple[datetime, str]] = ()

    @property
    def is_known(self) -> bool:
        """Whether it has more than a sentence on what is missing."""
        return bool(self.tables or self.charts or self.events)


def page(
    title: str,
    sections: Sequence[Section],
    *,
    lead: str = "",
    error: str | None = None,
    back: str | None = None,
) -> str:
    """
    Sections as one page of HTML that asks the network for nothing.

    Args:
        title: A heading; in the browser's tab, too.
        sections: In their order.
        lead: A sentence below the heading.
        error: Why there is no more.
        back: The address of the job's page, if the page is served beside it.
    """
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
    """What a browser lets the page do: look as it does. It runs no script, and needs no network."""
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

    A template is read once: a policy names what is in it by its hash, and both must be of one time.
    """
    here = PackageLoader("pho_service.shown", ".")
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(*folder), here]) if folder else here,
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        auto_reload=False,
    )
    environment.filters |= {"number": number, "percent": percent}
    return environment


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ")
