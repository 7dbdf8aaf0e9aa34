"""How sparsity is shared over linears, against sorting, plain loops and inequalities."""

import math
from dataclasses import replace
from fractions import Fraction
from itertools import permutations

import pytest
import torch

from pho_service.errors import NumericalError
from pho_service.pruning.allocation import allocate, apportion, block_of
from pho_service.pruning.layer_view import LayerView
from pho_service.spec.pattern import Pattern
from pho_service.spec.steps import ALLOCATIONS, Allocation

METHODS = ALLOCATIONS
UNITS = ("linear", "block")

# Of very different sizes, two blocks and one linear outside of them.
ODD_SHAPES = {
    "layers.0.q": (3, 5),
    "layers.0.up": (40, 31),
    "layers.1.q": (7, 1),
    "layers.1.up": (90, 70),
    "head": (13, 11),
}
ROUND_SHAPES = {"layers.0.q": (10, 20), "layers.0.up": (40, 30), "layers.1.q": (20, 5)}
SIMILAR_SHAPES = {
    "layers.0.q": (30, 20),
    "layers.0.up": (40, 31),
    "layers.1.q": (25, 31),
    "layers.1.up": (50, 40),
}
GROUPED_SHAPES = {
    "layers.0.q": (3, 16),
    "layers.0.up": (40, 48),
    "layers.1.q": (7, 16),
    "layers.1.up": (90, 64),
    "head": (13, 32),
}


def made(shapes, *, seed=0, sampled=None):
    """Random linears of different scales; ``sampled`` rows of each, or all."""
    generator = torch.Generator().manual_seed(seed)
    views = []
    for name, (out_features, in_features) in shapes.items():
        rows = min(sampled or out_features, out_features)
        scale = float(torch.rand((), generator=generator)) + 0.2
        views.append(
            LayerView(
                name=name,
                out_features=out_features,
                rows=scale * torch.randn(rows, in_features, generator=generator) ** 3,
                activation_norm=torch.rand(in_features, generator=generator) + 0.1,
                fisher=torch.rand(rows, generator=generator) ** 2,
                root=torch.randn(6, in_features, generator=generator),
            )
        )
    return views


def again(layers):
    return lambda: iter(layers)


def size(view):
    return view.out_features * view.rows.shape[1]


def units(layers, unit):
    groups = {}
    for view in layers:
        groups.setdefault(view.name if unit == "linear" else block_of(view.name), []).append(view)
    return list(groups.values())


def scores(view):
    """A * x * sqrt(g) of the rows of a linear."""
    score = view.rows.abs() * view.activation_norm * view.fisher.sqrt()[:, None]
    values = score.flatten().tolist()
    return values


def test_a_block_ends_with_the_first_number_without_one_a_linear_is_its_own_block():
    assert block_of("transformer.h.11.mlp.experts.5.c_fc") == "transformer.h.11"
    assert block_of("model.layer3.fc") == "model.layer3.fc"


def test_the_largest_remainders_go_up_of_equal_ones_the_earlier_other_totals_are_refused():
    assert apportion([0.2, 1.7, 2.5, 3.6], 8) == [0, 2, 2, 4]
    assert apportion([Fraction(7, 2)] * 4, 14) == [4, 4, 3, 3]
    for total in (2, 6):
        with pytest.raises(ValueError, match=f"rounded to {total}"):
            apportion([1.5, 2.5], total)


@pytest.mark.parametrize(
    ("sparsity", "spread", "sampled"), [("0.5", 0.2, None), ("0.123", 1.0, 4), ("0.999", 0.2, 4)]
)
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("method", METHODS)
def test_the_model_loses_exactly_what_the_pattern_says_each_linear_what_the_bounds_allow(
    method, unit, sparsity, spread, sampled
):
    layers = made(ODD_SHAPES, sampled=sampled)
    pattern = Pattern.parse(sparsity)
    removed = allocate(again(layers), pattern, Allocation(method=method, unit=unit, spread=spread))
    low = max(0.0, pattern.sparsity - spread)
    high = max(pattern.sparsity, min(0.995, pattern.sparsity + spread))

    assert list(removed) == list(ODD_SHAPES)
    assert all(type(count) is int for count in removed.values())
    assert sum(removed.values()) == pattern.removed(sum(map(size, layers)))
    for view in layers:
        assert low * size(view) - 1 <= removed[view.name] <= high * size(view) + 1


def test_uniform_by_hand():
    """0.5 of 15 and 7 are 7.5 and 3.5; the eleventh weight goes from the earlier linear."""
    layers = made({"a": (3, 5), "b": (7, 1)})
    removed = allocate(again(layers), Pattern.parse("0.5"), Allocation())

    assert removed == {"a": 8, "b": 3}


@pytest.mark.parametrize("pattern", ["0.6", "4:8"])
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("method", METHODS[1:])
def test_without_a_spread_every_method_is_uniform(method, unit, pattern):
    views = again(made(GROUPED_SHAPES))
    uniform = allocate(views, Pattern.parse(pattern), Allocation())

    allocation = Allocation(method=method, unit=unit, spread=0.0)
    assert allocate(views, Pattern.parse(pattern), allocation) == uniform


def clipped_threshold(layers, unit, pattern, spread):
    """Raise a threshold score by score, until the clipped counts of the units add up."""
    groups = units(layers, unit)
    sizes = [sum(map(size, group)) for group in groups]
    low = [round((pattern.sparsity - spread) * n) for n in sizes]
    high = [round((pattern.sparsity + spread) * n) for n in sizes]
    ordered = sorted(
        (value, i) for i, group in enumerate(groups) for view in group for value in scores(view)
    )
    below = [0] * len(groups)
    clipped = list(low)
    for _, i in ordered:
        if sum(clipped) == pattern.removed(sum(sizes)):
            break
        below[i] += 1
        clipped[i] = min(max(below[i], low[i]), high[i])
    return clipped


@pytest.mark.parametrize("spread", [0.1, 0.2, 0.3])
@pytest.mark.parametrize("unit", UNITS)
def test_fisher_clipped(unit, spread):
    """One threshold, each unit clipped: as found by a loop over all sorted scores."""
    layers = made(ROUND_SHAPES)
    pattern = Pattern.parse("0.5")
    allocation = Allocation(method="fisher", unit=unit, spread=spread)
    removed = allocate(again(layers), pattern, allocation)
    by_unit = [sum(removed[view.name] for view in group) for group in units(layers, unit)]

    rounding = 0 if unit == "linear" else 1  # a unit's weights are rounded linear by linear
    assert by_unit == pytest.approx(clipped_threshold(layers, unit, pattern, spread), abs=rounding)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("method", ["owl", "fisher"])
def test_sampled_rows_stand_for_more(method, unit):
    sample = [
        replace(view, out_features=3 * view.out_features) if view.name == "layers.0.up" else view
        for view in made(ODD_SHAPES)
    ]
    full = [
        replace(
            view,
            rows=view.rows.repeat(view.out_features // len(view.rows), 1),
            fisher=view.fisher.repeat(view.out_features // len(view.rows)),
        )
        for view in sample
    ]
    allocation = Allocation(method=method, unit=unit, outlier_ratio=2.0)
    from_sample = allocate(again(sample), Pattern.parse("0.5"), allocation)
    from_full = allocate(again(full), Pattern.parse("0.5"), allocation)

    # The equal scores at the threshold go in equal shares, so only rounding may differ.
    assert all(abs(from_sample[name] - from_full[name]) <= 1 for name in from_full)


def outlier_shares(layers, unit, ratio):
    """D of each unit by plain loops: the share of A * x above ``ratio`` block means."""
    mean = {}
    for group in units(layers, "block"):
        values = [v for view in group for v in wanda_scores(view)]
        mean[block_of(group[0].name)] = sum(values) / len(values)
    shares = []
    for group in units(layers, unit):
        limit = ratio * mean[block_of(group[0].name)]
        values = [v for view in group for v in wanda_scores(view)]
        shares.append(sum(v > limit for v in values) / len(values))
    return shares


def wanda_scores(view):
    """A * x of the rows of a linear."""
    norms = view.activation_norm.tolist()
    return [abs(w) * x for row in view.rows.tolist() for w, x in zip(row, norms, strict=True)]


@pytest.mark.parametrize("spread", [0.05, 0.2, 0.6])
@pytest.mark.parametrize("unit", UNITS)
def test_owl(unit, spread):
    """Each sparsity is a constant less the scaled share of outliers, clipped to the bounds."""
    layers = made(SIMILAR_SHAPES)
    pattern = Pattern.parse("0.6")
    allocation = Allocation(method="owl", unit=unit, spread=spread, outlier_ratio=2.0)
    removed = allocate(again(layers), pattern, allocation)
    shares = outlier_shares(layers, unit, 2.0)
    kept_more = [2 * spread * (d - min(shares)) / (max(shares) - min(shares)) for d in shares]
    low, high = max(0.0, 0.6 - spread), min(0.995, 0.6 + spread)
    groups = units(layers, unit)
    largest = max(range(len(groups)), key=lambda i: sum(map(size, groups[i])))
    found = [sum(removed[view.name] for view in group) / sum(map(size, group)) for group in groups]
    constant = found[largest] + kept_more[largest]

    assert low < found[largest] < high  # so the constant can be read from it
    for group, sparsity, more in zip(groups, found, kept_more, strict=True):
        expected = min(max(constant - more, low), high)
        assert sparsity == pytest.approx(expected, abs=1e-3 + len(group) / sum(map(size, group)))


def error_curve(view, grid):
    """The error at each sparsity by a plain loop over output rows, in float64."""
    gram = (view.root.T @ view.root).double()
    order = torch.tensor(scores(view)).argsort()
    curve = []
    for sparsity in grid:
        gone = torch.zeros(view.rows.numel(), dtype=torch.bool)
        gone[order[: round(sparsity * view.rows.numel())]] = True
        removed = view.rows.double() * gone.view_as(view.rows)
        rows = zip(removed, view.fisher.tolist(), strict=True)
        curve.append(sum(g * float(row @ gram @ row) for row, g in rows))
    return curve


def convex_value(grid, curve, at):
    """The lower convex hull: the lowest chord of two points of the curve."""
    chords = [
        curve[i] + (curve[j] - curve[i]) * (at - grid[i]) / (grid[j] - grid[i])
        for i in range(len(grid))
        for j in range(i + 1, len(grid))
        if grid[i] <= at <= grid[j]
    ]
    return min(chords)


@pytest.mark.parametrize("spread", [0.1, 0.3])
def test_curves_no_better_exchange(spread):
    """Moving weights from any linear to any other does not lower the sum of convex errors."""
    layers = made({"a": (20, 30), "b": (64, 25), "c": (10, 12), "d": (30, 40)})
    pattern = Pattern.parse("0.5")
    removed = allocate(again(layers), pattern, Allocation(method="curves", spread=spread))
    low, high = 0.5 - spread, 0.5 + spread
    grid = [low + (high - low) * i / 11 for i in range(12)]
    curves = [error_curve(view, grid) for view in layers]

    def error(i, count):
        at = min(max(count / size(layers[i]), low), high)
        return convex_value(grid, curves[i], at)

    found = [float(removed[view.name]) for view in layers]
    total = sum(error(i, count) for i, count in enumerate(found))
    sizes = [size(view) for view in layers]

    moved = 0
    for i, j in permutations(range(len(layers)), 2):
        # Rounding put each linear up to one weight off the optimum, so start one weight away.
        less, more = found[i] - 1, found[j] + 1
        for weights in (1, 9):
            if less - weights >= low * sizes[i] and more + weights <= high * sizes[j]:
                saved = error(i, less) - error(i, less - weights)
                caused = error(j, more + weights) - error(j, more)
                moved += 1
                assert caused >= saved - 1e-5 * total
    assert moved


def test_curves_of_groups():
    """For N:M the linear whose groups suffer least keeps least: by hand, with two equal linears."""
    layers = made({"a": (8, 16), "b": (8, 16)})
    layers[1] = replace(layers[0], name="b", fisher=layers[0].fisher * 1e6)
    removed = allocate(again(layers), Pattern.parse("2:4"), Allocation(method="curves", spread=0.3))

    assert removed == {"a": 1, "b": 3}


@pytest.mark.parametrize("method", METHODS)
def test_all_linears_of_a_block_lose_the_same_share_within_one_weight(method):
    layers = made(ODD_SHAPES)
    pattern = Pattern.parse("0.6")
    removed = allocate(again(layers), pattern, Allocation(method=method, unit="block", spread=0.3))

    for group in units(layers, "block"):
        shares = [(removed[v.name] - 1, removed[v.name] + 1, size(v)) for v in group]
        assert max(lo / n for lo, _, n in shares) <= min(hi / n for _, hi, n in shares)


@pytest.mark.parametrize(
    ("text", "spread", "sampled"), [("2:4", 0.3, None), ("1:4", 1.0, 4), ("5:16", 0.3, 4)]
)
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("method", METHODS)
def test_n_m_mixes_keep_no_more_than_the_pattern_and_less_by_under_one_step_of_the_least_unit(
    method, unit, text, spread, sampled
):
    layers = made(GROUPED_SHAPES, sampled=sampled)
    pattern = Pattern.parse(text)
    kept = allocate(again(layers), pattern, Allocation(method=method, unit=unit, spread=spread))
    budget = pattern.keep * sum(map(size, layers))
    used = sum(kept[view.name] * size(view) for view in layers)
    most = max(
        n for n in range(1, pattern.group) if abs(n - pattern.keep) <= pattern.group * spread + 1e-6
    )
    room = [sum(map(size, group)) for group in units(layers, unit) if kept[group[0].name] < most]

    assert list(kept) == list(GROUPED_SHAPES)
    for n in kept.values():
        assert 1 <= n <= pattern.group - 1
        assert abs((1 - n / pattern.group) - pattern.sparsity) <= spread + 1e-9
    for group in units(layers, unit):
        assert len({kept[view.name] for view in group}) == 1
    assert used <= budget
    assert all(budget - used < n for n in room)


def test_the_next_n_of_2_4_is_a_quarter_away_with_less_spread_there_is_only_one_mix():
    views = again(made(GROUPED_SHAPES))
    kept = allocate(views, Pattern.parse("2:4"), Allocation(method="fisher", spread=0.24))

    assert set(kept.values()) == {2}


def test_of_ideal_4_3_and_3_7_kept_of_8_the_second_one_goes_up():
    weights = torch.ones(2, 10, 8)
    weights[0].view(-1)[:43] = 2
    weights[1].view(-1)[:37] = 2
    ones = {"activation_norm": torch.ones(8), "fisher": torch.ones(10), "root": torch.eye(8)}
    layers = [
        LayerView(name=name, out_features=10, rows=rows, **ones)
        for name, rows in zip("ab", weights, strict=True)
    ]
    kept = allocate(again(layers), Pattern.parse("4:8"), Allocation(method="fisher", spread=0.3))

    assert kept == {"a": 4, "b": 4}


@pytest.mark.parametrize("text", ["4:7", "6:11", "5:10"])
def test_a_unit_at_the_bound_stays_there_whatever_the_rounding_of_1_n_m(text):
    pattern = Pattern.parse(text)
    layers = made({"a": (7, pattern.group), "b": (11, 3 * pattern.group), "c": (23, pattern.group)})
    layers[0] = replace(layers[0], fisher=layers[0].fisher * 1e-12)
    spread = 1.5 / pattern.group
    kept = allocate(again(layers), pattern, Allocation(method="fisher", spread=spread))

    assert pattern.keep - 1 <= min(kept.values())
    assert max(kept.values()) <= pattern.keep + 1


@pytest.mark.parametrize("pattern", ["0.6", "4:8"])
@pytest.mark.parametrize("method", ["fisher", "curves"])
def test_from_a_linear_of_zeros_more_than_its_share_is_taken(method, pattern):
    layers = made(GROUPED_SHAPES)
    layers[1] = replace(layers[1], rows=torch.zeros_like(layers[1].rows))
    allocation = Allocation(method=method, spread=0.25)
    dead = allocate(again(layers), Pattern.parse(pattern), allocation)["layers.0.up"]

    assert dead < 4 if pattern == "4:8" else dead == round(0.85 * size(layers[1]))


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("method", METHODS)
def test_dead_model(method, unit):
    """If nothing tells the linears apart, all lose the same share within one weight."""
    layers = [replace(v, rows=torch.zeros_like(v.rows)) for v in made(ODD_SHAPES)]
    removed = allocate(again(layers), Pattern.parse("0.6"), Allocation(method=method, unit=unit))

    assert all(abs(removed[v.name] - 0.6 * size(v)) < 1 for v in layers)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", ALLOCATIONS[1:])
def test_not_finite(method, value):
    """NaN or infinity in the weights is an error that names the layer."""
    layers = made(ODD_SHAPES)
    layers[1].rows[:] = value

    with pytest.raises(NumericalError, match=r"layers\.0\.up") as caught:
        allocate(again(layers), Pattern.parse("0.5"), Allocation(method=method))
    assert caught.value.layer == "layers.0.up"


# Offsets, against plain float64 loops.

SHAPES = {
    f"layers.{block}.{kind}": shape
    for block in range(3)
    for kind, shape in {"q_proj": (20, 20), "k_proj": (10, 20), "up_proj": (40, 20)}.items()
}
WEIGHTS = {name: rows * columns for name, (rows, columns) in SHAPES.items()}
OFFSETS = {"q_proj": 0.5, "up_proj": -0.2, "experts": 3.0}  # k_proj at 0; no linear is an expert
DEPTH = (0.3, -0.2)


def lost(allocation, pattern="0.6"):
    return allocate(again(made(SHAPES)), Pattern.parse(pattern), allocation)


def kept_odds(name, sparsity):
    """The log-odds of what a linear keeps, with its offsets, before all are shifted."""
    depth = int(name.split(".")[1]) - 1.0  # -1, 0, 1
    curve = DEPTH[0] * depth + DEPTH[1] * (3 * depth**2 - 1) / 2
    return math.log((1 - sparsity) / sparsity) + OFFSETS.get(name.split(".")[2], 0.0) + curve


@pytest.mark.parametrize("method", ALLOCATIONS)
@pytest.mark.parametrize("pattern", ["0.3", "0.9"])
def test_total_and_bounds(method, pattern):
    """The model loses exactly what the pattern says, and each linear lies within the spread."""
    allocation = Allocation(method=method, spread=0.15, offsets=OFFSETS, depth=DEPTH)

    found = lost(allocation, pattern)

    asked = Pattern.parse(pattern)
    assert sum(found.values()) == asked.removed(sum(WEIGHTS.values()))
    for name, count in found.items():
        assert abs(count - asked.sparsity * WEIGHTS[name]) <= 0.15 * WEIGHTS[name] + 1


@pytest.mark.parametrize("method", ["uniform", "fisher"])
def test_shift_of_log_odds(method):
    """Offsets are differences of the log-odds of what is kept; one number is common to all."""
    plain = Allocation(method=method, spread=0.15)
    wide = replace(plain, spread=0.35, offsets=OFFSETS, depth=DEPTH)
    base = lost(replace(plain, spread=0.35))

    found = lost(wide)

    common = [
        kept_odds(name, base[name] / WEIGHTS[name]) - math.log(WEIGHTS[name] / found[name] - 1)
        for name in SHAPES
        if 0.27 < found[name] / WEIGHTS[name] < 0.93  # not at a bound
    ]
    assert len(common) > 5
    assert max(common) - min(common) < 0.04  # whole weights


def test_of_blocks():
    """A curve over depth holds for whole blocks, too: all of their linears lose one share."""
    found = lost(Allocation(method="uniform", unit="block", depth=(0.5,)))

    shares = [found[name] / WEIGHTS[name] for name in SHAPES]
    assert shares[0] == pytest.approx(shares[2], abs=0.01)
    assert shares[0] > shares[3] > shares[6]  # late blocks keep more


def test_offsets_of_kinds_that_the_model_does_not_have_or_all_alike_change_nothing():
    plain = Allocation(method="fisher")

    assert lost(replace(plain, offsets={"gate_proj": 1.0})) == lost(plain)
    assert plain.to_dict().keys() == {"method", "unit", "spread", "outlier_ratio"}
