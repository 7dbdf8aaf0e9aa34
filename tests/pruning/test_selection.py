"""Which weights stay, against plain sorting."""

import itertools
from fractions import Fraction

import pytest
import torch

from pho_service.pruning.selection import keep_highest, nm_mask, threshold_of


def sorted_mask(line, removed):
    """Stable sort from high to low, so a tie keeps the lower index; all but the tail stay."""
    order = sorted(range(len(line)), key=lambda i: -line[i])
    kept = set(order[: len(line) - removed])
    return [i in kept for i in range(len(line))]


@pytest.mark.parametrize("removed", [-1, 5])
def test_more_than_all_or_fewer_than_none_cannot_be_removed(removed):
    with pytest.raises(ValueError, match=f"removed={removed}"):
        keep_highest(torch.zeros(2, 4), removed)


def test_2_4_keeps_the_two_highest_in_each_of_the_256_runs_of_four_values_out_of_0_3():
    runs = [list(map(float, run)) for run in itertools.product(range(4), repeat=4)]
    mask = nm_mask(torch.tensor(runs), keep=2, group=4)

    assert mask.tolist() == [sorted_mask(run, 2) for run in runs]


@pytest.mark.parametrize(("keep", "group", "width"), [(0, 4, 8), (4, 4, 8), (5, 4, 8), (2, 4, 6)])
def test_n_must_lie_in_1_m_1_and_m_must_divide_the_line(keep, group, width):
    with pytest.raises(ValueError, match=r"must hold|not a multiple"):
        nm_mask(torch.zeros(2, width), keep=keep, group=group)


def sorted_threshold(chunks, removed):
    """Walk up the sorted scores in exact arithmetic until ``removed`` weights are passed."""
    pairs = sorted((v, weight) for values, weight in chunks for v in values.flatten().tolist())
    passed = Fraction(0)
    for value, weight in pairs:
        passed += Fraction(weight)
        if passed >= Fraction(removed):
            return value
    raise AssertionError("fewer weights than removed")


def chunks_of(kind):
    """Three chunks of different shapes and weights; binary weights, so that sums are exact."""
    generator = torch.Generator().manual_seed(0)
    shapes, weights = [(7, 11), (40, 1), (6, 5)], [1.0, 2.5, 0.25]
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
def test_it_is_that_of_a_walk_up_all_sorted_scores(kind, share):
    chunks = chunks_of(kind)
    removed = share * sum(values.numel() * weight for values, weight in chunks)
    pieces = [(part.T, weight) for values, weight in chunks for part in values.split(3)]
    expected = sorted_threshold(chunks, removed)

    assert threshold_of(lambda: chunks, removed) == expected
    assert threshold_of(lambda: reversed(pieces), removed) == expected


@pytest.mark.parametrize("value", [0.0, 1e-45, 1.1754944e-38, 1.0, 3.4028235e38])
def test_zero_denormal_and_the_largest_floats_are_returned_as_they_are(value):
    values = torch.tensor([value])

    assert threshold_of(lambda: [(values, 1.0)], 1) == float(values[0])
