"""How many values are worked on at a time."""

import pytest
import torch
from pretended_cards import Card

from pho_service.pruning.hardware import chunk_size


def test_nothing_is_asked_of_a_machine_without_a_gpu() -> None:
    assert chunk_size(torch.device("cpu"), 1 << 18) == 1 << 18


@pytest.mark.parametrize(
    ("free", "size"), [(60 << 30, 1 << 28), (16 << 30, 1 << 28), (15 << 30, 1 << 27), (0, 1 << 18)]
)
def test_a_gpu_takes_what_fits(pretended_gpu: Card, free: int, size: int) -> None:
    pretended_gpu.others = pretended_gpu.memory_bytes - free

    assert chunk_size(pretended_gpu.device, 1 << 18) == size


def test_what_torch_keeps_is_free(pretended_gpu: Card) -> None:
    pretended_gpu.others = 70 << 30
    torch.empty(4 << 30, dtype=torch.uint8, device="cuda")

    assert pretended_gpu.free < 8 << 30 < pretended_gpu.free + pretended_gpu.reserved
    assert chunk_size(pretended_gpu.device, 1 << 18) == 1 << 27
