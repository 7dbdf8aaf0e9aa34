"""Tests of assignments: exact while they are small, close to that and far cheaper beyond."""

from typing import Any

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from pho_service.pruning import permutation
from pho_service.pruning.permutation import assign


def gains(count: int, spread: float, seed: int = 0) -> Tensor:
    """(count, count): what channels gain over the bars of groups, some large everywhere."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.rand(16, 1, count, generator=generator) - torch.rand(
        16, count, 1, generator=generator
    )
    sizes = (spread * torch.randn(count, 1, generator=generator)).exp()
    return rows.clamp_min(0).sum(dim=0).T * sizes + sizes


def total(gain: Tensor, chosen: Tensor) -> float:
    """What an assignment gains."""
    return float(gain[chosen, torch.arange(len(gain))].sum(dtype=torch.float64))


def exact(gain: Tensor) -> float:
    """The most that any gains."""
    candidate, place = linear_sum_assignment(gain.double().numpy(), maximize=True)
    return float(gain.double().numpy()[candidate, place].sum())


@pytest.mark.parametrize("count", [1, 2, 5, 256])
def test_up_to_256_candidates_scipys_answer_pair_by_pair(count: int) -> None:
    gain = gains(count, spread=0.5)
    candidate, place = linear_sum_assignment(gain.numpy(), maximize=True)
    chosen = assign(gain)

    assert chosen.dtype == torch.int64
    assert chosen[torch.from_numpy(place)].tolist() == candidate.tolist()


@pytest.mark.parametrize("spread", [0.0, 0.5, 1.5])
@pytest.mark.parametrize("count", [257, 400])
def test_large_ones_are_close(count: int, spread: float) -> None:
    """Beyond: each candidate has one place, with 99 % of the exact gain over the diagonal."""
    gain = gains(count, spread)
    chosen = assign(gain)
    before = float(gain.diagonal().sum(dtype=torch.float64))

    assert chosen.sort().values.tolist() == list(range(count))
    assert total(gain, chosen) - before >= 0.99 * (exact(gain) - before)
    assert total(gain, chosen) <= exact(gain) * (1 + 1e-6)


def test_never_below_the_diagonal() -> None:
    """Where all gain most at their own place they stay there, however little it is."""
    for seed in range(3):
        gain = torch.rand(300, 300, generator=torch.Generator().manual_seed(seed))
        gain.diagonal().copy_(1 + 1e-3 * torch.arange(300))

        assert assign(gain).tolist() == list(range(300))


def test_pairs_grow_with_the_width(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}
    match = permutation.min_weight_full_bipartite_matching

    def counted(pairs: Any, *, maximize: bool) -> Any:
        seen[pairs.shape[0]] = pairs.nnz
        return match(pairs, maximize=maximize)

    def refused(*_: Any, **__: Any) -> None:
        raise AssertionError("all pairs were looked at")

    monkeypatch.setattr(permutation, "min_weight_full_bipartite_matching", counted)
    monkeypatch.setattr(permutation, "linear_sum_assignment", refused)
    for count in (257, 512, 1024):
        assign(gains(count, spread=0.5))

    assert set(seen) == {257, 512, 1024}
    assert all(16 * count <= pairs <= 33 * count for count, pairs in seen.items())


def test_where_nothing_is_better_than_anything_else_each_candidate_still_gets_one_place() -> None:
    for gain in (torch.zeros(300, 300), torch.full((300, 300), 3.7)):
        assert assign(gain).sort().values.tolist() == list(range(300))


def test_the_unit_of_the_gains_does_not_matter_from_1e_20_to_1e20() -> None:
    gain = gains(300, spread=0.5)

    for size in (2.0**-66, 2.0**66):
        assert total(gain, assign(gain * size)) == pytest.approx(total(gain, assign(gain)), 1e-6)


def test_the_same_gains_give_the_same_assignment() -> None:
    gain = gains(300, spread=0.5)

    assert torch.equal(assign(gain), assign(gain.clone()))


@pytest.mark.parametrize("count", [10, 300])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_are_refused_whatever_the_size(count: int, value: float) -> None:
    gain = gains(count, spread=0.5)
    gain[2, 3] = value

    with pytest.raises(ValueError, match=r"numeric|NaN|infinite|infeasible"):
        assign(gain)


def test_as_many_places_as_candidates() -> None:
    with pytest.raises(ValueError, match=r"\(3, 4\) is not square"):
        assign(torch.zeros(3, 4))
