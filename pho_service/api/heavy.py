"""
Requests that take seconds of a core: a few at a time, so that the others are answered meanwhile.
"""

from collections.abc import Callable
from functools import partial
from typing import ParamSpec, TypeVar

from anyio import CapacityLimiter
from anyio.to_thread import run_sync

AT_ONCE = 2

P = ParamSpec("P")
T = TypeVar("T")


class Heavy:
    """
    Threads for what takes long. Who comes when all are busy waits for a turn, and needs none.
    """

    def __init__(self) -> None:
        self._threads = CapacityLimiter(AT_ONCE)

    async def run(self, work: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """What ``work`` gives, done in one of the threads."""
        return await run_sync(partial(work, *args, **kwargs), limiter=self._threads)
