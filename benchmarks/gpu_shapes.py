"""
Models with the shapes of published ones and random weights, as folders that `pho` reads.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

from pho_service.models.calibration import CalibrationText
from pho_service.models.texts import TextRecord
from pho_service.spec.calibration import CalibrationSettings

SHARD = "2GB"


@dataclass(frozen=True, kw_only=True)
class Shape:
    """
    Attributes:
        like: The published model with these shapes.
        config: Of transformers.
        blocks: That the published model has; more than the shape where only some are measured.
        stream: Whether it is streamed from its files.
        dtype: Of the weights.
    """

    like: str
    config: Callable[[], PreTrainedConfig]
    blocks: int
    stream: bool = False
    dtype: str = "bfloat16"

    @property
    def times(self) -> float:
        """How often its blocks stand in the published model."""
        return self.blocks / self.config().num_hidden_layers


_TINY = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096,
}  # fmt: skip
_EIGHT = {
    "vocab_size": 128_256, "num_key_value_heads": 8, "rope_theta": 5e5,
    "max_position_embeddings": 8192,
}  # fmt: skip

# `tiny` ones are there to try the script out.
SHAPES = {
    "llama-2-7b": Shape(like="LLaMA-2-7B", config=LlamaConfig, blocks=32),
    "llama-3-8b": Shape(
        like="LLaMA-3-8B", config=lambda: LlamaConfig(**_EIGHT, intermediate_size=14_336), blocks=32
    ),
    "llama-3-70b-block": Shape(
        like="LLaMA-3-70B, one block streamed",
        config=lambda: LlamaConfig(
            **_EIGHT, hidden_size=8192, intermediate_size=28_672, num_attention_heads=64,
            num_hidden_layers=1,
        ),
        blocks=80,
        stream=True,
    ),
    "mixtral-block": Shape(
        like="Mixtral 8x7B, one block",
        config=lambda: MixtralConfig(num_hidden_layers=1, num_local_experts=8),
        blocks=32,
    ),
    "tiny": Shape(like="nothing", config=lambda: LlamaConfig(**_TINY), blocks=2),
    "tiny-streamed": Shape(
        like="nothing", config=lambda: LlamaConfig(**_TINY), blocks=4, stream=True
    ),
    "tiny-mixtral": Shape(
        like="nothing", config=lambda: MixtralConfig(**_TINY, num_local_experts=4), blocks=2
    ),
}  # fmt: skip


def write_model(shape: Shape, folder: Path, *, device: torch.device, seed: int) -> None:
    """
    Write a model with random weights and a tokenizer that is never used.

    Args:
        shape: Of the model.
        folder: New.
        device: Where the weights are drawn: a card draws them a hundred times faster.
        seed: Of the weights.
    """
    config = shape.config()
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, shape.dtype))
    try:
        with torch.random.fork_rng(), device:
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(config)
    finally:
        torch.set_default_dtype(before)
    model.save_pretrained(folder, max_shard_size=SHARD)
    tokenizer = Tokenizer(WordLevel({"a": 0}))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def random_text(settings: CalibrationSettings, vocabulary: int) -> CalibrationText:
    """As many windows of random tokens as the settings ask for, none held out."""
    generator = torch.Generator().manual_seed(settings.seed)
    shape = (settings.samples, settings.context_length)
    windows = torch.randint(vocabulary, shape, generator=generator)
    digest = hashlib.sha256(windows.numpy().tobytes()).hexdigest()
    return CalibrationText(
        calibration=windows,
        beside=windows[:0],
        record=TextRecord(source="random tokens", sha256=digest, documents=0),
        bundle_key=digest,
    )
