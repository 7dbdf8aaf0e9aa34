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
    return order.dtype == torch.int64 and order.sort().values.tolist() == list(range(width))


def test_close_to_the_best_grouping() -> None:
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
def test_it_retains_more_than_without_one_for_every_n_m(keep: int, group: int) -> None:
    score = random_score(24, 48, seed=3)
    order = permute_channels(score, keep=keep, group=group)
    found = retained_score(score, order, keep=keep, group=group)

    assert is_permutation(order, 48)
    assert found > retained_score(score, torch.arange(48), keep=keep, group=group)


def test_four_important_channels_in_one_group_of_2_4_are_shared_out_two_a_group() -> None:
    score = torch.tensor([[9.0, 8, 7, 6, 1, 1, 1, 1]]).repeat(3, 1)
    order = permute_channels(score, keep=2, group=4)

    assert sorted(int((group < 4).sum()) for group in order.view(2, 4)) == [2, 2]
    assert retained_score(score, order, keep=2, group=4) == 3 * (9 + 8 + 7 + 6)


@pytest.mark.parametrize(("keep", "group"), SHAPES)
def test_hinge_sums_are_those_of_sorting_each_group(keep: int, group: int) -> None:
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


@pytest.mark.parametrize("value", [0.0, 1e-38, 1e35])
def test_equal_scores_give_the_order_that_there_is(value: float) -> None:
    score = torch.full((3, 16), value)

    assert torch.equal(permute_channels(score, keep=2, group=4), torch.arange(16))


def test_nothing_depends_on_the_global_random_state_and_nothing_changes_it() -> None:
    score, linear, gram = random_score(16, 32), random_linear(16, 32), random_gram(32)
    before = torch.get_rng_state()
    by_score = [permute_channels(score, keep=2, group=4, sweeps=3) for _ in range(2)]
    by_error = [permute_for_error([linear], gram, keep=2, group=4) for _ in range(2)]

    assert torch.equal(*by_score)
    assert torch.equal(*by_error)
    assert torch.equal(torch.get_rng_state(), before)


def test_with_more_than_256_groups_it_has_97_percent_of_the_gain_of_assignments_over_all_pairs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
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


def test_it_is_the_sum_of_g_d_h_d_in_float64_row_by_row() -> None:
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


@pytest.mark.parametrize("seed", range(2))
def test_in_the_end_no_swap_of_two_groups_lowers_the_error(seed: int) -> None:
    linear, gram = random_linear(10, 8, seed), random_gram(8, seed)
    order = permute_for_error([linear], gram, keep=2, group=4)
    found = exact_error([linear], gram, order)

    for first, second in product(range(4), range(4, 8)):
        swapped = order.clone()
        swapped[[first, second]] = order[[second, first]]
        assert exact_error([linear], gram, swapped) >= found * (1 - 1e-5)


def test_groups_are_rated_the_same_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    linear, gram = random_linear(40, 64, seed=16), random_gram(64)
    whole = permute_for_error([linear], gram, keep=2, group=4)
    monkeypatch.setattr(permutation, "_CHUNK", 1)

    assert torch.equal(permute_for_error([linear], gram, keep=2, group=4), whole)


@pytest.mark.parametrize(("keep", "group"), SHAPES)
def test_swaps_improve_on_the_best_first_order(keep: int, group: int) -> None:
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


def test_a_group_without_a_partner_sits_a_round_out_a_single_one_stays_as_it_is() -> None:
    linear = random_linear(10, 12, seed=19)
    narrow = random_linear(10, 4, seed=19)

    assert is_permutation(permute_for_error([linear], random_gram(12), keep=2, group=4), 12)
    order = permute_for_error([narrow], random_gram(4), keep=2, group=4)
    assert order.tolist() == [0, 1, 2, 3]


def test_rows_that_cost_nothing_leave_the_channels_as_they_are() -> None:
    linear = replace(random_linear(10, 16), fisher=torch.zeros(10))

    order = permute_for_error([linear], random_gram(16), keep=2, group=4)
    assert torch.equal(order, torch.arange(16))
