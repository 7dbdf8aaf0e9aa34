"""Assignments of more than 256 candidates: close to exact ones, and far cheaper."""

import pytest
import torch
from scipy.optimize import linear_sum_assignment

from pho_service.pruning import permutation
from pho_service.pruning.permutation import assign


def gains(count, spread, seed=0):
    """(count, count): what channels gain over the bars of groups, some large everywhere."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.rand(16, 1, count, generator=generator) - torch.rand(
        16, count, 1, generator=generator
    )
    sizes = (spread * torch.randn(count, 1, generator=generator)).exp()
    return rows.clamp_min(0).sum(dim=0).T * sizes + sizes


def total(gain, chosen):
    return float(gain[chosen, torch.arange(len(gain))].sum(dtype=torch.float64))


def exact(gain):
    candidate, place = linear_sum_assignment(gain.double().numpy(), maximize=True)
    return float(gain.double().numpy()[candidate, place].sum())


@pytest.mark.parametrize("spread", [0.0, 0.5, 1.5])
@pytest.mark.parametrize("count", [257, 400])
def test_large_ones_are_close(count, spread):
    """Each candidate has one place, with 99 % of the exact gain over the diagonal."""
    gain = gains(count, spread)
    chosen = assign(gain)
    before = float(gain.diagonal().sum(dtype=torch.float64))

    assert chosen.sort().values.tolist() == list(range(count))
    assert total(gain, chosen) - before >= 0.99 * (exact(gain) - before)
    assert total(gain, chosen) <= exact(gain) * (1 + 1e-6)


def test_pairs_grow_with_the_width(monkeypatch):
    seen = {}
    match = permutation.min_weight_full_bipartite_matching

    def counted(pairs, *, maximize):
        seen[pairs.shape[0]] = pairs.nnz
        return match(pairs, maximize=maximize)

    def refused(*_, **__):
        raise AssertionError("all pairs were looked at")

    monkeypatch.setattr(permutation, "min_weight_full_bipartite_matching", counted)
    monkeypatch.setattr(permutation, "linear_sum_assignment", refused)
    for count in (257, 512, 1024):
        assign(gains(count, spread=0.5))

    assert set(seen) == {257, 512, 1024}
    assert all(16 * count <= pairs <= 33 * count for count, pairs in seen.items())


def test_where_nothing_is_better_than_anything_else_each_candidate_still_gets_one_place():
    for gain in (torch.zeros(300, 300), torch.full((300, 300), 3.7)):
        assert assign(gain).sort().values.tolist() == list(range(300))


def test_the_unit_of_the_gains_does_not_matter_from_1e_20_to_1e20():
    gain = gains(300, spread=0.5)

    for size in (2.0**-66, 2.0**66):
        assert total(gain, assign(gain * size)) == pytest.approx(total(gain, assign(gain)), 1e-6)
