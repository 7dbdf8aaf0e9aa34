"""How many values are worked on at a time."""

import pytest
import torch

from pho_service.pruning.hardware import cards_memory, chunk_size


def test_nothing_is_asked_of_a_machine_without_a_gpu():
    assert chunk_size(torch.device("cpu"), 1 << 18) == 1 << 18


@pytest.mark.parametrize(
    ("free", "size"), [(60 << 30, 1 << 28), (16 << 30, 1 << 28), (15 << 30, 1 << 27), (0, 1 << 18)]
)
def test_a_gpu_takes_what_fits(pretended_gpu, free, size):
    pretended_gpu.others = pretended_gpu.memory_bytes - free

    assert chunk_size(pretended_gpu.device, 1 << 18) == size


def test_what_torch_keeps_is_free(pretended_gpu):
    pretended_gpu.others = 70 << 30
    torch.empty(4 << 30, dtype=torch.uint8, device="cuda")

    assert pretended_gpu.free < 8 << 30 < pretended_gpu.free + pretended_gpu.reserved
    assert chunk_size(pretended_gpu.device, 1 << 18) == 1 << 27


def test_memory_of_cards_is_told_once_one_is_used(pretended_gpu, monkeypatch):
    pretended_gpu.others = 70 << 30
    told = cards_memory([pretended_gpu.device])
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    unused = cards_memory([pretended_gpu.device])
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", _fails)

    assert told == (70 << 30, pretended_gpu.memory_bytes)
    assert unused is None
    assert cards_memory([pretended_gpu.device]) is None
    assert cards_memory([torch.device("cpu")]) is None


def _fails(_device):
    raise RuntimeError("CUDA error: device-side assert triggered")
