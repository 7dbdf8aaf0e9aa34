"""A pruned folder passes its check; whatever is broken in it is found, and only that."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from pho_service.errors import ConfigurationError, ModelError, NumericalError
from pho_service.models.loading import LanguageModel, load_model
from pho_service.models.mask_file import MASKS, LayerMask, read_masks, write_masks
from pho_service.models.packed import pack
from pho_service.models.saving import read_recipe
from pho_service.pipeline.check import Check, check_folder

UP = "model.layers.1.mlp.up_proj"
GATE = "model.layers.1.mlp.gate_proj"
DOWN = "model.layers.1.mlp.down_proj"
NAMES = [
    "recipe", "masks", "zeros", "sparsity", "groups", "weight hashes",
    "original model", "kept weights", "other parameters", "semi-structured",
]  # fmt: skip


def bytes_sha256(weight: Tensor) -> str:
    """Of a weight's values, row by row, without the code under test."""
    values = weight.contiguous()
    short = values.view(torch.int16) if values.dtype is torch.bfloat16 else values
    return hashlib.sha256(short.numpy().tobytes()).hexdigest()


def group_mask(weight: Tensor, order: Tensor | None) -> Tensor:
    """The two largest of each four weights, in an order of the channels, by a slow loop."""
    channels = torch.arange(weight.shape[1]) if order is None else order
    keep = torch.zeros(weight.shape, dtype=torch.bool)
    for group in channels.split(4):
        best = weight[:, group].abs().topk(2, dim=1).indices
        keep.scatter_(1, group[best], True)
    return keep


@dataclass(frozen=True, kw_only=True)
class Pruned:
    """A pruned folder, and how to break it."""

    path: Path

    def edit_recipe(self, change: Callable[[dict[str, Any]], object]) -> None:
        """Change the recipe's document."""
        path = self.path / "pruning.json"
        document = json.loads(path.read_text())
        change(document)
        path.write_text(json.dumps(document))

    def edit_tensor(self, name: str, change: Callable[[Tensor], object], layer: str = "") -> None:
        """Change a saved tensor in place; with ``layer``, that linear's hash is made to fit."""
        path = self.path / "model.safetensors"
        tensors = {key: tensor.clone() for key, tensor in load_file(path).items()}
        change(tensors[name])
        save_file(tensors, path, metadata={"format": "pt"})
        if layer:
            digest = bytes_sha256(tensors[name])
            self.edit_recipe(lambda r: r["layers"][layer].update(weights_sha256=digest))

    def edit_masks(self, change: Callable[[dict[str, LayerMask]], object], *, hashes: bool) -> None:
        """Change the masks; with ``hashes``, the recipe is made to fit."""
        file = read_masks(self.path / MASKS)
        masks = {name: file.mask(name) for name in file.names}
        change(masks)
        written = write_masks(masks, self.path / MASKS, metadata=file.metadata)
        if hashes:
            self.edit_recipe(
                lambda r: [r["layers"][n].update(mask_sha256=h) for n, h in written.items()]
            )


def prune(
    folder: Path,
    target: Path,
    *,
    pattern: str = "2:4",
    dtype: torch.dtype = torch.float32,
    orders: dict[str, Tensor] | None = None,
    folded: list[dict[str, Any]] | None = None,
    fold: Callable[[LanguageModel], object] = lambda _: None,
    updated: bool = False,
) -> Pruned:
    """
    Prune a folder by hand.

    Args:
        folder: Of the dense model.
        target: Of the pruned one.
        pattern: 2:4, or anything else for half of each linear.
        dtype: Saved.
        orders: Of the channels in which groups are cut, by linear.
        folded: As the recipe has it.
        fold: Renumbers the model's channels accordingly.
        updated: Whether what stays is changed.
    """
    model = load_model(str(folder), device="cpu")
    origin = model.to_dict()
    fold(model)
    masks, layers = {}, {}
    for name, linear in model.linears.items():
        weight = linear.weight
        order = (orders or {}).get(name)
        groups = pattern == "2:4"
        half = weight.abs() > weight.abs().flatten().median()
        masks[name] = LayerMask(keep=group_mask(weight, order) if groups else half, order=order)
        weight.masked_fill_(~masks[name].keep, 0)
        if updated:
            weight.mul_(1.5)
        layers[name] = {
            "sparsity": 1 - float(masks[name].keep.double().mean()),
            "weights_sha256": bytes_sha256(weight.to(dtype)),
            "keep": 2 if groups else None,
            "group": 4 if groups else None,
        }
    model.model.to(dtype).save_pretrained(target)
    model.tokenizer.save_pretrained(target)
    (target / MASKS).parent.mkdir()
    for name, digest in write_masks(masks, target / MASKS, metadata={}).items():
        layers[name]["mask_sha256"] = digest
    removed = sum(int((~mask.keep).sum()) for mask in masks.values())
    recipe = {
        "format": "pho-pruning",
        "version": 2,
        "configuration": {"pattern": pattern, "method": "by hand"},
        "model": origin,
        "updated": updated,
        "folded": folded or [],
        "sparsity": removed / sum(mask.keep.numel() for mask in masks.values()),
        "layers": layers,
        "calibration": {},
        "versions": {},
    }
    (target / "pruning.json").write_text(json.dumps(recipe))
    return Pruned(path=target)


@pytest.fixture
def pruned(model_folder: Path, tmp_path: Path) -> Pruned:
    """The tiny model at 2:4; the groups of one linear are cut in an order of its own."""
    order = torch.randperm(32, generator=torch.Generator().manual_seed(3))
    return prune(model_folder, tmp_path / "pruned", orders={UP: order})


def failed(checks: list[Check]) -> list[str]:
    """The names of the checks that failed."""
    return [check.name for check in checks if not check.passed]


def detail(checks: list[Check], name: str) -> str:
    """What a check says."""
    return next(check.detail for check in checks if check.name == name)


def test_good(pruned: Pruned, model: LanguageModel) -> None:
    """A folder that is what it says passes every check, with and without the original."""
    with_original = check_folder(pruned.path, original=model)
    alone = check_folder(pruned.path, original=None)

    assert [check.name for check in with_original] == [check.name for check in alone] == NAMES
    assert failed(with_original) == failed(alone) == []
    assert detail(with_original, "sparsity") == "50.0000% of 18,432 weights"
    assert "9,216 removed weights are zero; 0 kept" in detail(with_original, "zeros")
    assert detail(with_original, "groups") == "14 linears"
    assert detail(with_original, "kept weights") == "as in the original"
    for name in ("original model", "kept weights", "other parameters"):
        assert detail(alone, name) == "not checked: no original model was given"


def test_packed_folder(pruned: Pruned, model: LanguageModel, tmp_path: Path) -> None:
    """A packed folder is checked as it is, and found to be of another model or changed."""
    pack(pruned.path, tmp_path / "pruned.pho")
    good = check_folder(tmp_path / "pruned.pho", original=model)
    with torch.no_grad():
        model.linears[UP].weight[0, 0] += 1
    other = replace(model, name="other")  # whose hash is not known yet
    bad = check_folder(tmp_path / "pruned.pho", original=other)

    assert [*good] == [*check_folder(pruned.path, original=load_model(model.name, device="cpu"))]
    assert failed(bad) == ["original model"]


def test_unstructured(model_folder: Path, tmp_path: Path, model: LanguageModel) -> None:
    """A ratio has no groups to check."""
    folder = prune(model_folder, tmp_path / "pruned", pattern="0.5").path
    checks = check_folder(folder, original=model)

    assert failed(checks) == []
    assert detail(checks, "groups") == "no linear has N:M groups"


def test_bfloat16(model_folder: Path, tmp_path: Path, model: LanguageModel) -> None:
    """Saved in another dtype than pruned in, weights are compared in the saved one."""
    folder = prune(model_folder, tmp_path / "pruned", dtype=torch.bfloat16)
    good = check_folder(folder.path, original=model)
    folder.edit_tensor("model.norm.weight", lambda t: t[0].add_(1 / 128))
    bad = check_folder(folder.path, original=model)

    assert failed(good) == []
    assert failed(bad) == ["other parameters"]


def test_each_linear_is_told(pruned: Pruned) -> None:
    told: list[int] = []

    @contextmanager
    def bar(_: str, steps: int) -> Iterator[Callable[[int], None]]:
        told.append(steps)
        yield told.append

    check_folder(pruned.path, original=None, progress=bar)

    assert told == [14] + [1] * 14


def test_flipped_bit(pruned: Pruned, model: LanguageModel) -> None:
    """A mask that is not the recorded one fails its hash alone: nothing can be told with it."""
    pruned.edit_masks(lambda masks: masks[UP].keep[3].logical_not_(), hashes=False)
    checks = check_folder(pruned.path, original=model)

    assert failed(checks) == ["masks"]
    assert detail(checks, "masks").startswith(f"{UP}: the mask is not")
    assert "13 of 14 linears looked at" in detail(checks, "zeros")


def test_forged_mask(pruned: Pruned, model: LanguageModel) -> None:
    """A mask that claims to keep more, with a hash that fits, contradicts everything else."""

    def keep_all(masks: dict[str, LayerMask]) -> None:
        masks[UP].keep[3] = True

    pruned.edit_masks(keep_all, hashes=True)
    checks = check_folder(pruned.path, original=model)

    assert failed(checks) == ["sparsity", "groups", "kept weights"]
    assert "16 kept ones are too" in detail(checks, "zeros")


def test_weight_not_zero(pruned: Pruned, model: LanguageModel) -> None:
    """A removed weight that is not zero is found, even if its hash was made to fit."""
    removed = (~read_masks(pruned.path / MASKS).mask(UP).keep).nonzero()[7]
    index = tuple(removed.tolist())
    pruned.edit_tensor(f"{UP}.weight", lambda t: t[index].fill_(1e-30), layer=UP)
    checks = check_folder(pruned.path, original=model)

    assert failed(checks) == ["zeros"]
    assert detail(checks, "zeros") == f"{UP}: 1 removed weights are not zero"


def test_changed_weight(pruned: Pruned, model: LanguageModel) -> None:
    """A kept weight of other value fails against the original, even if its hash was made to fit."""
    kept = read_masks(pruned.path / MASKS).mask(DOWN).keep.nonzero()[5]
    index = tuple(kept.tolist())
    pruned.edit_tensor(f"{DOWN}.weight", lambda t: t[index].mul_(1.0001), layer=DOWN)
    checks = check_folder(pruned.path, original=model)

    assert failed(checks) == ["kept weights"]
    assert detail(checks, "kept weights") == f"{DOWN}: 1 kept weights were changed"
    assert failed(check_folder(pruned.path, original=None)) == []


def test_wrong_weight_hash(pruned: Pruned, model: LanguageModel) -> None:
    """A weight's hash that is not the recorded one is found without the original."""
    pruned.edit_recipe(lambda r: r["layers"][UP].update(weights_sha256="0" * 64))
    checks = check_folder(pruned.path, original=model)

    assert failed(checks) == failed(check_folder(pruned.path, original=None)) == ["weight hashes"]
    assert UP in detail(checks, "weight hashes")


def test_a_recorded_hash_of_another_mask_is_found(pruned: Pruned, model: LanguageModel) -> None:
    pruned.edit_recipe(lambda r: r["layers"][UP].update(mask_sha256="0" * 64))

    assert failed(check_folder(pruned.path, original=model)) == ["masks"]


def test_a_kept_weight_that_is_zero_is_counted_and_no_fault(pruned: Pruned) -> None:
    kept = tuple(read_masks(pruned.path / MASKS).mask(DOWN).keep.nonzero()[5].tolist())
    pruned.edit_tensor(f"{DOWN}.weight", lambda t: t[kept].fill_(0), layer=DOWN)
    checks = check_folder(pruned.path, original=None)

    assert failed(checks) == []
    assert "1 kept ones are too" in detail(checks, "zeros")


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.norm.weight"])
def test_changed_embedding(pruned: Pruned, model: LanguageModel, name: str) -> None:
    """What is no linear of a block must be as it was."""
    pruned.edit_tensor(name, lambda t: t.view(-1)[7].add_(0.01))
    checks = check_folder(pruned.path, original=model)

    assert failed(checks) == ["other parameters"]
    assert detail(checks, "other parameters") == f"{name} was changed"


@pytest.mark.parametrize(
    ("keys", "value"),
    [(("layers", UP, "sparsity"), 0.4999), (("sparsity",), 0.5001)],
)
def test_the_sparsity_of_each_linear_and_of_all_is_counted(
    pruned: Pruned, model: LanguageModel, keys: tuple[str, ...], value: float
) -> None:
    def change(recipe: dict[str, Any]) -> None:
        for key in keys[:-1]:
            recipe = recipe[key]
        recipe[keys[-1]] = value

    pruned.edit_recipe(change)

    assert failed(check_folder(pruned.path, original=model)) == ["sparsity"]


@pytest.mark.parametrize("pattern", [(1, 4), (2, 8), (4, 5)])
def test_wrong_groups(pruned: Pruned, pattern: tuple[int, int]) -> None:
    """Groups that do not keep what the recipe says are found, whatever the sparsity is."""
    keep, group = pattern
    pruned.edit_recipe(lambda r: r["layers"][DOWN].update(keep=keep, group=group))
    checks = check_folder(pruned.path, original=None)

    assert failed(checks) == ["groups"]
    assert DOWN in detail(checks, "groups")


def test_groups_without_order(pruned: Pruned) -> None:
    """Groups are counted in the mask's own order: without it they are broken."""
    pruned.edit_masks(lambda m: m.update({UP: LayerMask(keep=m[UP].keep)}), hashes=True)
    checks = check_folder(pruned.path, original=None)

    assert failed(checks) == ["groups"]
    assert detail(checks, "groups").startswith(f"{UP}: ")


def test_at_n_m_every_linear_must_have_groups(pruned: Pruned) -> None:
    pruned.edit_recipe(lambda r: r["layers"][DOWN].update(keep=None, group=None))
    checks = check_folder(pruned.path, original=None)

    assert failed(checks) == ["recipe"]
    assert "the pattern is 2:4" in checks[0].detail


@pytest.mark.parametrize(
    "keys",
    [
        *[(key,) for key in (
            "configuration", "model", "updated", "folded", "sparsity", "layers", "calibration",
            "versions",
        )],
        ("configuration", "pattern"), ("model", "weights_sha256"), ("layers", UP, "mask_sha256"),
    ],
)  # fmt: skip
def test_missing_key(pruned: Pruned, model: LanguageModel, keys: tuple[str, ...]) -> None:
    """A recipe that lacks a key fails, and the key is named."""

    def remove(recipe: dict[str, Any]) -> None:
        for key in keys[:-1]:
            recipe = recipe[key]
        del recipe[keys[-1]]

    pruned.edit_recipe(remove)
    checks = check_folder(pruned.path, original=model)

    assert failed(checks) == ["recipe"]
    assert ".".join(keys) in checks[0].detail
    with pytest.raises(ConfigurationError, match="breaks the format"):
        read_recipe(pruned.path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"keep": 5}, "not a pattern"),
        ({"keep": None}, "both be given"),
        ({"sparsity": 1.5}, "less than or equal"),
        ({"sparsity": float("nan")}, "finite"),
    ],
)
def test_bad_value(pruned: Pruned, changes: dict[str, object], said: str) -> None:
    """A value that breaks a rule is named."""
    pruned.edit_recipe(lambda r: r["layers"][UP].update(changes))
    checks = check_folder(pruned.path, original=None)

    assert failed(checks) == ["recipe"]
    assert UP in checks[0].detail
    assert said in checks[0].detail


def test_a_linear_that_the_recipe_forgets_or_invents_fails(pruned: Pruned) -> None:
    pruned.edit_recipe(lambda r: r["layers"].update(other=r["layers"].pop(UP)))
    checks = check_folder(pruned.path, original=None)

    assert failed(checks) == ["recipe"]
    assert checks[0].detail == f"{UP} is not in it; the model has no other"


def test_masks_must_be_those_of_the_models_linears_in_their_shapes(pruned: Pruned) -> None:
    def change(masks: dict[str, LayerMask]) -> None:
        masks[UP] = LayerMask(keep=torch.ones(32, 64, dtype=torch.bool))
        masks["other"] = masks.pop(DOWN)

    pruned.edit_masks(change, hashes=False)
    checks = check_folder(pruned.path, original=None)

    assert failed(checks) == ["masks"]
    assert f"{UP} has the shape (64, 32), its mask (32, 64)" in checks[-1].detail
    assert f"{DOWN} has no mask" in checks[-1].detail


def test_another_original(pruned: Pruned, tiny_llama: LlamaForCausalLM, model_folder: Path) -> None:
    """Against another model, that is told, and its weights are not compared."""
    tiny_llama.get_parameter(f"{UP}.weight").data[0, 0] += 0.01
    tiny_llama.save_pretrained(model_folder)
    other = load_model(str(model_folder), device="cpu")
    checks = check_folder(pruned.path, original=other)

    assert failed(checks) == ["original model"]
    assert detail(checks, "original model").startswith("another model: ")
    assert detail(checks, "kept weights") == "not checked: it is another model"


def test_another_dtype(pruned: Pruned, model_folder: Path) -> None:
    """An original in another dtype has another hash: which one to load is told."""
    other = load_model(str(model_folder), device="cpu", dtype="bfloat16")
    checks = check_folder(pruned.path, original=other)

    assert read_recipe(pruned.path).model.dtype == "float32"
    assert failed(checks) == ["original model"]
    assert "--dtype float32" in detail(checks, "original model")


def test_updated(model_folder: Path, tmp_path: Path, model: LanguageModel) -> None:
    """Kept weights that were updated are not compared; the rest of the model still is."""
    folder = prune(model_folder, tmp_path / "pruned", updated=True)
    good = check_folder(folder.path, original=model)
    folder.edit_recipe(lambda r: r.update(updated=False))
    hidden = check_folder(folder.path, original=model)

    assert failed(good) == []
    assert detail(good, "kept weights") == "not checked: the kept weights were updated"
    assert detail(good, "other parameters") == "7 as in the original"
    assert failed(hidden) == ["kept weights"]


ORDER = torch.randperm(64, generator=torch.Generator().manual_seed(4))
FOLDED = [{"reader": DOWN, "writers": [GATE, UP], "order": ORDER.tolist()}]


def fold_mlp(model: LanguageModel) -> None:
    """Renumber the channels between the matrices of the second MLP."""
    for name in (GATE, UP):
        model.linears[name].weight.copy_(model.linears[name].weight[ORDER].clone())
    model.linears[DOWN].weight.copy_(model.linears[DOWN].weight[:, ORDER].clone())


def test_folded(model_folder: Path, tmp_path: Path, model: LanguageModel) -> None:
    """Renumbered channels are compared with those that they were."""
    folder = prune(model_folder, tmp_path / "pruned", folded=FOLDED, fold=fold_mlp)
    good = check_folder(folder.path, original=model)
    folder.edit_recipe(lambda r: r.update(folded=[]))
    hidden = check_folder(folder.path, original=model)

    assert failed(good) == []
    assert detail(good, "kept weights").endswith("3 linears with other channel orders")
    assert failed(hidden) == ["kept weights"]
    for name in (GATE, UP, DOWN):
        assert name in detail(hidden, "kept weights")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"order": [0] * 64}, "not a permutation"),
        ({"reader": "other"}, "folded other is not a linear"),
        ({"writers": [GATE, GATE]}, "folded twice"),
        ({"writers": [DOWN]}, "not a permutation of its 32"),
    ],
)
def test_an_order_that_is_no_permutation_or_of_other_linears_fails_the_recipe(
    model_folder: Path, tmp_path: Path, changes: dict[str, object], said: str
) -> None:
    folder = prune(model_folder, tmp_path / "pruned", folded=FOLDED, fold=fold_mlp)
    folder.edit_recipe(lambda r: r["folded"][0].update(changes))
    checks = check_folder(folder.path, original=None)

    assert failed(checks) == ["recipe"]
    assert said in checks[0].detail


def saved(model: PreTrainedModel, tokenizer_of: Path, folder: Path) -> Path:
    """A model as a folder, with a tokenizer from elsewhere."""
    model.save_pretrained(folder)
    for path in tokenizer_of.glob("token*"):
        shutil.copy(path, folder)
    return folder


def test_transposed(model_folder: Path, tmp_path: Path) -> None:
    """GPT-2 stores (in, out), and the bias of a linear moves along with its folded outputs."""
    config = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=256, n_positions=32)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        gpt2 = GPT2LMHeadModel(config)
        gpt2.transformer.h[0].mlp.c_fc.bias.data.normal_()
    dense = saved(gpt2, model_folder, tmp_path / "dense")
    reader, writer = "transformer.h.0.mlp.c_proj", "transformer.h.0.mlp.c_fc"
    order = torch.randperm(128, generator=torch.Generator().manual_seed(5))

    def fold(model: LanguageModel) -> None:
        wide = model.model.get_submodule(writer)
        wide.weight.data = wide.weight.data[:, order].contiguous()
        wide.bias.data = wide.bias.data[order]
        narrow = model.model.get_submodule(reader)
        narrow.weight.data = narrow.weight.data[order].contiguous()

    entry = {"reader": reader, "writers": [writer], "order": order.tolist()}
    folder = prune(dense, tmp_path / "pruned", folded=[entry], fold=fold)
    original = load_model(str(dense), device="cpu")
    good = check_folder(folder.path, original=original)
    folder.edit_tensor(f"{writer}.bias", lambda t: t[0].add_(1))

    assert failed(good) == []
    assert failed(check_folder(folder.path, original=original)) == ["other parameters"]


def test_experts(model_folder: Path, tmp_path: Path) -> None:
    """The matrices of fused experts are linears; the router beside them is compared as it is."""
    config = Qwen3MoeConfig(
        vocab_size=256, hidden_size=32, intermediate_size=64, moe_intermediate_size=16,
        num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
        num_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        dense = saved(Qwen3MoeForCausalLM(config), model_folder, tmp_path / "dense")
    folder = prune(dense, tmp_path / "pruned")
    original = load_model(str(dense), device="cpu")
    checks = check_folder(folder.path, original=original)
    router = next(n for n in load_file(folder.path / "model.safetensors") if "mlp.gate.w" in n)
    folder.edit_tensor(router, lambda t: t.view(-1)[0].add_(1))

    assert failed(checks) == []
    assert detail(checks, "groups") == f"{4 + 3 * 4} linears"
    assert failed(check_folder(folder.path, original=original)) == ["other parameters"]


def test_masks_that_were_cut_off_are_an_error_not_a_failed_check(pruned: Pruned) -> None:
    path = pruned.path / MASKS
    path.write_bytes(path.read_bytes()[:-10])

    with pytest.raises(ModelError, match=r"masks\.safetensors is damaged or truncated"):
        check_folder(pruned.path, original=None)


def test_so_are_masks_that_are_not_there(pruned: Pruned) -> None:
    (pruned.path / MASKS).unlink()

    with pytest.raises(ModelError, match="do not exist"):
        check_folder(pruned.path, original=None)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_and_a_model_that_cannot_be_loaded(pruned: Pruned, name: str) -> None:
    (pruned.path / name).unlink()

    with pytest.raises(ModelError):
        check_folder(pruned.path, original=None)


def test_and_a_weight_that_is_no_number_which_no_comparison_would_find(pruned: Pruned) -> None:
    pruned.edit_tensor(f"{UP}.weight", lambda t: t[0, 0].fill_(torch.nan))

    with pytest.raises(NumericalError, match=UP):
        check_folder(pruned.path, original=None)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "is not a recipe"),
        ('{"format": "other"}', "is not a recipe"),
        ('{"format": "pho-pruning", "version": 3}', "has format version 3.*reads version 2"),
    ],
)
def test_no_recipe(pruned: Pruned, content: str, said: str) -> None:
    """What is no recipe of this version is an error with the way out."""
    (pruned.path / "pruning.json").write_text(content)

    with pytest.raises(ConfigurationError, match=said):
        check_folder(pruned.path, original=None)


def test_dense_folder(model_folder: Path, tmp_path: Path) -> None:
    """A folder that was not pruned, or is not there, is told so."""
    with pytest.raises(ConfigurationError, match=r"has no pruning\.json"):
        check_folder(model_folder, original=None)
    with pytest.raises(ModelError, match="is no folder"):
        check_folder(tmp_path / "none", original=None)


def test_no_device(pruned: Pruned, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a CUDA device the 2:4 format is not tried, and that is told."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    checks = check_folder(pruned.path, original=None)

    assert checks[-1] == Check(
        name="semi-structured", passed=True, detail="not checked: no CUDA device"
    )


def packed_on_cpu(weight: Tensor) -> SimpleNamespace:
    """A stand-in for torch's 2:4 format: the same packing, which also runs without a GPU."""
    if weight.shape[0] < 32:
        raise RuntimeError("shape is not supported")
    packed = sparse_semi_structured_from_dense_cutlass(weight)
    return SimpleNamespace(to_dense=lambda: sparse_semi_structured_to_dense_cutlass(*packed))


def test_packed(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every 2:4 linear is packed, in the order of its groups; refused shapes are no fault."""
    order = torch.randperm(64, generator=torch.Generator().manual_seed(3))
    folder = prune(model_folder, tmp_path / "pruned", orders={DOWN: order})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(Tensor, "cuda", lambda tensor: tensor)
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", packed_on_cpu)
    good = check_folder(folder.path, original=None)
    folder.edit_masks(lambda m: m.update({DOWN: LayerMask(keep=m[DOWN].keep)}), hashes=True)
    bad = check_folder(folder.path, original=None)

    assert failed(good) == []
    assert detail(good, "semi-structured").startswith("10 linears; torch refuses 4: model.layers.0")
    assert failed(bad) == ["groups", "semi-structured"]
    assert detail(bad, "semi-structured").startswith(f"{DOWN}: ")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_semi_structured(model_folder: Path, tmp_path: Path) -> None:
    """On a GPU torch's 2:4 format holds the linears, also one whose groups lie in another order."""
    order = torch.randperm(64, generator=torch.Generator().manual_seed(3))
    folder = prune(model_folder, tmp_path / "pruned", orders={DOWN: order})
    checks = check_folder(folder.path, original=None)

    assert failed(checks) == []
    assert not detail(checks, "semi-structured").startswith("not checked")
