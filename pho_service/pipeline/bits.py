"""
A model in so many bytes: how much of it is cut, and with how few bits the rest is written.
"""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pho_service.errors import InvalidInput
from pho_service.models.gguf_file import MORE_BITS, converted
from pho_service.models.gguf_types import SHARED, Quantiser, choose_types
from pho_service.models.scratch import scratch_folder
from pho_service.models.structure import Anatomy, block_shapes
from pho_service.pipeline.structured import cut_costs
from pho_service.pipeline.work import Work
from pho_service.progress import Progress, silent
from pho_service.shown.parts import Table
from pho_service.spec.document import number, percent
from pho_service.spec.export import Level
from pho_service.spec.structure import BlockShapes, Cut, Structure, split, structured_pattern

FINALISTS = 2  # splits of a share that are cut and measured
SHARES = tuple(twentieths / 20 for twentieths in range(1, 11))  # of the blocks: 5 % to 50 %


@dataclass(frozen=True, kw_only=True)
class Way:
    """
    One way to come to so many bytes.

    Attributes:
        bytes: The most that the file may have.
        share: Share of the blocks' weights that is to be cut; 0: nothing.
        cut: What that costs, in nats a token, as splits of a share are rated.
        rounding: What the bits cost that are left then, estimated to second order.
    """

    bytes: int
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

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "share": self.share,
            "pattern": self.pattern,
            "nats": self.nats,
            "cut": self.cut,
            "bits": self.rounding,
        }


@dataclass(frozen=True, kw_only=True)
class BitsAndCuts:
    """
    What a model costs with fewer bits and with parts cut out, for any number of bytes.

    Attributes:
        name: The model that it is of.
        levels: What each matrix can be written as, by its tensor.
        rest: Bytes of all else.
        cuts: What is removed at least where a share is cut, and what that costs.
    """

    name: str
    levels: Mapping[str, Sequence[Level]]
    rest: int
    cuts: Mapping[float, tuple[float, float]]

    def ways_to(self, most: int) -> list[Way]:
        """
        The ways to a GGUF file of at most so many bytes, that of the least cost first.

        Costs of a cut and of bits are added up, both in nats to second order. The bits of what
        stays cost as much as its share of the weights.

        Raises:
            InvalidInput: Half of the blocks is not enough to cut.
        """
        ways = []
        for share, (removed, cost) in [(0.0, (0.0, 0.0)), *self.cuts.items()]:
            left = self._left(1 - removed)
            chosen = choose_types(left, most - self.rest)
            if chosen is not None:
                bits = sum(level.nats for level in chosen.values())
                ways.append(Way(bytes=most, share=share, cut=cost, rounding=bits))
        if not ways:
            stays = 1 - max((removed for removed, _ in self.cuts.values()), default=0.0)
            fewest = [min(each.bytes for each in known) for known in self._left(stays).values()]
            raise InvalidInput(
                f"{most / 1e6:.4g} MB are too few for {self.name}, which has "
                f"{(self.rest + sum(fewest)) / 1e6:.4g} MB with the fewest bits here and as much "
                "of its blocks cut as can be. Give more, or take a smaller model."
            )
        return sorted(ways, key=lambda way: way.nats)

    def _left(self, stays: float) -> dict[str, list[Level]]:
        """The levels where only a share of the blocks stays; the embedding and the head do."""
        return {
            name: [
                replace(each, bytes=int(each.bytes * stays), nats=each.nats * stays)
                for each in known
            ]
            if name not in MORE_BITS
            else [*known]
            for name, known in self.levels.items()
        }


def bits_and_cuts(work: Work, converter: Sequence[str], progress: Progress = silent) -> BitsAndCuts:
    """
    Work out what bits and cuts of a calibrated model cost, once for all numbers of bytes. Both
    are kept where it has a cache.

    Raises:
        ModelError: The model's blocks cannot be cut, or llama.cpp does not know the model.
        OutputError: There is no room for the two files that are made of it meanwhile.
    """
    model = work.model
    shapes = block_shapes(Anatomy(model))
    size = sum(p.numel() * p.element_size() for p in model.model.parameters())
    folder = scratch_folder(3 * size)  # itself, as a file, and that with fewer bits
    with tempfile.TemporaryDirectory(prefix="pho-", dir=folder) as temporary:
        dense = Path(temporary) / Path(model.name).stem
        model.model.save_pretrained(dense)
        if model.tokenizer is not None:
            model.tokenizer.save_pretrained(dense)
        with converted(dense, Path(temporary) / "dense.gguf", converter, progress) as whole:
            quantiser = Quantiser(
                whole, model, work.bundle.statistics(), work.calibration, work.blocks(Structure())
            )
            levels = quantiser.levels(progress)
            rest = quantiser.rest(levels)
    cuts = _cuts(work, shapes, progress)
    return BitsAndCuts(name=model.name, levels=levels, rest=rest, cuts=cuts)


def _cuts(work: Work, shapes: BlockShapes, progress: Progress) -> dict[float, tuple[float, float]]:
    """What is removed at least where a share is cut, and what that costs."""
    structures = {share: _splits(share, shapes) for share in SHARES}
    if shapes.multiple % SHARED or not any(structures.values()):
        return {}  # narrower inputs would have no scales, and keep their 16 bits
    assert work.calibration is not None
    costs = cut_costs(
        work.model, work.calibration, shapes, work.bundle.statistics().fisher,
        [structure for each in structures.values() for structure in each],
        memo=work.blocks(Structure()), progress=progress,
    )  # fmt: skip
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


def budgets_table(budgets: Sequence[Sequence[Way]]) -> Table:
    """For each number of bytes what costs least there, beside the whole model."""
    rows = []
    for ways in budgets:
        best, whole = ways[0], next((way for way in ways if not way.share), None)
        cut = percent(best.share) if best.share else "nothing"
        alone = "" if whole is None else number(whole.nats)
        rows.append((f"{best.bytes / 1e6:g} MB", cut, number(best.nats), alone))
    return Table(
        ("bytes", "cut of the blocks", "estimated cost, nats", "nothing cut"), rows,
        title="What costs least in so many bytes",
    )  # fmt: skip
