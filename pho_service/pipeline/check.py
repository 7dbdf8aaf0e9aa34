"""
Check a pruned folder against its own recipe and masks, and against the model that it came from.
"""

import json
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import Tensor

from pho_service.errors import field_name
from pho_service.models.architecture import decoder_blocks
from pho_service.models.loading import DTYPES, LanguageModel, load_model
from pho_service.models.mask_file import MASKS, LayerMask, MaskFile, read_masks, weight_sha256
from pho_service.models.packed import as_folder
from pho_service.models.saving import (
    Folded,
    LayerRecord,
    Recipe,
    StructureRecord,
    indices_sha256,
    recipe_document,
)
from pho_service.models.structure import Anatomy
from pho_service.progress import Progress, silent
from pho_service.pruning.statistics import PrunableLinear
from pho_service.spec.configuration import first_of, reasons

_NOT_CHECKED = "not checked: "


@dataclass(frozen=True, kw_only=True)
class Check:
    """One line of the report."""

    name: str  # What was checked
    passed: bool  # False if something is wrong. What could not be checked passes
    detail: str  # What was found; begins with "not checked" if nothing was looked at

    @property
    def skipped(self) -> bool:
        return self.detail.startswith(_NOT_CHECKED)

    @property
    def result(self) -> str:
        """In a word: ``ok``, ``skipped`` or ``FAILED``."""
        return "skipped" if self.skipped else "ok" if self.passed else "FAILED"


def _check(name: str, problems: list[str], detail: str) -> Check:
    return Check(name=name, passed=not problems, detail=first_of(problems) if problems else detail)


def check_folder(
    folder: Path, *, original: LanguageModel | None, progress: Progress = silent
) -> list[Check]:
    """Verify a pruned folder: nothing that it says of itself is taken on trust."""
    # A linear whose mask is not the recipe's has only its weights' hash checked, and a recipe or
    # masks of another model end the report: one fault is told once.
    folder = folder.expanduser()
    with as_folder(folder) as small:
        try:
            recipe = Recipe.model_validate(recipe_document(small))
        except ValidationError as error:
            return [_check("recipe", [reasons(error)], "")]
        there = recipe.layers or (small / MASKS).exists()
        masks = read_masks(small / MASKS) if there else None
        model = load_model(str(folder), device="cpu", dtype=_saved_dtype(small))
        dense = f", {len(recipe.dense)} of them dense" if recipe.dense else ""
        dense = dense if recipe.layers else ", without masks"
        whole = f"complete, {len(recipe.layers) + len(recipe.dense)} linears{dense}"
        recipe_check = _check("recipe", [*_recipe_problems(recipe, model.linears)], whole)
        if not recipe_check.passed:
            return [recipe_check]
        problems = [] if masks is None else [*_mask_problems(masks, recipe, model.linears)]
        if problems:
            return [recipe_check, _check("masks", problems, "")]
        return [recipe_check, *_check_weights(recipe, masks, model, original, progress)]


def _saved_dtype(folder: Path) -> str:
    """What a folder's config says, for load_model: weights are compared as they lie there."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        dtype = config.get("dtype")
    except (OSError, ValueError, RecursionError, AttributeError):
        dtype = None  # load_model says what is wrong
    return dtype if dtype in DTYPES else "auto"


def _recipe_problems(recipe: Recipe, linears: Mapping[str, PrunableLinear]) -> Iterator[str]:
    """What a recipe says that cannot be true of a model with these linears."""
    named = {**recipe.layers, **recipe.dense}
    yield from (f"{name} is not in it" for name in linears if name not in named)
    yield from (f"the model has no {name}" for name in named if name not in linears)
    yield from (f"{name} is both pruned and dense" for name in recipe.dense.keys() & recipe.layers)
    if recipe.configuration is not None and ":" in (pattern := recipe.configuration.pattern):
        for name, record in recipe.layers.items():
            if record.group is None:
                yield f"{name} has no groups, but the pattern is {pattern}"
    for folded in recipe.folded:
        # What reads the channels has them in dimension 1, what writes them in dimension 0.
        for name, dim in [(folded.reader, 1), *((writer, 0) for writer in folded.writers)]:
            channels = linears[name].weight.shape[dim] if name in linears else 0
            if sorted(folded.order) != list(range(channels)):
                yield f"the order folded into {name} is not one of its {channels} channels"


def _mask_problems(
    masks: MaskFile, recipe: Recipe, linears: Mapping[str, PrunableLinear]
) -> Iterator[str]:
    """Why masks cannot be those of the linears that a recipe says are pruned."""
    yield from (f"{name} has no mask" for name in recipe.layers if name not in masks.shapes)
    for name, shape in masks.shapes.items():
        if name not in recipe.layers:
            yield f"{name} has a mask, but is not a pruned linear of the model"
        elif shape != (linear_shape := tuple(linears[name].weight.shape)):
            yield f"{name} has the shape {linear_shape}, its mask {shape}"


def _check_weights(
    recipe: Recipe,
    masks: MaskFile | None,
    model: LanguageModel,
    original: LanguageModel | None,
    progress: Progress,
) -> list[Check]:
    """Everything beyond the recipe itself."""
    origin = _origin_check(recipe, model, original)
    dense_model = original if origin.passed and not recipe.is_student else None
    rows, columns = _renumbered(recipe.folded)
    problems: dict[str, list[str]] = defaultdict(list)
    weights = removed = 0
    records: dict[str, LayerRecord | None] = {**recipe.layers, **dict.fromkeys(recipe.dense)}
    with progress("Checking", len(records)) as advance:
        for name, record in records.items():
            advance(1)
            weight = model.linears[name].weight.to("cpu", model.stored_dtype)
            sha256 = recipe.dense[name] if record is None else record.weights_sha256
            if weight_sha256(weight) != sha256:
                problems["weight hashes"].append(
                    f"{name}: the weight is not the one that was saved"
                )
            kept = torch.ones_like(weight, dtype=torch.bool)
            if record is not None and masks is not None:
                if masks.sha256(name) != record.mask_sha256:
                    problems["masks"].append(f"{name}: the mask is not the one that was saved")
                    continue
                mask = masks.mask(name)
                kept = mask.keep
                weights += kept.numel()
                removed += kept.numel() - int(kept.count_nonzero())
                left = weight.bool() & ~kept
                problems["zeros"] += _some(name, left, "removed weights are not zero")
                problems["groups"] += _group_problems(name, mask, record)
            if dense_model is not None and (record is None or not recipe.updated):
                before = dense_model.linears[name].weight.cpu()
                before = _taken(before, rows.get(name), columns.get(name)).to(weight.dtype)
                changed = (weight != before) & kept
                problems["kept weights"] += _some(name, changed, "kept weights were changed")
    share = removed / max(weights, 1)
    groups = sum(record.group is not None for record in recipe.layers.values())
    no_masks = f"{_NOT_CHECKED}the model has no masks"
    checks = [
        _check(name, problems[name], detail)
        for name, detail in (
            ("masks", f"{len(recipe.layers)} masks as recorded" if recipe.layers else no_masks),
            (
                "zeros",
                f"{removed:,} removed weights are zero, {share:.4%} of {weights:,}"
                if recipe.layers
                else no_masks,
            ),
            ("groups", f"{groups} linears" if groups else "no linear has N:M groups"),
            ("weight hashes", f"{len(records)} weights as recorded"),
        )
    ]
    if dense_model is None:
        reason = "no original model was given" if original is None else "it is another model"
        if recipe.is_student:
            reason = "a model smaller than its teacher has other weights"
        if recipe.structure is not None:
            dense_model = original if origin.passed else None
            checks.append(_check_structure(recipe, recipe.structure, model, dense_model))
        names = ("kept weights", "other parameters")
        return [*checks, origin, *(_check(name, [], f"{_NOT_CHECKED}{reason}") for name in names)]
    kept_check = _check("kept weights", problems["kept weights"], _kept_detail(recipe))
    return [*checks, origin, kept_check, _check_others(recipe, model, dense_model, rows)]


def _check_structure(
    recipe: Recipe, cut: StructureRecord, model: LanguageModel, original: LanguageModel | None
) -> Check:
    """What is recorded of a cut; with the dense model, the rows that stayed as they were."""
    if indices_sha256(cut.layers, cut.neurons, cut.query_heads) != cut.sha256:
        return _check("structure", ["the indices are not those that were saved"], "")
    if original is None or recipe.recovery is not None:
        return _check("structure", [], "what stayed as recorded")
    anatomy, problems = Anatomy(original), []
    dense_blocks, blocks = [*anatomy.blocks], [name for name, _ in decoder_blocks(model.model)]
    for block, index in zip(blocks, cut.layers, strict=True):
        dense_block = dense_blocks[index]
        for find, chosen in (
            (anatomy.neurons, cut.neurons), (anatomy.query_heads, cut.query_heads),
        ):  # fmt: skip
            if dense_block not in chosen:
                continue
            part = find(dense_block)
            rows = part.columns(torch.tensor(chosen[dense_block]))
            for writer in part.writers:
                name = block + writer.name.removeprefix(dense_block)
                before = writer.weight.cpu()[rows].to(model.stored_dtype)
                if not torch.equal(
                    model.linears[name].weight.to("cpu", model.stored_dtype), before
                ):
                    problems.append(f"{name}: its rows are not those of the original that stayed")
    return _check("structure", problems, "the rows that stayed are those of the original")


def _some(linear: str, wrong: Tensor, what: str) -> list[str]:
    count = int(wrong.count_nonzero())  # ten times as fast as a sum
    return [f"{linear}: {count} {what}"] if count else []


def _group_problems(linear: str, mask: LayerMask, record: LayerRecord) -> list[str]:
    """Why a mask is not N:M in its own channel order."""
    if record.group is None:
        return []
    out_features, in_features = mask.keep.shape
    if in_features % record.group:
        return [f"{linear}: in_features={in_features} is not a multiple of M={record.group}"]
    keep = _taken(mask.keep, None, mask.order).to(torch.uint8)
    groups = keep.reshape(out_features, -1, record.group)
    kept = groups.sum(dim=-1, dtype=torch.uint8)  # (out_features, groups); at most MAX_GROUP
    wrong = kept.ne(record.keep or 0)
    return _some(linear, wrong, f"groups do not keep {record.keep} of {record.group}")


def _taken(weight: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    """The weight with its channels in other orders; None leaves them."""
    weight = weight if rows is None else weight[rows]
    return weight if columns is None else weight[:, columns]


def _renumbered(folded: list[Folded]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """By linear: the original output row, and input channel, at each position of the saved one."""
    rows, columns = {}, {}
    for entry in folded:
        order = torch.tensor(entry.order)
        columns[entry.reader] = order
        rows.update(dict.fromkeys(entry.writers, order))
    return rows, columns


def _origin_check(recipe: Recipe, model: LanguageModel, original: LanguageModel | None) -> Check:
    if original is None:
        return _check("original model", [], f"{_NOT_CHECKED}no original model was given")
    problems, pruned = [], recipe.model
    taught = recipe.is_student and recipe.structure is None
    was = "was the teacher" if taught else "was pruned"
    dtype = str(original.dtype).removeprefix("torch.")
    shapes, pruned_shapes = (
        {name: linear.weight.shape for name, linear in each.linears.items()}
        for each in (original, model)
    )
    if dtype != pruned.dtype:
        problems = [
            f"{original.name} is loaded in {dtype}, but the model was pruned in {pruned.dtype}: "
            f"load it in that ({field_name('dtype', pruned.dtype)})"
        ]
    elif original.weights_sha256 != pruned.weights_sha256 or (
        shapes != pruned_shapes and not recipe.is_student
    ):
        problems = [
            f"another model: {original.name} has the hash {original.weights_sha256[:16]}, but "
            f"{pruned.name} {was}, {pruned.weights_sha256[:16]}"
        ]
    return _check("original model", problems, f"{original.name} is the model that {was}")


def _kept_detail(recipe: Recipe) -> str:
    if recipe.updated:
        dense = f"{len(recipe.dense)} dense linears as in the original, the others were updated"
        return dense if recipe.dense else f"{_NOT_CHECKED}the kept weights were updated"
    count = len({name for f in recipe.folded for name in (f.reader, *f.writers)})
    return "as in the original" + (f", {count} linears with other channel orders" * (count > 0))


def _check_others(
    recipe: Recipe, model: LanguageModel, original: LanguageModel, rows: Mapping[str, Tensor]
) -> Check:
    """Whether embeddings, norms and biases were left alone; a folded writer's bias moves along."""
    trained = recipe.recovery is not None and recipe.recovery.train == "norms"
    before, after = _beside_linears(original), _beside_linears(model)
    problems = [f"{name} is only in one of the models" for name in before.keys() ^ after.keys()]
    for name in before.keys() & after.keys():
        if trained and after[name].dim() == 1:
            continue
        linear, _, field = name.rpartition(".")
        expected = before[name].cpu()
        if field == "bias" and linear in rows:
            expected = expected[rows[linear]]
        actual = after[name]
        if actual.is_floating_point():
            expected, actual = expected.to(model.stored_dtype), actual.to(model.stored_dtype)
        if not torch.equal(expected, actual):
            problems.append(f"{name} was changed")
    but = ", norms and biases aside, which were trained" if trained else ""
    return _check("other parameters", sorted(problems), f"{len(after)} as in the original{but}")


def _beside_linears(model: LanguageModel) -> dict[str, Tensor]:
    """The model's state without the weights of its linears, of which one tensor may hold many."""
    starts = sorted(linear.weight.data_ptr() for linear in model.linears.values())

    def holds_linear(tensor: Tensor) -> bool:
        first = bisect_left(starts, tensor.data_ptr())
        return first < len(starts) and starts[first] < tensor.data_ptr() + tensor.nbytes

    state = model.model.state_dict()
    return {name: value for name, value in state.items() if not holds_linear(value)}
