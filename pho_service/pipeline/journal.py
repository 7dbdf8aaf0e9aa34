"""
A job is a function that is run from the top: what its journal holds is not done again.

Here everything is done at once, in one process; what takes long is kept in studies meanwhile. A
service keeps each piece, and has several workers at them: see :mod:`workers.conductor`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from pho_service.progress import Advance, Run

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Piece:
    """
    One of several pieces of a job that do not depend on each other.

    Attributes:
        number: Tells it from the others with the same name.
        about: What to do, as JSON values.
        lock: Pieces with the same lock are done one after the other, of all jobs.
    """

    number: int = 0
    about: Mapping[str, Any] = field(default_factory=dict)
    lock: str | None = None


class Journal:
    """Does each piece as it comes."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def each(
        self,
        name: str,
        pieces: Sequence[Piece],
        do: Callable[[Piece, Run], T],
        kind: type[T],
        *,
        title: str | None = None,
    ) -> list[T]:
        """Return what each piece gives."""
        del name, kind
        if title is None or not pieces:
            return [do(piece, self.run) for piece in pieces]
        found = []
        with self.run.progress(title, len(pieces)) as advance:
            quiet = replace(self.run, progress=_within(advance))
            for piece in pieces:
                found.append(do(piece, quiet))
                advance(1)
        return found

    def once(self, name: str, do: Callable[[Run], T], kind: type[T]) -> T:
        """Return what a piece gives that is the only one of its name."""
        (found,) = self.each(name, [Piece()], lambda _, run: do(run), kind)
        return found


def _within(advance: Advance) -> Callable[[str, int], Any]:
    """Progress that only shows that something goes on."""

    @contextmanager
    def progress(title: str, steps: int) -> Iterator[Advance]:
        del title, steps
        yield lambda _: advance(0)

    return progress
