"""Streamed sums of one input, against float64."""

import pytest
import torch
from torch import Tensor

from pho_service.pruning.second_moments import (
    PANEL,
    SecondMoment,
    add_gram_,
    mirrored_,
    square_root,
)


def random_tokens(tokens: int, width: int, seed: int = 0) -> Tensor:
    """(tokens, width), float32, with one channel that all others follow a little."""
    x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed))
    return x + 0.5 * x[:, :1]


def projection(x: Tensor, rows: int, seed: int, parts: int = 1) -> Tensor:
    """The sum of a projection's rows, x given in so many parts."""
    moment = SecondMoment(x.shape[1], x.device, projection_rows=rows, seed=seed)
    for part in x.chunk(parts):
        moment.add(part)
    return moment.moment


def test_each_token_is_in_one_row() -> None:
    """The rows' sums are the tokens, each once, as it is or with its sign changed."""
    moment = projection(torch.eye(50), rows=8, seed=3)

    assert torch.equal(moment.abs().sum(dim=0), torch.ones(50))
    assert 0 < int((moment < 0).sum()) < 50
    assert int((moment != 0).any(dim=1).sum()) == 8


def test_projection_is_unbiased() -> None:
    """Over many seeds the energy of a direction is right on average, and varies by 2 / rows."""
    x, rows = random_tokens(40, 6).double(), 4
    direction = torch.arange(6.0, dtype=torch.float64) - 2
    along = (x @ direction).square()  # of each token
    exact = along.sum()
    energies = torch.stack(
        [(projection(x, rows, seed).double() @ direction).square().sum() for seed in range(4000)]
    )
    pairs = exact.square() - along.square().sum()  # over i != j

    assert float(energies.mean()) == pytest.approx(float(exact), rel=0.05)
    assert float(energies.var()) == pytest.approx(float(2 / rows * pairs), rel=0.2)


def test_parts_do_not_matter() -> None:
    """Tokens that come in other parts are drawn to the same rows with the same signs."""
    x = random_tokens(60, 5)

    torch.testing.assert_close(projection(x, 16, 1, parts=7), projection(x, 16, 1))


@pytest.mark.parametrize("width", [7, PANEL, 2 * PANEL + 3])
def test_gram(width: int) -> None:
    """The upper triangle is summed panel by panel and mirrored."""
    x = random_tokens(20, width)
    gram = torch.zeros(width, width)
    for part in x.chunk(3):
        add_gram_(gram, part)
    mirrored_(gram)

    assert torch.equal(gram, gram.T)
    torch.testing.assert_close(gram.double(), x.double().T @ x.double(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tokens", [3, 40])
def test_square_root(tokens: int) -> None:
    """A second moment has a root, singular or not, also where channels differ by 8 orders."""
    x = random_tokens(tokens, 20) * torch.logspace(-4, 4, 20)
    x[:, 5] = 0
    gram = (x.T @ x) / tokens
    root = square_root(gram).double()
    size = gram.diagonal().double().sqrt()

    error = (root.T @ root - gram).abs() / (size[:, None] * size).clamp_min(1e-30)
    assert float(error.max()) < 1e-5
    assert bool((root[:, 5] == 0).all())


def test_mean() -> None:
    """The mean of projections of two inputs has, on average, the mean of their energies."""
    first, second = random_tokens(30, 4, seed=1), random_tokens(30, 4, seed=2)
    both = (first.T @ first + second.T @ second) / 2
    total = torch.zeros(4, 4)
    for seed in range(3000):
        moments = []
        for x, own in ((first, 2 * seed), (second, 2 * seed + 1)):
            moments.append(SecondMoment(4, x.device, projection_rows=8, seed=own))
            moments[-1].add(x)
        mean = SecondMoment.mean(moments)
        total += mean.moment.T @ mean.moment / 3000

    torch.testing.assert_close(total, both, rtol=0.05, atol=1.0)
    torch.testing.assert_close(mean.squares, both.diagonal())


@pytest.mark.parametrize("rows", [0, 16])
def test_mixed_precision(rows: int) -> None:
    """Sums are float32 to the last bit where products around them are bfloat16."""
    x = random_tokens(30, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = projection(x, rows, seed=1)

    assert torch.equal(mixed, projection(x, rows, seed=1))
