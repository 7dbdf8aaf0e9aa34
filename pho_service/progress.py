"""
What goes with long-running work: where it runs, who is told how far it is, who may end it.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

Advance = Callable[[int], None]  # so many more steps are done
Progress = Callable[[str, int], AbstractContextManager[Advance]]  # (title, number of steps)
Look = Callable[[], None]  # called before a piece of work; may refuse by raising
Fence = Callable[[], AbstractContextManager[None]]  # around each write; may refuse by raising


@contextmanager
def silent(title: str, steps: int) -> Iterator[Advance]:
    del title, steps
    yield lambda _: None


def never(*_: object) -> None:
    """Refuse nothing."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """Where something long runs, and who watches it."""

    device: str = "cpu"  # For the proxies; models lie where they lie
    progress: Progress = silent  # Is told of each long step
    look: Look = never  # Called before each piece of work; may refuse by raising
    # Entered around each write that would not be the same twice; may refuse by raising.
    fence: Fence = nullcontext


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
