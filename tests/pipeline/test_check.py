"""A pruned folder passes its check; whatever is broken in it is found, and only that."""

import hashlib
import json
import re
import shutil
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from pho_service.errors import ConfigurationError, ModelError, NumericalError
from pho_service.models.loading import load_model
from pho_service.models.mask_file import MASKS, LayerMask, read_masks, write_masks
from pho_service.models.packed import pack
from pho_service.models.saving import read_recipe
from pho_service.pipeline.check import check_folder
from pho_service.pipeline.prune import prune_job
from pho_service.pipeline.work import Work
from pho_service.spec.baselines import reference_methods
from pho_service.spec.configuration import Configuration
from pho_service.spec.pattern import Pattern
from pho_service.spec.steps import Steps

UP = "model.layers.1.mlp.up_proj"
GATE = "model.layers.1.mlp.gate_proj"
DOWN = "model.layers.1.mlp.down_proj"
NAMES = [
    "recipe", "masks", "zeros", "groups", "weight hashes",
    "original model", "kept weights", "other parameters",
]  # fmt: skip
OF_THE_ORIGINAL = ("original model", "kept weights", "other parameters")


def bytes_sha256(weight):
    """Of a weight's values, row by row, without the code under test."""
    values = weight.contiguous()
    short = values.view(torch.int16) if values.dtype is torch.bfloat16 else values
    return hashlib.sha256(short.numpy().tobytes()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Pruned:
    """A pruned folder, and how to break it."""

    path: Path

    def edit_recipe(self, change):
        path = self.path / "pruning.json"
        document = json.loads(path.read_text())
        change(document)
        path.write_text(json.dumps(document))

    def edit_tensor(self, name, change, layer=""):
        """Change a saved tensor in place; with ``layer``, that linear's hash is made to fit."""
        path = self.path / "model.safetensors"
        tensors = {key: tensor.clone() for key, tensor in load_file(path).items()}
        change(tensors[name])
        save_file(tensors, path, metadata={"format": "pt"})
        if layer:
            digest = bytes_sha256(tensors[name])
            self.edit_recipe(lambda r: r["layers"][layer].update(weights_sha256=digest))

    def edit_masks(self, change, *, hashes):
        """Change the masks; with ``hashes``, the recipe is made to fit."""
        file = read_masks(self.path / MASKS)
        masks = {name: file.mask(name) for name in file.names}
        change(masks)
        written = write_masks(masks, self.path / MASKS, metadata=file.metadata)
        if hashes:
            self.edit_recipe(
                lambda r: [r["layers"][n].update(mask_sha256=h) for n, h in written.items()]
            )


def prune(model, bundle, target, *, pattern="2:4", calibration=None, **steps):
    wanda = reference_methods(Pattern.parse(pattern))["wanda"]
    configuration = Configuration.of(replace(wanda, steps=Steps(**steps)))
    prune_job(Work.of(bundle, model, calibration=calibration), configuration, target)
    return Pruned(path=target)


@pytest.fixture
def pruned(original, bundle, tmp_path_factory, tmp_path):
    """The tiny model at 2:4; groups are cut in orders that only the MLPs fold."""
    stored = tmp_path_factory.getbasetemp() / "pruned"
    if not stored.is_dir():
        prune(original, bundle, stored, permutation="score")
    return Pruned(path=Path(shutil.copytree(stored, tmp_path / "pruned")))


def failed(checks):
    return [check.name for check in checks if not check.passed]


def detail(checks, name):
    return next(check.detail for check in checks if check.name == name)


def test_good(pruned, model):
    """A folder that is what it says passes every check, with and without the original."""
    with_original = check_folder(pruned.path, original=model)
    alone = check_folder(pruned.path, original=None)

    assert [check.name for check in with_original] == [check.name for check in alone] == NAMES
    assert failed(with_original) == failed(alone) == []
    assert detail(with_original, "zeros") == "9,216 removed weights are zero, 50.0000% of 18,432"
    assert detail(with_original, "groups") == "14 linears"
    assert detail(with_original, "kept weights").endswith("6 linears with other channel orders")
    for name in OF_THE_ORIGINAL:
        assert detail(alone, name) == "not checked: no original model was given"
    told = []

    @contextmanager
    def bar(_, steps):
        told.append(steps)
        yield told.append

    weighed(DOWN, lambda t: t.fill_(0))(pruned)  # a kept weight that is zero is no fault
    assert failed(check_folder(pruned.path, original=None, progress=bar)) == []
    assert told == [14] + [1] * 14


def test_a_packed_folder_is_checked_as_it_is_and_found_to_be_of_another_model_or_changed(
    pruned, model, original, tmp_path
):
    pack(pruned.path, tmp_path / "pruned.pho")
    good = check_folder(tmp_path / "pruned.pho", original=model)
    with torch.no_grad():
        model.linears[UP].weight[0, 0] += 1
    other = replace(model, name="other")  # whose hash is not known yet
    bad = check_folder(tmp_path / "pruned.pho", original=other)

    assert [*good] == [*check_folder(pruned.path, original=original)]
    assert failed(bad) == ["original model"]


def test_a_bfloat16_checkpoint_stays_one_and_its_kept_weights_stay_bit_for_bit(
    tiny_llama, model_folder, calibrated, tmp_path
):
    tiny_llama.to(torch.bfloat16).save_pretrained(model_folder)
    model, original = (load_model(str(model_folder), device="cpu") for _ in range(2))
    folder = prune(model, calibrated(original), tmp_path / "pruned")
    good = check_folder(folder.path, original=original)
    folder.edit_tensor("model.norm.weight", lambda t: t[0].add_(1 / 128))
    bad = check_folder(folder.path, original=original)

    saved = load_file(folder.path / "model.safetensors").values()
    assert {tensor.dtype for tensor in saved} == {torch.bfloat16} != {original.dtype}
    assert failed(good) == []
    assert failed(bad) == ["other parameters"]


def edited(*keys, **changes):
    def change(recipe):
        for key in keys:
            recipe = recipe[key]
        recipe.update(changes)

    return lambda pruned: pruned.edit_recipe(change)


def masked(change, *, hashes=True):
    return lambda pruned: pruned.edit_masks(change, hashes=hashes)


def weighed(layer, change, *, kept=True):
    """Changes a kept or a removed weight, and makes its hash fit."""

    def break_it(pruned):
        keep = read_masks(pruned.path / MASKS).mask(layer).keep
        index = tuple((keep == kept).nonzero()[5].tolist())
        pruned.edit_tensor(f"{layer}.weight", lambda t: change(t[index]), layer=layer)

    return break_it


def added(name):
    return lambda pruned: pruned.edit_tensor(name, lambda t: t.view(-1)[7].add_(0.01))


def of_others(masks):
    """Masks in another shape, and of something else."""
    masks[UP] = LayerMask(keep=torch.ones(32, 64, dtype=torch.bool))
    masks["other"] = masks.pop(DOWN)


def forget(pruned):
    """As if the recipe were of another model."""
    pruned.edit_recipe(lambda recipe: recipe["layers"].update(other=recipe["layers"].pop(UP)))


NAN, ZEROS = float("nan"), "0" * 64


@pytest.mark.parametrize(
    ("break_it", "expected", "said"),
    [
        (masked(lambda m: m[UP].keep[3].logical_not_(), hashes=False), "masks", f"{UP}: the mask"),
        (
            masked(lambda m: m[UP].keep[3].fill_(True)),  # claims to keep more
            "groups, kept weights",
            f"kept weights: {UP}: 16 kept weights were changed",
        ),
        (
            weighed(UP, lambda t: t.fill_(1e-30), kept=False),
            "zeros",
            f"{UP}: 1 removed weights",
        ),
        (weighed(DOWN, lambda t: t.mul_(1.0001)), "kept weights", f"{DOWN}: 1 kept weights were"),
        (edited("layers", UP, weights_sha256=ZEROS), "weight hashes", f"weight hashes: .*{UP}"),
        (edited("layers", UP, mask_sha256=ZEROS), "masks", f"{UP}: the mask is not"),
        (added("model.embed_tokens.weight"), "other parameters", "embed_tokens.weight was changed"),
        (added("model.norm.weight"), "other parameters", "model.norm.weight was changed"),
        (edited("layers", DOWN, keep=1, group=4), "groups", f"groups: .*{DOWN}"),
        (edited("layers", DOWN, keep=2, group=8), "groups", f"groups: .*{DOWN}"),
        (edited("layers", DOWN, keep=4, group=5), "groups", f"groups: .*{DOWN}"),
        # without the order in which they were cut
        (masked(lambda m: m.update({UP: LayerMask(keep=m[UP].keep)})), "groups", f"groups: {UP}: "),
        (edited("layers", DOWN, keep=None, group=None), "recipe", "the pattern is 2:4"),
        (edited("layers", UP, keep=5), "recipe", f"{UP}.*not a pattern"),
        (edited("layers", UP, keep=None), "recipe", f"{UP}.*both be given"),
        (edited("layers", UP, sparsity=1.5), "recipe", f"{UP}.*less than or equal"),
        (edited("layers", UP, sparsity=NAN), "recipe", f"{UP}.*finite"),
        (edited("folded", 0, order=[0] * 64), "recipe", "not one of its 64 channels"),
        (edited("folded", 0, reader="other"), "recipe", "the order folded into other is not"),
        (edited("folded", 0, writers=[DOWN]), "recipe", "not one of its 32 channels"),
        (forget, "recipe", f"recipe: {UP} is not in it; the model has no other"),
        (
            masked(of_others, hashes=False),
            "masks",
            r"shape \(64, 32\), its mask \(32, 64",
        ),
        (masked(of_others, hashes=False), "masks", f"{DOWN} has no mask"),
    ],
)
def test_what_is_broken_is_found_and_only_that(pruned, model, break_it, expected, said):
    break_it(pruned)
    checks = check_folder(pruned.path, original=model)
    alone = check_folder(pruned.path, original=None)

    assert ", ".join(failed(checks)) == expected
    assert any(re.search(said, f"{check.name}: {check.detail}") for check in checks)
    assert {*failed(alone)} == {*failed(checks)} - {*OF_THE_ORIGINAL}


def test_a_recipe_lacks_no_key(pruned):
    whole = (pruned.path / "pruning.json").read_text()
    keys = [
        *((key,) for key in json.loads(whole) if key not in ("format", "version")),
        ("configuration", "pattern"), ("model", "weights_sha256"), ("layers", UP, "mask_sha256"),
    ]  # fmt: skip

    for *above, last in keys:
        document = part = json.loads(whole)
        for key in above:
            part = part[key]
        del part[last]
        (pruned.path / "pruning.json").write_text(json.dumps(document))
        with pytest.raises(ConfigurationError, match=".".join([*above, last])):
            read_recipe(pruned.path)


def test_against_another_model_or_dtype_that_is_told_and_weights_are_not_compared(
    pruned, tiny_llama, model_folder
):
    short = load_model(str(model_folder), device="cpu", dtype="bfloat16")
    in_short = check_folder(pruned.path, original=short)
    tiny_llama.get_parameter(f"{UP}.weight").data[0, 0] += 0.01
    tiny_llama.save_pretrained(model_folder)
    other = load_model(str(model_folder), device="cpu")
    checks = check_folder(pruned.path, original=other)

    assert failed(checks) == failed(in_short) == ["original model"]
    assert detail(checks, "original model").startswith("another model: ")
    assert detail(checks, "kept weights") == "not checked: it is another model"
    assert read_recipe(pruned.path).model.dtype == "float32"
    assert "dtype=float32" in detail(in_short, "original model")


def test_kept_weights_that_were_updated_are_not_compared_the_rest_of_the_model_still_is(
    bundle, report, tmp_path, model,
    original,
):  # fmt: skip
    """At a ratio, which has no groups to check."""
    folder = prune(
        original, bundle, tmp_path / "out", pattern="0.5", calibration=report.windows, update="obs"
    )
    good = check_folder(folder.path, original=model)
    folder.edit_recipe(lambda r: r.update(updated=False))
    hidden = check_folder(folder.path, original=model)

    assert failed(good) == []
    assert detail(good, "groups") == "no linear has N:M groups"
    assert detail(good, "kept weights") == "not checked: the kept weights were updated"
    assert detail(good, "other parameters") == "7 as in the original"
    assert failed(hidden) == ["kept weights"]


def test_renumbered_channels_are_compared_with_those_that_they_were(pruned, model):
    pruned.edit_recipe(lambda r: r.update(folded=r["folded"][:1]))
    hidden = check_folder(pruned.path, original=model)

    assert failed(hidden) == ["kept weights"]
    for name in (GATE, UP, DOWN):
        assert name in detail(hidden, "kept weights")


def test_the_bias_of_a_linear_moves_along_with_its_folded_outputs(
    model_folder, calibrated, tmp_path
):
    """In GPT-2, which stores (in, out)."""
    config = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=256, n_positions=32)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        gpt2 = GPT2LMHeadModel(config)
        gpt2.transformer.h[0].mlp.c_fc.bias.data.normal_()
    gpt2.save_pretrained(tmp_path / "dense")
    for path in model_folder.glob("token*"):
        shutil.copy(path, tmp_path / "dense")
    model, original = (load_model(str(tmp_path / "dense"), device="cpu") for _ in range(2))
    folder = prune(model, calibrated(original), tmp_path / "pruned", permutation="score")
    good = check_folder(folder.path, original=original)
    bias = "transformer.h.0.mlp.c_fc.bias"
    moved = load_file(folder.path / "model.safetensors")[bias] != original.model.get_parameter(bias)
    folder.edit_tensor(bias, lambda t: t[0].add_(1))

    assert moved.any()
    assert failed(good) == []
    assert failed(check_folder(folder.path, original=original)) == ["other parameters"]


def cut(name, size):
    def break_it(pruned):
        path = pruned.path / name
        content = path.read_bytes()[:-size]
        path.unlink() if not content else path.write_bytes(content)

    return break_it


def recipe_is(content):
    return lambda pruned: (pruned.path / "pruning.json").write_text(content) and None


GONE = 10**9


@pytest.mark.parametrize(
    ("break_it", "error", "said"),
    [
        (cut(MASKS, 10), ModelError, r"masks\.safetensors is damaged or truncated"),
        (cut(MASKS, GONE), ModelError, "do not exist"),
        (cut("model.safetensors", GONE), ModelError, "has no weights"),
        (cut("config.json", GONE), ModelError, "config"),
        (cut("pruning.json", GONE), ConfigurationError, r"has no pruning\.json"),
        (lambda pruned: shutil.rmtree(pruned.path), ModelError, "is no folder"),
        (
            lambda pruned: pruned.edit_tensor(f"{UP}.weight", lambda t: t[0, 0].fill_(torch.nan)),
            NumericalError,
            UP,
        ),
        (recipe_is(""), ConfigurationError, "is not JSON"),
        (recipe_is("[" * 100_000), ConfigurationError, "is not JSON"),
        (recipe_is("[]"), ConfigurationError, "is not a recipe"),
        (recipe_is('{"format": "other"}'), ConfigurationError, "is not a recipe"),
        (
            recipe_is('{"format": "pho-pruning", "version": 3}'),
            ConfigurationError,
            "has format version 3.*reads version 2",
        ),
    ],
)
def test_what_cannot_be_read_is_an_error_not_a_failed_check(pruned, break_it, error, said):
    break_it(pruned)

    with pytest.raises(error, match=said):
        check_folder(pruned.path, original=None)
