"""Which linears torch's 2:4 kernels are given, and what is said of the others; on no real GPU."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import pho_service as pho
from pho_service.errors import InvalidInput
from pho_service.models.loading import LanguageModel, load_model
from pho_service.models.mask_file import MASKS, LayerMask, write_masks
from pho_service.pipeline import bench
from pho_service.pipeline.bench import check_gpu, convert_
from pho_service.pruning.masks import broken_groups

UP = "model.layers.1.mlp.up_proj"
DOWN = "model.layers.1.mlp.down_proj"
GATE = "model.layers.1.mlp.gate_proj"
Q = "model.layers.0.self_attn.q_proj"


def halved(weight: Tensor, order: Tensor | None = None) -> Tensor:
    """Which weights stay if the first two of each four do, in an order of the channels."""
    keep = torch.arange(weight.shape[1]) % 4 < 2
    found = torch.empty_like(keep)
    found[torch.arange(weight.shape[1]) if order is None else order] = keep
    return found.expand(weight.shape).contiguous()


@pytest.fixture
def loaded(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LanguageModel:
    """A folder at 2:4: one linear in an order of its own, one at 4:8, one dense; in bfloat16."""
    model = load_model(str(model_folder), device="cpu", dtype="bfloat16")
    masks, layers = {}, {}
    for name, linear in model.linears.items():
        if name == GATE:
            continue
        width = linear.weight.shape[1]
        # Neighbours stay together in no group of it.
        order = torch.arange(width).view(4, -1).T.flatten() if name == UP else None
        keep = halved(linear.weight, order)
        if name == DOWN:
            keep = (torch.arange(width) % 8 < 4).expand(linear.weight.shape).contiguous()
        linear.weight.masked_fill_(~keep, 0)
        masks[name] = LayerMask(keep=keep, order=order)
        group = 8 if name == DOWN else 4
        layers[name] = {
            "sparsity": 0.5, "weights_sha256": "", "mask_sha256": "", "keep": group // 2,
            "group": group,
        }  # fmt: skip
    folder = tmp_path / "pruned"
    model.model.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    (folder / MASKS).parent.mkdir()
    write_masks(masks, folder / MASKS, metadata={})
    recipe = {
        "format": "pho-pruning", "version": 2, "configuration": {"pattern": "2:4"},
        "model": model.to_dict(), "updated": False, "folded": [], "sparsity": 0.5,
        "layers": layers, "dense": {GATE: ""}, "calibration": {}, "versions": {},
    }  # fmt: skip
    (folder / "pruning.json").write_text(json.dumps(recipe))
    monkeypatch.setattr(bench, "check_gpu", lambda _: None)
    return load_model(str(folder), device="cpu", dtype="bfloat16")


def refusing(weight: Tensor) -> Tensor:
    """What torch's conversion does: refuses some shapes, and gives a tensor for the others."""
    if weight.shape[0] == 16:
        raise RuntimeError("dense.size(0) must be larger\nthan 32")
    return weight.clone()


def test_which_linears(loaded: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only groups that hold as they stand are converted; each other linear has its reason."""
    monkeypatch.setattr(bench, "to_semi_structured", refusing)
    before = {name: linear.weight.clone() for name, linear in loaded.linears.items()}
    small = [name for name, weight in before.items() if weight.shape[0] == 16]
    done = convert_(loaded, Path(loaded.name))

    assert {*done.left} == {UP, DOWN, GATE, *small}
    assert [*done.converted] == [name for name in loaded.linears if name not in done.left]
    assert "another channel order" in done.left[UP]
    assert "--deployable" in done.left[UP]
    assert done.left[DOWN] == "it was pruned at 4:8, and GPUs have kernels for 2:4"
    assert done.left[GATE] == "it was left dense"
    assert {done.left[name] for name in small} == {
        "torch refuses it: dense.size(0) must be larger than 32"
    }
    assert small
    assert all(torch.equal(loaded.linears[n].weight, w) for n, w in before.items())


def test_without_a_recipe(loaded: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that PHO did not prune is taken by its zeros."""
    monkeypatch.setattr(bench, "to_semi_structured", torch.clone)
    (Path(loaded.name) / "pruning.json").unlink()
    done = convert_(loaded, Path(loaded.name))

    assert {*done.left.values()} == {"not every group of 4 neighbours has 2 zeros"}
    assert {*done.left} == {UP, DOWN, GATE}


def test_groups_are_those_of_neighbours_counted_row_by_row() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.rand(5, 12, generator=generator) * (torch.rand(5, 12, generator=generator) < 0.6)
    slow = sum(
        sum(float(value) != 0 for value in row[start : start + 4]) > 2
        for row in weight
        for start in range(0, 12, 4)
    )

    assert broken_groups(weight) == slow > 0
    assert broken_groups(weight[:, :10]) == 5 * 3


def test_no_gpu(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU, on the CPU, on an old GPU and in float32 it is refused with a way out."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InvalidInput, match=r"torch sees no GPU.*pho\.load_model"):
        pho.load_semi_structured(model_folder)
    with pytest.raises(InvalidInput, match="needs a GPU, and the device is cpu"):
        check_gpu(torch.device("cpu"))
    old: dict[str, Any] = {
        "get_device_capability": lambda _: (7, 5), "get_device_name": lambda _: "Old",
    }  # fmt: skip
    for name, answer in old.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    with pytest.raises(InvalidInput, match=r"Old has compute capability 7\.5, but 2:4 needs 8\.0"):
        check_gpu(torch.device("cuda", 0))
    monkeypatch.setattr(bench, "check_gpu", lambda _: None)
    with pytest.raises(InvalidInput, match="is in float32"):
        convert_(load_model(str(model_folder), device="cpu"), model_folder)
