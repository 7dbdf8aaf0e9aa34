"""
What holds of scores and patterns for any weights: zeros, ties, denormals, very large ones.

`make fuzz` tries many more.
"""

import math
from dataclasses import replace
from decimal import Decimal

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import Tensor, nn

from pho_service.errors import NumericalError
from pho_service.pruning import kernels
from pho_service.pruning.masks import line_mask, linear_masks
from pho_service.pruning.scores import importance, layer_importance, plain_combine_terms
from pho_service.pruning.selection import (
    count_below,
    keep_highest,
    nm_mask,
    plain_keep_highest,
    plain_nm_mask,
    threshold_of,
)
from pho_service.pruning.statistics import InputStatistics, PrunableLinear, Statistics
from pho_service.spec.pattern import Coefficients, Pattern
from pho_service.spec.steps import Candidate

PROFILE = "fuzz" if settings.get_current_profile_name() == "fuzz" else "suite"
drawn = settings.get_profile(PROFILE)

# --------------------------------------------------------------------------- strategies

_few = st.sampled_from([0.0, 1.0, -1.0, 2.0, 0.5])  # so that most are tied
_moderate = st.floats(2**-20, 2**20, width=32) | st.floats(-(2**20), -(2**-20), width=32)
_any_size = st.floats(-(2**99), 2**99, width=32) | st.sampled_from([1e-45, -1e-40, 6e29, 2**-126])
_coefficient = st.sampled_from([0.0, 1.0]) | st.floats(2**-10, 2**10)
_SHAPES = st.tuples(st.integers(1, 7), st.integers(1, 9))


def tensors(elements, shape=_SHAPES):
    return arrays.arrays(np.float32, shape, elements=elements).map(torch.from_numpy)


def weights(*elements):
    """(out_features, in_features), float32, of one of these kinds."""
    return st.one_of([tensors(each) for each in (_few, *elements)])


scores = weights(
    st.floats(0, width=32, allow_nan=False), st.floats(width=32, allow_nan=False),
    st.sampled_from([0.0, -0.0, math.inf, 1e-45, 3.4028234663852886e38]),
)  # fmt: skip


@st.composite
def coefficients(draw, **fixed):
    parts = {name: draw(_coefficient) for name in ("row", "column", "neighbourhood")}
    parts |= {name: fixed[name] for name in parts.keys() & fixed.keys()}
    assume(sum(parts.values()))
    values = {
        "kernel_size": draw(st.sampled_from([3, 5, 15])),
        "activation_exponent": draw(st.sampled_from([0.0, 0.5, 1.0]) | st.floats(0, 4)),
        "gradient_exponent": draw(st.sampled_from([0.0, 0.5]) | st.floats(0, 2)),
        "normalisation": draw(st.sampled_from(["mean", "sum", "none"])),
    }
    return Coefficients(**{**values, **parts, **fixed})


@st.composite
def layers(draw, weight):
    """A weight with activation norms and Fisher row weights, zeros among them."""
    drawn_weight = draw(weight)
    beside = st.sampled_from([0.0, 1.0]) | st.floats(2**-10, 2**10, width=32)
    out_features, in_features = drawn_weight.shape
    return drawn_weight, draw(tensors(beside, in_features)), draw(tensors(beside, out_features))


def score_of(layer, score):
    weight, norm, fisher = layer
    return layer_importance(
        weight, activation_norm=norm, fisher=fisher, coefficients=score, layer="layer"
    )


# ------------------------------------------------------------------------------- scores


@drawn
@given(layers(weights(_moderate, _any_size)), coefficients(), st.booleans())
def test_finite(layer, score, half):
    """Scores are finite and not negative, 0 where a weight is 0, and the same the second time."""
    weight, norm, fisher = layer
    if half:
        weight = weight.bfloat16()
    if score.normalisation == "none":  # the one that grows with the weights
        parts = score.row + score.column + score.neighbourhood
        act = float(norm.max()) ** score.activation_exponent
        grad = float(fisher.max()) ** score.gradient_exponent
        assume(parts * float(weight.abs().max()) * max(act, 1.0) * max(grad, 1.0) < 1e38)
    found = score_of((weight, norm, fisher), score)

    assert found.dtype is torch.float32
    assert bool(torch.isfinite(found).all())
    assert bool((found >= 0).all())
    assert bool((found[weight == 0] == 0).all())
    assert torch.equal(found, score_of((weight, norm, fisher), score))


@drawn
@given(
    layers(weights(_moderate)),
    coefficients(),
    st.sampled_from([math.nan, math.inf, -math.inf]),
    st.data(),
)
def test_not_finite(layer, score, bad, data):
    """A weight that is NaN or infinite is refused wherever it stands, on any score."""
    weight, norm, fisher = layer
    weight = weight.clone()
    weight[data.draw(st.integers(0, len(weight) - 1)), 0] = bad

    with pytest.raises(NumericalError, match="layer"):
        score_of((weight, norm, fisher), score)


@drawn
@given(layers(weights(_moderate)), coefficients(), st.integers(-30, 30))
def test_scale(layer, score, exponent):
    """Weights times a power of two: relative scores keep their bits, plain ones are scaled."""
    weight, norm, fisher = layer
    scaled = score_of((weight * 2.0**exponent, norm, fisher), score)
    factor = 2.0**exponent if score.normalisation == "none" else 1.0

    assert torch.equal(scaled, score_of(layer, score) * factor)


@drawn
@given(layers(weights(_moderate)), coefficients())
def test_parts_add_up(layer, score):
    """A score is the sum of its three parts, so a coefficient of 0 takes its part out."""
    nothing = {"row": 0.0, "column": 0.0, "neighbourhood": 0.0}
    parts = [
        score_of(layer, replace(score, **{**nothing, name: value}))
        for name in nothing
        if (value := getattr(score, name))
    ]

    torch.testing.assert_close(sum(parts), score_of(layer, score), rtol=1e-4, atol=1e-30)


@drawn
@given(layers(weights(_moderate, _any_size)), st.lists(coefficients(), min_size=1, max_size=4))
def test_batch(layer, together):
    """Candidates that are scored together get the bits that each gets alone, compiled or not."""
    weight, norm, fisher = layer
    magnitude = weight.abs()
    given_ = {
        "row_mean": magnitude.mean(dim=1)[None, None],
        "column_mean": magnitude.mean(dim=0)[None, None],
        "window_means": (magnitude + 0.5)[None, None, None],
        "activation_norm": norm[None, None],
        "fisher": fisher[None, None],
        "out_features": len(weight),
    }

    def of(several):
        return importance(
            magnitude[None, None], windows=[0] * len(several), coefficients=several, **given_
        )

    found = of(together)
    with pytest.MonkeyPatch.context() as changed:
        changed.setattr(kernels, "combine_terms", plain_combine_terms)
        plain = of(together)

    alone = torch.cat([of([score]) for score in together], dim=1)
    torch.testing.assert_close(found, alone, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(found, plain, rtol=1e-6, atol=1e-44, equal_nan=True)


# ----------------------------------------------------------------------------- patterns


@drawn
@given(scores, st.data())
def test_highest(score, data):
    """Every line loses its number exactly, nothing kept is lower than what goes; ties by place."""
    lines, n = score.shape
    removed = torch.tensor(data.draw(st.lists(st.integers(0, n), min_size=lines, max_size=lines)))
    mask = keep_highest(score, removed)

    assert torch.equal(mask.sum(dim=1), n - removed)
    for line, kept in zip(score.tolist(), mask.tolist(), strict=True):
        order = sorted(range(n), key=lambda i: (-line[i], i))
        assert [kept[i] for i in order] == sorted(kept, reverse=True)
    assert torch.equal(mask, plain_keep_highest(score, removed))


@drawn
@given(st.integers(2, 8), st.data())
def test_groups(group, data):
    """N of every M stay exactly, in every row with its own N, the same ones in plain torch."""
    lines, runs = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3))
    elements = data.draw(st.sampled_from([_few, st.floats(width=32, allow_nan=False)]))
    score = data.draw(tensors(elements, (lines, runs * group)))
    numbers = st.lists(st.integers(1, group - 1), min_size=lines, max_size=lines)
    keep = torch.tensor(data.draw(numbers))
    mask = nm_mask(score, keep=keep, group=group)

    assert bool((mask.view(lines, runs, group).sum(dim=2) == keep[:, None]).all())
    assert torch.equal(mask, plain_nm_mask(score, keep, group))


@drawn
@given(weights(_moderate), st.floats(0.001, 0.999))
def test_share(score, sparsity):
    """Any share of any width is removed exactly, by its decimal digits, rounded down."""
    pattern = Pattern(sparsity=sparsity)
    mask = line_mask(score, pattern)

    assert set((~mask).sum(dim=1).tolist()) == {int(Decimal(repr(sparsity)) * score.shape[1])}


@drawn
@given(
    st.lists(tensors(_few | st.floats(0, 2**99, width=32)).map(Tensor.abs), min_size=1, max_size=3),
    st.data(),
)
def test_threshold(chunks, data):
    """The threshold of any number of weights is the score that sorting finds, however it is cut."""
    ordered = torch.cat([chunk.flatten() for chunk in chunks]).sort().values
    removed = data.draw(st.integers(1, len(ordered)))
    found = threshold_of(lambda: [(chunk, 1.0) for chunk in chunks], removed)

    assert found == float(ordered[removed - 1])
    for chunk in chunks:
        below, tied = count_below(chunk, found)
        assert torch.equal(below, (chunk < found).sum(dim=1))
        assert torch.equal(tied, (chunk == found).sum(dim=1))


def model_of(parts):
    linears = {}
    for number, weight in enumerate(parts):
        module = nn.Linear(*reversed(weight.shape), bias=False)
        module.weight.data = weight
        linears[str(number)] = PrunableLinear(name=str(number), module=module)
    statistics = Statistics(
        inputs=[
            InputStatistics(activation_norm=torch.ones(w.shape[1]), root=torch.ones(1, w.shape[1]))
            for w in parts
        ],
        input_of={name: number for number, name in enumerate(linears)},
        fisher={name: torch.ones(len(w)) for name, w in zip(linears, parts, strict=True)},
    )
    return linears, statistics


COUNTED = {
    "row": lambda mask: (~mask).sum(dim=1),
    "layer": lambda mask: (~mask).sum()[None],
}


@drawn
@given(
    st.lists(weights(_moderate, _any_size), min_size=1, max_size=3),
    coefficients(),
    st.sampled_from(["0.1", "0.29", "0.5", "0.7", "0.999"]),
)
def test_model(parts, score, share):
    """In each scope, exactly the share of what competes goes: rows, layers or the whole model."""
    linears, statistics = model_of(parts)
    for scope in ("row", "layer", "global"):
        pattern = Pattern.parse(share, scope)
        candidate = Candidate(method="crepe", coefficients=score, pattern=pattern)
        masks = {n: m.keep for n, m in linear_masks(linears, statistics, candidate)}
        if scope == "global":
            total = sum(mask.numel() for mask in masks.values())
            assert sum(int((~m).sum()) for m in masks.values()) == pattern.removed(total)
            continue
        for mask in masks.values():
            counts = COUNTED[scope](mask)
            assert counts.unique().tolist() == [pattern.removed(mask.numel() // len(counts))]
