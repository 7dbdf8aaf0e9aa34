"""
Prune a model for good and save it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from pho_service.errors import InvalidInput, field_name
from pho_service.host.machine import versions
from pho_service.models.loading import LanguageModel, sha256_each
from pho_service.models.mask_file import LayerMask, PackedMask
from pho_service.models.saving import indices_sha256, save_pruned
from pho_service.models.scratch import Memo
from pho_service.models.structure import Anatomy, as_cut, block_shapes
from pho_service.pipeline.blocks import blocks_kept
from pho_service.pipeline.pipeline import few_tokens, prune_model
from pho_service.pipeline.structured import cut_model
from pho_service.pipeline.work import Work
from pho_service.progress import Progress, silent
from pho_service.pruning.bundle import ProxyBundle
from pho_service.pruning.masks import LinearMask, model_sparsity
from pho_service.pruning.permutation import fold_order
from pho_service.pruning.reconstruction import Reconstructed
from pho_service.spec.configuration import Configuration
from pho_service.spec.steps import Candidate
from pho_service.spec.structure import Cut, Structure


@dataclass(frozen=True, kw_only=True)
class PrunedFolder:
    """Changes that were made to a model."""

    sparsity: float  # Over the weights of all linears that are pruned
    layers: dict[str, float]  # Sparsity of each of them, in the model's order
    masks: dict[str, PackedMask]  # What each of them keeps, one bit a weight
    recipe: dict[str, Any]  # JSON values: what ``pruning.json`` says of it
    # What the training of each block came to, if there was one.
    blocks: dict[str, Reconstructed] = field(default_factory=dict)

    @property
    def orders(self) -> dict[str, int] | None:
        """How many linears have which order of channels; None where none was permuted."""
        # ``folded`` into the stored weights; to be ``gathered`` by a runtime in the order of the
        # masks; or ``kept`` as the model has it.
        configuration = self.recipe["configuration"]
        if configuration is None or configuration["steps"]["permutation"] == "none":
            return None
        folded = len(self.recipe["folded"])
        gathered = sum(mask.order is not None for mask in self.masks.values())
        kept = len(self.layers) - folded - gathered
        return {"folded": folded, "gathered": gathered, "kept": kept}


def orders_in_words(orders: Mapping[str, int]) -> str:
    """Say whether a runtime must permute; see :attr:`Pruned.orders`."""
    folded = f"Orders of channels: {orders['folded']} folded into the stored weights"
    if not orders["gathered"]:
        return f"{folded}, {orders['kept']} as the model has them. No runtime has to permute."
    return (
        f"{folded}; {orders['gathered']} linears hold their groups in an order that a runtime must "
        f"gather their inputs in. With {field_name('steps/deployable', True)} none does."
    )


@dataclass(frozen=True, kw_only=True)
class _Kept:
    """A linear's mask, packed once: all of them are held until they are written."""

    mask: PackedMask
    group_keep: int  # N of N:M
    sparsity: float  # Share removed

    @classmethod
    def of(cls, mask: LinearMask) -> "_Kept":
        return cls(
            mask=PackedMask.of(LayerMask(keep=mask.keep, order=mask.order)),
            group_keep=mask.group_keep,
            sparsity=1 - int(mask.keep.count_nonzero()) / mask.keep.numel(),
        )

    def taken(self, keep: Tensor, order: Tensor | None) -> "_Kept":
        return replace(self, mask=PackedMask.of(LayerMask(keep=keep, order=order)))


def prune_job(
    work: Work,
    configuration: Configuration,
    folder: Path,
    *,
    origin: Mapping[str, Any] | None = None,
    memo: Memo | None = None,
    progress: Progress = silent,
) -> PrunedFolder:
    """Prune with a configuration, and write a Hugging Face folder with masks and recipe."""
    # ``memo`` has what a confirmation has pruned and trained already, if it is not lost.
    configuration = configuration.for_size(work.model.parameters)
    if memo is None:
        blocks = folder.expanduser().resolve().with_name(f".{folder.name}.blocks")
        memo = blocks_kept(
            work.model, work.bundle, winner_of(configuration), work.calibration, lambda _: blocks
        )
    model = work.model  # before its weights change
    pruned = prune_in_place(work, configuration, origin=origin, memo=memo, progress=progress)
    model = model if configuration.cut is None else as_cut(model)
    save_pruned(model, folder, pruned.masks.items(), pruned.recipe)
    if memo:
        memo.remove()
    return pruned


def prune_in_place(
    work: Work,
    configuration: Configuration,
    *,
    origin: Mapping[str, Any] | None = None,
    memo: Memo | None = None,
    progress: Progress = silent,
) -> PrunedFolder:
    """Prune a model with a configuration for good; no model is written."""
    # Input channels that were permuted for N:M, and can be renumbered with the linears that write
    # them, are: then the groups hold in the order of the model.
    model, bundle, calibration = work.model, work.bundle, work.calibration
    configuration = configuration.for_size(model.parameters)
    bundle.check_model(model.linears)
    if configuration.cut is not None:
        return _cut_in_place(work, configuration, configuration.cut, memo, progress)
    few = few_tokens(model.linears, configuration.candidate(), calibration)
    dense = model.to_dict()  # before its weights change
    candidate = configuration.candidate()
    kept: dict[str, _Kept] = {}
    blocks: dict[str, Reconstructed] = {}

    def keep(name: str, mask: LinearMask) -> None:
        kept[name] = _Kept.of(mask)

    chosen = bundle.choose(candidate.steps.linears, candidate.pattern)
    title = "Pruning and training" if candidate.steps.reconstruction.wanted else "Pruning"
    with progress(title, len(chosen.names)) as advance:
        prune_model(
            model,
            bundle.statistics(),
            candidate,
            calibration,
            advance,
            keep,
            memo=memo,
            rebuilt=blocks.__setitem__,
        )
    folded = _fold(model, kept)
    model.model.to(model.stored_dtype)  # type: ignore[arg-type]  # as in loading.py
    hashes = sha256_each(linear.weight for linear in model.linears.values())
    weights = dict(zip(model.linears, hashes, strict=True))
    layers = {name: kept[name].sparsity for name in model.linears if name in kept}
    dense_linears = {name: sha256 for name, sha256 in weights.items() if name not in kept}
    sparsity = model_sparsity(model.linears, layers)
    recipe = {
        **_head(configuration, dense, bundle),
        **({} if origin is None else {"origin": dict(origin)}),
        "updated": candidate.steps.changes_weights,
        **({} if few is None else {"few_tokens": few}),
        "folded": folded,
        "sparsity": sparsity,
        "layers": {
            name: {
                "sparsity": layers[name],
                "weights_sha256": weights[name],
                "keep": kept[name].group_keep if candidate.pattern.group else None,
                "group": candidate.pattern.group or None,
            }
            for name in layers
        },
        **({"dense": dense_linears} if dense_linears else {}),
        **({"blocks": {name: b.to_dict() for name, b in blocks.items()}} if blocks else {}),
        "versions": versions("torch", "transformers"),
    }
    masks = {name: kept[name].mask for name in layers}
    return PrunedFolder(sparsity=sparsity, layers=layers, masks=masks, recipe=recipe, blocks=blocks)


def winner_of(configuration: Configuration) -> Candidate | Structure:
    """What a model is pruned with: a score and steps, or what stays of its blocks."""
    cut = configuration.cut
    return configuration.candidate() if cut is None else cut.structure


def _cut_in_place(
    work: Work, configuration: Configuration, cut: Cut, memo: Memo | None, progress: Progress
) -> PrunedFolder:
    """Cut blocks out of a model, or neurons and heads out of them; the recipe says which stayed."""
    model, dense = work.model, work.model.to_dict()
    cut.check(block_shapes(Anatomy(model)), model.name)
    if work.calibration is None:
        raise InvalidInput(
            "a cut runs the calibration's text through the model, and none is given. Give the text "
            "of the search, with its settings."
        )
    done = cut_model(
        model, work.calibration, cut.structure, fisher=work.bundle.statistics().fisher, memo=memo,
        progress=progress,
    )  # fmt: skip
    model.model.to(model.stored_dtype)  # type: ignore[arg-type]  # as in loading.py
    linears = done.model.linears
    hashes = sha256_each(linear.weight for linear in linears.values())
    recipe = {
        **_head(configuration, dense, work.bundle),
        "updated": True,
        "folded": [],
        "sparsity": 0.0,
        "layers": {},
        "dense": dict(zip(linears, hashes, strict=True)),
        "structure": {
            "layers": [*done.layers],
            "neurons": done.neurons,
            "query_heads": done.query_heads,
            "sha256": indices_sha256(done.layers, done.neurons, done.query_heads),
        },
        "versions": versions("torch", "transformers"),
    }
    return PrunedFolder(sparsity=0.0, layers={}, masks={}, recipe=recipe)


def _head(
    configuration: Configuration, dense: Mapping[str, Any], bundle: ProxyBundle
) -> dict[str, Any]:
    """How a recipe begins: what a model was pruned with, and which."""
    return {
        "format": "pho-pruning",
        "version": 2,
        "configuration": configuration.model_dump(mode="json"),
        "model": dict(dense),
        "calibration": {k: v for k, v in bundle.provenance.items() if k != "model"},
    }


def _fold(model: LanguageModel, kept: dict[str, _Kept]) -> list[dict[str, Any]]:
    """Renumber hidden channels where that is exact; masks and orders follow."""
    # A streamed model's weights are on disk already and stay in their order.
    folded: list[dict[str, Any]] = []
    if model.stream:
        return folded
    for name, reader in model.linears.items():
        order = kept[name].mask.order if name in kept else None
        if order is None:
            continue
        writers = fold_order(model.model, reader, model.linears, order)
        if not writers:
            continue
        kept[name] = kept[name].taken(kept[name].mask.keep[:, order], None)
        for writer in kept.keys() & writers:
            mask = kept[writer].mask
            kept[writer] = kept[writer].taken(mask.keep[order], mask.order)
        folded.append({"reader": name, "writers": writers, "order": order.tolist()})
    return folded
