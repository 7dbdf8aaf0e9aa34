"""The tiny model as it is loaded, and a random one of every family that is supported."""

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from pho_service.models.loading import load_model

VOCABULARY = 96
COMMON = {
    "vocab_size": VOCABULARY, "num_hidden_layers": 2, "hidden_size": 16,
    "num_attention_heads": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "max_position_embeddings": 32,
}  # fmt: skip
GATED = COMMON | {"intermediate_size": 24, "num_key_value_heads": 2}
WIDE_HEADS = GATED | {"head_dim": 8}  # heads that together are wider than the model
MIXTURE = WIDE_HEADS | {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12,
    "norm_topk_prob": True,
}  # fmt: skip
made = AutoConfig.for_model

CONFIGS = {
    "llama-2": made("llama", **GATED | {"num_key_value_heads": 4}),
    "llama-3": made("llama",
        **GATED,
        rope_parameters={
            "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
        },
        tie_word_embeddings=True,
    ),
    "mistral": made("mistral", **GATED, sliding_window=6),
    "qwen-2": made("qwen2", **GATED),
    "qwen-3": made("qwen3", **WIDE_HEADS),
    "gemma-2": made("gemma2", **WIDE_HEADS, sliding_window=6, query_pre_attn_scalar=8),
    "gemma-3": made("gemma3_text",
        **WIDE_HEADS, sliding_window=6, query_pre_attn_scalar=8,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "gemma-3-vision": made("gemma3",
        text_config=WIDE_HEADS | {"sliding_window": 6, "query_pre_attn_scalar": 8},
        vision_config={
            "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
            "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
        },
        mm_tokens_per_image=4,
    ),
    "opt": made("opt", **COMMON, ffn_dim=24, word_embed_proj_dim=16),
    "opt-350m": made("opt",
        **COMMON, ffn_dim=24, word_embed_proj_dim=12, do_layer_norm_before=False
    ),
    "gpt-2": made("gpt2",
        vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=4, n_positions=32,
        bos_token_id=1, eos_token_id=2,
    ),
    "gpt-neox": made("gpt_neox", **COMMON, intermediate_size=24),
    "phi": made("phi", **GATED),
    "phi-3": made("phi3", **GATED),
    "falcon-7b": made("falcon", **COMMON, multi_query=True, parallel_attn=True),
    "falcon-40b": made("falcon", **COMMON, new_decoder_architecture=True, num_kv_heads=2),
    "falcon-rw": made("falcon",
        **COMMON, alibi=True, multi_query=False, parallel_attn=False, bias=True
    ),
    "mixtral": made("mixtral", **GATED, num_local_experts=4, num_experts_per_tok=2),
    "qwen-2-moe": made("qwen2_moe",
        **MIXTURE, decoder_sparse_step=1, shared_expert_intermediate_size=4
    ),
    "qwen-3-moe": made("qwen3_moe", **MIXTURE),
    "deepseek-v3": made("deepseek_v3",
        **GATED, n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=2,
        n_shared_experts=1, moe_intermediate_size=12, first_k_dense_replace=1, q_lora_rank=12,
        kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8,
    ),
}  # fmt: skip
# Those whose code differs most; the others are thorough.
FIRST = (
    "llama-3", "gemma-3", "opt", "gpt-2", "falcon-40b", "falcon-rw", "phi-3", "mixtral",
    "deepseek-v3",
)  # fmt: skip


@pytest.fixture
def model(model_folder):
    return load_model(str(model_folder), device="cpu")


@pytest.fixture(
    params=[
        name if name in FIRST else pytest.param(name, marks=pytest.mark.thorough)
        for name in CONFIGS
    ]
)
def family(request):
    return str(request.param)


@pytest.fixture
def config(family):
    return copy.deepcopy(CONFIGS[family])


@pytest.fixture
def network(config):
    """Two random blocks in evaluation mode, biases and norms random as well."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).float().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.2 * torch.randn(parameter.shape)
            model.get_input_embeddings().weight *= 4  # tokens differ, so no expert is left out
    return model


@pytest.fixture
def windows():
    """(4, 20), int64: random tokens that every tokenizer and model here knows."""
    return torch.randint(3, 42, (4, 20), generator=torch.Generator().manual_seed(1))
