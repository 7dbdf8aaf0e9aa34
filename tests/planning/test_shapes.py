"""
Shapes from headers alone, against the models that transformers builds.
"""

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CohereConfig,
    DeepseekV3Config,
    FalconConfig,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    OlmoeConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    Starcoder2Config,
)
from transformers.activations import ACT2FN

from pho_service.errors import InvalidInput
from pho_service.models.architecture import decoder_blocks, prunable_linears
from pho_service.planning.shapes import (
    ACTIVATIONS,
    Header,
    ModelShapes,
    TensorHeader,
    model_shapes,
    read_header,
)

COMMON = {
    "vocab_size": 96, "num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 4,
    "max_position_embeddings": 32, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
GATED = COMMON | {"intermediate_size": 24, "num_key_value_heads": 2}
WIDE_HEADS = GATED | {"head_dim": 8}  # heads that together are wider than the model
MIXTURE = WIDE_HEADS | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
LATENT = GATED | {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 2,
    "n_shared_experts": 1, "moe_intermediate_size": 12, "first_k_dense_replace": 1,
    "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8,
}  # fmt: skip
GPT = {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32, "vocab_size": 96}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**GATED),
    "llama-tied": LlamaConfig(**GATED, tie_word_embeddings=True),
    "mistral": MistralConfig(**GATED),
    "qwen-2": Qwen2Config(**GATED),
    "qwen-3": Qwen3Config(**WIDE_HEADS),
    "gemma": GemmaConfig(**WIDE_HEADS),
    "gemma-2": Gemma2Config(**WIDE_HEADS),
    "gemma-3": Gemma3TextConfig(**WIDE_HEADS),
    "gemma-3-vision": Gemma3Config(
        text_config=WIDE_HEADS,
        vision_config={"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
                       "num_attention_heads": 2, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
    ),
    "opt": OPTConfig(**COMMON, ffn_dim=24, word_embed_proj_dim=16),
    "opt-350m": OPTConfig(**COMMON, ffn_dim=24, word_embed_proj_dim=12),
    "gpt-2": GPT2Config(**GPT),
    "gpt-j": GPTJConfig(**GPT, rotary_dim=4),
    "gpt-neox": GPTNeoXConfig(**COMMON, intermediate_size=24),
    "phi": PhiConfig(**GATED),
    "phi-3": Phi3Config(**GATED),
    "falcon-7b": FalconConfig(**COMMON, multi_query=True, parallel_attn=True),
    "falcon-40b": FalconConfig(**COMMON, new_decoder_architecture=True, num_kv_heads=2),
    "falcon-rw": FalconConfig(
        **COMMON, alibi=True, multi_query=False, parallel_attn=False, bias=True
    ),
    "bloom": BloomConfig(vocab_size=96, hidden_size=16, n_layer=2, n_head=4),
    "cohere": CohereConfig(**GATED),
    "olmo-2": Olmo2Config(**GATED),
    "starcoder-2": Starcoder2Config(**GATED),
    "mixtral": MixtralConfig(**GATED, num_local_experts=4, num_experts_per_tok=2),
    "olmoe": OlmoeConfig(**GATED, num_experts=4, num_experts_per_tok=2),
    "qwen-2-moe": Qwen2MoeConfig(
        **MIXTURE, decoder_sparse_step=1, shared_expert_intermediate_size=4, mlp_only_layers=[0]
    ),
    "qwen-3-moe": Qwen3MoeConfig(**MIXTURE),
    "deepseek-v3": DeepseekV3Config(**LATENT, q_lora_rank=6),
    "deepseek-v2-queries": DeepseekV3Config(**LATENT, q_lora_rank=None),
}  # fmt: skip
HeaderOf = Callable[[PreTrainedConfig], Header]


def sizes(shapes: ModelShapes) -> list[Counter[tuple[int, int]]]:
    """How many linears of which size each block has."""
    return [
        sum((Counter({(li.out_features, li.in_features): li.count}) for li in block.linears),
            Counter[tuple[int, int]]())
        for block in shapes.blocks
    ]  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_those_of_the_model(name: str, header_of: HeaderOf, tmp_path: Path) -> None:
    """By the names of the model's parameters and by those that its files have."""
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name]))
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
    stored = model_shapes(name, read_header(str(tmp_path)))
    built = model_shapes(name, header_of(CONFIGS[name]))

    for shapes in (stored, built):
        assert sizes(shapes) == expected
        assert shapes.parameters == pytest.approx(parameters, abs=4)  # a bias of DeepSeek's router
        assert (shapes.hidden, shapes.vocabulary) == (16, 96)
    assert [block.norms for block in stored.blocks] == [block.norms for block in built.blocks]
    assert stored.active == built.active


def shapes_of(config: PreTrainedConfig, header_of: HeaderOf) -> ModelShapes:
    """What its header says."""
    return model_shapes("org/m", header_of(config))


@pytest.mark.parametrize(
    ("name", "inputs"),
    [
        ("llama", [16, 16, 16, 24]),
        ("gemma-3", [16, 16, 24, 32]),
        ("gpt-2", [16, 16, 16, 64]),
        ("phi", [16, 16, 24]),  # one norm for attention and feed-forward
        ("deepseek-v3", [6, 8, 16, 16, 24, 32]),
    ],
)
def test_queries_keys_and_values_read_one_input_gate_and_up_another(
    name: str, inputs: list[int], header_of: HeaderOf
) -> None:
    block = shapes_of(CONFIGS[name], header_of).blocks[0]

    assert sorted({li.reads: li.in_features for li in block.linears}.values()) == inputs


@pytest.mark.parametrize(
    ("name", "norms"),
    [("llama", 32), ("gemma-3", 4 * 16 + 32 + 16), ("olmo-2", 2 * 16 + 16 + 8), ("phi", 16)],
)
def test_norms(name: str, norms: int, header_of: HeaderOf) -> None:
    """Those of queries and keys read all heads."""
    assert shapes_of(CONFIGS[name], header_of).blocks[0].norms == norms


def test_two_of_four_experts_see_each_token_the_others_do_not(header_of: HeaderOf) -> None:
    shapes = shapes_of(CONFIGS["mixtral"], header_of)
    experts = sum(li.weights for li in shapes.linears if li.count == 4)

    assert shapes.active == shapes.prunable - experts / 2


def test_what_is_not_loaded_is_not_counted(header_of: HeaderOf) -> None:
    plain = header_of(CONFIGS["llama-tied"])
    more = {name.replace("layers.0.", "layers.2."): t for name, t in plain.tensors.items()}
    more["lm_head.weight"] = TensorHeader((96, 16), "BF16")
    more["model.layers.0.self_attn.bias"] = TensorHeader((1, 1, 32, 32), "BOOL")

    found = model_shapes("m", replace(plain, tensors={**plain.tensors, **more}))
    assert found == model_shapes("m", plain)


@pytest.mark.parametrize("name", ACT2FN)
def test_activations(name: str) -> None:
    """As many tensors are kept for a backward pass as the table says, beside input and output."""
    module: nn.Module = ACT2FN[name]
    if name == "prelu":  # whose own weight is kept
        return
    saved: list[int] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.numel() == 2:
            saved.append(tensor.data_ptr())
        return tensor

    x = torch.zeros(2, requires_grad=True)
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        kept = module(x)

    assert kept is not None
    assert max(0, len({*saved}) - 2) == ACTIVATIONS.get(name, 0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_hidden_layers": -5}, "num_hidden_layers=-5 in its configuration"),
        ({"vocab_size": 2**40}, "is not a whole number"),
        ({"num_experts_per_tok": True}, "num_experts_per_tok=True"),
    ],
)
def test_the_message_names_the_field_and_its_value(
    change: dict[str, Any], words: str, header_of: HeaderOf
) -> None:
    header = header_of(CONFIGS["llama"])
    with pytest.raises(InvalidInput, match=words):
        model_shapes("org/m", replace(header, config={**header.config, **change}))


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (TensorHeader((16, 8), "I4"), "stored as 'I4'"),
        (TensorHeader((16, 1, 4), "BF16"), r"model.layers.0.more.weight \(16, 1, 4\) of a block"),
    ],
)
def test_odd_weights_are_refused(tensor: TensorHeader, words: str, header_of: HeaderOf) -> None:
    """What cannot be pruned is not planned."""
    header = header_of(CONFIGS["llama"])
    more = {**header.tensors, "model.layers.0.more.weight": tensor}
    with pytest.raises(InvalidInput, match=words.replace("model.layers.0.", "")):
        model_shapes("org/m", replace(header, tensors=more))


def test_states_are_refused(header_of: HeaderOf) -> None:
    """Mamba has weights that are no linears; and a model without blocks has nothing to prune."""
    with pytest.raises(InvalidInput, match="is not the weight of a linear"):
        model_shapes("m", header_of(MambaConfig(num_hidden_layers=1, hidden_size=16)))
    with pytest.raises(InvalidInput, match="not linears of numbered blocks"):
        model_shapes("m", Header(config={}, tensors={"x.weight": TensorHeader((4, 4), "F32")}))
