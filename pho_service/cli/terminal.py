"""
How verbs talk: progress and messages on stderr, results on stdout, errors as exit codes.
"""

import functools
import json
import logging
import os
import re
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn, ParamSpec

import click

from pho_service.errors import InvalidInput, PhoError, plain, plain_line
from pho_service.host.machine import faults_told, missing_extra
from pho_service.progress import bar, is_shared

if TYPE_CHECKING:
    from rich.console import Group, RenderableType
    from rich.table import Table

    from pho_service.shown import parts as shown

P = ParamSpec("P")

_ENDLESS = 100_000  # characters of a line that is never folded
_LEAST_FOLDED = 16  # characters of a column that is folded
# With its unit, and what may follow: its share of another, an interval, the end of a range.
_NUMBER = re.compile(
    r"[+±-]?(\d[\d,]*(\.\d+)?(e[+-]?\d+)?|nan|inf)( ?(%|[KMGT]i?B|m?s|min|h|x))?"
    r"(/\d+| ± .*| to .*| \(.*\))?"
)

progress = bar  # of verbs: always shown, on stderr


def verb(function: Callable[P, None]) -> Callable[P, None]:
    """Run a verb quietly, and turn its errors into one line and an exit code."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        _quieten()
        try:
            with faults_told(), _interrupts_told():
                function(*args, **kwargs)
        except InvalidInput as error:
            fail(str(error), code=2)
        except PhoError as error:
            fail(str(error), code=1)
        except ModuleNotFoundError as error:
            needs = missing_extra(error)
            if needs is None:
                raise
            words = click.get_current_context().command_path.split()[1:]
            fail(f"{' '.join(words)} {needs}", code=1)

    return run


@contextmanager
def _interrupts_told() -> Iterator[None]:
    """End with a line after Ctrl-C, also where a library made another error of it."""
    came = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal came
        came = True
        signal.default_int_handler(number, frame)

    is_default = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    noted = is_default and threading.current_thread() is threading.main_thread()
    if noted:
        signal.signal(signal.SIGINT, note)
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if not (came or isinstance(error, KeyboardInterrupt)):
            raise
        fail("interrupted. What was finished is kept: the same command goes on.", code=1)
    finally:
        if noted:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def fail(message: str, *, code: int) -> NoReturn:
    click.echo(f"pho: {plain(message)}", err=True)
    raise SystemExit(code)


def _quieten() -> None:
    """Other people's warnings and progress bars are not for our users."""
    warnings.simplefilter("ignore")
    loud = ("transformers", "datasets", "huggingface_hub", "optuna", "accelerate", "lm_eval")
    for name in loud:
        logging.getLogger(name).setLevel(logging.ERROR)


def say(message: str) -> None:
    click.echo(plain(message), err=True)


def tell(text: str) -> None:
    """A part of the result, for a person: without what a terminal would obey."""
    click.echo(plain(text))


def print_json(document: object) -> None:
    """The result, for a machine."""
    click.echo(json.dumps(document, indent=2))


@contextmanager
def working(title: str) -> Iterator[None]:
    """A line with the time that has passed, for a step that cannot count."""
    if is_shared():
        with bar(title, None):
            yield
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bars:
        bars.add_task(title, total=None)
        yield


@contextmanager
def loading(name: str) -> Iterator[None]:
    """A line while a model is loaded, in place of transformers' bars."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    # A hub id as it is; of a file or folder that lies anywhere, its own name
    with working(f"Loading {Path(name).name if Path(name).is_absolute() else name}"):
        yield


def table_width() -> int | None:
    """Return how wide tables may be: as the terminal, or as COLUMNS says; None in a pipe."""
    from rich.console import Console

    console = Console()
    return console.width if console.is_terminal or os.environ.get("COLUMNS") else None


def print_table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[Any]],
    *,
    caption: str = "",
    spare: Sequence[str] = (),
) -> None:
    """Print a table on stdout: numbers are aligned right, text left, and no cell is cut."""
    # In a pipe each row is a line, however long. On a terminal that is too narrow, columns are left
    # out, which a line below the table says; then the widest text is folded; and if that is not
    # enough, each cell gets a line.
    from rich.console import Console
    from rich.text import Text

    cells = [["" if cell is None else plain_line(str(cell)) for cell in row] for row in rows]
    width = table_width()
    console = Console(emoji=False, highlight=False, width=_ENDLESS)  # N:M: would become a picture
    shown, left_out = list(range(len(columns))), []
    drawn: RenderableType = _table(columns, cells, shown)
    needed = console.measure(drawn).maximum
    for heading in spare:
        if width is None or needed <= width:
            break
        if heading in columns:
            shown.remove(columns.index(heading))
            left_out.append(heading)
            drawn = _table(columns, cells, shown)
            needed = console.measure(drawn).maximum
    if width is not None and needed > width:
        folded = _folded(columns, cells, shown, needed - width)
        drawn = _lines(columns, cells) if folded is None else _table(columns, cells, shown, folded)
        left_out = [] if folded is None else left_out
    console.width = width or _ENDLESS
    notes = [plain(caption)] if caption else []
    if left_out:
        names = ", ".join(left_out)
        notes.append(f"No room for: {names}. A wider terminal and --json have more.")
    console.print(Text(f"\n{plain(title)}\n", style="bold"))
    console.print(drawn)
    for note in notes:
        console.print(Text(f"\n{note}", style="dim"))


def show_table(table: "shown.Table", *, spare: Sequence[str] = ()) -> None:
    """Print a table of a result; see :func:`print_table`."""
    print_table(table.title, table.columns, table.cells, caption=" ".join(table.notes), spare=spare)


def _table(
    columns: Sequence[str],
    cells: Sequence[Sequence[str]],
    shown: Sequence[int],
    folded: int | None = None,
) -> "Table":
    """The columns of these numbers, one of them folded where there is no room."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for index in shown:
        table.add_column(
            Text(columns[index]),
            justify="right" if _are_numbers(cells, index) else "left",
            no_wrap=index != folded,
            overflow="fold",
        )
    for row in cells:
        table.add_row(*(Text(row[index]) for index in shown))
    return table


def _folded(
    columns: Sequence[str], cells: Sequence[Sequence[str]], shown: Sequence[int], excess: int
) -> int | None:
    """The widest column of text, if it can give so many characters away and stay readable."""
    widths = {
        index: max(len(columns[index]), *(len(row[index]) for row in cells))
        for index in shown
        if cells and not _are_numbers(cells, index)
    }
    widest = max(widths, key=widths.__getitem__, default=None)
    return None if widest is None or widths[widest] - excess < _LEAST_FOLDED else widest


def _are_numbers(cells: Sequence[Sequence[str]], index: int) -> bool:
    column = [row[index] for row in cells if row[index]]
    return bool(column) and all(map(_NUMBER.fullmatch, column))


def _lines(columns: Sequence[str], cells: Sequence[Sequence[str]]) -> "Group":
    """A line for each cell that is not empty, and an empty one between rows."""
    from rich.console import Group
    from rich.text import Text

    longest = max(map(len, columns))
    lines = []
    for row in cells:
        lines += [
            Text(f"{heading:<{longest}}  {cell}", overflow="fold")
            for heading, cell in zip(columns, row, strict=True)
            if cell
        ]
        lines.append(Text(""))
    return Group(*lines[:-1])
