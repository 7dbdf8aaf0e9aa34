"""
The shapes of a model's weights, from its configuration alone: no weights, no torch.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pho_service.errors import InvalidInput
from pho_service.planning.layouts import ACTIVATIONS, FAMILIES, Family, Fields, LinearShape

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}


@dataclass(frozen=True, kw_only=True)
class ModelShapes:
    """
    Properties of a model that a plan depends on.

    Attributes:
        family: As its configuration calls it.
        blocks: The linears of each block, in the order of the blocks.
        hidden: Width of a hidden state.
        vocabulary: Number of tokens that it knows.
        outside: Parameters beside the linears: embeddings, head, norms, biases, routers.
        beside: Those of them that lie in blocks, for one block at most.
        heads: Attention heads.
        dtype: That its weights are stored in.
        context: Longest window that it can read; None if its configuration does not say.
        norms: Elements of a token that the norms of a block read.
        activations: Tensors of its widest size that a block's activation keeps for a backward
            pass, beside its input and its output.
    """

    family: str
    blocks: tuple[tuple[LinearShape, ...], ...]
    hidden: int
    vocabulary: int
    outside: int
    beside: int
    heads: int
    dtype: str
    context: int | None
    norms: int
    activations: int

    @property
    def prunable(self) -> int:
        """Number of prunable weights."""
        return sum(linear.weights for block in self.blocks for linear in block)

    @property
    def parameters(self) -> int:
        """Number of all parameters."""
        return self.prunable + self.outside

    @property
    def active(self) -> float:
        """Weights of the blocks that a token is multiplied by, twice that are its FLOP."""
        return sum(linear.share * linear.weights for block in self.blocks for linear in block)

    def bytes(self, dtype: str | None = None) -> int:
        """Size of all weights in a dtype; by default the stored one."""
        return self.parameters * DTYPE_BYTES[dtype or self.dtype]

    def block_bytes(self, dtype: str | None = None) -> int:
        """Size of the largest block."""
        largest = max(sum(linear.weights for linear in block) for block in self.blocks)
        return (largest + self.beside) * DTYPE_BYTES[dtype or self.dtype]


def model_shapes(name: str, config: Mapping[str, Any]) -> ModelShapes:
    """
    Give the shapes of a model.

    Args:
        name: The model's, for messages.
        config: The contents of its config.json. A multimodal model's decoder is its
            ``text_config``; what is beside the decoder (a vision tower) is not counted.

    Raises:
        InvalidInput: A family whose layout is not known here, or a field that is missing or wrong.
    """
    text = config.get("text_config")
    values = dict(text) if isinstance(text, Mapping) else dict(config)
    values.setdefault("model_type", {"gemma3": "gemma3_text"}.get(str(config.get("model_type"))))
    dtypes = (values.get("dtype"), values.get("torch_dtype"), config.get("dtype"),
              config.get("torch_dtype"), "float32")  # fmt: skip
    dtype = next(str(d) for d in dtypes if d).removeprefix("torch.")
    if dtype not in DTYPE_BYTES:
        raise InvalidInput(
            f"{name}: its weights are stored as {dtype!r}, which is none of "
            f"{', '.join(DTYPE_BYTES)}. Quantised models cannot be pruned: give the original."
        )
    kind = str(values["model_type"])
    family = FAMILIES.get(kind)
    if family is None:
        raise InvalidInput(
            f"{name}: the family {kind!r} cannot be planned from its configuration alone. Known "
            f"are {', '.join(sorted(FAMILIES))}. A calibration says what it needs before it begins."
        )
    given = {field: value for field, value in values.items() if value is not None}
    read = Fields(name, {**(family.defaults or {}), **given})
    blocks = tuple(tuple(block) for block in family.blocks(read))
    hidden = read.number("hidden_size", "n_embd")
    vocabulary = read.number("vocab_size")
    context = read.number("max_position_embeddings", "n_positions", default=0)
    embedded = read.number("word_embed_proj_dim", default=hidden)
    tied = read.flag("tie_word_embeddings", default=family.tied)
    beside = max(_beside(read, block) for block in blocks)
    activation = given.get("hidden_act") or given.get("activation_function")
    outside = sum(_beside(read, block) for block in blocks)
    outside += vocabulary * embedded * (1 if tied else 2) + hidden
    outside += 2 * hidden * embedded if embedded != hidden else 0
    if family.positions is not None:
        outside += (context + family.positions) * hidden
    return ModelShapes(
        family=kind,
        blocks=blocks,
        hidden=hidden,
        vocabulary=vocabulary,
        outside=outside,
        beside=beside,
        heads=read.heads,
        dtype=dtype,
        context=context or None,
        norms=_norms(read, family),
        activations=ACTIVATIONS.get(str(activation), 0),
    )


def _norms(config: Fields, family: Family) -> int:
    """Elements of a token that the norms of a block read."""
    heads = config.heads + config.key_heads if family.head_norms else 0
    return family.norms * config.number("hidden_size", "n_embd") + heads * config.head_dim


def _beside(config: Fields, block: Iterable[LinearShape]) -> int:
    """Parameters of a block beside its linears: norms, biases, routers; all are small."""
    hidden = config.number("hidden_size", "n_embd")
    block = list(block)
    routers = sum(
        linear.count * hidden for linear in block if linear.name.endswith("experts.gate_proj")
    )
    biases = sum(linear.out_features for linear in block if linear.count == 1)
    return 4 * hidden + routers + biases
