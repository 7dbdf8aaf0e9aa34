"""
What is cut out of a model's blocks, the sizes that say what can be, and uniform cuts of a share.
"""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from pho_service.errors import InvalidInput
from pho_service.spec.document import STRICT, JsonDocument, Number, Whole, check_choice, parse_bytes
from pho_service.spec.export import GGUF_TYPES, SIZE, GgufType, RuntimeName

if TYPE_CHECKING:
    from pho_service.spec.pattern import Pattern

MULTIPLE = 64  # neurons: what kernels and GGUF's types want the width of an FFN to be a multiple of
MOST_OF_THE_BLOCKS = 0.5  # that a share of the file may cut
STEPS = 16  # a narrow FFN has at least so many widths, by a lower power of two


@dataclass(frozen=True, kw_only=True)
class Structure(JsonDocument):
    """What stays of a model's blocks; every block gets the same sizes."""

    __pydantic_config__ = STRICT

    neurons: Annotated[
        Whole | None, Field(ge=1, description="Neurons kept in each FFN; null keeps all.")
    ] = None
    query_heads: Annotated[
        Whole | None,
        Field(ge=1, description="Query heads kept in each attention; null keeps all."),
    ] = None
    layers: Annotated[
        tuple[Annotated[Whole, Field(ge=0)], ...] | None,
        Field(description="Indices of the blocks that stay, ascending; null keeps all."),
    ] = None
    dropped: Annotated[
        Whole,
        Field(ge=0, description="Blocks to drop that the divergence from the dense model chooses."),
    ] = 0

    def __str__(self) -> str:
        """In a few words: what is kept of each block, and how many blocks leave."""
        parts = []
        if self.neurons is not None:
            parts.append(f"{self.neurons:,} neurons")
        if self.query_heads is not None:
            parts.append(f"{self.query_heads} query heads")
        if self.dropped:
            parts.append(f"{self.dropped} blocks fewer")
        if self.layers is not None:
            parts.append(f"{len(self.layers)} blocks")
        return ", ".join(parts) or "everything"

    def __post_init__(self) -> None:
        if self.layers == ():
            raise InvalidInput("layers=[] leaves no block. Name at least one, or give null.")
        if self.layers is not None and self.dropped:
            raise InvalidInput(
                f"layers={[*self.layers]} names the blocks that stay, so dropped={self.dropped} "
                "has none to choose. Give one of the two."
            )
        if self.layers is not None and [*self.layers] != sorted({*self.layers}):
            raise InvalidInput(
                f"layers={[*self.layers]} is not ascending, each index once. Blocks keep their "
                "order: sort them."
            )


def usual_multiple(width: int) -> int:
    """What the width of an FFN should stay a multiple of: 64, or less where that is too coarse."""
    # A width that is no multiple of 64 itself has nothing to lose by another one.
    multiple = MULTIPLE
    while multiple > 1 and (width % multiple or width // multiple < STEPS):
        multiple //= 2
    return multiple


@dataclass(frozen=True, kw_only=True)
class BlockShapes:
    """What can be cut out of a model whose blocks all have the same sizes, in weights."""

    layers: int  # Blocks
    layer_weights: int  # Weights of a block's linears, a mean one's if they differ
    width: int  # Neurons of an FFN; 0 where they cannot be cut
    multiple: int  # What a smaller width is a multiple of
    neuron_weights: int  # Weights that leave a block with one neuron
    # Numbers of query heads that transformers can load, all of them first.
    query_heads: tuple[int, ...]
    head_weights: int  # Weights that leave a block with one query head
    parameters: int  # Weights of the model, with embeddings and the like

    @property
    def weights(self) -> int:
        """Weights of all blocks' linears."""
        return self.layers * self.layer_weights

    def removed_share(self, structure: Structure) -> float:
        """The share of the blocks' weights that a structure removes."""
        layers = self.layers - structure.dropped
        if structure.layers is not None:
            layers = len(structure.layers)
        neurons = 0 if structure.neurons is None else self.width - structure.neurons
        heads = 0
        if structure.query_heads is not None:
            heads = self.query_heads[0] - structure.query_heads
        lost = neurons * self.neuron_weights + heads * self.head_weights
        return 1 - layers * (self.layer_weights - lost) / self.weights


def split(share: float, shapes: BlockShapes) -> list[Structure]:
    """
    Name the uniform structures that remove about a share of the blocks' weights.

    Each number of dropped blocks, with each number of query heads, is joined by the FFN width that
    comes nearest to the share: at most half a step of the width is removed too much or too little.

    Raises:
        InvalidInput: ``share`` is not between 0 and 1, or nothing comes near it.
    """
    if not 0 < share < 1:
        raise InvalidInput(f"a share of {share:g} is not between 0 and 1. Give 0.2 for a fifth.")
    structures = []
    for dropped in range(shapes.layers):
        layers = shapes.layers - dropped
        for query_heads in shapes.query_heads:
            heads_lost = shapes.query_heads[0] - query_heads
            removed = dropped * shapes.layer_weights + layers * heads_lost * shapes.head_weights
            missing = share * shapes.weights - removed
            steps = round(missing / _step(shapes, layers))
            widest = shapes.width // shapes.multiple - 1 if shapes.width else 0
            if 0 <= steps <= widest:
                neurons = shapes.width - steps * shapes.multiple
                structures.append(
                    Structure(
                        neurons=neurons if steps else None,
                        query_heads=query_heads if heads_lost else None,
                        dropped=dropped,
                    )
                )
    structures = [structure for structure in structures if structure != Structure()]
    if not structures:
        raise InvalidInput(
            f"no structure of {shapes.layers} blocks, {shapes.query_heads[0]} query heads and "
            f"{shapes.width} neurons that can be cut comes near a share of {share:g}: at least one "
            f"block, one query head of each key and {shapes.multiple} neurons stay. Give another "
            "share."
        )
    return structures


def _step(shapes: BlockShapes, layers: int) -> int:
    """The weights between two widths, or between two cuts of something else if there is one."""
    if shapes.width:
        return layers * shapes.multiple * shapes.neuron_weights
    heads = [a - b for a, b in zip(shapes.query_heads, shapes.query_heads[1:], strict=False)]
    return min([shapes.layer_weights, *(layers * step * shapes.head_weights for step in heads)])


ESTIMATE = "estimated-divergence"  # what splits of a share are rated by: nats from the dense model
PREFIX = "structured:"  # begins the pattern of a smaller model: structured:20%
OF_FILE = "smaller:"  # the same by a share of its file: smaller:20%
IN_BYTES = "bytes:"  # by the most that a GGUF file may have, bits chosen, too: bytes:95MB
BY_SPEED = "faster:"  # by how many times as fast it writes: faster:1.2x
_FEWEST_BITS = {False: 4.5, True: 3.4375}  # of a weight: Q4_0, or Q3_K where llama-quantize is
_LEFT = 0.97  # of what a cut leaves, at least: it may remove somewhat more than its share
_GOALS = (IN_BYTES, BY_SPEED)
GOAL_SHARE = 0.05  # of the blocks: what is planned where a goal is to tell the share
PROMPT, WRITTEN, ROUNDS = 128, 64, 9  # tokens that a speed is measured with, and how often
_MOST_TIMES = 10.0
_RUNTIMES: tuple[RuntimeName, ...] = ("torch", "llama.cpp")


def is_structured(pattern: object) -> bool:
    """Whether a pattern, of whatever document, is that of a smaller model."""
    return isinstance(pattern, str) and pattern.startswith((PREFIX, OF_FILE, *_GOALS))


@dataclass(frozen=True, kw_only=True)
class Goal:
    """What a model is cut for, where the model itself has to tell how much that takes."""

    pattern: str  # In words: bytes:95MB, faster:1.2x, faster:1.2x:llama.cpp:q8_0
    bytes: int | None = None  # The most that a GGUF file of it may have
    times: float = 0.0  # As fast as the dense model, where there are no bytes
    runtime: RuntimeName = "torch"  # Where that is measured
    type: GgufType = "q8_0"  # Of the files, in llama.cpp

    @classmethod
    def parse(cls, pattern: str) -> "Goal | None":
        """
        Read ``bytes:95MB``, ``faster:1.2x``, or ``faster:1.2x:llama.cpp:q8_0``; None of another.

        Raises:
            InvalidInput: What follows is not a size, or not a number of times, runtime and type.
        """
        kind, _, words = pattern.partition(":")
        if f"{kind}:" == IN_BYTES:
            if not re.fullmatch(SIZE, words):
                raise InvalidInput(
                    f"pattern {pattern!r} is not the size of a file. Write {IN_BYTES}95MB."
                )
            return cls(pattern=pattern, bytes=parse_bytes(words, "pattern"))
        return cls._of_speed(pattern, *words.split(":")) if f"{kind}:" == BY_SPEED else None

    @classmethod
    def _of_speed(
        cls, pattern: str, words: str, runtime: str = "torch", gguf_type: str = "", *more: str
    ) -> "Goal":
        try:
            times = float(words.removesuffix("x"))
        except ValueError:
            times = 0.0
        if not 1 < times <= _MOST_TIMES:
            raise InvalidInput(
                f"pattern {pattern!r} is no number of times above 1 and up to {_MOST_TIMES:g}. "
                f"Write {BY_SPEED}1.2x for a model that writes 1.2 times as fast."
            )
        check_choice("runtime", runtime, _RUNTIMES)
        if more or (gguf_type and runtime == "torch"):
            raise InvalidInput(
                f"pattern {pattern!r} names more than a runtime, and than a type of llama.cpp's "
                f"files. Write {BY_SPEED}{times:g}x, or {BY_SPEED}{times:g}x:llama.cpp:q8_0."
            )
        if gguf_type:
            check_choice("type", gguf_type, GGUF_TYPES)
        return cls(
            pattern=pattern, times=times, runtime=runtime,  # type: ignore[arg-type]  # checked
            **({"type": gguf_type} if gguf_type else {}),  # type: ignore[arg-type]
        )  # fmt: skip

    @property
    def size(self) -> str:
        """The bytes as they are asked for; empty of a speed."""
        return self.pattern.removeprefix(IN_BYTES) if self.bytes is not None else ""

    @property
    def where(self) -> str:
        """The runtime that speeds are measured in, in words."""
        return self.runtime if self.runtime == "torch" else f"{self.runtime} at {self.type}"


def check_fewest(
    name: str, most: int, pattern: "Pattern | None", *, parameters: int, prunable: int, llama: bool
) -> None:
    """
    See that a model, cut by a pattern or as much as it can be, may have so few bytes.

    Args:
        name: The model's.
        most: The most bytes that a GGUF file of it may have.
        pattern: What is pruned; None or a goal: as much is cut as can be.
        parameters: All weights.
        prunable: Weights of the blocks.
        llama: Whether `llama-quantize` makes its types.

    Raises:
        InvalidInput: Even with the fewest bits for each weight it has more.
    """
    cut, way_out = MOST_OF_THE_BLOCKS, "take a smaller model"
    cut_out, bits = " with half of its blocks cut", _FEWEST_BITS[llama]
    if pattern is not None and pattern.goal is None:
        cut = pattern.cut_share(parameters=parameters, prunable=prunable)
        cut_out, way_out = "", "cut more"
    least = _LEFT * (parameters - cut * prunable) * bits / 8
    if least > most:
        raise InvalidInput(
            f"{most / 1e6:.4g} MB are too few for {name}, which has at least {least / 1e6:.4g} MB "
            f"as a GGUF file{cut_out}: {bits:g} bits are the fewest here for a weight. Ask for "
            f"more, or {way_out}."
        )


def structured_share(pattern: str) -> tuple[float, bool]:
    """
    Read the share of ``structured:20%`` or ``smaller:20%``, and whether it is one of the file.

    Raises:
        InvalidInput: What follows is not a share between 0 and 1.
    """
    kind, _, words = (part.strip() for part in pattern.partition(":"))
    is_of_file = pattern.startswith(OF_FILE)
    try:
        share = round(float(words.removesuffix("%")) / (100 if words.endswith("%") else 1), 12)
    except ValueError:
        share = 0.0
    if not 0 < share < 1:
        of = "file" if is_of_file else "blocks' weights"
        raise InvalidInput(
            f"pattern {pattern!r} is not a share of the {of}. Write {kind}:20% to cut a fifth."
        )
    return share, is_of_file


def share_of_blocks(share: float, *, parameters: int, prunable: int) -> float:
    """
    The share of the blocks' weights to cut so that a model's file has so much less.

    Raises:
        InvalidInput: More than half of the blocks would have to go.
    """
    most = MOST_OF_THE_BLOCKS * prunable / parameters
    if share > most:
        raise InvalidInput(
            f"pattern {structured_pattern(share, of_file=True)} is more than {most:.0%} of this "
            f"model's file, which is half of what its blocks have of it. Write {OF_FILE}20%, or "
            f"cut more of the blocks: {PREFIX}60%."
        )
    return share * parameters / prunable


def structured_pattern(share: float, *, of_file: bool = False) -> str:
    """The pattern of a share: ``structured:20%``, or ``smaller:20%``."""
    return f"{OF_FILE if of_file else PREFIX}{100 * share:.10g}%"


@dataclass(frozen=True, kw_only=True)
class Cut(JsonDocument):
    """What a configuration cuts out of the blocks of a model, and what they had before."""

    __pydantic_config__ = STRICT

    structure: Structure
    layers: Annotated[Whole, Field(description="Blocks of the dense model.")]
    neurons: Annotated[Whole, Field(description="Neurons of each of its FFNs; 0 if uncut.")]
    query_heads: Annotated[Whole, Field(description="Query heads of each of its attentions.")]
    removed: Annotated[Number, Field(description="Share of the weights of all blocks.")]

    @classmethod
    def of(cls, structure: Structure, shapes: BlockShapes) -> "Cut":
        """A structure of a model with these shapes."""
        return cls(
            structure=structure,
            layers=shapes.layers,
            neurons=shapes.width,
            query_heads=shapes.query_heads[0],
            removed=shapes.removed_share(structure),
        )

    @property
    def is_nothing(self) -> bool:
        """Whether the whole model stays, as where its bits alone make a file small enough."""
        return self.structure == Structure()

    def check(self, shapes: BlockShapes, model: str) -> None:
        """
        Raises:
            InvalidInput: It is of a model whose blocks are others.
        """
        has = (shapes.layers, shapes.width, shapes.query_heads[0])
        wanted = (self.layers, self.neurons, self.query_heads)
        if has != wanted:
            raise InvalidInput(
                f"the configuration is for {self._blocks(*wanted)}, but {model} has "
                f"{self._blocks(*has)}. Search there: `pho prune {model} "
                f"--pattern {structured_pattern(round(self.removed, 2))}`."
            )

    def __str__(self) -> str:
        """What stays, and what share of the blocks' weights is gone."""
        dense = self._blocks(self.layers, self.neurons, self.query_heads)
        return f"{self.structure}, of {dense}: {self.removed:.1%} of their weights are gone"

    @staticmethod
    def _blocks(layers: int, neurons: int, query_heads: int) -> str:
        return f"{layers} blocks with {neurons:,} neurons and {query_heads} query heads"
