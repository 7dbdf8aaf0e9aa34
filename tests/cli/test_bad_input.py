"""What a user does wrong: one clear line, the right exit code, no debris."""

import json
import math
from pathlib import Path

import pytest
from click.testing import CliRunner
from transformers import LlamaForCausalLM

from pho_service.cli import main

CALIBRATION = ["--samples", "4", "--context-length", "24", "--projection-rows", "8"]


def pho(*arguments: object) -> tuple[int, str]:
    """Exit code and stderr."""
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    return result.exit_code, result.stderr


@pytest.fixture
def search(model_folder: Path, texts: dict[str, Path], tmp_path: Path) -> list[object]:
    """A search that would work."""
    return [
        "search", model_folder, "--text", texts["calibration"], "--trials", 8, *CALIBRATION,
        "--study", f"sqlite:///{tmp_path / 's.db'}", "--out", tmp_path / "out.json",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--pattern", "0"], "sparsity 0 is not between 0 and 1"),
        (["--pattern", "1"], "sparsity 1 is not between 0 and 1"),
        (["--pattern", "5:4"], "keeps N=5 of M=4"),
        (["--pattern", "half"], "neither a number nor N:M"),
        (["--pattern", "2:4", "--scope", "layer"], "scope 'layer' has no meaning"),
        (["--pattern", "0.5", "--kernel-sizes", "4"], "--kernel-sizes 4: 4 is even"),
        (["--pattern", "0.5", "--kernel-sizes", "x"], "not numbers"),
        (["--pattern", "0.5", "--space", "row_share=2:3"], "row_share=2:3 is not allowed"),
        (["--pattern", "0.5", "--trials", "2"], "trials=2 is too few"),
        (["--pattern", "0.5", "--samples", "0"], "--samples 0 is below 1"),
        (["--pattern", "0.5", "--calibration-memory", "much"], "'much' is not a size"),
        (["--pattern", "0.5", "--calibration-memory", "1e999GB"], "is not a size"),
        (
            ["--pattern", "0.5", "--calibration-memory", "0.1"],
            "--calibration-memory 0.1 is below 1",
        ),
        (["--pattern", "0.5", "--calibration-memory", "1.5MiB"], "but may take 2 MiB"),
        (["--pattern", "0.5", "--device", "cuda:77"], "does not exist"),
        (["--pattern", "0.5", "--sampler", "luck"], "'luck' is not one of"),
        (["--pattern", "0.5", "--confirm-windows", "0"], "--confirm-windows 0 is below 1"),
        (["--pattern", "2:5"], r"in_features=32 is not a multiple of M=5"),
        ([], "there is neither a pattern nor a target"),
    ],
)
def test_usage(search: list[object], tmp_path: Path, options: list[str], message: str) -> None:
    """Bad usage is exit code 2, names the value, and writes nothing."""
    code, error = pho(*search, *options)

    assert code == 2
    assert message in error
    assert not (tmp_path / "out.json").exists()


def test_width_names_the_layer(search: list[object]) -> None:
    """An input width that M does not divide names its layer."""
    assert "model.layers.0.self_attn.q_proj" in pho(*search, "--pattern", "2:5")[1]


def test_text_and_dataset(search: list[object]) -> None:
    """Two texts are one too many."""
    code, error = pho(*search, "--pattern", "0.5", "--dataset", "x")

    assert code == 2
    assert "--dataset x: text and dataset are both given; give one of them" in error


def test_no_model(search: list[object]) -> None:
    """A model that is not there fails, and is named."""
    search[1] = "./nowhere"
    code, error = pho(*search, "--pattern", "0.5")

    assert code == 1
    assert "./nowhere does not exist" in error


def test_short_text(search: list[object]) -> None:
    """A text shorter than a window fails with the way out."""
    code, error = pho(*search, "--pattern", "0.5", "--context-length", "1500")

    assert code == 2 or "do not fill one window" in error
    assert code != 0


def test_nan_activation(
    tiny_llama: LlamaForCausalLM, model_folder: Path, search: list[object], tmp_path: Path
) -> None:
    """Activations that are NaN name the first layer that saw them."""
    tiny_llama.get_parameter("model.layers.1.input_layernorm.weight").data[0] = math.nan
    tiny_llama.save_pretrained(model_folder)
    code, error = pho(*search, "--pattern", "0.5")

    assert code == 1
    assert "model.layers.1.self_attn.q_proj: the activations" in error
    assert not (tmp_path / "out.json").exists()


def test_bundle_of_another_model(
    tiny_llama: LlamaForCausalLM, model_folder: Path, texts: dict[str, Path], tmp_path: Path
) -> None:
    """Statistics of other weights are refused, and nothing is written."""
    bundle = tmp_path / "b.safetensors"
    pho("calibrate", model_folder, "--text", texts["calibration"], "--out", bundle, *CALIBRATION)
    tiny_llama.get_parameter("model.layers.0.mlp.down_proj.weight").data += 0.01
    tiny_llama.save_pretrained(model_folder)
    config = write_config(tmp_path)
    code, error = pho(
        "prune", model_folder, "--config", config, "--bundle", bundle, "--out", tmp_path / "new"
    )

    assert code == 1
    assert "of another model: the weights of model.layers.0.mlp.down_proj differ" in error
    assert not (tmp_path / "new").exists()


def write_config(folder: Path, **changes: object) -> Path:
    """A configuration written by hand."""
    path = folder / "config.json"
    path.write_text(json.dumps({
        "format": "pho-configuration", "version": 1, "method": "crepe", "pattern": "0.5",
        "scope": "layer",
        "coefficients": {"row": 1.0, "column": 1.0, "neighbourhood": 1.0, "kernel_size": 3,
                         "activation_exponent": 0.5},
        **changes,
    }))  # fmt: skip
    return path


def test_truncated_bundle(tmp_path: Path) -> None:
    """A truncated bundle is refused."""
    path = tmp_path / "b.safetensors"
    path.write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{}")
    code, error = pho(
        "search", path, "--preset", "score", "--pattern", "0.5", "--out", tmp_path / "c.json"
    )

    assert code == 1
    assert "damaged or truncated" in error


def test_folder_in_use(model_folder: Path, texts: dict[str, Path], tmp_path: Path) -> None:
    """A folder that holds something is left as it is, before any work is done."""
    used = tmp_path / "used"
    used.mkdir()
    (used / "thesis.txt").write_text("mine")
    code, error = pho(
        "prune", model_folder, "--config", write_config(tmp_path), "--out", used,
        "--text", texts["calibration"], *CALIBRATION,
    )  # fmt: skip

    assert code == 1
    assert "is in use" in error
    assert [p.name for p in used.iterdir()] == ["thesis.txt"]


def test_other_pattern(model_folder: Path, texts: dict[str, Path], tmp_path: Path) -> None:
    """A configuration of another pattern does not belong into a comparison."""
    code, error = pho(
        "compare", model_folder, "--pattern", "0.6", "--config", write_config(tmp_path),
        "--text", texts["calibration"], "--report-text", texts["report"], *CALIBRATION,
    )  # fmt: skip

    assert code == 1
    assert "is for the pattern 0.5, but the comparison is for 0.6" in error


def test_no_folder_for_the_result(search: list[object], tmp_path: Path) -> None:
    """A result that could not be written is refused before the search, not after it."""
    code, error = pho(*search, "--pattern", "0.5", "--out", tmp_path / "no" / "c.json")

    assert code == 1
    assert "does not exist" in error
    assert not (tmp_path / "s.db").exists()


def test_study_is_no_database(search: list[object], tmp_path: Path) -> None:
    """A file that is no database is refused and left alone."""
    (tmp_path / "s.db").write_text("my notes " * 500)
    code, error = pho(*search, "--pattern", "0.5")

    assert code == 1
    assert "not a database" in error
    assert (tmp_path / "s.db").read_text() == "my notes " * 500
