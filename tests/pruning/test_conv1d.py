"""GPT-2 stores its linears as (in, out): all of pruning sees them as (out, in)."""

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from pho_service.models.architecture import prunable_linears
from pho_service.pruning.bundle import sample_bundle
from pho_service.pruning.masks import model_masks, pruned
from pho_service.pruning.proxy import ProxyEvaluator
from pho_service.pruning.statistics import PrunableLinear, Statistics, collect_statistics
from pho_service.spec.pattern import Coefficients, Pattern
from pho_service.spec.steps import Candidate

Linears = dict[str, PrunableLinear]

CREPE = Coefficients(row=0.4, column=1, neighbourhood=0.8, gradient_exponent=0.3)
MAGNITUDE = Coefficients(
    row=1, column=0, neighbourhood=0, activation_exponent=0, normalisation="none"
)


@pytest.fixture
def tiny_gpt2() -> GPT2LMHeadModel:
    """A random GPT-2 of one block, in evaluation mode."""
    config = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=256, n_positions=32)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return GPT2LMHeadModel(config).eval()


@pytest.fixture
def conv_linears(tiny_gpt2: GPT2LMHeadModel) -> Linears:
    """The linears of ``tiny_gpt2``, by name."""
    return prunable_linears(tiny_gpt2)


@pytest.fixture
def conv_statistics(
    tiny_gpt2: GPT2LMHeadModel, conv_linears: Linears, windows: Tensor
) -> Statistics:
    """What ``windows`` say about ``conv_linears``."""
    return collect_statistics(
        tiny_gpt2, conv_linears, windows, fisher_windows=2, projection_rows=0, seed=0
    )


def candidate_of(coefficients: Coefficients, pattern: str, scope: str | None) -> Candidate:
    """A candidate in a pattern."""
    return Candidate(
        method="crepe", coefficients=coefficients, pattern=Pattern.parse(pattern, scope)
    )


def plain_twins(linears: Linears) -> Linears:
    """The same weights in ``nn.Linear`` modules."""
    twins = {}
    for name, linear in linears.items():
        stored = linear.module.get_parameter("weight").detach()  # (in, out)
        module = nn.Linear(*stored.shape)
        module.weight.data = stored.T.clone()
        twins[name] = PrunableLinear(name=name, module=module)
    return twins


def test_shapes(conv_linears: Linears, conv_statistics: Statistics) -> None:
    """Weights and statistics count (out, in), though the module stores (in, out)."""
    stored = {n: tuple(li.module.get_parameter("weight").shape) for n, li in conv_linears.items()}

    assert list(stored.values()) == [(32, 96), (32, 32), (32, 128), (128, 32)]
    for name, (inputs, outputs) in stored.items():
        assert conv_linears[name].weight.shape == (outputs, inputs)
        assert conv_statistics.activation_norm(name).shape == (inputs,)
        assert conv_statistics.fisher[name].shape == (outputs,)


def test_groups_run_along_inputs(
    tiny_gpt2: GPT2LMHeadModel, conv_linears: Linears, conv_statistics: Statistics
) -> None:
    """2:4 by magnitude zeroes the two smallest of each four stored rows, in each column."""
    parameters = {n: p for n, p in tiny_gpt2.named_parameters() if p.dim() == 2}
    before = {name: p.detach().clone() for name, p in parameters.items()}
    candidate = candidate_of(MAGNITUDE, "2:4", None)
    with pruned(conv_linears, model_masks(conv_linears, conv_statistics, candidate)):
        inside = {name: p.detach().clone() for name, p in parameters.items()}

    for name, stored in before.items():
        expected = stored.clone()
        if name.removesuffix(".weight") in conv_linears:
            for start in range(0, stored.shape[0], 4):
                run = expected[start : start + 4]
                run.scatter_(0, run.abs().argsort(dim=0)[:2], 0)
        assert torch.equal(inside[name], expected)
        assert torch.equal(parameters[name], stored)


@pytest.mark.parametrize(
    ("pattern", "scope"), [("0.5", "row"), ("0.5", "layer"), ("0.5", "global"), ("2:4", None)]
)
def test_masks_equal_plain_linears(
    conv_linears: Linears, conv_statistics: Statistics, pattern: str, scope: str | None
) -> None:
    """A transposed linear gets the mask that an ``nn.Linear`` of the same weights gets."""
    candidate = candidate_of(CREPE, pattern, scope)
    masks = dict(model_masks(conv_linears, conv_statistics, candidate))
    twins = dict(model_masks(plain_twins(conv_linears), conv_statistics, candidate))

    assert all(torch.equal(masks[name], twins[name]) for name in conv_linears)


def test_rates_as_plain_linears(conv_linears: Linears, conv_statistics: Statistics) -> None:
    """A bundle of transposed linears accepts its model and rates as one of ``nn.Linear`` does."""
    bundle, twin = (
        sample_bundle(each, conv_statistics, rows_per_layer=8, kernel_sizes=(3,), seed=0)
        for each in (conv_linears, plain_twins(conv_linears))
    )
    bundle.check_model(conv_linears)
    candidates = [candidate_of(CREPE, "0.5", "layer"), candidate_of(CREPE, "2:4", None)]
    ratings, twin_ratings = (ProxyEvaluator(b).evaluate(candidates) for b in (bundle, twin))

    for rating, expected in zip(ratings, twin_ratings, strict=True):
        assert rating.fisher == pytest.approx(expected.fisher, rel=1e-5)
        assert rating.absolute == pytest.approx(expected.absolute, rel=1e-5)
