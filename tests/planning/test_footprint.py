"""The footprint of a configuration alone, against that of the model that transformers builds."""

import copy
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
    PreTrainedConfig,
    Qwen3Config,
)

from pho_service.models.architecture import prunable_linears
from pho_service.models.footprint import footprint_of
from pho_service.planning.footprint import HEAD_TOKENS, shapes_footprint
from pho_service.planning.shapes import model_shapes
from pho_service.planning.stage_memory import LOGITS_AT_ONCE
from pho_service.pruning import passes, perplexity
from pho_service.spec.calibration import CalibrationSettings

SETTINGS = CalibrationSettings(samples=8, context_length=512)
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(num_hidden_layers=2),
    "gemma-3": Gemma3TextConfig(num_hidden_layers=2),
    "qwen-3": Qwen3Config(num_hidden_layers=2),
    "gpt-2": GPT2Config(n_layer=2),
    "opt": OPTConfig(num_hidden_layers=2),
    "mixtral": MixtralConfig(
        num_hidden_layers=2, hidden_size=512, intermediate_size=1024, num_attention_heads=8,
        num_key_value_heads=4, num_local_experts=4,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_same_as_of_the_model(name: str, dtype: str) -> None:
    """Weights, passes, bundle and sampling take within some per cent the same."""
    config = copy.deepcopy(CONFIGS[name])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    linears = prunable_linears(model)
    expected = footprint_of(model, linears, dtype=getattr(torch, dtype))
    written: dict[str, Any] = config.to_dict()

    found = shapes_footprint(model_shapes(name, written), dtype)

    assert sorted(found.rows) == sorted(expected.rows)
    assert found.prunable == expected.prunable
    assert found.bundle(SETTINGS) == expected.bundle(SETTINGS)
    assert found.sampling(SETTINGS) == expected.sampling(SETTINGS)
    assert found.weights == pytest.approx(expected.weights, rel=0.01)
    assert found.forward(512, 2) == expected.forward(512, 2)
    for recompute in (False, True):
        assert found.backward(512, 2, recompute=recompute) == pytest.approx(
            expected.backward(512, 2, recompute=recompute), rel=0.1
        )


def test_constants_are_those_of_the_passes() -> None:
    """What is written down here, since nothing of torch is imported, is what is done."""
    assert HEAD_TOKENS == passes.HEAD_TOKENS
    assert LOGITS_AT_ONCE == perplexity.CHUNK
