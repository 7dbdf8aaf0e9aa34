"""Windows and perplexity, against transformers' own loss."""

import math

import pytest
import torch

from pho_service.errors import NumericalError, OutOfMemory, TextError
from pho_service.pruning.perplexity import (
    batch_size,
    cut_windows,
    log_probabilities,
    perplexity_of,
    rate_perplexity,
)


@pytest.mark.parametrize(
    ("tokens", "length", "prefix", "windows"),
    [
        (range(11), 4, [], [[0, 1, 2, 3], [4, 5, 6, 7]]),
        (range(10, 17), 4, [1], [[1, 10, 11, 12], [1, 13, 14, 15]]),
        (range(6), 3, [], [[0, 1, 2], [3, 4, 5]]),  # which fill them exactly
        (range(6), 4, [9], [[9, 0, 1, 2], [9, 3, 4, 5]]),
    ],
)
def test_windows_do_not_overlap_and_each_starts_with_the_prefix_a_short_tail_is_dropped(
    tokens, length, prefix, windows
):
    assert cut_windows(torch.tensor(tokens), length, prefix).tolist() == windows


@pytest.mark.parametrize(("tokens", "prefix"), [(0, []), (3, []), (2, [1])])
def test_a_text_below_one_window_is_refused(tokens, prefix):
    with pytest.raises(TextError, match=rf"{tokens} tokens.*window of 4"):
        cut_windows(torch.arange(tokens), 4, prefix)


def test_perplexity_is_exp_of_the_mean_of_the_losses_that_transformers_computes(
    tiny_llama, windows
):
    with torch.no_grad():
        losses = [float(tiny_llama(input_ids=w[None], labels=w[None]).loss) for w in windows]
    shapes = []
    tiny_llama.register_forward_pre_hook(
        lambda _m, _a, kwargs: shapes.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    rated = rate_perplexity(tiny_llama, windows)

    assert rated.perplexity == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    assert (rated.tokens, rated.windows) == (6 * 23, 6)
    assert rated.losses == pytest.approx([23 * loss for loss in losses], rel=1e-5)
    assert shapes == [(1, 24)] * 6  # one by one on a CPU


@pytest.mark.parametrize(
    ("count", "predicted"), [(6, 100), (16, 100), (3, 64), (20, 23)]
)  # runs of 64 and 36 tokens; whole windows
def test_its_standard_error_is_that_of_a_ratio_of_sums(count, predicted):
    """The jackknife, which leaves out one run of tokens after the other, says the same."""
    generator = torch.Generator().manual_seed(count)
    sizes = [size for size in (64, predicted - 64) if size > 0] if predicted > 64 else [predicted]
    losses = [
        [size * (3 + 0.2 * float(torch.randn((), generator=generator))) for size in sizes]
        for _ in range(count)
    ]
    rated = perplexity_of(losses, torch.zeros(count, predicted + 1))
    parts = [(sum(window), predicted) for window in losses]
    if count < 16:
        parts = [part for window in losses for part in zip(window, sizes, strict=True)]
    total, tokens = (sum(each) for each in zip(*parts, strict=True))
    left = [(total - loss) / (tokens - size) for loss, size in parts]
    mean = sum(left) / len(left)
    jackknife = math.sqrt(sum((x - mean) ** 2 for x in left) * (len(left) - 1) / len(left))

    assert rated.error == pytest.approx(jackknife * rated.perplexity, rel=0.05)
    assert perplexity_of([[30.0]], torch.zeros(1, 11)).error is None  # of a single loss


def test_uniform_model(tiny_llama, windows):
    """A model that knows nothing has the vocabulary's size as its perplexity."""
    tiny_llama.get_parameter("lm_head.weight").data.zero_()

    assert rate_perplexity(tiny_llama, windows).perplexity == pytest.approx(256, rel=1e-5)


def test_model_is_left_alone(tiny_llama, windows):
    """After a rating, the model can still be run for gradients."""
    rate_perplexity(tiny_llama, windows)
    tiny_llama(input_ids=windows, labels=windows).loss.backward()

    assert all(p.grad is not None for p in tiny_llama.parameters())


def test_a_loss_that_is_nan_is_an_error_not_a_perplexity(tiny_llama, windows):
    tiny_llama.get_parameter("lm_head.weight").data[5] = math.nan

    with pytest.raises(NumericalError, match="NaN or infinite"):
        rate_perplexity(tiny_llama, windows)


def test_a_huge_loss_does_not_overflow(tiny_llama, windows):
    tiny_llama.get_parameter("lm_head.weight").data.mul_(1e5)
    rated = rate_perplexity(tiny_llama, windows)

    assert 1e300 < rated.perplexity < math.inf


def test_of_a_large_vocabulary_the_loss_is_computed_some_positions_at_a_time_to_the_same_sum(
    tiny_llama, windows, monkeypatch
):
    whole = rate_perplexity(tiny_llama, windows).perplexity
    monkeypatch.setattr("pho_service.pruning.perplexity.CHUNK", 1)  # 16 positions of 23
    chunks = [rows for rows, _ in log_probabilities(torch.zeros(23, 256))]

    assert chunks == [slice(0, 16), slice(16, 32)]
    assert rate_perplexity(tiny_llama, windows).perplexity == pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize(
    ("memory", "free", "size"),
    [
        (10**9, 10**9, 16),
        (10**9, 512_000, 16),  # who else is on the card does not matter while all fit
        (600_000, 600_000, 8),  # half of what the model leaves; a power of two
        (560_000, 560_000, 4),
        (10**9, 511_999, 8),
        (10**9, 0, 1),
        (1000, 10**9, 1),
    ],
)
def test_batch_size(monkeypatch, memory, free, size):
    """Model and card say how many windows are run at once; what is free only if they don't fit."""
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda _: (free // 2, memory))
    monkeypatch.setattr("torch.cuda.memory_reserved", lambda _: free)
    monkeypatch.setattr("torch.cuda.memory_allocated", lambda _: free // 2)

    assert batch_size(1000, torch.device("cuda"), weights=50_000, most=16) == size


def test_the_first_window_is_run_alone_the_others_in_batches_to_the_same_result(
    tiny_llama, windows, monkeypatch
):
    alone = rate_perplexity(tiny_llama, windows).perplexity
    monkeypatch.setattr("pho_service.pruning.perplexity.batch_size", lambda *_, **__: 3)
    shapes = []
    tiny_llama.register_forward_pre_hook(
        lambda _m, _a, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )

    assert rate_perplexity(tiny_llama, windows).perplexity == pytest.approx(alone, rel=1e-6)
    assert shapes == [(1, 24), (3, 24), (2, 24)]


def crowded(model, most):
    """Let a model run out of memory on more windows at once; how many it is given each time."""
    given = []

    def look(_module, _args, kwargs):
        given.append(len(kwargs["input_ids"]))
        if given[-1] > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    model.register_forward_pre_hook(look, with_kwargs=True)
    return given


def test_a_batch_that_does_not_fit_is_tried_at_half_its_size_with_the_same_result(
    tiny_llama, windows, monkeypatch
):
    alone = rate_perplexity(tiny_llama, windows).perplexity
    monkeypatch.setattr(
        "pho_service.pruning.perplexity.batch_size", lambda *_, most, **__: min(4, most)
    )
    given = crowded(tiny_llama, 2)

    assert rate_perplexity(tiny_llama, windows).perplexity == pytest.approx(alone, rel=1e-6)
    assert given == [1, 4, 2, 2, 1]


@pytest.mark.parametrize(("most", "tried"), [(0, [1]), (1, [1, 4, 2])])
def test_it_is_tried_once_then_the_error_says_what_may_help(
    tiny_llama, windows, monkeypatch, most, tried
):
    monkeypatch.setattr("pho_service.pruning.perplexity.batch_size", lambda *_, **__: 4)
    given = crowded(tiny_llama, most)

    with pytest.raises(OutOfMemory, match=r"of 24 tokens: CUDA out of memory.*context_length"):
        rate_perplexity(tiny_llama, windows)
    assert given == tried
