"""Which weights stay, against plain sorting."""

import itertools
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from pho_service.pruning.selection import keep_highest, nm_mask, threshold_of


def sorted_mask(line: list[float], removed: int) -> list[bool]:
    """Stable sort from high to low, so a tie keeps the lower index; all but the tail stay."""
    order = sorted(range(len(line)), key=lambda i: -line[i])
    kept = set(order[: len(line) - removed])
    return [i in kept for i in range(len(line))]


def with_ties(*shape: int) -> Tensor:
    """Few distinct whole numbers, so most scores are tied."""
    return torch.randint(4, shape, generator=torch.Generator().manual_seed(0)).float()


@pytest.mark.parametrize("removed", range(14))
def test_keep_highest_ties(removed: int) -> None:
    """With many ties a line still loses exactly ``removed``, and the lower index stays."""
    score = with_ties(5, 13)
    mask = keep_highest(score, removed)

    assert mask.sum(dim=1).tolist() == [13 - removed] * 5
    assert mask.tolist() == [sorted_mask(line, removed) for line in score.tolist()]


@pytest.mark.parametrize("removed", [1, 50, 199])
def test_keep_highest_distinct(removed: int) -> None:
    """Without ties the highest scores of each line stay."""
    score = torch.randn(3, 200, generator=torch.Generator().manual_seed(0))
    mask = keep_highest(score, removed)

    assert mask.tolist() == [sorted_mask(line, removed) for line in score.tolist()]


@pytest.mark.parametrize("removed", [0, 3, 8])
def test_keep_highest_all_equal(removed: int) -> None:
    """If all scores are equal, the last ones go."""
    mask = keep_highest(torch.zeros(2, 8), removed)

    assert mask.tolist() == [[True] * (8 - removed) + [False] * removed] * 2


@pytest.mark.parametrize("removed", [-1, 5])
def test_keep_highest_out_of_range(removed: int) -> None:
    """More than all, or fewer than none, cannot be removed."""
    with pytest.raises(ValueError, match=f"removed={removed}"):
        keep_highest(torch.zeros(2, 4), removed)


@pytest.mark.parametrize(
    ("keep", "group"), [(1, 2), (1, 4), (2, 4), (3, 4), (4, 8), (2, 3), (63, 64), (1, 64)]
)
@pytest.mark.parametrize("ties", [True, False])
def test_nm_mask(keep: int, group: int, *, ties: bool) -> None:
    """Every run keeps exactly its N highest scores of M; on a tie the lower index stays."""
    width = 2 * group
    score = (
        with_ties(6, width)
        if ties
        else torch.randn(6, width, generator=torch.Generator().manual_seed(0))
    )
    expected = [
        sorted_mask(line[:group], group - keep) + sorted_mask(line[group:], group - keep)
        for line in score.tolist()
    ]
    mask = nm_mask(score, keep=keep, group=group)

    assert mask.tolist() == expected
    assert mask.view(6, 2, group).sum(dim=-1).unique().tolist() == [keep]


def test_nm_mask_all_orders() -> None:
    """2:4 keeps the two highest in each of the 256 runs of four values out of 0..3."""
    runs = [list(map(float, run)) for run in itertools.product(range(4), repeat=4)]
    mask = nm_mask(torch.tensor(runs), keep=2, group=4)

    assert mask.tolist() == [sorted_mask(run, 2) for run in runs]


def test_nm_mask_stacked() -> None:
    """Leading dimensions stack layers: each gets the mask that it gets alone."""
    score = torch.rand(3, 4, 8, generator=torch.Generator().manual_seed(0))
    mask = nm_mask(score, keep=2, group=4)

    assert torch.equal(mask, torch.stack([nm_mask(s, keep=2, group=4) for s in score]))


@pytest.mark.parametrize(("keep", "group", "width"), [(0, 4, 8), (4, 4, 8), (5, 4, 8), (2, 4, 6)])
def test_nm_mask_refuses(keep: int, group: int, width: int) -> None:
    """N must lie in 1..M-1, and M must divide the line."""
    with pytest.raises(ValueError, match=r"must hold|not a multiple"):
        nm_mask(torch.zeros(2, width), keep=keep, group=group)


def sorted_threshold(chunks: list[tuple[Tensor, float]], removed: float) -> float:
    """Walk up the sorted scores in exact arithmetic until ``removed`` weights are passed."""
    pairs = sorted((v, weight) for values, weight in chunks for v in values.flatten().tolist())
    passed = Fraction(0)
    for value, weight in pairs:
        passed += Fraction(weight)
        if passed >= Fraction(removed):
            return value
    raise AssertionError("fewer weights than removed")


def chunks_of(kind: str) -> list[tuple[Tensor, float]]:
    """Three chunks of different shapes and weights; binary weights, so that sums are exact."""
    generator = torch.Generator().manual_seed(0)
    shapes, weights = [(7, 11), (40,), (2, 3, 5)], [1.0, 2.5, 0.25]
    values = [torch.rand(shape, generator=generator) for shape in shapes]
    if kind == "ties":
        values = [(v * 4).floor() for v in values]
    elif kind == "wide":  # from below the smallest normal float to near the largest
        values = [10 ** (v.double() * 80 - 42) for v in values]
    elif kind == "close":  # all share their upper 16 bits
        values = [1 + v / 256 for v in values]
    return list(zip([v.float() for v in values], weights, strict=True))


@pytest.mark.parametrize("share", [0.001, 0.1, 0.25, 0.5, 0.77, 0.999, 1])
@pytest.mark.parametrize("kind", ["plain", "ties", "wide", "close"])
def test_threshold(kind: str, share: float) -> None:
    """The threshold is the score at which a walk up all sorted scores has passed ``removed``."""
    chunks = chunks_of(kind)
    removed = share * sum(values.numel() * weight for values, weight in chunks)

    assert threshold_of(lambda: chunks, removed) == sorted_threshold(chunks, removed)


def test_threshold_every_count() -> None:
    """With weight 1, removing c makes the threshold the c-th smallest score, for every c."""
    values = with_ties(23)
    ordered = sorted(values.tolist())

    assert [threshold_of(lambda: [(values, 1.0)], c) for c in range(1, 24)] == ordered


def test_threshold_chunks_do_not_matter() -> None:
    """Scores in one piece and in many, reordered, give the same threshold."""
    values = torch.rand(200, generator=torch.Generator().manual_seed(0))
    pieces = [(piece, 1.0) for piece in reversed(values.split(7))]

    assert threshold_of(lambda: pieces, 93) == threshold_of(lambda: [(values, 1.0)], 93)


@pytest.mark.parametrize("value", [0.0, 1e-45, 1.1754944e-38, 1.0, 3.4028235e38])
def test_threshold_extremes(value: float) -> None:
    """Zero, denormal and the largest floats are returned as they are."""
    values = torch.tensor([value])

    assert threshold_of(lambda: [(values, 1.0)], 1) == float(values[0])


def test_threshold_not_contiguous() -> None:
    """The memory layout of the scores does not matter."""
    values = torch.rand(8, 9, generator=torch.Generator().manual_seed(0))

    assert threshold_of(lambda: [(values.T, 1.0)], 30) == float(values.flatten().kthvalue(30)[0])
