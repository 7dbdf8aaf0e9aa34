"""
The shapes of a model's weights, from the header of its files: no weights, no torch.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any, NamedTuple

from pho_service.errors import InvalidInput

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}
_STORED = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}
# Tensors that an activation in plain operations keeps for a backward pass; others keep their input.
ACTIVATIONS = {
    "gelu_new": 2, "gelu_fast": 5, "gelu_python": 1, "gelu_python_tanh": 2, "gelu_accurate": 2,
    "xielu": 3,
}  # fmt: skip
_IN_BLOCK = re.compile(r"(.+?)\.(\d{1,6})\.(.+)")
_EXPERT = re.compile(r"(.*\bexperts)\.(?:\d+\.)?(.+)")


class Stored(NamedTuple):
    """A tensor of a file."""

    shape: tuple[int, ...]
    dtype: str  # as safetensors names it: BF16


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a model's files say before its weights are read: config.json, and the tensors."""

    config: Mapping[str, Any]
    tensors: Mapping[str, Stored]


@dataclass(frozen=True, kw_only=True)
class LinearShape:
    """One prunable linear of a block, or the same matrix of all experts of a mixture."""

    name: str  # inside of its block: self_attn.q_proj
    out_features: int
    in_features: int
    reads: str = ""  # names the input that it shares with others, whose statistics are one
    count: int = 1  # of experts
    share: float = 1.0  # of the tokens that reach each expert

    @property
    def weights(self) -> int:
        """Number of weights, of all experts."""
        return self.count * self.out_features * self.in_features


@dataclass(frozen=True, kw_only=True)
class BlockShape:
    """What can be pruned of a block, and what is beside it."""

    linears: tuple[LinearShape, ...]
    parameters: int
    norms: int  # elements of a token that they read


@dataclass(frozen=True, kw_only=True)
class ModelShapes:
    """Properties of a model that a plan depends on."""

    family: str  # as its configuration calls it
    blocks: tuple[BlockShape, ...]
    hidden: int
    vocabulary: int
    parameters: int
    dtype: str  # that its weights are stored in
    context: int | None  # longest window that it can read, if its configuration says so
    activations: int  # see ACTIVATIONS

    @property
    def linears(self) -> Iterator[LinearShape]:
        """What can be pruned, of all blocks."""
        return (linear for block in self.blocks for linear in block.linears)

    @property
    def prunable(self) -> int:
        """Number of prunable weights."""
        return sum(linear.weights for linear in self.linears)

    @property
    def active(self) -> float:
        """Weights of the blocks that a token is multiplied by, twice that are its FLOP."""
        return sum(linear.share * linear.weights for linear in self.linears)

    def bytes(self, dtype: str | None = None) -> int:
        """Size of all weights in a dtype; by default the stored one."""
        return self.parameters * DTYPE_BYTES[dtype or self.dtype]


def model_shapes(name: str, header: Header) -> ModelShapes:
    """Return the shapes of a model; InvalidInput, with its name, if it cannot be pruned."""
    text = header.config.get("text_config")
    config = dict(text) if isinstance(text, Mapping) else dict(header.config)
    layers = _number(name, config, "num_hidden_layers", "n_layer", "num_layers", "n_layers")
    chosen = _number(name, config, "num_experts_per_tok", "num_experts_per_token")
    inside, outside = _split(header.tensors, layers)
    linears = [_linears(name, block, chosen) for block in inside]
    if not linears or not all(linears):
        raise InvalidInput(
            f"{name}: its weights are not linears of numbered blocks, as in model.layers.0, so it "
            "cannot be planned. A calibration says what it needs before it begins."
        )
    # All that reads or writes the hidden states has their width.
    sizes = Counter(
        size for block in linears for li in block for size in (li.out_features, li.in_features)
    )
    hidden = sizes.most_common(1)[0][0]
    blocks = tuple(_block(block, own, hidden) for block, own in zip(inside, linears, strict=True))
    dtypes = [
        str(each.get(field)).removeprefix("torch.")
        for each in (config, header.config)
        for field in ("dtype", "torch_dtype")
    ]
    dtypes += [_STORED[t.dtype] for block in inside for t in block.values() if len(t.shape) > 1]
    if config.get("tie_word_embeddings"):
        outside.pop("lm_head.weight", None)  # the embedding, once more
    tables = [t.shape for t in outside.values() if len(t.shape) == 2] or [(1, 1)]
    vocabulary = _number(name, config, "vocab_size") or max(tables, key=prod)[0]
    activation = config.get("hidden_act") or config.get("activation_function")
    context = _number(name, config, "max_position_embeddings", "n_positions")
    return ModelShapes(
        family=str(config.get("model_type") or header.config.get("model_type")),
        blocks=blocks,
        hidden=hidden,
        vocabulary=vocabulary,
        parameters=sum(prod(t.shape) for t in outside.values())
        + sum(block.parameters for block in blocks),
        dtype=next(each for each in dtypes if each in DTYPE_BYTES),
        context=context,
        activations=ACTIVATIONS.get(str(activation), 0),
    )


def _number(name: str, config: Mapping[str, Any], *fields: str) -> int | None:
    """The first of the fields that is there."""
    field = next((field for field in fields if config.get(field) is not None), None)
    if field is None:
        return None
    value = config[field]
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
        raise InvalidInput(
            f"{name}: {field}={value!r} in its configuration is not a whole number "
            "above 0, so nothing can be planned for it. Check the file."
        )
    return value


_Tensors = dict[str, Stored]


def _split(tensors: Mapping[str, Stored], layers: int | None) -> tuple[list[_Tensors], _Tensors]:
    """The tensors of each block of the decoder, by their names inside of it; and all others."""
    lists: dict[str, dict[int, _Tensors]] = defaultdict(lambda: defaultdict(dict))
    for full_name, tensor in tensors.items():
        if _is_parameter(full_name, tensor) and (found := _IN_BLOCK.fullmatch(full_name)):
            lists[found[1]][int(found[2])][found[3]] = tensor

    # A vision tower has blocks, too: fewer, or smaller ones.
    def rank(numbered: dict[int, _Tensors]) -> tuple[bool, int]:
        weights = sum(prod(t.shape) for block in numbered.values() for t in block.values())
        return len(numbered) >= (layers or 0), weights

    decoder = max(lists, key=lambda where: rank(lists[where]), default="")
    # Blocks beyond the last one predict further tokens in training; they are not loaded.
    own = lists[decoder]
    blocks = [own[i] for i in sorted(own) if layers is None or i < layers]
    outside = {
        full_name: tensor
        for full_name, tensor in tensors.items()
        if _is_parameter(full_name, tensor) and not full_name.startswith(f"{decoder}.")
    }
    return blocks, outside


def _is_parameter(name: str, tensor: Stored) -> bool:
    """Whether a tensor is not a buffer: old checkpoints of GPT-2 have its attention masks."""
    return not (name.endswith("bias") and len(tensor.shape) > 2)


def _linears(name: str, block: _Tensors, chosen: int | None) -> list[LinearShape]:
    """The linears of a block, without its routers; their inputs are not known yet."""
    found: dict[str, LinearShape] = {}
    experts: dict[str, int] = {}
    for full_name, (shape, dtype) in block.items():
        if len(shape) < 2:
            continue
        path = full_name.removesuffix(".weight")
        if dtype not in _STORED:
            raise InvalidInput(
                f"{name}: its weights are stored as {dtype!r}, which is none of "
                f"{', '.join(_STORED)}. Quantised models cannot be pruned: give the original."
            )
        expert = _EXPERT.fullmatch(path)
        if len(shape) == 3 and expert:
            for linear in _fused(path, shape):
                found[linear.name], experts[expert[1]] = linear, shape[0]
        elif len(shape) != 2 or path == full_name:
            raise InvalidInput(
                f"{name}: {full_name} {shape} of a block is not the weight of a linear, so that it "
                "cannot be pruned. Models with such weights (convolutions, states) are not "
                "supported."
            )
        elif expert:
            short = f"{expert[1]}.{expert[2]}"
            before = found[short].count if short in found else 0
            found[short] = _linear(short, shape, count=before + 1)
            experts[expert[1]] = before + 1
        else:
            bias = block.get(f"{path}.bias", Stored((), "")).shape
            # GPT-2 keeps its weights as (in, out): the bias has the size of what comes out.
            found[path] = _linear(path, shape if bias in ((), shape[:1]) else shape[::-1])
    routers = {each for where, count in experts.items() for each in _routers(found, where, count)}
    return [
        replace(li, share=min(1.0, (chosen or li.count) / li.count)) if li.count > 1 else li
        for path, li in found.items()
        if path not in routers
    ]


def _linear(name: str, shape: tuple[int, ...], count: int = 1) -> LinearShape:
    return LinearShape(name=name, out_features=shape[0], in_features=shape[1], count=count)


def _fused(path: str, shape: tuple[int, ...]) -> list[LinearShape]:
    """The matrices of all experts in one tensor, (experts, out_features, in_features)."""
    count, rows, width = shape
    if "gate_up" not in path:
        return [_linear(path, (rows, width), count)]
    names = (path.replace("gate_up", each) for each in ("gate", "up"))
    return [_linear(each, (rows // 2, width), count) for each in names]


def _routers(linears: Mapping[str, LinearShape], experts: str, count: int) -> Iterator[str]:
    """Beside the experts the linears that are alone and have a row for each of them, or one."""
    parent = experts.rpartition("experts")[0]
    beside = defaultdict(list)
    for path in linears:
        if path.startswith(parent) and not path.startswith(f"{experts}."):
            beside[path.removeprefix(parent).partition(".")[0]].append(path)
    for path, *more in beside.values():
        if not more and linears[path].out_features in (count, 1):
            yield path


def _block(block: _Tensors, linears: list[LinearShape], hidden: int) -> BlockShape:
    """A block, with the inputs that its linears share."""
    norms = {n: t.shape[0] for n, t in block.items() if len(t.shape) == 1 and n.endswith("weight")}
    # Where there is one norm alone, attention and feed-forward stand side by side behind it.
    together = list(norms.values()).count(hidden) == 1
    by_parent = defaultdict(list)
    for linear in linears:
        by_parent[linear.name.rpartition(".")[0]].append(linear)
    known = []
    for parent, own in by_parent.items():
        # One of them gives the hidden states back, and reads what the others have made.
        backs = [li for li in own[::-1] if li.out_features == hidden] if len(own) > 1 else []
        back = max(backs, key=lambda li: li.in_features != hidden, default=None)
        for linear in own:
            where = "" if together and linear.in_features == hidden else parent
            reads = f"{parent} back" if linear is back else f"{where} {linear.in_features}"
            known.append(replace(linear, reads=reads))
    return BlockShape(
        linears=tuple(known),
        parameters=sum(prod(t.shape) for t in block.values()),
        norms=sum(
            size if size >= hidden else _read_by_norm(norm, size, by_parent)
            for norm, size in norms.items()
        ),
    )


def _read_by_norm(norm: str, size: int, linears: Mapping[str, list[LinearShape]]) -> int:
    """Elements of a token that a narrow norm reads: ``q_norm`` all heads of ``q_proj``."""
    parent, _, own = norm.removesuffix(".weight").rpartition(".")
    lead = re.split(r"_?(?:layer)?norm", own)[0]
    outs = [
        li.out_features
        for li in linears.get(parent, ())
        if lead and li.name.removeprefix(f"{parent}.").startswith(lead)
    ]
    return outs[0] if outs else size
