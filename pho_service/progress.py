"""
How long work tells of itself, whoever listens: a terminal, a log, or nobody.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

Advance = Callable[[int], None]  # so many more steps are done
Progress = Callable[[str, int], AbstractContextManager[Advance]]  # (title, number of steps)


@contextmanager
def silent(title: str, steps: int) -> Iterator[Advance]:
    """Tell nobody."""
    del title, steps
    yield lambda _: None
