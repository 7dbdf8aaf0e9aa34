"""Model folders that look right and are not."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaForCausalLM

from pho_service.errors import ModelError, NumericalError
from pho_service.models import loading
from pho_service.models.architecture import prunable_linears
from pho_service.models.loading import load_model

LAYER = "model.layers.1.mlp.up_proj.weight"


def rewrite_weights(folder: Path, changes: dict[str, Tensor | None]) -> None:
    """Replace tensors of a model folder; None takes one away."""
    file = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    for name, tensor in changes.items():
        del tensors[name]
        if tensor is not None:
            tensors[name] = tensor
    save_file(tensors, file, metadata={"format": "pt"})


def rewrite_config(folder: Path, **changes: object) -> None:
    """Change keys of a model folder's config."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_weight_that_the_file_lacks_is_an_error_that_names_it(model_folder: Path) -> None:
    rewrite_weights(model_folder, {LAYER: None})

    with pytest.raises(ModelError, match="up_proj"):
        load_model(str(model_folder), device="cpu")


def test_config_with_more_layers(model_folder: Path) -> None:
    """A config that promises more layers than the file holds is an error."""
    rewrite_config(model_folder, num_hidden_layers=3)

    with pytest.raises(ModelError, match=r"layers\.2"):
        load_model(str(model_folder), device="cpu")


def test_a_weight_of_another_shape_than_the_configs_is_an_error(model_folder: Path) -> None:
    rewrite_weights(model_folder, {LAYER: torch.zeros(64, 33)})

    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model(str(model_folder), device="cpu")


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_not_finite(model_folder: Path, value: float) -> None:
    """An infinite weight is as bad as a NaN; the layer is named."""
    weight = torch.zeros(64, 32)
    weight[63, 31] = value
    rewrite_weights(model_folder, {LAYER: weight})

    with pytest.raises(NumericalError, match=r"model\.layers\.1\.mlp\.up_proj: a weight is NaN"):
        load_model(str(model_folder), device="cpu")


@pytest.mark.parametrize("share", [0.0, 0.00005, 0.5, 0.999])
def test_truncated(model_folder: Path, share: float) -> None:
    """Weights that were cut off are refused, wherever the file ends."""
    file = model_folder / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])

    with pytest.raises(ModelError, match="cannot be loaded: SafetensorError"):
        load_model(str(model_folder), device="cpu")


@pytest.mark.parametrize("content", ["{", "{}", '{"model_type": "unheard-of"}'])
def test_bad_config(model_folder: Path, content: str) -> None:
    """A config that is no config, or of no known architecture, is refused."""
    (model_folder / "config.json").write_text(content)

    with pytest.raises(ModelError, match=r"cannot be loaded|config\.json is not"):
        load_model(str(model_folder), device="cpu")


def test_no_tokenizer(model_folder: Path) -> None:
    """A model without a tokenizer is refused: it would get one that knows no words."""
    for path in model_folder.glob("tokenizer*"):
        path.unlink()

    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model(str(model_folder), device="cpu")


def test_code_that_a_folder_brings_along_is_never_run(model_folder: Path, tmp_path: Path) -> None:
    rewrite_config(
        model_folder,
        model_type="unheard-of",
        auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"},
    )
    (model_folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")

    with pytest.raises(ModelError, match="code from a model repository is never run"):
        load_model(str(model_folder), device="cpu")
    assert not (tmp_path / "ran").exists()


def test_no_blocks(tiny_llama: LlamaForCausalLM) -> None:
    """A model whose blocks cannot be found is refused, not pruned somewhere."""
    tiny_llama._no_split_modules = None

    with pytest.raises(ModelError, match="no decoder blocks found"):
        prunable_linears(tiny_llama)


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("We couldn't connect to 'https://huggingface.co' to load the files", "cannot be reached"),
        ("x is not a local folder and is not a valid model identifier", "has no such model"),
        ("x does not appear to have a file named model.safetensors", "no safetensors weights"),
        ("Please pass the argument `trust_remote_code=True`", "is never run"),
        ("something new\n  happened", "OSError: something new happened"),
    ],
)
def test_what_transformers_says_becomes_a_sentence_with_a_way_out(said: str, told: str) -> None:
    assert told in loading._reason(OSError(said))


def test_gated_model() -> None:
    """A model whose licence was not accepted is told from a hub that is down."""
    said = (
        "You are trying to access a gated repo.\nMake sure to have access to it at "
        "https://huggingface.co/a/b.\n401 Client Error.\n\nCannot access gated repo for url "
        "https://huggingface.co/a/b/resolve/main/config.json.\nAccess to model a/b is restricted."
    )

    assert "gated" in loading._reason(OSError(said))
