"""The divergence from the dense model, against the whole sum in float64."""

import copy
import math

import pytest
import torch

from pho_service.errors import NumericalError
from pho_service.pruning.perplexity import dense_reference, rate_divergence


@pytest.fixture
def pruned(tiny_llama):
    """``tiny_llama`` without the smaller half of each linear's weights."""
    model = copy.deepcopy(tiny_llama)
    for name, weight in model.named_parameters():
        if name.endswith("proj.weight"):
            weight.data[weight.abs() < weight.abs().median()] = 0
    return model


def whole_divergence(dense, other, windows):
    """Over all tokens of the vocabulary, position by position, in float64."""
    with torch.no_grad():
        p, q = (m(input_ids=windows).logits[:, :-1].double().softmax(-1) for m in (dense, other))
    return float((p * (p / q).log()).sum(dim=-1).mean())


def test_with_all_tokens_kept_it_is_the_divergence_over_the_whole_vocabulary(
    tiny_llama, pruned, windows
):
    reference = dense_reference(tiny_llama, windows, top_k=1000)

    assert reference.tokens.shape == (6, 23, 256)
    assert rate_divergence(pruned, reference) == pytest.approx(
        whole_divergence(tiny_llama, pruned, windows), rel=1e-5
    )


def test_fewer_tokens_bound_it_from_below(tiny_llama, pruned, windows):
    seen = [
        rate_divergence(pruned, dense_reference(tiny_llama, windows, top_k=k))
        for k in (1, 4, 16, 64, 256)
    ]

    itself = dense_reference(tiny_llama, windows, top_k=64)
    assert rate_divergence(tiny_llama, itself) == 0
    assert seen[0] > 0
    assert seen == sorted(seen)
    assert seen[-1] <= whole_divergence(tiny_llama, pruned, windows) * (1 + 1e-5)


def test_sure_models(tiny_llama, windows):
    """Where one token has nearly all of the probability, the rest is no number's rounding."""
    head = tiny_llama.get_parameter("lm_head.weight")
    other = copy.deepcopy(tiny_llama)
    head.data[7] *= 1e4
    other.get_parameter("lm_head.weight").data[8] *= 1e4
    divergence = rate_divergence(other, dense_reference(tiny_llama, windows))

    assert 1 < divergence < math.inf


def test_a_model_whose_logits_are_no_numbers_is_an_error_dense_or_pruned(tiny_llama, windows):
    reference = dense_reference(tiny_llama, windows)
    tiny_llama.get_parameter("lm_head.weight").data[5] = math.nan

    with pytest.raises(NumericalError, match="NaN or infinite"):
        rate_divergence(tiny_llama, reference)
    with pytest.raises(NumericalError, match="NaN or infinite"):
        dense_reference(tiny_llama, windows)
