"""Pieces of work side by side."""

import threading

import pytest
import torch

from pho_service.pruning.hardware import in_threads


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield 3
    torch.set_num_threads(before)


def test_as_many_threads_work_at_once_as_torch_has(threads):
    together = threading.Barrier(threads, timeout=120)

    def work(piece):
        together.wait()
        return 10 * piece, torch.get_num_threads()

    for _ in range(2):
        assert in_threads(work, range(threads)) == [(0, 1), (10, 1), (20, 1)]
        assert torch.get_num_threads() == threads


def test_a_thread_that_begins_afterwards_has_torchs_number(threads):
    in_threads(str, range(threads))
    found = []
    other = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    other.start()
    other.join()

    assert found == [threads]


@pytest.mark.usefixtures("threads")
def test_a_piece_that_itself_has_pieces_does_them_by_itself():
    found = in_threads(lambda a: in_threads(lambda b: 10 * a + b, range(3)), range(8))

    assert found == [[10 * a, 10 * a + 1, 10 * a + 2] for a in range(8)]


@pytest.mark.usefixtures("threads")
def test_the_first_piece_that_fails_is_the_one_that_is_heard_of():
    with pytest.raises(ZeroDivisionError):
        in_threads(lambda number: 1 // number, [1, 0, 2])
