"""
Smaller models: of the cuts that remove a share of the blocks, the one with the best perplexity.
"""

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pho_service.host.machine import let_go_of_memory, versions
from pho_service.models.architecture import prunable_linears
from pho_service.models.loading import LanguageModel, sha256_each
from pho_service.models.saving import indices_sha256, save_pruned
from pho_service.models.structure import Anatomy, block_shapes
from pho_service.pipeline.rating import perplexity_on
from pho_service.pipeline.structured import CutModel, cut_model
from pho_service.pipeline.work import Work
from pho_service.progress import Progress, silent
from pho_service.pruning.perplexity import dense_reference, rate_divergence
from pho_service.shown.parts import Table
from pho_service.spec.document import number, percent
from pho_service.spec.perplexity import Perplexity
from pho_service.spec.structure import BlockShapes, Structure, structures_of

_COMPARED = 4  # windows that divergences are measured on


@dataclass(frozen=True, kw_only=True)
class Tried:
    """A cut, and how good the model was after it."""

    structure: Structure
    removed: float  # Share of the weights of all blocks
    divergence: float  # Nats, from the dense model
    perplexity: Perplexity


@dataclass(frozen=True, kw_only=True)
class Smaller:
    """A model that was cut."""

    cut: CutModel
    recipe: dict[str, Any]  # JSON values: what ``pruning.json`` says of it
    dense: Perplexity
    tried: list[Tried]  # The one that was taken comes first

    @property
    def table(self) -> Table:
        """A row for each cut that was tried, and one for the dense model."""
        rows = [("dense", "", "", number(self.dense.perplexity), "")]
        rows += [
            (
                str(cut.structure), percent(cut.removed), number(cut.divergence),
                number(cut.perplexity.perplexity), str(cut.perplexity.against(self.dense)),
            )
            for cut in self.tried
        ]  # fmt: skip
        return Table(
            ("what stays of each block", "removed", "KL", "perplexity", "against dense"),
            rows,
            title="Cuts, before any recovery",
            notes=(
                "Removed: share of the weights of all blocks. The second row is what is saved.",
            ),
        )


def make_smaller(work: Work, share: float, folder: Path, *, progress: Progress = silent) -> Smaller:
    """Cut about a share of the block weights out of a model, and write it as a folder."""
    # Each structure is cut out of a copy; the best so far is kept. Memory holds three models where
    # there are several structures, and two where there is one.
    model, dense_record = work.model, work.model.to_dict()
    shapes = block_shapes(Anatomy(model))
    structures = structures_of(share, shapes)
    text = work.text
    reference = dense_reference(model.model, text.windows[:_COMPARED])
    dense = perplexity_on(text, model, progress)
    fisher = work.bundle.statistics().fisher
    assert work.calibration is not None  # the verb reads a text
    best: CutModel | None = None
    tried: list[Tried] = []
    for structure in structures:
        cut = cut_model(
            _copied(model), work.calibration, structure, fisher=fisher, progress=progress
        )
        one = Tried(
            structure=structure,
            removed=shapes.removed_share(structure),
            divergence=rate_divergence(cut.model.model, reference),
            perplexity=perplexity_on(text, cut.model, progress),
        )
        if all(one.perplexity.perplexity < other.perplexity.perplexity for other in tried):
            best = cut
        tried.append(one)
        del cut
        let_go_of_memory()
    assert best is not None  # structures_of gives at least one
    tried.sort(key=lambda each: each.perplexity.perplexity)
    best.model.model.to(model.stored_dtype)  # type: ignore[arg-type]  # as in loading.py
    recipe = _recipe(work, dense_record, best, tried, dense, shapes)
    save_pruned(best.model, folder, (), recipe)
    return Smaller(cut=best, recipe=recipe, dense=dense, tried=tried)


def _copied(model: LanguageModel) -> LanguageModel:
    network = copy.deepcopy(model.model)
    return replace(model, model=network, linears=prunable_linears(network))


def _recipe(
    work: Work,
    dense_record: dict[str, Any],
    best: CutModel,
    tried: Sequence[Tried],
    dense: Perplexity,
    shapes: BlockShapes,
) -> dict[str, Any]:
    linears = best.model.linears
    hashes = sha256_each(linear.weight for linear in linears.values())
    return {
        "format": "pho-pruning",
        "version": 2,
        "configuration": None,
        "model": dense_record,
        "calibration": {k: v for k, v in work.bundle.provenance.items() if k != "model"},
        "updated": True,
        "folded": [],
        "sparsity": 0.0,
        "layers": {},
        "dense": dict(zip(linears, hashes, strict=True)),
        "structure": {
            "layers": [*best.layers],
            "neurons": best.neurons,
            "query_heads": best.query_heads,
            "sha256": indices_sha256(best.layers, best.neurons, best.query_heads),
            "removed": tried[0].removed,
            "of": {"layers": shapes.layers, "neurons": shapes.width,
                   "query_heads": shapes.query_heads[0]},
            "dense_perplexity": dense.perplexity,
            "tried": [
                {**asdict(one.structure), "removed": one.removed, "divergence": one.divergence,
                 "perplexity": one.perplexity.perplexity, "error": one.perplexity.error}
                for one in tried
            ],
            "text": {"source": work.text.record.source, "sha256": work.text.record.sha256},
        },
        "versions": versions("torch", "transformers"),
    }  # fmt: skip
