"""
LLaMAs of many sizes with random weights and random tokens: what work costs does not depend on
what they say.
"""

import hashlib
from dataclasses import dataclass
from types import SimpleNamespace

import torch

from pho_service.models.architecture import prunable_linears
from pho_service.models.calibration import CalibrationText
from pho_service.models.loading import LanguageModel
from pho_service.models.texts import TextRecord
from pho_service.spec.calibration import CalibrationSettings

VOCABULARY = 32_000
LONGEST = 4096  # tokens of a window


@dataclass(frozen=True, kw_only=True)
class Shape:
    """
    The size of a LLaMA with untied embeddings.

    Attributes:
        like: The published model with these shapes, but for the vocabulary.
    """

    like: str
    hidden: int
    intermediate: int
    blocks: int
    heads: int
    kv_heads: int

    @property
    def parameters(self) -> int:
        """Number of weights, embeddings and norms included."""
        attention = 2 * self.hidden * (self.hidden + self.hidden // self.heads * self.kv_heads)
        block = attention + 3 * self.hidden * self.intermediate + 2 * self.hidden
        return self.blocks * block + self.hidden + 2 * VOCABULARY * self.hidden


# By billions of parameters, about; `tiny` ones are there to try the scripts out.
SHAPES = {
    name: Shape(
        like=like, hidden=hidden, intermediate=intermediate, blocks=blocks, heads=heads,
        kv_heads=kv_heads,
    )
    for name, like, hidden, intermediate, blocks, heads, kv_heads in (
        ("tiny", "nothing", 32, 64, 2, 4, 2),
        ("tiny-deep", "nothing", 32, 64, 4, 4, 2),
        ("0.1", "SmolLM2-135M", 576, 1536, 30, 9, 3),
        ("0.3", "SmolLM2-360M", 960, 2560, 32, 15, 5),
        ("1", "TinyLlama-1.1B", 2048, 5632, 22, 32, 4),
        ("3", "Llama-3.2-3B", 3072, 8192, 28, 24, 8),
        ("7", "LLaMA-2-7B", 4096, 11008, 32, 32, 32),
        ("13", "LLaMA-2-13B", 5120, 13824, 40, 40, 40),
    )
}  # fmt: skip


def random_llama(size: str, *, dtype: str, device: str, seed: int) -> LanguageModel:
    """
    A LLaMA with random weights, made on its device and never on disk.

    Args:
        size: A key of ``SHAPES``.
        dtype: Of the weights, as `pho --dtype` names it.
        device: As torch names it.
        seed: Of the weights.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = SHAPES[size]
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=shape.hidden, intermediate_size=shape.intermediate,
        num_hidden_layers=shape.blocks, num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads, max_position_embeddings=LONGEST,
        tie_word_embeddings=False,
    )  # fmt: skip
    stored = getattr(torch, dtype)
    before = torch.get_default_dtype()
    torch.set_default_dtype(stored)
    try:
        with torch.random.fork_rng(), torch.device(device):
            torch.manual_seed(seed)
            model = LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)
    return LanguageModel(
        name=f"random LLaMA {size}",
        revision=None,
        model=model,
        tokenizer=SimpleNamespace(bos_token_id=None),  # the text is tokens already
        stored_dtype=stored,
        linears=prunable_linears(model),
    )


def random_text(settings: CalibrationSettings, vocabulary: int = VOCABULARY) -> CalibrationText:
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
