"""Swaps of kept and removed weights, against brute force, plain loops and float64."""

import math

import pytest
import torch

from pho_service.pruning.repruning import dsnot_refine, swap_refine
from pho_service.pruning.selection import keep_highest, nm_mask

GROUPS = pytest.mark.parametrize("group", [0, 2, 8])


def layer(out_features, in_features, seed=0):
    """A weight, and the Gram matrix of correlated inputs of unequal sizes."""
    generator = torch.Generator().manual_seed(seed)
    few = torch.randn(4 * in_features, max(2, in_features // 8), generator=generator)
    x = few @ torch.randn(few.shape[1], in_features, generator=generator)
    x += torch.randn(x.shape, generator=generator) + 0.3
    x *= torch.rand(in_features, generator=generator) + 0.5
    return torch.randn(out_features, in_features, generator=generator), x.T @ x / len(x)


def half_mask(weight, gram, group=0):
    score = weight.float().abs() * gram.diagonal().sqrt()
    if group:
        return nm_mask(score, keep=group // 2, group=group)
    return keep_highest(score, weight.shape[1] // 2)


def exact_errors(weight, mask, gram):
    """D H D^T of each row, in float64."""
    removed = weight.double() * ~mask
    return torch.einsum("ri,ij,rj->r", removed, gram.double(), removed)


def swaps(kept, group):
    """All masks of a row that are one swap away, inside of runs if there are any."""
    found = []
    for back in (~kept).nonzero()[:, 0].tolist():
        for out in kept.nonzero()[:, 0].tolist():
            if not group or back // group == out // group:
                swapped = kept.clone()
                swapped[back], swapped[out] = True, False
                found.append(swapped)
    return found


def same_counts(before, after, group):
    runs = (len(before), -1, group or before.shape[1])
    return before.view(runs).sum(dim=2).equal(after.view(runs).sum(dim=2))


@GROUPS
@pytest.mark.parametrize("max_swaps", [3, 1000])
def test_swaps_lower_every_row(group, max_swaps):
    """No row's error rises, and the layer's falls; counts stay; no row makes too many swaps."""
    weight, gram = layer(40, 200)
    mask = half_mask(weight, gram, group)

    refined = swap_refine(weight, mask, gram, group=group, max_swaps=max_swaps)
    before, after = exact_errors(weight, mask, gram), exact_errors(weight, refined, gram)

    assert bool((after <= before).all())
    assert bool((after < before)[(refined != mask).any(dim=1)].all())
    assert after.sum() < 0.95 * before.sum()
    assert same_counts(mask, refined, group)
    assert (refined & ~mask).sum(dim=1).max() <= max_swaps


@pytest.mark.parametrize(("group", "width"), [(0, 8), (2, 8), (8, 8), (4, 128)])
def test_swaps_end_where_none_helps(group, width):
    weight, gram = layer(20 if width == 8 else 4, width)
    mask = half_mask(weight, gram, group)

    refined = swap_refine(weight, mask, gram, group=group, max_swaps=1000)

    for row, kept, first in zip(weight, refined, exact_errors(weight, mask, gram), strict=True):
        others = torch.stack(swaps(kept, group))
        errors = exact_errors(row.expand(len(others), -1), others, gram)
        now = exact_errors(row[None], kept[None], gram)
        assert errors.min() >= now - 1e-5 * first


@GROUPS
def test_first_swap_is_the_best(group):
    weight, gram = layer(30, 8)
    mask = half_mask(weight, gram, group)

    refined = swap_refine(weight, mask, gram, group=group, max_swaps=1)

    for row, kept, found in zip(weight, mask, refined, strict=True):
        masks = torch.stack([kept, *swaps(kept, group)])
        best = exact_errors(row.expand(len(masks), -1), masks, gram).min()
        assert exact_errors(row[None], found[None], gram) == pytest.approx(float(best), rel=1e-4)


@pytest.mark.parametrize("kept", [0, 1, 31, 32])
@pytest.mark.parametrize("group", [0, 4])
def test_rows_that_keep_all_or_nothing_have_no_swaps(kept, group):
    weight, gram = layer(3, 32)
    mask = torch.arange(32).expand(3, 32) < kept

    refined = swap_refine(weight, mask, gram, group=group)

    assert same_counts(mask, refined, group)
    assert bool((exact_errors(weight, refined, gram) <= exact_errors(weight, mask, gram)).all())


def test_of_equal_swaps_the_one_of_the_lowest_channels_is_made():
    weight = torch.tensor([[2.0, 2.0, 1.0, 1.0]])
    mask = torch.tensor([[False, False, True, True]])

    once = swap_refine(weight, mask, torch.eye(4), max_swaps=1)
    in_runs = swap_refine(
        weight.repeat(1, 2), mask.repeat(1, 2), torch.eye(8), group=4, max_swaps=1
    )

    assert once.tolist() == [[True, False, False, True]]
    assert in_runs.tolist() == [[True, False, False, True, False, False, True, True]]


@pytest.mark.parametrize("size", [1e3, 1e6, 1e9])
@pytest.mark.parametrize("group", [0, 4])
def test_where_one_direction_dwarfs_all_no_row_gets_worse(group, size):
    weight, gram = layer(60, 64)
    gram += size
    mask = half_mask(weight, gram, group)

    refined = swap_refine(weight, mask, gram, group=group, max_swaps=1000)
    before, after = exact_errors(weight, mask, gram), exact_errors(weight, refined, gram)

    assert bool((after <= before).all())
    assert after.sum() < 0.1 * before.sum()


@GROUPS
def test_how_many_rows_are_worked_on_at_once_from_one_to_all_changes_no_bit_of_a_mask(
    group, monkeypatch
):
    weight, gram = layer(23, 64)
    mask = half_mask(weight, gram, group)
    swapped = swap_refine(weight, mask, gram, group=group)
    balanced = dsnot_refine(weight, mask, **row_statistics(64), group=group)

    for chunk in (1, 64 * 8 * 5, 1 << 28):
        monkeypatch.setattr("pho_service.pruning.repruning._CHUNK", chunk)

        assert swap_refine(weight, mask, gram, group=group).equal(swapped)
        assert dsnot_refine(weight, mask, **row_statistics(64), group=group).equal(balanced)


@pytest.mark.parametrize("group", [0, 8])
def test_a_gpu_takes_all_rows_at_once(group, pretended_gpu, monkeypatch):
    weight, gram = layer(8, 96)
    mask = half_mask(weight, gram, group)
    statistics = row_statistics(96)
    arguments = {name: values.cuda() for name, values in statistics.items()}

    def refined(height):
        """Masks of the rows, so many times, by swaps and DSnoT; launches and waits of each."""
        weights, masks = weight.repeat(height, 1).cuda(), mask.repeat(height, 1).cuda()
        found, counted = [], []
        for refine in (
            lambda: swap_refine(weights, masks, gram.cuda(), group=group),
            lambda: dsnot_refine(weights, masks, **arguments, group=group),
        ):
            with pretended_gpu.counting() as counts:
                found.append(refine().cpu())
            counted.append((counts.launches, counts.waits))
        return found, counted

    low, few = refined(1)
    high, many = refined(9)
    monkeypatch.setattr("pho_service.pruning.repruning._CHUNK", 1)
    monkeypatch.setattr("pho_service.pruning.hardware.GPU_CHUNK", 96 * 8 * 30)
    cut, more = refined(9)

    assert few == many
    assert all(each[0] > one[0] for each, one in zip(more, few, strict=True))
    on_cpu = [
        swap_refine(weight, mask, gram, group=group),
        dsnot_refine(weight, mask, **statistics, group=group),
    ]
    for expected, *others in zip(on_cpu, low, high, cut, strict=True):
        assert all(other.equal(expected.repeat(len(other) // 8, 1)) for other in others)


@GROUPS
def test_a_weight_that_is_bfloat16_and_stored_in_out_is_refined_as_its_float32_copy(group):
    weight, gram = layer(10, 48)
    weight = weight.bfloat16()
    mask = half_mask(weight, gram, group)
    stored, stored_mask = weight.T.contiguous().T, mask.T.contiguous().T

    for refine in (
        lambda w, m: swap_refine(w, m, gram, group=group),
        lambda w, m: dsnot_refine(w, m, **row_statistics(48), group=group, threshold=0.01),
    ):
        assert refine(stored, stored_mask).equal(refine(weight.float(), mask))


# --- DSnoT --------------------------------------------------------------------------------------


def row_statistics(in_features, seed=0):
    """Mean, variance and activation norm of inputs with both signs."""
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(in_features, generator=generator)
    variance = torch.rand(in_features, generator=generator) + 0.1
    return {
        "mean": mean,
        "variance": variance,
        "activation_norm": (variance + mean.square()).sqrt(),
    }


def dsnot_row(weight, kept, statistics, *, group, max_cycles, threshold, power):
    """DSnoT's rules for one row, weight by weight."""
    mean, variance, norm = (statistics[k].tolist() for k in ("mean", "variance", "activation_norm"))
    channels = range(len(weight))
    share = [weight[j] * mean[j] for j in channels]
    error = sum(share[j] for j in channels if not kept[j])
    kept, moved = list(kept), set()
    for _ in range(max_cycles):
        if abs(error) <= threshold:
            break
        sign = math.copysign(1, error)
        removable = [j for j in channels if kept[j] and j not in moved and share[j] * sign < 0]
        addable = [
            j
            for j in channels
            if not kept[j]
            and j not in moved
            and share[j] * sign > 0
            and (not group or any(i // group == j // group for i in removable))
        ]
        if not removable or not addable:
            break
        back = max(addable, key=lambda j: abs(share[j]) / variance[j] ** power)
        if group:
            removable = [i for i in removable if i // group == back // group]
        out = min(removable, key=lambda j: abs(weight[j]) * norm[j])
        after = error - share[back] + share[out]
        if abs(after) >= abs(error):
            break
        error = after
        kept[back], kept[out] = True, False
        moved |= {back, out}
    return kept


@GROUPS
@pytest.mark.parametrize("max_cycles", [1, 50])
@pytest.mark.parametrize(("threshold", "power"), [(0.1, 1.0), (0.0, 0.5), (1.0, 0.0)])
def test_each_row_ends_as_in_a_plain_loop_over_the_published_rules(
    group, max_cycles, threshold, power
):
    weight, gram = layer(40, 32)
    mask = half_mask(weight, gram, group)
    statistics = row_statistics(32)
    options = {"group": group, "max_cycles": max_cycles, "threshold": threshold, "power": power}

    refined = dsnot_refine(weight, mask, **statistics, **options)

    assert refined.tolist() == [
        dsnot_row(row, kept, statistics, **options)
        for row, kept in zip(weight.tolist(), mask.tolist(), strict=True)
    ]


def test_channels_without_mean_and_variance_never_move_and_give_no_nan():
    weight, gram = layer(20, 40)
    mask = half_mask(weight, gram)
    statistics = row_statistics(40)
    for values in statistics.values():
        values[::4] = 0

    refined = dsnot_refine(weight, mask, **statistics, power=2.0)

    assert refined[:, ::4].equal(mask[:, ::4])
    assert not refined.equal(mask)
