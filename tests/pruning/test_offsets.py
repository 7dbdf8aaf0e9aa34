"""Offsets of an allocation, against plain float64 loops, and the totals that they leave."""

import math
from dataclasses import replace

import pytest
import torch

from pho_service.pruning.allocation import allocate
from pho_service.pruning.layer_view import LayerView
from pho_service.spec.pattern import Pattern
from pho_service.spec.steps import ALLOCATIONS, Allocation

SHAPES = {
    f"layers.{block}.{kind}": shape
    for block in range(3)
    for kind, shape in {"q_proj": (20, 20), "k_proj": (10, 20), "up_proj": (40, 20)}.items()
}
WEIGHTS = {name: rows * columns for name, (rows, columns) in SHAPES.items()}
OFFSETS = {"q_proj": 0.5, "up_proj": -0.2, "experts": 3.0}  # k_proj at 0; no linear is an expert
DEPTH = (0.3, -0.2)


def views() -> list[LayerView]:
    """Random linears of three blocks."""
    generator = torch.Generator().manual_seed(0)
    return [
        LayerView(
            name=name,
            out_features=rows,
            rows=torch.randn(rows, columns, generator=generator) ** 3,
            activation_norm=torch.rand(columns, generator=generator) + 0.1,
            fisher=torch.rand(rows, generator=generator),
            root=torch.randn(6, columns, generator=generator),
        )
        for name, (rows, columns) in SHAPES.items()
    ]


def lost(allocation: Allocation, pattern: str = "0.6") -> dict[str, int]:
    """What each linear loses."""
    return allocate(views, Pattern.parse(pattern), allocation)


def kept_odds(name: str, sparsity: float) -> float:
    """The log-odds of what a linear keeps, with its offsets, before all are shifted."""
    depth = int(name.split(".")[1]) - 1.0  # -1, 0, 1
    curve = DEPTH[0] * depth + DEPTH[1] * (3 * depth**2 - 1) / 2
    return math.log((1 - sparsity) / sparsity) + OFFSETS.get(name.split(".")[2], 0.0) + curve


@pytest.mark.parametrize("method", ALLOCATIONS)
@pytest.mark.parametrize("pattern", ["0.3", "0.6", "0.9"])
def test_total_and_bounds(method: str, pattern: str) -> None:
    """The model loses exactly what the pattern says, and each linear lies within the spread."""
    allocation = Allocation(method=method, spread=0.15, offsets=OFFSETS, depth=DEPTH)

    found = lost(allocation, pattern)

    asked = Pattern.parse(pattern)
    assert sum(found.values()) == asked.removed(sum(WEIGHTS.values()))
    for name, count in found.items():
        assert abs(count - asked.sparsity * WEIGHTS[name]) <= 0.15 * WEIGHTS[name] + 1


@pytest.mark.parametrize("method", ["uniform", "fisher"])
def test_shift_of_log_odds(method: str) -> None:
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


def test_of_blocks() -> None:
    """A curve over depth holds for whole blocks, too: all of their linears lose one share."""
    found = lost(Allocation(method="uniform", unit="block", depth=(0.5,)))

    shares = [found[name] / WEIGHTS[name] for name in SHAPES]
    assert shares[0] == pytest.approx(shares[2], abs=0.01)
    assert shares[0] > shares[3] > shares[6]  # late blocks keep more


def test_offsets_of_kinds_that_the_model_does_not_have_or_all_alike_change_nothing() -> None:
    plain = Allocation(method="fisher")

    assert lost(replace(plain, offsets={"gate_proj": 1.0})) == lost(plain)
    assert plain.to_dict().keys() == {"method", "unit", "spread", "outlier_ratio"}
