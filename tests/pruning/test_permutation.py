"""An order of the input channels keeps more of a score, or makes less error, than none."""

from dataclasses import replace
from itertools import combinations, product

import pytest
import torch
from pretended_cards import Card
from torch import Tensor

from pho_service.pruning import permutation
from pho_service.pruning.permutation import (
    PermutedLinear,
    moved_scores,
    permute_channels,
    permute_for_error,
    permuted_mask,
    reconstruction_error,
    retained_score,
)
from pho_service.pruning.selection import nm_mask

SHAPES = [(2, 4), (1, 4), (3, 4), (4, 8), (1, 2)]


def random_score(out_features: int, in_features: int, seed: int = 0) -> Tensor:
    """Scores whose channels differ in size, as activations make them."""
    generator = torch.Generator().manual_seed(seed)
    channel = torch.randn(in_features, generator=generator).exp()
    return torch.rand(out_features, in_features, generator=generator) * channel


def random_linear(out_features: int, in_features: int, seed: int = 0) -> PermutedLinear:
    """A linear whose score is its magnitude, with a heavy-tailed Fisher weight."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out_features, in_features, generator=generator)
    fisher = torch.randn(out_features, generator=generator).exp()
    return PermutedLinear(weight=weight, score=weight.abs(), fisher=fisher)


def random_gram(in_features: int, seed: int = 0) -> Tensor:
    """(in_features, in_features): of correlated inputs of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(in_features, in_features, generator=generator)
    scale = torch.randn(in_features, generator=generator).exp()
    inputs = torch.randn(4 * in_features, in_features, generator=generator) @ mix * scale
    return inputs.T @ inputs / len(inputs)


def groupings_of_eight() -> list[Tensor]:
    """All 35 ways to part eight channels into two groups of four."""
    orders = []
    for others in combinations(range(1, 8), 3):
        first = [0, *others]
        orders.append(torch.tensor(first + [c for c in range(8) if c not in first]))
    return orders


def exact_error(linears: list[PermutedLinear], gram: Tensor, order: Tensor) -> float:
    """The weighted error of several linears at 2:4, in float64, row by row."""
    total = 0.0
    for linear in linears:
        mask = permuted_mask(linear.score, order, keep=2, group=4)
        removed = linear.weight.double() * ~mask
        for row, importance in zip(removed, linear.fisher.double(), strict=True):
            total += float(importance * (row @ gram.double() @ row))
    return total


def is_permutation(order: Tensor, width: int) -> bool:
    """Whether every channel stands somewhere, once."""
    return order.dtype == torch.int64 and order.sort().values.tolist() == list(range(width))


def test_close_to_the_best_grouping() -> None:
    shares = []
    for seed in range(20):
        score = random_score(16, 8, seed)
        retained = [retained_score(score, each, keep=2, group=4) for each in groupings_of_eight()]
        found = retained_score(score, permute_channels(score, keep=2, group=4), keep=2, group=4)
        shares.append(found / max(retained))
        assert found >= retained[0]  # of the identity

    assert max(shares) <= 1 + 1e-12
    assert min(shares) > 0.985
    assert sum(shares) / 20 > 0.995


@pytest.mark.parametrize(("keep", "group"), SHAPES)
def test_never_below_the_identity(keep: int, group: int) -> None:
    """The score retained is more than without a permutation, for every N:M."""
    score = random_score(24, 48, seed=3)
    order = permute_channels(score, keep=keep, group=group)
    found = retained_score(score, order, keep=keep, group=group)

    assert is_permutation(order, 48)
    assert found > retained_score(score, torch.arange(48), keep=keep, group=group)


def test_a_sweep_that_would_lower_the_retained_score_is_not_made() -> None:
    score = random_score(24, 64, seed=4)
    found = [
        retained_score(
            score, permute_channels(score, keep=2, group=4, sweeps=sweeps), keep=2, group=4
        )
        for sweeps in range(6)
    ]

    assert found == sorted(found)
    assert found[-1] > found[0]


def test_where_nothing_can_be_won_the_channels_stay_as_they_are() -> None:
    score = torch.tensor([[9.0, 8, 1, 2, 7, 6, 3, 1]])

    assert permute_channels(score, keep=2, group=4).tolist() == list(range(8))


def test_unevenly_placed_channels() -> None:
    """Four important channels in one group of 2:4 are shared out, two a group."""
    score = torch.tensor([[9.0, 8, 7, 6, 1, 1, 1, 1]]).repeat(3, 1)
    order = permute_channels(score, keep=2, group=4)

    assert sorted(int((group < 4).sum()) for group in order.view(2, 4)) == [2, 2]
    assert retained_score(score, order, keep=2, group=4) == 3 * (9 + 8 + 7 + 6)


@pytest.mark.parametrize(("keep", "group"), SHAPES)
def test_hinge_sums_equal_sorting(keep: int, group: int) -> None:
    """The cost matrix is what sorting every group with every newcomer gives."""
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
def test_mask_is_nm_in_the_order(keep: int, group: int) -> None:
    score = random_score(10, 4 * group, seed=7)
    order = torch.randperm(4 * group, generator=torch.Generator().manual_seed(8))
    mask = permuted_mask(score, order, keep=keep, group=group)

    for members in order.view(4, group):
        assert (mask[:, members].sum(dim=1) == keep).all()
        lowest_kept = score[:, members].where(mask[:, members], torch.inf).amin(dim=1)
        highest_gone = score[:, members].where(~mask[:, members], -torch.inf).amax(dim=1)
        assert (lowest_kept >= highest_gone).all()


def test_without_a_permutation_it_is_the_plain_n_m_mask() -> None:
    score = random_score(5, 16)

    mask = permuted_mask(score, torch.arange(16), keep=2, group=4)
    assert torch.equal(mask, nm_mask(score, keep=2, group=4))


@pytest.mark.parametrize("value", [0.0, 1.0, 1e-38, 1e35])
def test_equal_scores(value: float) -> None:
    """Ties, zeros and extreme scores give an order, and no order is better than any other."""
    score = torch.full((3, 16), value)

    assert torch.equal(permute_channels(score, keep=2, group=4), torch.arange(16))


def test_a_common_factor_of_the_scores_leaves_the_order_as_it_is() -> None:
    score = random_score(12, 32, seed=9)
    orders = [permute_channels(score * 2.0**power, keep=2, group=4) for power in (-90, 0, 90)]

    assert torch.equal(orders[0], orders[1])
    assert torch.equal(orders[2], orders[1])


def test_channels_that_score_0_everywhere_are_spread_over_the_groups() -> None:
    score = random_score(12, 16, seed=10)
    score[:, :8] = 0
    order = permute_channels(score, keep=2, group=4)

    assert retained_score(score, order, keep=2, group=4) == pytest.approx(float(score.sum()))


def test_one_order_for_two_linears() -> None:
    first, second = random_score(12, 32, seed=11), random_score(20, 32, seed=12)
    both = torch.cat([first, second])
    order = permute_channels(both, keep=2, group=4)
    parts = [permuted_mask(each, order, keep=2, group=4) for each in (first, second)]
    retained = sum(retained_score(each, order, keep=2, group=4) for each in (first, second))

    assert torch.equal(torch.cat(parts), permuted_mask(both, order, keep=2, group=4))
    assert retained > retained_score(both, torch.arange(32), keep=2, group=4)


def test_rows_are_sampled() -> None:
    """With a few rows the assignment still wins, and all rows decide what is accepted."""
    score = random_score(300, 64, seed=13)
    identity = retained_score(score, torch.arange(64), keep=2, group=4)
    found = [
        retained_score(
            score, permute_channels(score, keep=2, group=4, max_rows=rows), keep=2, group=4
        )
        for rows in (1, 30, 300)
    ]

    assert identity < found[0] <= found[1] <= found[2]


def test_nothing_depends_on_the_global_random_state_and_nothing_changes_it() -> None:
    score, linear, gram = random_score(16, 32), random_linear(16, 32), random_gram(32)
    before = torch.get_rng_state()
    by_score = [permute_channels(score, keep=2, group=4, sweeps=3) for _ in range(2)]
    by_error = [permute_for_error([linear], gram, keep=2, group=4) for _ in range(2)]

    assert torch.equal(*by_score)
    assert torch.equal(*by_error)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("in_features", [1024, 1200])
def test_wide_inputs(in_features: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to 256 groups: the bits of assignments over all pairs. Beyond: 97 % of their gain."""
    score = random_score(48, in_features, seed=20)
    order = permute_channels(score, keep=2, group=4)
    monkeypatch.setattr(permutation, "_WHOLE", in_features)
    exact = permute_channels(score, keep=2, group=4)
    before, found, most = (
        retained_score(score, each, keep=2, group=4)
        for each in (torch.arange(in_features), order, exact)
    )

    assert is_permutation(order, in_features)
    assert torch.equal(order, exact) == (in_features == 1024)
    assert found - before >= 0.97 * (most - before)


def test_orders_on_a_gpu(pretended_gpu: Card) -> None:
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

    linear, gram = random_linear(12, 64), random_gram(64)
    on_card = PermutedLinear(
        weight=linear.weight.cuda(), score=linear.score.cuda(), fisher=linear.fisher.cuda()
    )
    order = permute_for_error([on_card], gram.cuda(), keep=2, group=4, rounds=2)

    assert torch.equal(order.cpu(), permute_for_error([linear], gram, keep=2, group=4, rounds=2))


def test_reconstruction_error() -> None:
    """It is the sum of g_i D_i H D_i^T, here in float64 and row by row."""
    linear, gram = random_linear(9, 16, seed=14), random_gram(16)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(15))
    mask = permuted_mask(linear.score, order, keep=2, group=4)

    expected = exact_error([linear], gram, order)
    assert reconstruction_error(linear, gram, mask) == pytest.approx(expected, rel=1e-5)


def test_error_close_to_the_best_grouping() -> None:
    ratios = []
    for seed in range(20):
        linears = [random_linear(10, 8, seed), random_linear(6, 8, seed + 100)]
        gram = random_gram(8, seed)
        errors = [exact_error(linears, gram, order) for order in groupings_of_eight()]
        order = permute_for_error(linears, gram, keep=2, group=4)
        found = exact_error(linears, gram, order)
        ratios.append(found / min(errors))
        assert found <= errors[0] * (1 + 1e-6)  # of the identity

    assert min(ratios) >= 1 - 1e-6
    assert max(ratios) < 1.25
    assert sum(ratios) / 20 < 1.03


@pytest.mark.parametrize("seed", range(5))
def test_no_swap_is_left(seed: int) -> None:
    """Two groups meet in every round, so in the end none of their 16 swaps lowers the error."""
    linear, gram = random_linear(10, 8, seed), random_gram(8, seed)
    order = permute_for_error([linear], gram, keep=2, group=4)
    found = exact_error([linear], gram, order)

    for first, second in product(range(4), range(4, 8)):
        swapped = order.clone()
        swapped[[first, second]] = order[[second, first]]
        assert exact_error([linear], gram, swapped) >= found * (1 - 1e-5)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pairs of groups are rated the same one by one as all together."""
    linear, gram = random_linear(40, 64, seed=16), random_gram(64)
    whole = permute_for_error([linear], gram, keep=2, group=4)
    monkeypatch.setattr(permutation, "_CHUNK", 1)

    assert torch.equal(permute_for_error([linear], gram, keep=2, group=4), whole)


@pytest.mark.parametrize(("keep", "group"), SHAPES)
def test_swaps_lower_the_error(keep: int, group: int) -> None:
    """Swaps improve on the best of the first orders, and that on none, for every N:M."""
    linear, gram = random_linear(40, 64, seed=16), random_gram(64)

    def error(order: Tensor) -> float:
        mask = permuted_mask(linear.score, order, keep=keep, group=group)
        return reconstruction_error(linear, gram, mask)

    first, swapped = (
        permute_for_error([linear], gram, keep=keep, group=group, rounds=rounds)
        for rounds in (0, 12)
    )

    assert is_permutation(swapped, 64)
    assert error(swapped) < error(first) < error(torch.arange(64))


def test_order_does_not_take_the_error_for_the_score() -> None:
    linear, gram = random_linear(20, 32, seed=17), random_gram(32)
    linear = replace(linear, score=1 / (1 + linear.score))
    order = permute_for_error([linear], gram, keep=2, group=4)

    assert exact_error([linear], gram, order) < exact_error([linear], gram, torch.arange(32))


def test_sampled_rows_of_the_error() -> None:
    linear, gram = random_linear(200, 32, seed=18), random_gram(32)
    errors = [
        exact_error(
            [linear],
            gram,
            permute_for_error([linear], gram, keep=2, group=4, rounds=rounds, max_rows=50),
        )
        for rounds in (0, 12)
    ]

    assert errors[1] < errors[0] <= exact_error([linear], gram, torch.arange(32))


def test_odd_number_of_groups() -> None:
    """A group without a partner sits a round out; a single one stays as it is."""
    linear = random_linear(10, 12, seed=19)
    narrow = random_linear(10, 4, seed=19)

    assert is_permutation(permute_for_error([linear], random_gram(12), keep=2, group=4), 12)
    order = permute_for_error([narrow], random_gram(4), keep=2, group=4)
    assert order.tolist() == [0, 1, 2, 3]


def test_rows_that_cost_nothing_leave_the_channels_as_they_are() -> None:
    linear = replace(random_linear(10, 16), fisher=torch.zeros(10))

    order = permute_for_error([linear], random_gram(16), keep=2, group=4)
    assert torch.equal(order, torch.arange(16))
