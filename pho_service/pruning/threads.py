"""Independent pieces of work in as many threads as torch has, none of which starts others."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import TypeVar

import torch

Piece = TypeVar("Piece")
Done = TypeVar("Done")


def in_threads(work: Callable[[Piece], Done], pieces: Sequence[Piece]) -> list[Done]:
    """
    Do pieces of work on the CPU, side by side.

    In the threads torch itself takes one thread, so a piece gives the same bits
    however many there are. That is faster than threads within each operation
    where operations are small, and where some of them are not torch's.

    Args:
        work: Releases the interpreter most of the time, as torch and compiled loops do.
        pieces: In the order of their results.

    Raises:
        Exception: What the first piece that fails raises.
    """
    threads = torch.get_num_threads()
    if threads == 1 or len(pieces) < 2:
        return [work(piece) for piece in pieces]
    done = list(_pool(threads).map(work, pieces))
    torch.set_num_threads(threads)  # a new thread of the pool sets what others begin with
    return done


@lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "pho-pruning", initializer=_alone)


def _alone() -> None:
    """Let torch take one thread in this one, whatever is said elsewhere from now on."""
    torch.get_num_threads()  # until it is asked, torch takes what another thread has set last
    torch.set_num_threads(1)
