"""
Shapes from a configuration alone, against the models that transformers builds of it.
"""

import json
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    FalconConfig,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from pho_service.errors import InvalidInput
from pho_service.models.architecture import decoder_blocks, prunable_linears
from pho_service.planning.layouts import FAMILIES
from pho_service.planning.shapes import model_shapes

TWO = {"num_hidden_layers": 2}
MIXTURE = TWO | {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama-2-7b": LlamaConfig(**TWO),
    "llama-3-8b": LlamaConfig(
        **TWO, num_key_value_heads=8, intermediate_size=14336, vocab_size=128256
    ),
    "llama-tied": LlamaConfig(**TWO, tie_word_embeddings=True),
    "mistral": MistralConfig(**TWO),
    "qwen-2": Qwen2Config(**TWO),
    "qwen-3": Qwen3Config(**TWO),
    "gemma-2": Gemma2Config(**TWO),
    "gemma-3": Gemma3TextConfig(**TWO),
    "gemma-3-vision": Gemma3Config(
        text_config={"num_hidden_layers": 2, "hidden_size": 640, "intermediate_size": 2048},
        vision_config={"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
                       "num_attention_heads": 2, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
    ),
    "opt": OPTConfig(**TWO),
    "opt-350m": OPTConfig(
        **TWO, hidden_size=1024, num_attention_heads=16, word_embed_proj_dim=512, ffn_dim=4096
    ),
    "gpt-2": GPT2Config(n_layer=2),
    "gpt-neox": GPTNeoXConfig(**TWO),
    "phi": PhiConfig(**TWO),
    "phi-3": Phi3Config(**TWO),
    "falcon-7b": FalconConfig(**TWO, multi_query=True, parallel_attn=True),
    "falcon-40b": FalconConfig(**TWO, new_decoder_architecture=True, num_kv_heads=8),
    "falcon-rw": FalconConfig(**TWO, alibi=True, multi_query=False, parallel_attn=False),
    "mixtral": MixtralConfig(**MIXTURE, intermediate_size=512, num_local_experts=4),
    "qwen-2-moe": Qwen2MoeConfig(
        **MIXTURE, num_experts=4, moe_intermediate_size=96, shared_expert_intermediate_size=320,
        mlp_only_layers=[0],
    ),
    "qwen-3-moe": Qwen3MoeConfig(**MIXTURE, num_experts=8, moe_intermediate_size=96),
    "deepseek-v3": DeepseekV3Config(
        num_hidden_layers=2, hidden_size=512, intermediate_size=1024, num_attention_heads=4,
        num_key_value_heads=4, n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=2,
        moe_intermediate_size=96, first_k_dense_replace=1,
    ),
    "deepseek-v2-queries": DeepseekV3Config(
        num_hidden_layers=1, hidden_size=512, intermediate_size=1024, num_attention_heads=4,
        num_key_value_heads=4, n_routed_experts=4, n_group=2, topk_group=2,
        moe_intermediate_size=96, first_k_dense_replace=1, q_lora_rank=None,
    ),
}  # fmt: skip


def written(config: PreTrainedConfig) -> dict[str, Any]:
    """What config.json has."""
    values: dict[str, Any] = json.loads(config.to_json_string())
    return values


@pytest.mark.parametrize("name", CONFIGS)
def test_linears_are_those_of_the_model(name: str) -> None:
    """Names, shapes and numbers of experts are those of what transformers builds."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIGS[name])
    expected = []
    linears = prunable_linears(model)
    for block, _ in decoder_blocks(model):
        counted: dict[str, list[int]] = {}
        for full_name, linear in linears.items():
            if full_name.startswith(f"{block}."):
                short = (linear.siblings or full_name).removeprefix(f"{block}.")
                counted.setdefault(short, [0, *linear.weight.shape])[0] += 1
        expected.append(counted)

    shapes = model_shapes(name, written(CONFIGS[name]))

    found = [
        {s.name: [s.count, s.out_features, s.in_features] for s in block} for block in shapes.blocks
    ]
    assert found == expected


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "gemma-3-vision"])
def test_parameters_are_within_half_a_percent(name: str) -> None:
    """Norms and biases are estimated, all else is counted."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIGS[name])
    expected = sum(parameter.numel() for parameter in model.parameters())

    shapes = model_shapes(name, written(CONFIGS[name]))

    assert shapes.parameters == pytest.approx(expected, rel=0.005)
    assert shapes.vocabulary * shapes.hidden <= shapes.parameters


def test_all_families_are_compared() -> None:
    """No layout is untested, but for the first Gemma's, which is that of the second."""
    tested = {model_shapes(n, written(c)).family for n, c in CONFIGS.items()}

    assert tested == set(FAMILIES) - {"gemma"}


def test_inputs_are_shared_where_the_model_shares_them() -> None:
    """Queries, keys and values read one input, gate and up another."""
    shapes = model_shapes("m", written(LlamaConfig()))

    assert [s.reads for s in shapes.blocks[0]] == [
        "attention", "attention", "attention", "output", "mlp", "mlp", "mlp.down",
    ]  # fmt: skip
    assert shapes.bytes("bfloat16") == 2 * shapes.parameters
    assert shapes.active == shapes.prunable


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "mamba"}, "the family 'mamba' cannot be planned"),
        ({"hidden_size": -5}, "hidden_size=-5 in its configuration"),
        ({"num_hidden_layers": None}, "has no num_hidden_layers"),
        ({"intermediate_size": 2**40}, "is not a whole number"),
        ({"dtype": "int4"}, "stored as 'int4'"),
    ],
)
def test_odd_configurations_are_refused(change: dict[str, Any], words: str) -> None:
    """The message names the field and its value."""
    with pytest.raises(InvalidInput, match=words):
        model_shapes("org/m", written(LlamaConfig()) | change)
