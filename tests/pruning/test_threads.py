"""Pieces of work side by side."""

import threading
from collections.abc import Iterator

import pytest
import torch

from pho_service.pruning.hardware import in_threads


@pytest.fixture
def threads() -> Iterator[int]:
    """Three threads of torch for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield 3
    torch.set_num_threads(before)


def test_threads(threads: int) -> None:
    """As many threads as torch has work at once, and torch itself takes one in each."""
    together = threading.Barrier(threads, timeout=120)

    def work(piece: int) -> tuple[int, int]:
        together.wait()
        return 10 * piece, torch.get_num_threads()

    for _ in range(2):
        assert in_threads(work, range(threads)) == [(0, 1), (10, 1), (20, 1)]
        assert torch.get_num_threads() == threads


def test_others_keep_their_threads(threads: int) -> None:
    """A thread that begins afterwards has torch's number, not that of the pool's."""
    in_threads(str, range(threads))
    found: list[int] = []
    other = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    other.start()
    other.join()

    assert found == [threads]


@pytest.mark.usefixtures("threads")
def test_a_piece_that_itself_has_pieces_does_them_by_itself() -> None:
    found = in_threads(lambda a: in_threads(lambda b: 10 * a + b, range(3)), range(8))

    assert found == [[10 * a, 10 * a + 1, 10 * a + 2] for a in range(8)]


@pytest.mark.usefixtures("threads")
def test_the_first_piece_that_fails_is_the_one_that_is_heard_of() -> None:
    with pytest.raises(ZeroDivisionError):
        in_threads(lambda number: 1 // number, [1, 0, 2])
