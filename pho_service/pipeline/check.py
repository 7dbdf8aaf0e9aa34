"""
Check a pruned folder against its own recipe and masks, and against the model that it came from.
"""

import json
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import Tensor

from pho_service.errors import field_name
from pho_service.models.loading import DTYPES, LanguageModel, load_model
from pho_service.models.mask_file import MASKS, LayerMask, MaskFile, read_masks, weight_sha256
from pho_service.models.packed import as_folder
from pho_service.models.saving import Folded, LayerRecord, Recipe, recipe_document
from pho_service.progress import Progress, silent
from pho_service.pruning.masks import to_semi_structured
from pho_service.pruning.statistics import PrunableLinear
from pho_service.spec.configuration import first_of, reasons


# What of a recipe, and of masks, cannot be true of a model.
def recipe_problems(recipe: Recipe, linears: Mapping[str, PrunableLinear]) -> list[str]:
    """Find what a recipe says that cannot be true of a model with these linears."""
    said = [*recipe.layers, *recipe.dense]
    problems = [f"{name} is not in it" for name in linears if name not in {*said}]
    problems += [f"the model has no {name}" for name in said if name not in linears]
    problems += [f"{name} is both pruned and dense" for name in recipe.dense.keys() & recipe.layers]
    if recipe.configuration is not None and ":" in recipe.configuration.pattern:
        problems += [
            f"{name} has no groups, but the pattern is {recipe.configuration.pattern}"
            for name, record in recipe.layers.items()
            if record.group is None
        ]
    seen: set[tuple[str, int]] = set()
    for folded in recipe.folded:
        # What reads the channels has them in dimension 1, what writes them in dimension 0.
        for name, dim in [(folded.reader, 1), *((writer, 0) for writer in folded.writers)]:
            if name not in linears:
                problems.append(f"folded {name} is not a linear of the model")
            elif (name, dim) in seen:
                problems.append(f"{name} is folded twice")
            elif sorted(folded.order) != list(range(linears[name].weight.shape[dim])):
                problems.append(
                    f"the order folded into {name} is not a permutation of its "
                    f"{linears[name].weight.shape[dim]} channels"
                )
            seen.add((name, dim))
    return problems


def mask_problems(masks: MaskFile, linears: Mapping[str, PrunableLinear]) -> list[str]:
    """Why masks cannot be those of a model with these linears."""
    problems = [f"{name} has no mask" for name in linears if name not in masks.shapes]
    for name, shape in masks.shapes.items():
        if name not in linears:
            problems.append(f"{name} has a mask, but is not a pruned linear of the model")
        elif shape != tuple(linears[name].weight.shape):
            problems.append(
                f"{name} has the shape {tuple(linears[name].weight.shape)}, its mask {shape}"
            )
    return problems


TOLERANCE = 1e-6  # of a sparsity: a float32 mean rounds
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


def check_folder(
    folder: Path, *, original: LanguageModel | None, progress: Progress = silent
) -> list[Check]:
    """Verify a pruned folder: nothing that it says of itself is taken on trust."""
    # A linear whose mask is not the recipe's has only its weights' hash checked, and a recipe or
    # masks of another model end the report: one fault is told once.
    folder = folder.expanduser()
    with as_folder(folder) as small:
        return _check_files(folder, small, original, progress)


def _check_files(
    folder: Path, small: Path, original: LanguageModel | None, progress: Progress
) -> list[Check]:
    document = recipe_document(small)
    try:
        recipe = Recipe.model_validate(document)
    except ValidationError as error:
        return [_check("recipe", [reasons(error)], "")]
    masks = read_masks(small / MASKS)
    model = load_model(str(folder), device="cpu", dtype=_saved_dtype(small))
    recipe_check = _check(
        "recipe", recipe_problems(recipe, model.linears), f"complete, {_linears(recipe)}"
    )
    if not recipe_check.passed:
        return [recipe_check]
    pruned = {name: each for name, each in model.linears.items() if name in recipe.layers}
    problems = mask_problems(masks, pruned)
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


def _linears(recipe: Recipe) -> str:
    dense = f", {len(recipe.dense)} of them dense" if recipe.dense else ""
    return f"{len(recipe.layers) + len(recipe.dense)} linears{dense}"


class _Report:
    """What has been found so far, check by check."""

    def __init__(self) -> None:
        self.problems: dict[str, list[str]] = {}
        self.linears = 0  # with the recipe's mask
        self.weights = 0
        self.removed = 0
        self.kept_zeros = 0
        self.groups = 0
        self.semi_structured = 0
        self.refused: list[str] = []

    def add(self, check: str, layer: str, problem: str | None) -> None:
        if problem:
            self.problems.setdefault(check, []).append(f"{layer}: {problem}")

    def check(self, name: str, detail: str) -> Check:
        return _check(name, self.problems.get(name, []), detail)


def _check(name: str, problems: list[str], detail: str) -> Check:
    return Check(name=name, passed=not problems, detail=first_of(problems) if problems else detail)


def _check_weights(
    recipe: Recipe,
    masks: MaskFile,
    model: LanguageModel,
    original: LanguageModel | None,
    progress: Progress,
) -> list[Check]:
    """Everything beyond the recipe itself."""
    report = _Report()
    origin = _origin_check(recipe, model, original)
    compared = original if origin.passed else None
    rows, columns = _renumbered(recipe.folded)
    with progress("Checking", len(recipe.layers)) as advance:
        for name, record in recipe.layers.items():
            weight = model.linears[name].weight.to("cpu", model.stored_dtype)
            if weight_sha256(weight) != record.weights_sha256:
                report.add("weight hashes", name, "the weight is not the one that was saved")
            if masks.sha256(name) != record.mask_sha256:
                report.add("masks", name, "the mask is not the one that was saved")
            else:
                mask = masks.mask(name)
                _check_linear(report, name, record, weight, mask)
                if compared is not None and not recipe.updated:
                    before = compared.linears[name].weight.cpu()
                    expected = _taken(before, rows.get(name), columns.get(name))
                    changed = (weight != expected.to(weight.dtype)) & mask.keep
                    report.add("kept weights", name, _some(changed, "kept weights were changed"))
            advance(1)
    for name, sha256 in recipe.dense.items():
        weight = model.linears[name].weight.to("cpu", model.stored_dtype)
        if weight_sha256(weight) != sha256:
            report.add("weight hashes", name, "the weight is not the one that was saved")
        if compared is not None:
            expected = _taken(compared.linears[name].weight.cpu(), rows.get(name), None)
            changed = weight != expected.to(weight.dtype)
            report.add("dense linears", name, _some(changed, "weights were changed"))
    checks = [*_own_checks(report, recipe), origin]
    dense = ["dense linears"] if recipe.dense else []
    if original is None or not origin.passed:
        reason = "no original model was given" if original is None else "it is another model"
        checks += [
            Check(name=name, passed=True, detail=f"{_NOT_CHECKED}{reason}")
            for name in ("kept weights", *dense, "other parameters")
        ]
    else:
        checks += [
            report.check("kept weights", _kept_detail(recipe)),
            *(report.check(name, f"{len(recipe.dense)} as in the original") for name in dense),
            _check_others(recipe, model, original, rows),
        ]
    return [*checks, _semi_structured_check(report)]


def _check_linear(
    report: _Report, name: str, record: LayerRecord, weight: Tensor, mask: LayerMask
) -> None:
    """What can be told of one linear from its mask alone."""
    removed = weight.numel() - _count(mask.keep)
    share = removed / weight.numel()
    report.linears += 1
    report.weights += weight.numel()
    report.removed += removed
    nonzero = weight.bool()
    report.kept_zeros += weight.numel() - removed - _count(nonzero & mask.keep)
    report.add("zeros", name, _some(nonzero & ~mask.keep, "removed weights are not zero"))
    if abs(share - record.sparsity) > TOLERANCE:
        report.add("sparsity", name, f"{share:.6%} removed, {record.sparsity:.6%} in the recipe")
    if record.group is not None:
        report.groups += 1
        report.add("groups", name, _group_problem(mask, record))
    if (record.keep, record.group) == (2, 4) and torch.cuda.is_available():
        report.semi_structured += 1
        _check_semi_structured(report, name, _taken(weight, None, mask.order))


def _count(true: Tensor) -> int:
    return int(true.count_nonzero())  # ten times as fast as a sum


def _some(wrong: Tensor, what: str) -> str | None:
    count = _count(wrong)
    return f"{count} {what}" if count else None


def _group_problem(mask: LayerMask, record: LayerRecord) -> str | None:
    """Why a mask is not N:M in its own channel order."""
    assert record.group is not None
    out_features, in_features = mask.keep.shape
    if in_features % record.group:
        return f"in_features={in_features} is not a multiple of M={record.group}"
    keep = _taken(mask.keep, None, mask.order).to(torch.uint8)
    groups = keep.reshape(out_features, -1, record.group)
    kept = groups.sum(dim=-1, dtype=torch.uint8)  # (out_features, groups); at most MAX_GROUP
    return _some(kept.ne(record.keep or 0), f"groups do not keep {record.keep} of {record.group}")


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


def _own_checks(report: _Report, recipe: Recipe) -> list[Check]:
    """The checks of the linears that need no other model."""
    whole = report.linears == len(recipe.layers)  # else the total is not known
    total = report.removed / max(report.weights, 1)
    if whole and abs(total - recipe.sparsity) > TOLERANCE:
        said = f"{total:.6%} removed, {recipe.sparsity:.6%} in the recipe"
        report.add("sparsity", "the whole model", said)
    some = "" if whole else f" ({report.linears} of {len(recipe.layers)} linears looked at)"
    zeros = f"{report.removed:,} removed weights are zero; {report.kept_zeros:,} kept ones are too"
    groups = f"{report.groups} linears" if report.groups else "no linear has N:M groups"
    return [
        report.check("masks", f"{len(recipe.layers)} masks as recorded"),
        report.check("zeros", zeros + some),
        report.check("sparsity", f"{total:.4%} of {report.weights:,} weights" + some),
        report.check("groups", groups + some),
        report.check(
            "weight hashes", f"{len(recipe.layers) + len(recipe.dense)} weights as recorded"
        ),
    ]


def _origin_check(recipe: Recipe, model: LanguageModel, original: LanguageModel | None) -> Check:
    name = "original model"
    if original is None:
        return Check(name=name, passed=True, detail=f"{_NOT_CHECKED}no original model was given")
    dtype = str(original.dtype).removeprefix("torch.")
    if dtype != recipe.model.dtype:
        return Check(
            name=name,
            passed=False,
            detail=f"{original.name} is loaded in {dtype}, but the model was pruned in "
            f"{recipe.model.dtype}: load it in that ({field_name('dtype', recipe.model.dtype)})",
        )
    weights_sha256 = original.weights_sha256
    if weights_sha256 != recipe.model.weights_sha256 or _shapes(original) != _shapes(model):
        return Check(
            name=name,
            passed=False,
            detail=f"another model: {original.name} has the hash {weights_sha256[:16]}, "
            f"but {recipe.model.name} was pruned, {recipe.model.weights_sha256[:16]}",
        )
    return Check(name=name, passed=True, detail=f"{original.name} is the model that was pruned")


def _shapes(model: LanguageModel) -> dict[str, tuple[int, ...]]:
    return {name: tuple(linear.weight.shape) for name, linear in model.linears.items()}


def _kept_detail(recipe: Recipe) -> str:
    if recipe.updated:
        return f"{_NOT_CHECKED}the kept weights were updated"
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
        found = after[name]
        if found.is_floating_point():
            expected, found = expected.to(model.stored_dtype), found.to(model.stored_dtype)
        if not torch.equal(expected, found):
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


def _check_semi_structured(report: _Report, name: str, weight: Tensor) -> None:
    """Whether torch's 2:4 format holds a weight, (out_features, in_features), without loss."""
    if weight.dtype is torch.float32:
        weight = weight.bfloat16()  # torch's format for float32 is 1:2
    weight = weight.cuda().contiguous()
    try:
        dense = to_semi_structured(weight).to_dense()
    except RuntimeError as error:  # a shape that the kernels do not take, or no kernels
        report.refused.append(f"{name}: {error}")
    else:
        report.add("semi-structured", name, _some(dense.ne(weight), "weights are lost in 2:4"))


def _semi_structured_check(report: _Report) -> Check:
    if not torch.cuda.is_available():
        detail = f"{_NOT_CHECKED}no CUDA device"
    elif not report.semi_structured:
        detail = f"{_NOT_CHECKED}no linear is 2:4"
    elif len(report.refused) == report.semi_structured:
        detail = f"{_NOT_CHECKED}torch refuses every linear, the first with {report.refused[0]}"
    else:
        detail = f"{report.semi_structured - len(report.refused)} linears"
        if report.refused:
            detail += f"; torch refuses {len(report.refused)}: {report.refused[0]}"
    return report.check("semi-structured", detail)
