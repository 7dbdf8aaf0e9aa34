"""Windows and perplexity, against transformers' own loss."""

import math

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from pho_service.errors import NumericalError, TextError
from pho_service.pruning.perplexity import cut_windows, rate_perplexity


def test_cut_windows() -> None:
    """Windows follow each other without overlap, and a tail too short for one is dropped."""
    windows = cut_windows(torch.arange(11), 4, [])

    assert windows.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_cut_windows_prefix() -> None:
    """Every window starts with the prefix, which counts towards its length."""
    windows = cut_windows(torch.arange(10, 17), 4, [1])

    assert windows.tolist() == [[1, 10, 11, 12], [1, 13, 14, 15]]
    assert windows.dtype is torch.int64


@pytest.mark.parametrize("prefix", [[], [1]])
def test_cut_windows_exact(prefix: list[int]) -> None:
    """A text that fills its windows exactly loses nothing."""
    windows = cut_windows(torch.arange(12 - 3 * len(prefix)), 4, prefix)

    assert windows.shape == (3, 4)
    assert windows[:, len(prefix) :].flatten().tolist() == list(range(12 - 3 * len(prefix)))


@pytest.mark.parametrize(("tokens", "prefix"), [(0, []), (3, []), (2, [1])])
def test_cut_windows_too_short(tokens: int, prefix: list[int]) -> None:
    """A text that does not fill one window is refused with both lengths."""
    with pytest.raises(TextError, match=rf"{tokens} tokens.*window of 4"):
        cut_windows(torch.arange(tokens), 4, prefix)


def test_matches_transformers(tiny_llama: LlamaForCausalLM, windows: Tensor) -> None:
    """Perplexity is exp of the mean of the losses that transformers computes itself."""
    with torch.no_grad():
        losses = [float(tiny_llama(input_ids=w[None], labels=w[None]).loss) for w in windows]
    rated = rate_perplexity(tiny_llama, windows)

    assert rated.perplexity == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    assert (rated.tokens, rated.windows) == (6 * 23, 6)


def test_uniform_model(tiny_llama: LlamaForCausalLM, windows: Tensor) -> None:
    """A model that knows nothing has the vocabulary's size as its perplexity."""
    tiny_llama.get_parameter("lm_head.weight").data.zero_()

    assert rate_perplexity(tiny_llama, windows).perplexity == pytest.approx(256, rel=1e-5)


def test_same_bits(tiny_llama: LlamaForCausalLM, windows: Tensor) -> None:
    """The same model and windows give the same bits."""
    assert rate_perplexity(tiny_llama, windows) == rate_perplexity(tiny_llama, windows)


def test_model_is_left_alone(tiny_llama: LlamaForCausalLM, windows: Tensor) -> None:
    """After a rating, the model can still be run for gradients."""
    rate_perplexity(tiny_llama, windows)
    tiny_llama(input_ids=windows, labels=windows).loss.backward()

    assert all(p.grad is not None for p in tiny_llama.parameters())


def test_progress(tiny_llama: LlamaForCausalLM, windows: Tensor) -> None:
    """Progress is told once a window."""
    told: list[int] = []
    rate_perplexity(tiny_llama, windows, advance=told.append)

    assert told == [1] * 6


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_logits(tiny_llama: LlamaForCausalLM, windows: Tensor, bad: float) -> None:
    """A loss that is NaN or infinite is an error, not a perplexity."""
    tiny_llama.get_parameter("lm_head.weight").data[5] = bad

    with pytest.raises(NumericalError, match="NaN or infinite"):
        rate_perplexity(tiny_llama, windows)


def test_huge_loss(tiny_llama: LlamaForCausalLM, windows: Tensor) -> None:
    """A ruined but finite model gets a huge finite perplexity instead of an overflow."""
    tiny_llama.get_parameter("lm_head.weight").data.mul_(1e5)
    rated = rate_perplexity(tiny_llama, windows)

    assert 1e300 < rated.perplexity < math.inf
