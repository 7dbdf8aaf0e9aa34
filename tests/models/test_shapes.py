"""Shapes from headers alone, against the models that transformers builds."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoConfig, AutoModelForCausalLM, MambaConfig
from transformers.activations import ACT2FN

from pho_service.errors import InvalidInput
from pho_service.models.architecture import decoder_blocks, prunable_linears
from pho_service.planning.shapes import (
    ACTIVATIONS,
    Header,
    TensorHeader,
    model_shapes,
    read_header,
)

GATED = {
    "vocab_size": 96, "num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 4,
    "intermediate_size": 24, "num_key_value_heads": 2, "pad_token_id": 0,
}  # fmt: skip
GPT = {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32, "vocab_size": 96}
# Beside the families that are pruned in other tests.
MORE = {
    "gptj": {**GPT, "rotary_dim": 4},
    "bloom": {"vocab_size": 96, "hidden_size": 16, "n_layer": 2, "n_head": 4},
    "olmo2": GATED,
    "starcoder2": GATED,
    "olmoe": {**GATED, "num_experts": 4, "num_experts_per_tok": 2},
}
llama = pytest.mark.parametrize("family", ["llama-3"])


def sizes(shapes):
    return [
        sum((Counter({(li.out_features, li.in_features): li.count}) for li in block.linears),
            Counter[tuple[int, int]]())
        for block in shapes.blocks
    ]  # fmt: skip


def check(config, header_of, tmp_path):
    """By the names of the model's parameters and by those that its files have."""
    header = header_of(config)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    linears = prunable_linears(model)
    expected = [
        Counter(
            tuple(linear.weight.shape)
            for full_name, linear in linears.items()
            if full_name.startswith(f"{block}.")
        )
        for block, _ in decoder_blocks(model)
    ]
    stored = model_shapes("m", read_header(str(tmp_path)))
    built = model_shapes("m", header)

    for shapes in (stored, built):
        assert sizes(shapes) == expected
        assert shapes.parameters == pytest.approx(parameters, abs=4)  # a bias of DeepSeek's router
        assert (shapes.hidden, shapes.vocabulary) == (16, 96)
    assert [block.norms for block in stored.blocks] == [block.norms for block in built.blocks]
    assert stored.active == built.active


def test_those_of_the_model(config, header_of, tmp_path):
    check(config, header_of, tmp_path)


@pytest.mark.parametrize("kind", MORE)
def test_those_of_more_models(kind, header_of, tmp_path):
    check(AutoConfig.for_model(kind, **MORE[kind]), header_of, tmp_path)


@pytest.mark.parametrize(
    ("family", "inputs"),
    [
        ("llama-2", [16, 16, 16, 24]),
        ("gemma-3", [16, 16, 24, 32]),
        ("gpt-2", [16, 16, 16, 64]),
        ("phi", [16, 16, 24]),  # one norm for attention and feed-forward
        ("deepseek-v3", [8, 12, 16, 16, 24, 32]),
    ],
)
def test_queries_keys_and_values_read_one_input_gate_and_up_another(config, inputs, header_of):
    block = model_shapes("m", header_of(config)).blocks[0]

    assert sorted({li.reads: li.in_features for li in block.linears}.values()) == inputs


@pytest.mark.parametrize(
    ("family", "norms"), [("llama-2", 32), ("gemma-3", 4 * 16 + 32 + 16), ("phi", 16)]
)
def test_norms(config, norms, header_of):
    """Those of queries and keys read all heads."""
    assert model_shapes("m", header_of(config)).blocks[0].norms == norms


@pytest.mark.parametrize("family", ["mixtral"])
def test_two_of_four_experts_see_each_token_the_others_do_not(config, header_of):
    shapes = model_shapes("m", header_of(config))
    experts = sum(li.weights for li in shapes.linears if li.count == 4)

    assert shapes.active == shapes.prunable - experts / 2


@llama
def test_what_is_not_loaded_is_not_counted(config, header_of):
    plain = header_of(config)
    more = {name.replace("layers.0.", "layers.2."): t for name, t in plain.tensors.items()}
    more["lm_head.weight"] = TensorHeader((96, 16), "BF16")
    more["model.layers.0.self_attn.bias"] = TensorHeader((1, 1, 32, 32), "BOOL")

    found = model_shapes("m", replace(plain, tensors={**plain.tensors, **more}))
    assert found == model_shapes("m", plain)


@pytest.mark.parametrize("name", [name for name in ACT2FN if name != "prelu"])  # keeps its weight
def test_activations(name):
    """As many tensors are kept for a backward pass as the table says, beside input and output."""
    module = ACT2FN[name]
    saved = []

    def keep(tensor):
        if tensor.numel() == 2:
            saved.append(tensor.data_ptr())
        return tensor

    x = torch.zeros(2, requires_grad=True)
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        kept = module(x)

    assert kept is not None
    assert max(0, len({*saved}) - 2) == ACTIVATIONS.get(name, 0)


@llama
@pytest.mark.parametrize(
    ("changes", "more", "words"),
    [
        ({"num_hidden_layers": -5}, {}, "num_hidden_layers=-5 in its configuration"),
        ({"vocab_size": 2**40}, {}, "is not a whole number"),
        ({"num_experts_per_tok": True}, {}, "num_experts_per_tok=True"),
        ({}, {"model.layers.0.more.weight": TensorHeader((16, 8), "I4")}, "stored as 'I4'"),
        ({}, {"model.layers.0.more.weight": TensorHeader((16, 1, 4), "BF16")},
         r"more.weight \(16, 1, 4\) of a block"),
    ],
)  # fmt: skip
def test_an_odd_field_or_weight_is_named_with_its_value(config, changes, more, words, header_of):
    header = header_of(config)
    odd = Header(config={**header.config, **changes}, tensors={**header.tensors, **more})
    with pytest.raises(InvalidInput, match=words):
        model_shapes("org/m", odd)


def test_states_are_refused_as_is_a_model_without_blocks(header_of):
    with pytest.raises(InvalidInput, match="is not the weight of a linear"):
        model_shapes("m", header_of(MambaConfig(num_hidden_layers=1, hidden_size=16)))
    with pytest.raises(InvalidInput, match="not linears of numbered blocks"):
        model_shapes("m", Header(config={}, tensors={"x.weight": TensorHeader((4, 4), "F32")}))
