"""Statistics of a model. Their numbers stand against hooks and autograd in test_families."""

import math

import pytest
import torch
from torch import nn

from pho_service.errors import ModelError, NumericalError
from pho_service.pruning.statistics import PrunableLinear, gather


def collected(model, linears, windows, rows=0, **more):
    """What the product says, with one Fisher window unless told otherwise."""
    more = {"fisher_windows": 1, "seed": 0, **more}
    return gather(model, linears, windows, projection_rows=rows, **more).statistics(windows)


def test_readers_of_one_input_share_it(linears, statistics):
    readers = {}
    for name in linears:
        readers.setdefault(statistics.input_of[name], []).append(name)

    assert list(readers.values()) == [
        [f"model.layers.{block}.{name}" for name in names]
        for block in (0, 1)
        for names in (
            ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
            ["self_attn.o_proj"],
            ["mlp.gate_proj", "mlp.up_proj"],
            ["mlp.down_proj"],
        )
    ]
    assert len(statistics.inputs) == len(readers)


def same_bits(a, b):
    return a.input_of == b.input_of and all(
        torch.equal(x, y)
        for x, y in zip(
            [t for i in a.inputs for t in (i.root, i.activation_norm)] + list(a.fisher.values()),
            [t for i in b.inputs for t in (i.root, i.activation_norm)] + list(b.fisher.values()),
            strict=True,
        )
    )


def test_the_same_seed_projects_to_the_same_bits_another_does_not_torchs_global_one_is_left_alone(
    tiny_llama, linears, windows
):
    before = torch.random.get_rng_state()
    first, again, other = (
        collected(tiny_llama, linears, windows, 10, seed=seed) for seed in (5, 5, 6)
    )

    assert same_bits(first, again)
    assert not same_bits(first, other)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_projection_has_the_asked_number_of_rows_and_leaves_norms_and_fisher_weights_alone(
    tiny_llama, linears, windows, statistics
):
    projected = collected(tiny_llama, linears, windows, 11, fisher_windows=3)

    assert {tuple(i.root.shape) for i in projected.inputs} == {(11, 32), (11, 64)}
    for name in linears:
        assert torch.equal(projected.activation_norm(name), statistics.activation_norm(name))
        assert torch.equal(projected.fisher[name], statistics.fisher[name])


def test_collecting_changes_no_weight_no_requires_grad_makes_no_grad_and_leaves_no_hook(
    tiny_llama, linears, windows
):
    frozen = "model.norm.weight"
    tiny_llama.get_parameter(frozen).requires_grad_(False)
    before = {name: p.detach().clone() for name, p in tiny_llama.named_parameters()}
    told = []
    collected(tiny_llama, linears, windows, fisher_windows=3, advance=told.append)

    assert told == [1] * 6
    for name, parameter in tiny_llama.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.requires_grad is (name != frozen)
        assert parameter.grad is None
    assert not any(module._forward_hooks for module in tiny_llama.modules())

    def fail(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):  # also where it fails midway
        collected(tiny_llama, linears, windows, advance=fail)
    assert all(p.requires_grad is (n != frozen) for n, p in tiny_llama.named_parameters())
    assert not any(module._forward_hooks for module in tiny_llama.modules())


def test_a_frozen_model_or_another_seed_without_projection_gives_the_same_bits(
    tiny_llama, linears, windows, statistics
):
    tiny_llama.requires_grad_(False)
    frozen = collected(tiny_llama, linears, windows, fisher_windows=3, seed=99)

    assert same_bits(frozen, statistics)
    assert not any(p.requires_grad for p in tiny_llama.parameters())


def test_unused_linear(tiny_llama, linears, windows):
    """A linear that the model never calls is refused by name."""
    linears["spare.adapter"] = PrunableLinear(name="spare.adapter", module=nn.Linear(32, 32))

    with pytest.raises(ModelError, match=r"1 linears .*spare\.adapter"):
        collected(tiny_llama, linears, windows)


@pytest.mark.parametrize(
    ("parameter", "bad", "rows", "first"),
    [
        ("model.layers.1.post_attention_layernorm", math.nan, 0, "1.mlp.gate_proj: the activ"),
        ("model.layers.1.post_attention_layernorm", math.inf, 8, "1.mlp.gate_proj: the activ"),
        ("lm_head", math.nan, 0, "0.self_attn.q_proj: the gradients"),
    ],
)
def test_activations_or_gradients_that_are_not_finite_are_refused_with_the_first_linear(
    tiny_llama, linears, windows, parameter, bad, rows, first
):
    tiny_llama.get_parameter(f"{parameter}.weight").data[3] = bad

    with pytest.raises(NumericalError, match=f"layers.{first}"):
        collected(tiny_llama, linears, windows, rows)


def test_writing_to_a_linears_weight_changes_the_model_whichever_way_it_is_stored():
    module = nn.Linear(3, 2, bias=False)
    PrunableLinear(name="a", module=module).weight[1, 2] = 7
    PrunableLinear(name="b", module=module, transposed=True).weight[0, 1] = 8

    assert module.weight[1].tolist()[0] == 8
    assert module.weight[1].tolist()[2] == 7
