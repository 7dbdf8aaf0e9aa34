"""Models that run in milliseconds, as the whole product takes them on a pretended GPU."""

import shutil
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
)

from pho_service.models.calibration import calibrate, calibration_text
from pho_service.models.data_sets import TextSource
from pho_service.models.loading import load_model
from pho_service.models.texts import ReportText, read_windows
from pho_service.spec.calibration import CalibrationSettings

COMMON = {
    "vocab_size": 96, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "intermediate_size": 32, "initializer_range": 0.2,
    "max_position_embeddings": 64,
}  # fmt: skip
ONE_BLOCK = COMMON | {"num_hidden_layers": 1}
LLAMA = LlamaConfig(**COMMON)
SHALLOW = LlamaConfig(**ONE_BLOCK)
CONFIGS = {
    "llama": LLAMA,
    "llama-bfloat16": SHALLOW,
    "llama-streamed": LLAMA,
    "mixtral": MixtralConfig(**ONE_BLOCK, num_local_experts=3, num_experts_per_tok=2),
    "gpt-2": GPT2Config(
        vocab_size=96, n_embd=16, n_layer=1, n_head=2, n_positions=64, initializer_range=0.2
    ),
}
SETTINGS = CalibrationSettings(
    samples=4, context_length=24, fisher_samples=2, rows_per_layer=8, projection_rows=16,
    kernel_sizes=(3, 5),
)  # fmt: skip


@dataclass
class Subject:
    """One model on a device, which its proxies are on too."""

    name: str  # of the kind of model and the way that it is loaded
    folder: Path
    texts: Mapping[str, Path]  # by what they are for
    device: str

    @cached_property
    def model(self):
        """Loaded, or mapped if it is to be streamed."""
        stream = "streamed" in self.name
        dtype = "auto" if stream else self.dtype
        return load_model(str(self.folder), device=self.device, dtype=dtype, stream=stream)

    @property
    def dtype(self):
        return "bfloat16" if "bfloat16" in self.name else "float32"

    @cached_property
    def text(self):
        return self.text_for(SETTINGS)

    def text_for(self, settings):
        source = TextSource(path=str(self.texts["calibration"]))
        return calibration_text(self.model, source, settings)

    @cached_property
    def bundle(self):
        return calibrate(self.model, self.text, SETTINGS)

    def report(self, name="report"):
        source, length = TextSource(path=str(self.texts[name])), SETTINGS.context_length
        windows, record = read_windows(
            self.model, source, context_length=length, bos="auto", max_windows=2
        )
        return ReportText(windows=windows, record=record)


def write_model(name, folder, tokenizer):
    shutil.copytree(tokenizer, folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIGS[name])
    model.to(torch.bfloat16 if "bfloat16" in name else torch.float32).save_pretrained(folder)


@contextmanager
def unchanged(model):
    """What happens inside must leave the model dense, and on its device."""
    places = {name: p.device for name, p in model.model.named_parameters()}
    before = {name: p.detach().to("cpu", copy=True) for name, p in model.model.named_parameters()}
    yield
    for name, parameter in model.model.named_parameters():
        assert parameter.device == places[name], name
        assert torch.equal(parameter.detach().cpu(), before[name]), name
