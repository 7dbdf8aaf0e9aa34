"""
A model in so many bytes: how much of it is cut, and with how few bits the rest is written.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pho_service.errors import InvalidInput
from pho_service.models.gguf_file import converted
from pho_service.models.gguf_types import SHARED, Quantiser, choose_types
from pho_service.models.scratch import scratch_folder
from pho_service.models.structure import Anatomy, block_shapes
from pho_service.pipeline.structured import cut_costs
from pho_service.pipeline.work import Work
from pho_service.progress import Progress, silent
from pho_service.shown.parts import Table
from pho_service.spec.document import number, percent
from pho_service.spec.structure import BlockShapes, Cut, Structure, split, structured_pattern

FINALISTS = 2  # splits of a share that are cut and measured
SHARES = tuple(twentieths / 20 for twentieths in range(1, 11))  # of the blocks: 5 % to 50 %


@dataclass(frozen=True, kw_only=True)
class Way:
    """
    One way to come to so many bytes.

    Attributes:
        share: Share of the blocks' weights that is to be cut; 0: nothing.
        cut: What that costs, in nats a token, as splits of a share are rated.
        rounding: What the bits cost that are left then, estimated to second order.
    """

    share: float
    cut: float
    rounding: float

    @property
    def nats(self) -> float:
        return self.cut + self.rounding

    @property
    def pattern(self) -> str | None:
        """That of the cut; None if nothing is cut."""
        return structured_pattern(self.share) if self.share else None


def ways_to(
    most: int, work: Work, converter: Sequence[str], progress: Progress = silent
) -> list[Way]:
    """
    The ways to a GGUF file of at most so many bytes, that of the least cost first.

    Costs of a cut and of bits are added up, both in nats to second order. The bits of what stays
    cost as much as its share of the weights.

    Raises:
        InvalidInput: Half of the blocks is not enough to cut.
        ModelError: The model's blocks cannot be cut, or llama.cpp does not know the model.
    """
    model = work.model
    shapes = block_shapes(Anatomy(model))
    with tempfile.TemporaryDirectory(prefix="pho-", dir=scratch_folder(0)) as temporary:
        dense = Path(temporary) / Path(model.name).stem
        model.model.save_pretrained(dense)
        if model.tokenizer is not None:
            model.tokenizer.save_pretrained(dense)
        with converted(dense, Path(temporary) / "dense.gguf", converter, progress) as whole:
            quantiser = Quantiser(whole, model, work.bundle.statistics())
            levels = quantiser.levels(progress)
            rest = most - quantiser.rest(levels)
    ways = []
    for share, (removed, cost) in [(0.0, (0.0, 0.0)), *_cuts(work, shapes, progress).items()]:
        left = {
            name: [
                replace(each, bytes=int(each.bytes * (1 - removed)), nats=each.nats * (1 - removed))
                for each in known
            ]
            for name, known in levels.items()
        }
        chosen = choose_types(left, rest)
        if chosen is not None:
            bits = sum(level.nats for level in chosen.values())
            ways.append(Way(share=share, cut=cost, rounding=bits))
    if not ways:
        raise InvalidInput(
            f"{most / 1e6:.4g} MB are too few for {model.name}: what is outside of its blocks has "
            f"{(most - rest) / 1e6:.4g} MB, and the blocks are too large for the rest with four "
            "bits and half of them cut. Give more, or take a smaller model."
        )
    return sorted(ways, key=lambda way: way.nats)


def _cuts(work: Work, shapes: BlockShapes, progress: Progress) -> dict[float, tuple[float, float]]:
    """What is removed at least where a share is cut, and what that costs."""
    structures = {share: _splits(share, shapes) for share in SHARES}
    if shapes.multiple % SHARED or not any(structures.values()):
        return {}  # narrower inputs would have no scales, and keep their 16 bits
    assert work.calibration is not None
    memo = work.blocks(Structure())  # nothing is cut
    costs = cut_costs(
        work.model, work.calibration, shapes, work.bundle.statistics().fisher,
        [structure for each in structures.values() for structure in each],
        memo=memo, progress=progress,
    )  # fmt: skip
    if memo is not None:
        memo.remove()
    cuts = {}
    for share, several in structures.items():
        known = [structure for structure in several if costs.knows(structure)]
        best = sorted(known, key=lambda structure: costs.of(structure, shapes))[:FINALISTS]
        if best:  # of which any may be chosen
            removed = min(Cut.of(structure, shapes).removed for structure in best)
            cuts[share] = (removed, costs.of(best[0], shapes))
    return cuts


def _splits(share: float, shapes: BlockShapes) -> list[Structure]:
    try:
        return split(share, shapes)
    except InvalidInput:  # of a model of few blocks
        return []


def ways_table(ways: Sequence[Way]) -> Table:
    """What each way costs, by what is cut."""
    return Table(
        ("cut of the blocks", "the cut, nats", "bits, nats", "together"),
        [
            (percent(way.share) if way.share else "nothing", number(way.cut), number(way.rounding),
             number(way.nats))
            for way in sorted(ways, key=lambda way: way.share)
        ],
        title="Estimated cost of so many bytes",
        marked=sorted(way.share for way in ways).index(ways[0].share),
    )  # fmt: skip
