"""Masks of a whole model, and models with masks applied."""

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from pretended_cards import Card
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from pho_service.errors import InvalidInput, NumericalError
from pho_service.pruning.masks import (
    line_mask,
    model_masks,
    model_sparsity,
    plain_score,
    pruned,
    share_ties,
)
from pho_service.pruning.scores import layer_importance
from pho_service.pruning.statistics import PrunableLinear, Statistics
from pho_service.spec.pattern import Coefficients, Pattern
from pho_service.spec.steps import Candidate

Linears = dict[str, PrunableLinear]

RIA = Coefficients(row=1, column=1, neighbourhood=0, normalisation="sum")
CREPE = Coefficients(row=0.4, column=1, neighbourhood=0.8, kernel_size=5, gradient_exponent=0.3)


def masks_of(
    linears: Linears,
    statistics: Statistics,
    pattern: str,
    scope: str | None = None,
    coefficients: Coefficients = CREPE,
) -> dict[str, Tensor]:
    """The masks of one candidate, by name."""
    candidate = Candidate(
        method="crepe", coefficients=coefficients, pattern=Pattern.parse(pattern, scope)
    )
    return dict(model_masks(linears, statistics, candidate))


def score_of(
    linears: Linears, statistics: Statistics, name: str, coefficients: Coefficients
) -> Tensor:
    """The scores of one linear."""
    return layer_importance(
        linears[name].weight, activation_norm=statistics.activation_norm(name), layer=name,
        fisher=statistics.fisher[name], coefficients=coefficients,
    )  # fmt: skip


def bits_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all weights, as integers: 0 and -0 differ."""
    return {n: p.detach().clone().view(torch.int32) for n, p in model.named_parameters()}


def same_bits(model: nn.Module, before: dict[str, Tensor]) -> bool:
    """Whether all weights are as they were, to the last bit."""
    return all(torch.equal(bits, before[name]) for name, bits in bits_of(model).items())


@pytest.mark.parametrize("scope", ["row", "layer", "global"])
@pytest.mark.parametrize("coefficients", [RIA, CREPE], ids=["ria", "crepe"])
def test_where_weights_compete_none_that_goes_scores_higher_than_one_that_stays(
    linears: Linears, statistics: Statistics, coefficients: Coefficients, scope: str
) -> None:
    masks = masks_of(linears, statistics, "0.5", scope, coefficients)
    for name, mask in masks.items():
        score = score_of(linears, statistics, name, coefficients)
        lines, kept = (score, mask) if scope == "row" else (score.view(1, -1), mask.view(1, -1))
        lowest_kept = lines.masked_fill(~kept, math.inf).amin(dim=1)
        highest_gone = lines.masked_fill(kept, -math.inf).amax(dim=1)

        assert bool((lowest_kept >= highest_gone).all())


@pytest.mark.parametrize("tenths", [1, 5, 9])
@pytest.mark.parametrize("exponent", [0, 0.5])
def test_global_threshold(
    linears: Linears, statistics: Statistics, exponent: float, tenths: int
) -> None:
    """With the plain score, scope global is one threshold over all |W| x g^b of the model."""
    scores = torch.cat(
        [
            (
                linear.weight.double().abs()
                * statistics.activation_norm(name).double()
                * statistics.fisher[name].double()[:, None] ** exponent
            ).flatten()
            for name, linear in linears.items()
        ]
    )
    expected = torch.ones(len(scores), dtype=torch.bool)
    expected[scores.argsort()[: len(scores) * tenths // 10]] = False
    masks = masks_of(linears, statistics, f"0.{tenths}", "global", plain_score(exponent))

    assert torch.equal(torch.cat([mask.flatten() for mask in masks.values()]), expected)


def test_global_shares_are_plain(linears: Linears, statistics: Statistics) -> None:
    """In scope global a candidate decides which weights a linear loses, never how many."""
    own, plain = (
        masks_of(linears, statistics, "0.5", "global", coefficients)
        for coefficients in (CREPE, plain_score(CREPE.gradient_exponent))
    )

    assert {n: int(m.sum()) for n, m in own.items()} == {n: int(m.sum()) for n, m in plain.items()}
    assert any(not torch.equal(own[name], plain[name]) for name in own)


@pytest.mark.parametrize("ratio", ["0.1", "0.33333", "0.9"])
def test_global_ties(linears: Linears, statistics: Statistics, ratio: str) -> None:
    """If all weights are equal, scope global removes exactly its share, from the end."""
    for linear in linears.values():
        linear.weight.fill_(-1)
    flat = replace(
        statistics,
        inputs=[
            replace(entry, activation_norm=torch.ones_like(entry.activation_norm))
            for entry in statistics.inputs
        ],
    )
    masks = masks_of(linears, flat, ratio, "global", plain_score(0))
    kept = 18_432 - Pattern.parse(ratio).removed(18_432)

    assert torch.equal(
        torch.cat([mask.flatten() for mask in masks.values()]), torch.arange(18_432) < kept
    )


@pytest.mark.parametrize(
    ("total", "expected"),
    [(6, [1, 2, 3]), (8, [1, 2, 5]), (9, [1, 3, 5]), (12, [1, 6, 5]), (14, [3, 6, 5])],
)
def test_share_ties(total: int, expected: list[int]) -> None:
    """Scores below the threshold all go; of those equal to it, the last layers' go first."""
    assert share_ties([1, 2, 3], [2, 4, 2], [1.0, 1.0, 1.0], total) == expected


@pytest.mark.parametrize("total", [0, 7, 10, 14.9, 20, 25])
def test_share_ties_of_samples(total: float) -> None:
    """Where a score stands for several weights, less than one score's weights stay too many."""
    weights = [2.5, 10 / 3]
    removed = share_ties([0, 0], [4, 5], weights, total)
    gone = sum(n * weight for n, weight in zip(removed, weights, strict=True))

    assert total - max(weights) < gone <= total + 1e-4


@pytest.mark.parametrize("scope", ["row", "layer", "global"])
def test_tiny_ratio(linears: Linears, statistics: Statistics, scope: str) -> None:
    """A ratio that rounds down to no weight at all removes none."""
    masks = masks_of(linears, statistics, "0.00001", scope)

    assert all(bool(mask.all()) for mask in masks.values())


def test_order_and_repeat(linears: Linears, statistics: Statistics) -> None:
    """Masks come in the model's order, and a second time with the same bits."""
    first, second = (masks_of(linears, statistics, "0.5", "global") for _ in range(2))

    assert list(first) == list(linears)
    assert all(torch.equal(first[name], second[name]) for name in linears)


def test_lines_with_leading_dimensions_are_each_pruned_by_themselves() -> None:
    lines = torch.rand(2, 3, 8, generator=torch.Generator().manual_seed(0))

    for pattern in (Pattern.parse("0.25"), Pattern.parse("2:4")):
        mask = line_mask(lines, pattern)
        assert mask.shape == lines.shape
        assert torch.equal(mask[1, 2], line_mask(lines[1, 2], pattern))


def test_groups_that_do_not_fit(linears: Linears, statistics: Statistics) -> None:
    with pytest.raises(
        InvalidInput, match=r"layers\.0\.self_attn\.q_proj: in_features=32 is not a multiple of M=6"
    ):
        masks_of(linears, statistics, "3:6")


@pytest.mark.parametrize("scope", ["row", "layer", "global"])
def test_bad_weight(linears: Linears, statistics: Statistics, scope: str) -> None:
    """A weight that is NaN is refused with the name of its linear."""
    linears["model.layers.1.mlp.up_proj"].weight[3, 4] = math.nan

    with pytest.raises(NumericalError, match=r"layers\.1\.mlp\.up_proj"):
        masks_of(linears, statistics, "0.5", scope)


@pytest.mark.parametrize(
    ("pattern", "scope"), [("0.5", "row"), ("0.5", "layer"), ("0.5", "global"), ("2:4", None)]
)
def test_inside_the_block_exactly_the_masked_weights_are_0_all_others_keep_their_bits(
    tiny_llama: LlamaForCausalLM,
    linears: Linears,
    statistics: Statistics,
    pattern: str,
    scope: str | None,
) -> None:
    masks = masks_of(linears, statistics, pattern, scope)
    expected = {
        f"{name}.weight": torch.where(mask, linears[name].weight, 0) for name, mask in masks.items()
    }
    before = bits_of(tiny_llama)
    candidate = Candidate(method="crepe", coefficients=CREPE, pattern=Pattern.parse(pattern, scope))

    with pruned(linears, model_masks(linears, statistics, candidate)):
        for name, bits in bits_of(tiny_llama).items():
            wanted = expected[name].view(torch.int32) if name in expected else before[name]
            assert torch.equal(bits, wanted)


def test_pruned_restores(
    tiny_llama: LlamaForCausalLM, linears: Linears, statistics: Statistics, windows: Tensor
) -> None:
    """After the block all weights are back to the bit, and the model's output with them."""
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


def test_pruned_restores_after_an_error(
    tiny_llama: LlamaForCausalLM, linears: Linears, statistics: Statistics
) -> None:
    before = bits_of(tiny_llama)
    masks = masks_of(linears, statistics, "2:4")
    intact = True

    def interrupt() -> None:
        nonlocal intact
        intact = same_bits(tiny_llama, before)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), pruned(linears, iter(masks.items())):
        interrupt()

    assert not intact
    assert same_bits(tiny_llama, before)


def test_if_the_masks_fail_midway_the_linears_that_were_masked_already_are_restored(
    tiny_llama: LlamaForCausalLM, linears: Linears, statistics: Statistics
) -> None:
    before = bits_of(tiny_llama)
    ready = list(masks_of(linears, statistics, "0.5", "layer").items())
    intact = True

    def failing() -> Iterator[tuple[str, Tensor]]:
        nonlocal intact
        yield from ready[:5]
        intact = same_bits(tiny_llama, before)
        raise NumericalError("sixth")

    with pytest.raises(NumericalError, match="sixth"), pruned(linears, failing()):
        pass

    assert not intact
    assert same_bits(tiny_llama, before)


def test_a_module_that_two_names_stand_for_is_restored_to_the_bit_as_well() -> None:
    module = nn.Linear(4, 2, bias=False)
    before = bits_of(module)
    shared = {name: PrunableLinear(name=name, module=module) for name in ("a", "b")}
    mask = torch.tensor([[True, False, True, False]]).expand(2, 4)
    with pruned(shared, iter([("a", mask), ("b", mask)])):
        pass

    assert same_bits(module, before)


def test_sparsity(linears: Linears, statistics: Statistics) -> None:
    """Sparsities are the shares of zeros, by linear and over all weights."""
    masks = masks_of(linears, statistics, "0.7", "global")
    with pruned(linears, iter(masks.items())) as sparsity:
        zeros = {name: int((linear.weight == 0).sum()) for name, linear in linears.items()}
    sizes = {name: linear.weight.numel() for name, linear in linears.items()}

    assert sparsity == pytest.approx({name: zeros[name] / sizes[name] for name in linears})
    assert model_sparsity(linears, sparsity) == pytest.approx(sum(zeros.values()) / 18_432)


def test_lazy_masks_equal_ready_ones(
    tiny_llama: LlamaForCausalLM, linears: Linears, statistics: Statistics
) -> None:
    candidate = Candidate(
        method="crepe", coefficients=CREPE, pattern=Pattern.parse("0.5", "global")
    )
    with pruned(linears, iter(list(model_masks(linears, statistics, candidate)))):
        ready = bits_of(tiny_llama)
    with pruned(linears, model_masks(linears, statistics, candidate)):
        lazy = bits_of(tiny_llama)

    assert all(torch.equal(ready[name], lazy[name]) for name in ready)


def with_zeros(linears: Linears) -> None:
    """Give weights zeros of both signs, which must come back as they were."""
    for linear in linears.values():
        linear.weight[:, 0] = 0.0
        linear.weight[:, 1] = -0.0


def bits(model: nn.Module) -> dict[str, Tensor]:
    """The bits of all weights; -0 is not 0."""
    return {name: p.detach().cpu().view(torch.int32) for name, p in model.named_parameters()}


@pytest.mark.parametrize("is_short", [False, True])
def test_pruned_on_a_gpu(
    pretended_gpu: Card,
    monkeypatch: pytest.MonkeyPatch,
    tiny_llama: LlamaForCausalLM,
    linears: Linears,
    statistics: Statistics,
    *,
    is_short: bool,
) -> None:
    """On a GPU what was removed alone is kept, in main memory where it is short; all comes back."""
    with_zeros(linears)
    before = bits(tiny_llama)
    candidate = Candidate(method="crepe", coefficients=CREPE, pattern=Pattern.parse("0.75"))
    masks = dict(model_masks(linears, statistics, candidate))
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
    after = bits(tiny_llama)
    assert all(torch.equal(after[name], values) for name, values in before.items())
