"""Masks of a whole model, and models with masks applied."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from pho_service.errors import NumericalError
from pho_service.pruning.masks import (
    linear_masks,
    model_sparsity,
    plain_score,
    pruned,
    share_ties,
)
from pho_service.pruning.scores import layer_importance
from pho_service.pruning.statistics import PrunableLinear
from pho_service.spec.pattern import Coefficients, Pattern
from pho_service.spec.steps import Candidate

RIA = Coefficients(row=1, column=1, neighbourhood=0, normalisation="sum")
CREPE = Coefficients(row=0.4, column=1, neighbourhood=0.8, kernel_size=5, gradient_exponent=0.3)


def masks_of(linears, statistics, pattern, scope=None, coefficients=CREPE):
    candidate = Candidate(
        method="crepe", coefficients=coefficients, pattern=Pattern.parse(pattern, scope)
    )
    return {n: m.keep for n, m in linear_masks(linears, statistics, candidate)}


def score_of(linears, statistics, name, coefficients):
    return layer_importance(
        linears[name].weight, activation_norm=statistics.activation_norm(name), layer=name,
        fisher=statistics.fisher[name], coefficients=coefficients,
    )  # fmt: skip


def bits_of(model):
    """A copy of all weights, as integers: 0 and -0 differ."""
    return {n: p.detach().clone().cpu().view(torch.int32) for n, p in model.named_parameters()}


def same_bits(model, before):
    return all(torch.equal(bits, before[name]) for name, bits in bits_of(model).items())


@pytest.mark.parametrize("scope", ["row", "layer", "global"])
@pytest.mark.parametrize("coefficients", [RIA, CREPE], ids=["ria", "crepe"])
def test_where_weights_compete_none_that_goes_scores_higher_than_one_that_stays(
    linears, statistics, coefficients, scope
):
    masks = masks_of(linears, statistics, "0.5", scope, coefficients)
    for name, mask in masks.items():
        score = score_of(linears, statistics, name, coefficients)
        lines, kept = (score, mask) if scope == "row" else (score.view(1, -1), mask.view(1, -1))
        lowest_kept = lines.masked_fill(~kept, math.inf).amin(dim=1)
        highest_gone = lines.masked_fill(kept, -math.inf).amax(dim=1)

        assert bool((lowest_kept >= highest_gone).all())


@pytest.mark.parametrize("tenths", [1, 5, 9])
@pytest.mark.parametrize("exponent", [0, 0.5])
def test_global_threshold(linears, statistics, exponent, tenths):
    """With the plain score, scope global is one threshold over all |W| x g^b of the model."""
    parts = []
    for name, linear in linears.items():
        norm, fisher = statistics.activation_norm(name), statistics.fisher[name]
        parts.append(linear.weight.double().abs() * norm * fisher.double()[:, None] ** exponent)
    scores = torch.cat([part.flatten() for part in parts])
    expected = torch.ones(len(scores), dtype=torch.bool)
    expected[scores.argsort()[: len(scores) * tenths // 10]] = False
    masks = masks_of(linears, statistics, f"0.{tenths}", "global", plain_score(exponent))

    assert torch.equal(torch.cat([mask.flatten() for mask in masks.values()]), expected)


def test_global_shares_are_plain(linears, statistics):
    """In scope global a candidate decides which weights a linear loses, never how many."""
    own, plain = (
        masks_of(linears, statistics, "0.5", "global", coefficients)
        for coefficients in (CREPE, plain_score(CREPE.gradient_exponent))
    )

    assert list(own) == list(linears)
    assert {n: int(m.sum()) for n, m in own.items()} == {n: int(m.sum()) for n, m in plain.items()}
    assert any(not torch.equal(own[name], plain[name]) for name in own)


@pytest.mark.parametrize("ratio", ["0.33333", "0.9"])
def test_global_ties(linears, statistics, ratio):
    """If all weights are equal, scope global removes exactly its share, from the end."""
    for linear in linears.values():
        linear.weight.fill_(-1)
    ones = [
        replace(e, activation_norm=torch.ones_like(e.activation_norm)) for e in statistics.inputs
    ]
    flat = replace(statistics, inputs=ones)
    masks = masks_of(linears, flat, ratio, "global", plain_score(0))
    kept = 18_432 - Pattern.parse(ratio).removed(18_432)

    assert torch.equal(
        torch.cat([mask.flatten() for mask in masks.values()]), torch.arange(18_432) < kept
    )


@pytest.mark.parametrize(
    ("total", "expected"),
    [(6, [1, 2, 3]), (8, [1, 2, 5]), (9, [1, 3, 5]), (12, [1, 6, 5]), (14, [3, 6, 5])],
)
def test_of_equal_scores_the_last_layers_go_first(total, expected):
    assert share_ties([1, 2, 3], [2, 4, 2], [1.0, 1.0, 1.0], total) == expected


@pytest.mark.parametrize("total", [0, 7, 10, 14.9, 20, 25])
def test_share_ties_of_samples(total):
    """Where a score stands for several weights, less than one score's weights stay too many."""
    weights = [2.5, 10 / 3]
    removed = share_ties([0, 0], [4, 5], weights, total)
    gone = sum(n * weight for n, weight in zip(removed, weights, strict=True))

    assert total - max(weights) < gone <= total + 1e-4


@pytest.mark.parametrize("scope", ["row", "global"])
def test_bad_weight(linears, statistics, scope):
    """A weight that is NaN is refused with the name of its linear."""
    linears["model.layers.1.mlp.up_proj"].weight[3, 4] = math.nan

    with pytest.raises(NumericalError, match=r"layers\.1\.mlp\.up_proj"):
        masks_of(linears, statistics, "0.5", scope)


@pytest.mark.parametrize(
    ("pattern", "scope"), [("0.5", "row"), ("0.5", "layer"), ("0.5", "global"), ("2:4", None)]
)
def test_inside_the_block_exactly_the_masked_weights_are_0_all_others_keep_their_bits(
    tiny_llama, linears, statistics, pattern, scope
):
    masks = masks_of(linears, statistics, pattern, scope)
    expected = {
        f"{name}.weight": torch.where(mask, linears[name].weight, 0) for name, mask in masks.items()
    }
    before = bits_of(tiny_llama)
    # They are made while the model is masked, linear by linear.
    candidate = Candidate(method="crepe", coefficients=CREPE, pattern=Pattern.parse(pattern, scope))

    made = linear_masks(linears, statistics, candidate)
    with pruned(linears, ((name, mask.keep) for name, mask in made)):
        for name, bits in bits_of(tiny_llama).items():
            wanted = expected[name].view(torch.int32) if name in expected else before[name]
            assert torch.equal(bits, wanted)


def test_after_the_block_all_weights_are_back_to_the_bit_and_the_models_output_with_them(
    tiny_llama, linears, statistics, windows
):
    linears["model.layers.0.mlp.up_proj"].weight[:, 0] = -0.0
    before = bits_of(tiny_llama)
    masks = masks_of(linears, statistics, "0.5", "row")
    with torch.no_grad():
        dense = tiny_llama(input_ids=windows).logits
        with pruned(linears, iter(masks.items())):
            sparse = tiny_llama(input_ids=windows).logits
        again = tiny_llama(input_ids=windows).logits

    assert same_bits(tiny_llama, before)
    assert not torch.equal(sparse, dense)
    assert torch.equal(again, dense)


@pytest.mark.parametrize("midway", [True, False])
def test_pruned_restores_after_an_error_in_the_masks_too(
    tiny_llama, linears, statistics, *, midway
):
    before = bits_of(tiny_llama)
    ready = list(masks_of(linears, statistics, "0.5", "layer").items())
    intact = []

    def interrupt():
        intact.append(same_bits(tiny_llama, before))
        raise KeyboardInterrupt

    def masks():
        yield from ready[:5]
        if midway:
            interrupt()
        yield from ready[5:]

    with pytest.raises(KeyboardInterrupt), pruned(linears, masks()):
        interrupt()

    assert intact == [False]
    assert same_bits(tiny_llama, before)


def test_a_module_that_two_names_stand_for_is_restored_to_the_bit_as_well():
    module = nn.Linear(4, 2, bias=False)
    before = bits_of(module)
    shared = {name: PrunableLinear(name=name, module=module) for name in ("a", "b")}
    mask = torch.tensor([[True, False, True, False]]).expand(2, 4)
    with pruned(shared, iter([("a", mask), ("b", mask)])):
        pass

    assert same_bits(module, before)


def test_sparsities_are_the_shares_of_zeros(linears, statistics):
    masks = masks_of(linears, statistics, "0.7", "global")
    with pruned(linears, iter(masks.items())) as sparsity:
        zeros = {name: int((linear.weight == 0).sum()) for name, linear in linears.items()}
    sizes = {name: linear.weight.numel() for name, linear in linears.items()}

    assert sparsity == pytest.approx({name: zeros[name] / sizes[name] for name in linears})
    assert model_sparsity(linears, sparsity) == pytest.approx(sum(zeros.values()) / 18_432)


@pytest.mark.parametrize("is_short", [False, True])
def test_on_a_gpu_what_was_removed_alone_is_kept_in_main_memory_where_it_is_short_all_comes_back(
    pretended_gpu, monkeypatch, tiny_llama, linears, statistics, *, is_short
):
    for linear in linears.values():
        linear.weight[:, 0], linear.weight[:, 1] = 0.0, -0.0  # which come back as they were
    before = bits_of(tiny_llama)
    masks = masks_of(linears, statistics, "0.75")
    tiny_llama.to("cuda")
    dense = pretended_gpu.allocated
    prunable = sum(linear.weight.nbytes for linear in linears.values())
    if is_short:
        monkeypatch.setattr("pho_service.pruning.masks.free_memory", lambda _: 0)
    with pruned(linears, ((name, mask.to("cuda")) for name, mask in masks.items())):
        kept = pretended_gpu.allocated - dense
        for name, linear in linears.items():
            assert torch.equal((linear.weight != 0).cpu(), masks[name] & (linear.weight.cpu() != 0))

    if is_short:
        assert kept < 0.05 * prunable  # the last mask
    else:
        assert 0.75 * prunable <= kept < 0.85 * prunable  # in blocks of 512 bytes; what was zero
    assert same_bits(tiny_llama, before)
