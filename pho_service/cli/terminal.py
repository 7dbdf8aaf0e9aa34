"""
How verbs talk: progress and messages on stderr, results on stdout, errors as exit codes.
"""

import functools
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn, ParamSpec

import click

from pho_service.errors import InvalidInput, PhoError
from pho_service.host.extras import missing_extra
from pho_service.host.faults import faults_told
from pho_service.host.plain import plain, plain_line
from pho_service.progress import bar

P = ParamSpec("P")

progress = bar  # of verbs: always shown, on stderr


def verb(function: Callable[P, None]) -> Callable[P, None]:
    """Run a verb quietly, and turn its errors into one line and an exit code."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        _quieten()
        try:
            with faults_told():
                function(*args, **kwargs)
        except InvalidInput as error:
            _fail(str(error), code=2)
        except PhoError as error:
            _fail(str(error), code=1)
        except ModuleNotFoundError as error:
            needs = missing_extra(error)
            if needs is None:
                raise
            words = click.get_current_context().command_path.split()[1:]
            _fail(f"{' '.join(words)} {needs}", code=1)
        except KeyboardInterrupt:
            _fail("interrupted. What was finished is kept: the same command goes on.", code=1)

    return run


def _fail(message: str, *, code: int) -> NoReturn:
    click.echo(f"pho: {plain(message)}", err=True)
    raise SystemExit(code)


def _quieten() -> None:
    """Other people's warnings and progress bars are not for our users."""
    warnings.simplefilter("ignore")
    loud = ("transformers", "datasets", "huggingface_hub", "optuna", "accelerate", "lm_eval")
    for name in loud:
        logging.getLogger(name).setLevel(logging.ERROR)


def say(message: str) -> None:
    """A sentence for a person."""
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
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bars:
        bars.add_task(title, total=None)
        yield


def print_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], *, caption: str = ""
) -> None:
    """A table on stdout; all columns but the first are aligned right."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, caption=caption, box=box.SIMPLE_HEAD, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(Text("" if cell is None else plain_line(str(cell))) for cell in row))
    console = Console(emoji=False)  # which N:M: would become
    if not console.is_terminal:
        console.width = 160  # a pipe has no width of its own
    console.print(table)
