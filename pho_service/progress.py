"""
Progress reporting for long-running work: where it runs, who is told, who may end it.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
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
class BlocksTrained:
    """Tells how far the training of a winner is."""

    done: int  # Blocks
    blocks: int  # In all
    passes: int
    block_s: float | None  # Seconds that a block took, of late; None of the first
    shorter: tuple[int, ...]  # Blocks with all passes, and with any, if the next one has fewer


@dataclass(frozen=True, kw_only=True)
class LinearsPruned:
    """Tells how far a finalist is that is being pruned in full."""

    before: int  # Finalists that were begun before it
    done: int  # Linears
    linears: int  # In all
    linear_s: float  # Seconds that a linear took, of late


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
    # Whether there is time to prune one more finalist in full behind so many, and to go on with
    # one; None: there is.
    another: Callable[[int], bool] | None = None
    prunes_on: "Callable[[LinearsPruned], bool] | None" = None
    # Whether there is time to train the next block in as many passes; None: there is.
    trains_on: "Callable[[BlocksTrained], bool] | None" = None
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


class Steps:
    """The steps of something long, and how much longer they take than they were planned to."""

    def __init__(self, planned: Mapping[str, float], say: Callable[[str], None]) -> None:
        self._planned, self._say, self._name = dict(planned), say, ""
        self._times: dict[str, float] = {}  # seconds of steps that have a time of their own
        self._over = self._now = 0.0  # planned seconds of the steps before, and of this one
        self._began = self._step_began = time.monotonic()

    def give(self, name: str, seconds: float) -> None:
        """Give a step a time of its own, whatever the steps before it took."""
        self._times[name] = seconds

    def begin(self, name: str) -> None:
        """Say which step begins, and about how long it takes; those before it are over."""
        if name == self._name:
            return
        self._name, number = name, [*self._planned].index(name)
        self._over, self._now = sum([*self._planned.values()][:number]), self._planned[name]
        self._step_began = time.monotonic()
        took = about(self._seconds(name, self._pace()))
        self._say(f"Step {number + 1} of {len(self._planned)}: {name} ({took})")

    def _pace(self, seconds: float = 0.0, planned: float = 0.0) -> float:
        """How much longer steps take than planned, if the present one takes so long."""
        trust = sum(self._planned.values()) / 5  # the first steps do not say much
        return (self._step_began - self._began + seconds + trust) / (self._over + planned + trust)

    def _seconds(self, name: str, pace: float) -> float:
        """How long a step takes at a pace, or what it was given."""
        return self._times.get(name, pace * self._planned.get(name, 0.0))

    def left_s(self, piece_left: float) -> float:
        """Seconds that are left, by the plan and by the piece of work."""
        took = time.monotonic() - self._step_began
        left = max(self._seconds(self._name, self._pace()) - took, piece_left, 0.0)
        names = [*self._planned]
        later = names[names.index(self._name) + 1 if self._name else 0 :]
        pace = self._pace(took + left, self._now)
        return left + sum(self._seconds(name, pace) for name in later)


def about(seconds: float) -> str:
    if seconds < 90:
        return "a few seconds" if seconds < 10 else f"about {round(seconds, -1):.0f} s"
    return f"about {seconds / 60:.0f} min"


_shared: ContextVar["RichProgress | None"] = ContextVar("shared", default=None)
_titled: ContextVar[Callable[[str], None]] = ContextVar("titled", default=never)


@contextmanager
def one_bar(
    planned: Mapping[str, float],
    say: Callable[[str], None],
    *,
    begins: Mapping[str, str] | None = None,
    shown: bool = True,
) -> Iterator[Steps]:
    """
    Inside, one bar stands for all steps, whose planned seconds are given, and all other bars. A bar
    whose title ``begins`` with some words is the first of a step.
    """
    from rich import progress as rich

    steps = Steps(planned, say)

    def note(title: str) -> None:
        names = (name for words, name in (begins or {}).items() if title.startswith(words))
        if (name := next(names, "")) in planned:
            steps.begin(name)

    class Bar(rich.Progress):
        def get_renderables(self) -> Iterable["RenderableType"]:
            for whole in self.tasks[:1]:
                piece = self.tasks[-1]  # or the same
                known = piece.time_remaining if piece is not whole else None
                left, now = steps.left_s(known or 0.0), whole.elapsed or 0.0
                since = now - whole.fields["drawn"]  # always on, however wrong it was before
                share = whole.completed + (99 - whole.completed) * since / (since + left or 1.0)
                title = f"{about(left)} left  {piece.description}"
                if piece is not whole and piece.total:
                    title += f" {piece.completed:.0f}/{piece.total:.0f}"
                self.update(whole.id, completed=share, title=title, drawn=now)
            yield from super().get_renderables()

    columns = (
        rich.BarColumn(bar_width=20), rich.TaskProgressColumn(), rich.TimeElapsedColumn(),
        rich.TextColumn("{task.fields[title]}"),
    )  # fmt: skip
    with Bar(*columns, console=console(), transient=True, disable=not shown) as bars:
        bars.add_task("", total=100, title="", drawn=0.0)
        token, other = _shared.set(bars), _titled.set(note)
        try:
            yield steps
        finally:
            _shared.reset(token)
            _titled.reset(other)


def is_shared() -> bool:
    """Whether one bar stands for all others."""
    return _shared.get() is not None


@contextmanager
def bar(title: str, steps: int | None) -> Iterator[Advance]:
    """Show a bar with the time left, on stderr, which is full when the work ends before its end."""
    shared = _shared.get()
    _titled.get()(title)
    with empty_bars() if shared is None else nullcontext(shared) as shown:
        room = shown.console.width - len(f" ━━━━ {steps}/{steps} 0:00:00 left 0:00:00")
        title = title if len(title) <= room else f"{title[: room - 1]}…"  # not the numbers
        task = shown.add_task(title, total=steps, visible=shared is None)
        yield lambda count: shown.advance(task, count)
        shown.update(task, completed=steps)
        if shared is not None:
            shown.remove_task(task)


def watched(wanted: bool | None) -> bool:
    """Whether bars are drawn; None draws them where somebody can see them."""
    if wanted is None:
        here = console()
        return here.is_interactive or here.is_jupyter
    return wanted


def bars(wanted: bool | None) -> Progress:
    """Give bars, or silence."""
    return bar if watched(wanted) else silent
