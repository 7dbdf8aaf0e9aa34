"""
Progress reporting for long-running work: to a terminal, a log, or nobody.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

Advance = Callable[[int], None]  # so many more steps are done
Progress = Callable[[str, int], AbstractContextManager[Advance]]  # (title, number of steps)


@contextmanager
def silent(title: str, steps: int) -> Iterator[Advance]:
    """Tell nobody."""
    del title, steps
    yield lambda _: None


def empty_bars(*, shown: bool = True) -> "RichProgress":
    """A place on stderr for bars with the time that was taken and that is left."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"), BarColumn(bar_width=30), MofNCompleteColumn(),
        TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    return Progress(*columns, console=Console(stderr=True), disable=not shown)


@contextmanager
def bar(title: str, steps: int) -> Iterator[Advance]:
    """Show a bar with the time left, on stderr."""
    with empty_bars() as shown:
        task = shown.add_task(title, total=steps)
        yield lambda count: shown.advance(task, count)


def bars(wanted: bool) -> Progress:
    """Give bars, or silence."""
    return bar if wanted else silent
