"""
Progress reporting for long-running work: where it runs, who is told, who may end it.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as RichProgress

Advance = Callable[[float], None]  # so many more steps are done, or a part of one
Progress = Callable[[str, int], AbstractContextManager[Advance]]  # (title, number of steps)
Look = Callable[[], None]  # called before a piece of work; may refuse by raising
GivesWay = Callable[[], bool]  # whether others wait, and have waited long enough
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
    # Whether ``look`` would refuse, since others wait: what is not kept yet is kept before it
    gives_way: GivesWay = bool
    # How many finalists to prune in full, and how many passes of a training, there is time for, of
    # so many; None: as many as asked for.
    in_full: Callable[[int], int] | None = None
    passes: Callable[[int], int] | None = None
    # Entered around each write that would not be the same twice; may refuse by raising.
    fence: Fence = nullcontext


def console() -> "Console":
    """Where bars are drawn: stderr; in a notebook without widgets as plain text, too."""
    from rich.console import Console

    here = Console(stderr=True)
    if here.is_jupyter and find_spec("ipywidgets") is None:
        return Console(stderr=True, force_jupyter=False, force_terminal=True, width=100)
    return here


def empty_bars(*, shown: bool = True, of_bytes: bool = False) -> "RichProgress":
    """A place on stderr for bars with the time that was taken and that is left."""
    from rich import progress as rich
    from rich.table import Column

    whole = Column(no_wrap=True)  # what is narrow makes the bar shorter
    count = rich.DownloadColumn if of_bytes else rich.MofNCompleteColumn
    columns = (
        rich.TextColumn("{task.description}"), rich.BarColumn(bar_width=30),
        count(table_column=whole), rich.TimeElapsedColumn(table_column=whole),
        rich.TextColumn("left"), rich.TimeRemainingColumn(table_column=whole),
    )  # fmt: skip
    return rich.Progress(*columns, console=console(), disable=not shown)


@contextmanager
def bar(title: str, steps: int) -> Iterator[Advance]:
    """Show a bar with the time left, on stderr, which is full when the work ends before its end."""
    with empty_bars() as shown:
        room = shown.console.width - len(f" ━━━━ {steps}/{steps} 0:00:00 left 0:00:00")
        title = title if len(title) <= room else f"{title[: room - 1]}…"  # not the numbers
        task = shown.add_task(title, total=steps)
        yield lambda count: shown.advance(task, count)
        shown.update(task, completed=steps)


def watched(wanted: bool | None) -> bool:
    """Whether bars are drawn; None draws them where somebody can see them."""
    if wanted is None:
        here = console()
        return here.is_interactive or here.is_jupyter
    return wanted


def bars(wanted: bool | None) -> Progress:
    """Give bars, or silence."""
    return bar if watched(wanted) else silent
