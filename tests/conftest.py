"""
Fixtures that several folders share: a random Llama that runs in milliseconds, and what it says.

Each test gets its own, so a test may change what it is given. All are the same every time.
"""

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from pho_service.models.architecture import prunable_linears
from pho_service.pruning.statistics import PrunableLinear, Statistics, collect_statistics

VOCABULARY = 256


@pytest.fixture
def tiny_llama() -> LlamaForCausalLM:
    """A random float32 Llama in evaluation mode: 2 blocks, 14 linears, 18,432 prunable weights."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.1,  # large enough that tokens differ in loss
        dtype=torch.float32,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


@pytest.fixture
def linears(tiny_llama: LlamaForCausalLM) -> dict[str, PrunableLinear]:
    """The linears of ``tiny_llama``, by name."""
    return prunable_linears(tiny_llama)


@pytest.fixture
def windows() -> Tensor:
    """(6, 24), int64: random tokens of ``tiny_llama``."""
    return torch.randint(VOCABULARY, (6, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def statistics(
    tiny_llama: LlamaForCausalLM, linears: dict[str, PrunableLinear], windows: Tensor
) -> Statistics:
    """What ``windows`` say about ``linears``, with the full Gram matrices."""
    return collect_statistics(
        tiny_llama, linears, windows, fisher_windows=3, projection_rows=0, seed=0
    )
