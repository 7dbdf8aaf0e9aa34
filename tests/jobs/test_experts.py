"""A mixture of experts goes through the jobs as any other model does."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from pho_service.configuration import CoefficientsDocument, Configuration, StepsDocument
from pho_service.jobs.check import check_folder
from pho_service.jobs.prune import prune_job
from pho_service.models.calibration import calibrate, calibration_text
from pho_service.models.loading import load_model
from pho_service.models.texts import TextSource
from pho_service.spec import CalibrationSettings

SETTINGS = CalibrationSettings(
    samples=6, context_length=32, rows_per_layer=4, projection_rows=16, kernel_sizes=(3,)
)
CONFIGURATION = Configuration(
    method="crepe",
    coefficients=CoefficientsDocument(
        row=0.5, column=0.5, neighbourhood=0.2, kernel_size=3, activation_exponent=0.5
    ),
    pattern="2:4",
    scope="row",
    steps=StepsDocument(permutation="score"),
)


@pytest.fixture
def mixtral_folder(model_folder: Path, tmp_path: Path) -> Path:
    """A random bfloat16 Mixtral of two blocks and four experts, as Mistral AI stores it."""
    config = MixtralConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
        initializer_range=0.2, dtype=torch.bfloat16,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        MixtralForCausalLM(config).bfloat16().save_pretrained(tmp_path / "mixtral")
    for file in model_folder.glob("token*"):
        shutil.copy(file, tmp_path / "mixtral")
    return tmp_path / "mixtral"


def test_permuted(mixtral_folder: Path, texts: dict[str, Path], tmp_path: Path) -> None:
    """Every expert's channel order is folded into its weights; what is saved passes its check."""
    model = load_model(str(mixtral_folder), device="cpu")
    text = calibration_text(model, TextSource(path=str(texts["calibration"])), SETTINGS)
    bundle = calibrate(model, text, SETTINGS)
    prune_job(model, bundle, CONFIGURATION, tmp_path / "out", calibration=text.calibration)
    recipe = json.loads((tmp_path / "out" / "pruning.json").read_text())
    original = load_model(str(mixtral_folder), device="cpu")
    checks = check_folder(tmp_path / "out", original=original)

    assert {entry["reader"] for entry in recipe["folded"]} == {
        f"model.layers.{block}.mlp.experts.{expert}.down_proj"
        for block in range(2)
        for expert in range(4)
    }
    assert [check.detail for check in checks if not check.passed] == []
