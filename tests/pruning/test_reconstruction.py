"""The training of one pruned block, on a linear that stands for it."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from pho_service.pruning.reconstruction import Trainable, reconstruct, split, summary
from pho_service.pruning.statistics import PrunableLinear
from pho_service.spec.steps import Reconstruction

SETTINGS = Reconstruction(method="block", passes=3, learning_rate=0.05)


@pytest.fixture
def inputs():
    return torch.randn(9, 5, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def keep():
    return torch.rand(6, 8, generator=torch.Generator().manual_seed(1)) < 0.5


def pruned(keep):
    dense = torch.randn(6, 8, generator=torch.Generator().manual_seed(2))
    return dense, nn.Parameter(dense * keep)


def trainable(parameter, keep):
    module = nn.Linear(keep.shape[1], keep.shape[0], bias=False)
    module.weight = parameter
    return Trainable(linear=PrunableLinear(name="it", module=module), keep=keep)


def trained(parameter, keep, inputs, targets):
    return reconstruct(
        [trainable(parameter, keep)],
        lambda window: inputs[window] @ parameter.T,
        [*targets],
        SETTINGS,
    )


def plain(weight, keep, inputs, targets):
    weight, keep, inputs, targets = (t.double() for t in (weight, keep, inputs, targets))
    training, held_out = split(len(inputs))

    def error(window):
        difference = inputs[window] @ weight.T - targets[window]
        return float((difference.square().sum(1) / targets[window].square().sum(1)).mean())

    size = float(weight[keep.bool()].square().mean().sqrt())
    best = weight, sum(map(error, held_out)) / len(held_out)
    mean = 0.0
    square = 0.0
    step, better, share = 0, 0, 0.05
    generator = torch.Generator().manual_seed(0)
    while better < 3:
        for place, index in enumerate(torch.randperm(len(training), generator=generator).tolist()):
            x, y = inputs[training[index]], targets[training[index]]
            gradient = torch.zeros_like(weight)
            for token in range(5):
                difference = weight @ x[token] - y[token]
                gradient += 2 * torch.outer(difference, x[token]) / y[token].square().sum() / 5
            gradient *= keep
            rate, step = share * size * (1 - (better + place / len(training)) / 3), step + 1
            mean = 0.9 * mean + 0.1 * gradient
            square = 0.999 * square + 0.001 * gradient**2
            root = (square / (1 - 0.999**step)).sqrt() + 1e-8
            weight = weight - rate * mean / (1 - 0.9**step) / root
        found = sum(map(error, held_out)) / len(held_out)
        if found < best[1]:
            best, better = (weight, found), better + 1
        else:
            weight, mean, square, step, share = best[0], 0.0, 0.0, 0, share / 3
    return best


@pytest.mark.parametrize(("halves", "error"), [(False, 1e-4), (True, 0.02)])
def test_it_is_that_of_a_plain_float64_loop(halves, error, inputs, keep, monkeypatch):
    """On a CPU without units for products in bfloat16, and on one that has them."""
    monkeypatch.setattr("pho_service.pruning.hardware.multiplies_halves", lambda: halves)
    dense, parameter = pruned(keep)
    targets = inputs @ dense.T
    expected, held_out = plain(parameter.detach(), keep, inputs, targets)
    result = trained(parameter, keep, inputs, targets)

    torch.testing.assert_close(parameter.detach(), expected.float(), rtol=error, atol=error / 10)
    assert result.after == pytest.approx(held_out, rel=error)
    assert result.before is not None
    assert result.after is not None
    assert result.after < result.before
    assert result.kept
    assert torch.equal(parameter.detach() != 0, keep)


@pytest.mark.parametrize("bad", [math.nan, math.inf, None])
def test_an_error_of_nan_changes_nothing_nor_are_weights_that_are_right_already(inputs, keep, bad):
    dense, parameter = pruned(keep)
    before = parameter.detach().clone()
    targets = inputs @ (before if bad is None else dense).T
    if bad is not None:
        targets[0, 0, 0] = bad  # of a window that is trained on
    result = trained(parameter, keep, inputs, targets)

    assert torch.equal(parameter.detach(), before)
    assert not result.kept
    assert result.before == result.after
    if bad is None:
        assert (result.passes, result.after) == (3, 0)
    assert summary({"h.0": result}) == (
        "0 of 1 blocks reconstructed; no better, so left as they were: h.0"
    )
    # every eighth window is held out, of few the last
    assert split(16) == ([*range(7), *range(8, 15)], [7, 15])
    assert (split(3), split(2)) == (([0, 1], [2]), ([0], [1]))


def test_a_pass_that_makes_it_worse_is_taken_back(inputs, keep):
    dense, parameter = pruned(keep)
    result = reconstruct(
        [trainable(parameter, keep)],
        lambda window: inputs[window] @ parameter.T,
        [*(inputs @ dense.T)],
        replace(SETTINGS, learning_rate=1.0),
    )

    assert result.kept
    assert result.passes > SETTINGS.passes
    assert torch.equal(parameter.detach() != 0, keep)
