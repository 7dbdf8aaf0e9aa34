"""An order of the input channels keeps more of a score than none."""

from itertools import combinations

import pytest
import torch

from pho_service.pruning import permutation
from pho_service.pruning.permutation import (
    moved_scores,
    permute_channels,
    permuted_mask,
    retained_score,
)

SHAPES = [(2, 4), (1, 4), (3, 4), (4, 8), (1, 2)]


def random_score(out_features, in_features, seed=0):
    """Scores whose channels differ in size, as activations make them."""
    generator = torch.Generator().manual_seed(seed)
    channel = torch.randn(in_features, generator=generator).exp()
    return torch.rand(out_features, in_features, generator=generator) * channel


def groupings_of_eight():
    """All 35 ways to part eight channels into two groups of four."""
    orders = []
    for others in combinations(range(1, 8), 3):
        first = [0, *others]
        orders.append(torch.tensor(first + [c for c in range(8) if c not in first]))
    return orders


def is_permutation(order, width):
    return order.dtype == torch.int64 and order.sort().values.tolist() == list(range(width))


def test_close_to_the_best_grouping():
    shares = []
    for seed in range(10):
        score = random_score(16, 8, seed)
        retained = [retained_score(score, each, keep=2, group=4) for each in groupings_of_eight()]
        found = retained_score(score, permute_channels(score, keep=2, group=4), keep=2, group=4)
        shares.append(found / max(retained))
        assert found >= retained[0]  # of the identity

    assert max(shares) <= 1 + 1e-12
    assert min(shares) > 0.985
    assert sum(shares) / 10 > 0.995


@pytest.mark.parametrize(("keep", "group"), SHAPES)
def test_it_retains_more_than_without_one_for_every_n_m(keep, group):
    score = random_score(24, 48, seed=3)
    order = permute_channels(score, keep=keep, group=group)
    found = retained_score(score, order, keep=keep, group=group)

    assert is_permutation(order, 48)
    assert found > retained_score(score, torch.arange(48), keep=keep, group=group)


def test_four_important_channels_in_one_group_of_2_4_are_shared_out_two_a_group():
    score = torch.tensor([[9.0, 8, 7, 6, 1, 1, 1, 1]]).repeat(3, 1)
    order = permute_channels(score, keep=2, group=4)

    assert sorted(int((group < 4).sum()) for group in order.view(2, 4)) == [2, 2]
    assert retained_score(score, order, keep=2, group=4) == 3 * (9 + 8 + 7 + 6)


@pytest.mark.parametrize(("keep", "group"), SHAPES)
def test_hinge_sums_are_those_of_sorting_each_group(keep, group):
    score = random_score(20, 6 * group, seed=5)
    groups = torch.randperm(6 * group, generator=torch.Generator().manual_seed(6)).view(6, group)
    moving, staying = groups[:, 0], groups[:, 1:]
    cost = moved_scores(score.T.contiguous(), moving, staying, keep)

    for i in range(6):
        for j in range(6):
            members = torch.cat([moving[i : i + 1], staying[j]])
            ordered = score[:, members].sort(dim=1, descending=True).values
            assert float(cost[i, j]) == pytest.approx(float(ordered[:, :keep].sum()), rel=1e-5)


@pytest.mark.parametrize(("keep", "group"), SHAPES)
def test_mask_is_nm_in_the_order(keep, group):
    score = random_score(10, 4 * group, seed=7)
    order = torch.randperm(4 * group, generator=torch.Generator().manual_seed(8))
    mask = permuted_mask(score, order, keep=keep, group=group)

    for members in order.view(4, group):
        assert (mask[:, members].sum(dim=1) == keep).all()
        lowest_kept = score[:, members].where(mask[:, members], torch.inf).amin(dim=1)
        highest_gone = score[:, members].where(~mask[:, members], -torch.inf).amax(dim=1)
        assert (lowest_kept >= highest_gone).all()


@pytest.mark.parametrize("value", [0.0, 1e-38, 1e35])
def test_equal_scores_give_the_order_that_there_is(value):
    score = torch.full((3, 16), value)

    assert torch.equal(permute_channels(score, keep=2, group=4), torch.arange(16))


def test_nothing_depends_on_the_global_random_state_and_nothing_changes_it():
    score = random_score(16, 32)
    before = torch.get_rng_state()
    orders = [permute_channels(score, keep=2, group=4) for _ in range(2)]

    assert torch.equal(*orders)
    assert torch.equal(torch.get_rng_state(), before)


def test_with_more_than_256_groups_it_has_97_percent_of_the_gain_of_assignments_over_all_pairs(
    monkeypatch,
):
    score = random_score(48, 1200, seed=20)
    order = permute_channels(score, keep=2, group=4)
    monkeypatch.setattr(permutation, "_WHOLE", 1200)
    exact = permute_channels(score, keep=2, group=4)
    before, found, most = (
        retained_score(score, each, keep=2, group=4) for each in (torch.arange(1200), order, exact)
    )

    assert is_permutation(order, 1200)
    assert not torch.equal(order, exact)
    assert found - before >= 0.97 * (most - before)


def test_orders_on_a_gpu(pretended_gpu):
    """They are the CPU's, and the waits of an order by the score do not grow with its width."""
    waits = []
    for in_features in (1040, 1200):
        score = random_score(8, in_features)
        with pretended_gpu.counting() as counts:
            order = permute_channels(score.cuda(), keep=2, group=4)
        waits.append(counts.waits)

        assert order.device == pretended_gpu.device
        assert torch.equal(order.cpu(), permute_channels(score, keep=2, group=4))
    assert waits[0] == waits[1]
