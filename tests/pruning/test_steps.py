"""What follows the score, for the linears that read one input."""

from dataclasses import replace

import pytest
import torch

from pho_service.pruning.masks import mask_of
from pho_service.pruning.permutation import permute_channels
from pho_service.pruning.selection import nm_mask
from pho_service.pruning.steps import InputMoments, MaskedLinear, finish
from pho_service.pruning.weight_update import inverse_factor, obs_update, sparsegpt
from pho_service.spec.pattern import Pattern
from pho_service.spec.steps import Allocation, Steps

WIDTH, TOKENS = 16, 200


@pytest.fixture
def inputs():
    """(tokens, in_features), correlated, not centred."""
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(WIDTH, WIDTH, generator=generator)
    return torch.randn(TOKENS, WIDTH, generator=generator) @ mixing + 0.5


@pytest.fixture
def moments(inputs):
    """What a calibration says of ``inputs``, one sequence."""
    gram = inputs.T @ inputs / TOKENS
    return InputMoments(
        gram=gram,
        mean=inputs.mean(dim=0),
        activation_norm=(gram.diagonal() * TOKENS).sqrt(),
        seen=TOKENS,
    )


def wanda(weight, moments):
    return weight.abs() * moments.activation_norm


def linears_of(moments, pattern, order=None):
    """Two linears of different height, with masks by Wanda's score."""
    found = []
    for name, height in (("q_proj", 12), ("k_proj", 4)):
        generator = torch.Generator().manual_seed(height)
        weight = torch.randn(height, WIDTH, generator=generator)
        score = wanda(weight, moments)
        found.append(
            MaskedLinear(
                name=name, weight=weight, fisher=torch.rand(height) + 0.1,
                mask=mask_of(score, pattern, None, order),
            )
        )  # fmt: skip
    return found


def error(linear, changed, inputs):
    """Squared distance of the outputs of each row, from the inputs themselves."""
    outputs = inputs.double() @ (linear.weight - changed).double().T
    return outputs.square().sum(dim=0)


ALL_STEPS = [
    ("0.5", Steps(repruning="swaps")),
    ("0.5", Steps(repruning="dsnot", update="obs")),
    ("0.5", Steps(update="least-squares")),
    ("0.5", Steps(update="sparsegpt")),
    ("2:4", Steps(repruning="swaps", update="obs")),
    ("4:8", Steps(repruning="dsnot", update="obs")),
]


@pytest.mark.parametrize(("text", "steps"), ALL_STEPS)
def test_what_is_removed_is_exactly_0(moments, text, steps):
    pattern = Pattern.parse(text)
    linears = linears_of(moments, pattern)
    for linear, (name, mask, weight) in zip(
        linears, finish(linears, moments, pattern, steps), strict=True
    ):
        assert name == linear.name
        assert int(mask.keep.sum()) == int(linear.mask.keep.sum())
        assert bool((weight[~mask.keep] == 0).all())
        if steps.update == "none":
            assert torch.equal(weight[mask.keep], linear.weight[mask.keep])
        if pattern.group:
            order = torch.arange(WIDTH) if mask.order is None else mask.order
            groups = mask.keep[:, order].reshape(-1, pattern.group).sum(dim=1)
            assert bool((groups == pattern.keep).all())


@pytest.mark.parametrize("update", ["obs", "sparsegpt"])
def test_the_update_is_that_of_the_linear_alone(moments, update):
    pattern = Pattern.parse("0.5")
    linears = linears_of(moments, pattern)
    factor = inverse_factor(moments.gram, layer="q_proj")
    for linear, (_, mask, weight) in zip(
        linears, finish(linears, moments, pattern, Steps(update=update)), strict=True
    ):
        keep, expected = linear.mask.keep, obs_update(linear.weight, linear.mask.keep, factor)
        if update == "sparsegpt":
            expected, keep = sparsegpt(linear.weight, factor, removed=int((~keep).sum()))

        assert torch.equal(mask.keep, keep)
        assert torch.equal(weight, expected)


def test_an_update_follows_the_order(moments, inputs):
    pattern = Pattern.parse("2:4")
    plain = linears_of(moments, pattern)
    scores = torch.cat([wanda(li.weight, moments) for li in plain])
    order = permute_channels(scores, keep=2, group=4)
    linears = linears_of(moments, pattern, order)
    factor = inverse_factor(moments.gram[order][:, order], layer="q_proj")
    for linear, (_, mask, weight) in zip(
        linears, finish(linears, moments, pattern, Steps(update="sparsegpt")), strict=True
    ):
        expected, keep = sparsegpt(linear.weight[:, order], factor, keep=2, group=4)

        assert torch.equal(weight[:, order], expected)
        assert torch.equal(mask.keep[:, order], keep)
        assert error(linear, weight, inputs).sum() < error(linear, weight * 0, inputs).sum()


def test_second_moments_are_of_independent_tokens_too(moments):
    shrunk = moments.shrunk(2.0)
    more = 2.0 * WIDTH
    diagonal = torch.diag(moments.gram.diagonal()).double()
    expected = (TOKENS * moments.gram.double() + more * diagonal) / (TOKENS + more)

    torch.testing.assert_close(shrunk.gram.double(), expected)
    assert torch.equal(shrunk.gram.diagonal(), moments.gram.diagonal())
    assert torch.equal(shrunk.mean, moments.mean)
    assert moments.shrunk(0.0) is moments
    zeros = torch.zeros(WIDTH)  # of an input that no token reached
    unseen = InputMoments(gram=torch.diag(zeros), mean=zeros, activation_norm=zeros, seen=0)
    assert not unseen.shrunk(1.0).gram.any()


@pytest.mark.parametrize("repruning", ["none", "swaps", "admm"])
def test_shrinkage_helps_on_other_tokens(repruning):
    generator = torch.Generator().manual_seed(2)
    common = torch.randn(TOKENS, 1, generator=generator)
    inputs = torch.randn(TOKENS, WIDTH, generator=generator) + 0.7 * common
    few = inputs[: WIDTH + 8]
    gram = few.T @ few / len(few)
    moments = InputMoments(
        gram=gram, mean=few.mean(dim=0), activation_norm=gram.diagonal().sqrt(), seen=len(few)
    )
    pattern = Pattern.parse("0.5")
    steps = Steps(repruning=repruning, update="least-squares")
    linears = linears_of(moments, pattern)

    def errors(steps):
        finished = zip(linears, finish(linears, moments, pattern, steps), strict=True)
        weights = [(linear, weight) for linear, (_, _, weight) in finished]
        return [
            sum(float(error(linear, weight, tokens).sum()) for linear, weight in weights)
            for tokens in (few, inputs[len(few) :])
        ]

    plain, shrunk = errors(steps), errors(replace(steps, shrinkage=1.0))

    assert shrunk[0] > plain[0]
    assert shrunk[1] < plain[1]


def test_a_linear_of_1_of_4_keeps_1_of_4(moments):
    pattern = Pattern.parse("2:4")
    (linear, _) = linears_of(moments, pattern)
    score = wanda(linear.weight, moments)
    sparse = replace(linear, mask=mask_of(score, pattern, 1, None))
    allocated = Steps(allocation=Allocation(method="fisher"), repruning="swaps", update="obs")
    ((_, mask, _),) = finish([sparse], moments, pattern, allocated)

    assert torch.equal(sparse.mask.keep, nm_mask(score, keep=1, group=4))
    assert bool((mask.keep.reshape(-1, 4).sum(dim=1) == 1).all())
    assert mask.group_keep == 1
