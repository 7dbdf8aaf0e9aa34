"""Masks by ADMM and by ALPS, against plain loops in float64."""

from itertools import product

import pytest
import torch

from pho_service.errors import NumericalError
from pho_service.pruning.admm import (
    PUBLISHED_DAMPING,
    PUBLISHED_PENALTY,
    Masked,
    Normalised,
    Spectrum,
    admm,
    admm_refine,
    alps,
)
from pho_service.pruning.masks import Support

ROWS, WIDTH = 6, 24
KINDS = ("layer", "row", "2:4")


def gram_of(width=WIDTH, tokens=200, dead=0):
    """E[x x^T] of correlated inputs of unequal size, the first ``dead`` of them always 0."""
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(tokens, 4, generator=generator) @ torch.randn(
        4, width, generator=generator
    )
    x = common + torch.randn(tokens, width, generator=generator)
    x *= torch.exp(0.5 * torch.randn(width, generator=generator))
    x[:, :dead] = 0
    return x.T @ x / tokens


def weight_of(seed=1):
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(seed))


def support_of(kind, mask=None):
    """Half of the weights, by what competes."""
    if mask is None:
        mask = (torch.arange(ROWS * WIDTH) % 2 == 0).view(ROWS, WIDTH)
    if kind == "2:4":
        return Support.of(mask, keep=2, group=4)
    return Support.of(mask, by_row=kind == "row")


def plain_choice(kind):
    """What stays by sorting: all but the lowest half, or a share of it."""

    def lowest(scores, count):
        return {(i, j) for _, i, j in sorted(scores)[:count]}

    def choose(score, share=1.0):
        keep = torch.ones(score.shape, dtype=torch.bool)
        each = [(float(score[i, j]), i, j) for i, j in product(range(ROWS), range(score.shape[1]))]
        gone = set()
        if kind == "layer":
            gone = lowest(each, int(len(each) // 2 * share))
        for i in range(ROWS):
            row = [entry for entry in each if entry[1] == i]
            if kind == "row":
                gone |= lowest(row, int(len(row) // 2 * share))
            for first in range(0, len(row), 4):
                if kind == "2:4":
                    gone |= lowest(row[first : first + 4], 2)
        if kind == "2:4" and share < 1:
            gone = lowest([e for e in each if e[1:] in gone], int(len(gone) * share))
        for i, j in gone:
            keep[i, j] = False
        return keep

    return choose


def normalised(gram, damping):
    """The damped matrix with a diagonal of 1, and what its inputs were divided by; float64."""
    damped = gram.double() + damping * gram.diagonal().double().mean() * torch.eye(len(gram))
    scale = damped.diagonal().sqrt()
    return damped / scale / scale[:, None], scale


def plain_admm(weight, gram, choose):
    """Algorithm 2 of arXiv:2401.02938 with its code's numbers, written as they write it."""
    matrix, scale = normalised(gram, 0)
    matrix = matrix + 0.1 * torch.eye(len(gram))
    dense = weight.double() * scale
    inverse = torch.linalg.inv(matrix + torch.eye(len(gram)))
    free, multiplier = dense, torch.zeros_like(dense)
    for step in range(20):
        if step < 15:
            keep = choose((free + multiplier).abs(), 1 - (1 - (step + 1) / 15) ** 3)
        masked = (free + multiplier) * keep
        multiplier = multiplier + free - masked
        free = (dense @ matrix + masked - multiplier) @ inverse
    return (free + multiplier) * keep / scale, keep


def plain_alps(weight, gram, choose):
    """Algorithm 1 of arXiv:2406.07831 with its code's schedule, every inverse made anew."""
    matrix, scale = normalised(gram, 0.01)
    dense = weight.double() * scale
    before = first = choose(dense**2, 1)
    kept, rho, started = int(first.sum()), 0.1, False
    masked, multiplier = dense * first, torch.zeros_like(dense)
    for step in range(300):
        inverse = torch.linalg.inv(matrix + rho * torch.eye(len(gram)))
        free = (dense @ matrix - multiplier + rho * masked) @ inverse
        moved = free + multiplier / rho
        keep = choose(moved**2, 1)
        masked = moved * keep
        multiplier = multiplier + rho * (free - masked)
        if (step + 1) % 3:
            continue
        change, before = int((keep != before).sum()), keep
        if change > 0.005 * kept:
            started = True
            rho *= 1.3 if change > 0.1 * kept else 1.2
        elif change and started:
            rho *= 1.1
        elif started:
            break
        else:
            rho /= 5
            if change:
                masked, multiplier = dense * first, torch.zeros_like(dense)
        if step >= 30 and change < 0.0003 * kept:
            break
    keep = choose(free**2, 1)
    return free * keep / scale, keep


def plain_refine(weight, gram, keep, rows, choose):
    """The growing penalty with separate weights, masked weights and multipliers."""
    matrix, scale = normalised(gram, 0.01)
    dense = weight.double() * scale * rows.double()[:, None]
    masked, multiplier = dense * keep, torch.zeros_like(dense)
    for step in range(48):
        rho = 0.05 * 20 ** (step // 6 / 7)
        inverse = torch.linalg.inv(matrix + rho * torch.eye(len(gram)))
        free = (dense @ matrix - multiplier + rho * masked) @ inverse
        moved = free + multiplier / rho
        keep = choose(moved**2, 1)
        masked = moved * keep
        multiplier = multiplier + rho * (free - masked)
    return masked / scale / rows[:, None], keep


def check_equal(found, expected):
    assert torch.equal(found[1], expected[1])
    torch.testing.assert_close(found[0].double(), expected[0], rtol=1e-3, atol=1e-4)
    assert bool((found[0][~found[1]] == 0).all())


@pytest.mark.parametrize("kind", KINDS)
def test_admm(kind):
    """The published ADMM is its loop: gradual mask, fixed penalty, the last weights masked."""
    weight, gram = weight_of(), gram_of()
    moments = Normalised.of(gram, damping=0, layer="q")
    inverse = moments.inverse(PUBLISHED_DAMPING + PUBLISHED_PENALTY, layer="q")

    found = admm(weight, moments, inverse, support_of(kind))

    check_equal(found, plain_admm(weight, gram, plain_choice(kind)))


@pytest.mark.parametrize("kind", KINDS)
def test_alps(kind):
    """ALPS is its loop: the penalty follows how much the mask changes, until it settles."""
    weight, gram = weight_of(), gram_of()

    found = alps(weight, Spectrum.of(gram, layer="q"), support_of(kind))

    check_equal(found, plain_alps(weight, gram, plain_choice(kind)))


@pytest.mark.parametrize("kind", KINDS)
def test_refine(kind, monkeypatch):
    """Ours is its loop, rows with weights of their own, several linears as each alone."""
    monkeypatch.setattr("pho_service.pruning.hardware.multiplies_halves", lambda: False)
    gram = gram_of()
    keep = plain_choice(kind)(weight_of(3).abs(), 1)
    importance = torch.arange(1, ROWS + 1) / 2.0
    linears = [
        Masked(weight=weight_of(1), keep=keep, support=support_of(kind), importance=importance),
        Masked(weight=weight_of(2), keep=keep, support=support_of(kind)),
    ]

    found = admm_refine(linears, Normalised.of(gram, damping=0.01, layer="q"), layer="q")

    rows = (importance / importance.mean()).sqrt()
    for seed, each, of_rows in zip((1, 2), found, (rows, torch.ones(ROWS)), strict=True):
        expected = plain_refine(weight_of(seed), gram, keep, of_rows, plain_choice(kind))
        check_equal(each, expected)


def refined(kind, gram, keep, importance=None):
    linear = Masked(
        weight=weight_of(), keep=keep, support=support_of(kind, keep), importance=importance
    )
    (found,) = admm_refine([linear], Normalised.of(gram, damping=0.01, layer="q"), layer="q")
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_counts_and_repeats(kind):
    """As many weights stay as before, in every row or group; a second run has the same bits."""
    keep = plain_choice(kind)(weight_of(5).abs(), 1)
    if kind == "row":  # an allocation's remainder: the first rows lose one more
        keep[:2] &= torch.arange(WIDTH) != keep[:2].int().argmax(dim=1, keepdim=True)

    importance = torch.arange(ROWS) / 2.0  # the first row counts for nothing

    first, second = (refined(kind, gram_of(), keep, importance) for _ in range(2))

    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert bool(first[0].isfinite().all())
    assert int(first[1].sum()) == int(keep.sum())
    if kind == "row":
        assert torch.equal(first[1].sum(dim=1), keep.sum(dim=1))
    if kind == "2:4":
        assert bool((first[1].reshape(-1, 4).sum(dim=1) == 2).all())


@pytest.mark.parametrize("kind", KINDS)
def test_products_in_bfloat16_cost_less_than_a_hundredth_of_the_error(kind, monkeypatch):
    weight = torch.randn(ROWS * 8, WIDTH, generator=torch.Generator().manual_seed(6))
    support = support_of(kind, (torch.arange(weight.numel()) % 2 == 0).view(weight.shape))
    keep, gram, errors = support.choose(weight.abs()), gram_of(), []
    for halves in (False, True):
        monkeypatch.setattr("pho_service.pruning.hardware.multiplies_halves", lambda h=halves: h)
        linear = Masked(weight=weight, keep=keep, support=support)
        moments = Normalised.of(gram, damping=0.01, layer="q")
        ((found, _),) = admm_refine([linear], moments, layer="q")
        lost = weight - found
        errors.append(float((lost @ gram * lost).sum()))

    assert errors[1] != errors[0]
    assert errors[1] == pytest.approx(errors[0], rel=0.01)


@pytest.mark.parametrize("tokens", [0, 5, 200])
@pytest.mark.parametrize("method", ["admm", "alps", "refine"])
def test_singular(method, tokens):
    """Fewer tokens than inputs, and inputs that are always 0, whose weights are the first to go."""
    dead = 0 if tokens < 200 else 8
    gram = gram_of(tokens=tokens or 1, dead=dead) * (tokens > 0)
    support = support_of("row")

    if method == "alps":
        weight, keep = alps(weight_of(), Spectrum.of(gram, layer="q"), support)
    elif method == "admm":
        moments = Normalised.of(gram, damping=0, layer="q")
        weight, keep = admm(weight_of(), moments, moments.inverse(1.1, layer="q"), support)
    else:
        weight, keep = refined("row", gram, support.choose(weight_of().abs()))

    assert bool(weight.isfinite().all())
    assert bool((keep.sum(dim=1) == WIDTH // 2).all())
    assert not bool(keep[:, :dead].any())


def test_nan_in_the_second_moments_is_an_error_that_names_the_layer_and_the_way_out():
    gram = gram_of()
    gram[3, 3] = torch.nan

    with pytest.raises(NumericalError, match=r"mlp: .* NaN or infinite.* float32"):
        Normalised.of(gram, damping=0.01, layer="mlp")


def test_float64():
    """A matrix that float32 cannot factor is factored in float64; one that is not positive, not."""
    moments = Normalised(gram=torch.tensor([[1.0, 1.0], [1.0, 1.0]]), scale=torch.ones(2))

    inverse = moments.inverse(1e-9, layer="mlp")

    assert bool(inverse.isfinite().all())
    with pytest.raises(NumericalError, match=r"mlp: .* penalty of -0.5"):
        moments.inverse(-0.5, layer="mlp")
