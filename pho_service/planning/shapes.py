"""
The shapes of a model's weights, from the headers of its files: no weights, no torch.
"""

import asyncio
import json
import re
import struct
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache, cached_property, lru_cache
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import gguf
import numpy as np

from pho_service.errors import InvalidInput, ModelError, shown
from pho_service.host.access import is_path
from pho_service.host.machine import hub_answers
from pho_service.host.model_files import MAX_BYTES, check_config, shards_of

_T = TypeVar("_T")

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}
_STORED = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}
# Tensors that an activation in plain operations keeps for a backward pass; others keep their input.
ACTIVATIONS = {
    "gelu_new": 2, "gelu_fast": 5, "gelu_python": 1, "gelu_python_tanh": 2, "gelu_accurate": 2,
    "xielu": 3,
}  # fmt: skip
_IN_BLOCK = re.compile(r"(.+?)\.(\d{1,6})\.(.+)")
_EXPERT = re.compile(r"(.*\bexperts)\.(?:\d+\.)?(.+)")


class TensorHeader(NamedTuple):
    """A tensor of a file."""

    shape: tuple[int, ...]
    dtype: str  # as safetensors names it: BF16


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a model's files say before its weights are read: config.json, and the tensors."""

    config: Mapping[str, Any]
    tensors: Mapping[str, TensorHeader]


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

    @cached_property
    def linears(self) -> tuple[LinearShape, ...]:
        """What can be pruned, of all blocks."""
        return tuple(linear for block in self.blocks for linear in block.linears)

    @cached_property
    def prunable(self) -> int:
        return sum(linear.weights for linear in self.linears)

    @cached_property
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
    _check_bound(name, "layers", len(inside), MOST_LAYERS)
    linears = [_linears(name, block, chosen) for block in inside]
    _check_bound(name, "linears", sum(map(len, linears)), MOST_LINEARS)
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
    blocks = tuple(_block(*block, hidden) for block in zip(inside, linears, strict=True))
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


def _check_bound(name: str, what: str, count: int, most: int) -> None:
    if count > most:
        raise InvalidInput(
            f"{name} has {count} {what}, and {most} are the most that are planned for. Check that "
            "its files are those of a language model."
        )


def _number(name: str, config: Mapping[str, Any], *fields: str) -> int | None:
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


_Tensors = dict[str, TensorHeader]


def _split(
    tensors: Mapping[str, TensorHeader], layers: int | None
) -> tuple[list[_Tensors], _Tensors]:
    """The tensors of each block of the decoder, by their names inside of it; and all others."""
    lists: dict[str, dict[int, _Tensors]] = defaultdict(lambda: defaultdict(dict))
    for full_name, tensor in tensors.items():
        if _is_parameter(full_name, tensor) and (match := _IN_BLOCK.fullmatch(full_name)):
            lists[match[1]][int(match[2])][match[3]] = tensor

    # A vision tower has blocks, too: fewer, or smaller ones.
    def rank(numbered: dict[int, _Tensors]) -> tuple[bool, int]:
        weights = sum(prod(t.shape) for block in numbered.values() for t in block.values())
        return len(numbered) >= (layers or 0), weights

    decoder = max(lists, key=lambda where: rank(lists[where]), default="")
    # Blocks beyond the last one predict further tokens in training; they are not loaded.
    numbered = lists[decoder]
    blocks = [numbered[i] for i in sorted(numbered) if layers is None or i < layers]
    outside = {
        full_name: tensor
        for full_name, tensor in tensors.items()
        if _is_parameter(full_name, tensor) and not full_name.startswith(f"{decoder}.")
    }
    return blocks, outside


def _is_parameter(name: str, tensor: TensorHeader) -> bool:
    """Whether a tensor is not a buffer: old checkpoints of GPT-2 have its attention masks."""
    return not (name.endswith("bias") and len(tensor.shape) > 2)


def _linears(name: str, block: _Tensors, chosen: int | None) -> list[LinearShape]:
    """The linears of a block, without its routers; their inputs are not known yet."""
    linears: dict[str, LinearShape] = {}
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
                linears[linear.name], experts[expert[1]] = linear, shape[0]
        elif len(shape) != 2 or path == full_name:
            raise InvalidInput(
                f"{name}: {full_name} {shape} of a block is not the weight of a linear, so that it "
                "cannot be pruned. Models with such weights (convolutions, states) are not "
                "supported."
            )
        elif expert:
            short = f"{expert[1]}.{expert[2]}"
            before = linears[short].count if short in linears else 0
            linears[short] = _linear(short, shape, count=before + 1)
            experts[expert[1]] = before + 1
        else:
            bias = block.get(f"{path}.bias", TensorHeader((), "")).shape
            # GPT-2 keeps its weights as (in, out): the bias has the size of what comes out.
            linears[path] = _linear(path, shape if bias in ((), shape[:1]) else shape[::-1])
    _check_bound(name, "experts of a linear", max(experts.values(), default=0), MOST_EXPERTS)
    routers = {path for where, n in experts.items() for path in _routers(linears, where, n)}
    return [
        replace(li, share=min(1.0, (chosen or li.count) / li.count)) if li.count > 1 else li
        for path, li in linears.items()
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
    readers = []
    for parent, siblings in by_parent.items():
        # One of them gives the hidden states back, and reads what the others have made.
        backs = [li for li in siblings[::-1] if li.out_features == hidden]
        if len(siblings) == 1:
            backs = []
        back = max(backs, key=lambda li: li.in_features != hidden, default=None)
        for linear in siblings:
            where = "" if together and linear.in_features == hidden else parent
            reads = f"{parent} back" if linear is back else f"{where} {linear.in_features}"
            readers.append(replace(linear, reads=reads))
    return BlockShape(
        linears=tuple(readers),
        parameters=sum(prod(t.shape) for t in block.values()),
        norms=sum(
            size if size >= hidden else _read_by_norm(norm, size, by_parent)
            for norm, size in norms.items()
        ),
    )


def _read_by_norm(norm: str, size: int, linears: Mapping[str, list[LinearShape]]) -> int:
    """Elements of a token that a narrow norm reads: ``q_norm`` all heads of ``q_proj``."""
    parent, _, name = norm.removesuffix(".weight").rpartition(".")
    lead = re.split(r"_?(?:layer)?norm", name)[0]
    outs = [
        li.out_features
        for li in linears.get(parent, ())
        if lead and li.name.removeprefix(f"{parent}.").startswith(lead)
    ]
    return outs[0] if outs else size


# What the files of a model say before its weights are read: a folder's, a GGUF file's, or the
# hub's.
MOST_BYTES = 2**22  # of a configuration; those of the hub have some kilobytes
MOST_HEADER = 2**24  # bytes of a safetensors header; a hundred thousand tensors have 12 MB
MOST_TENSORS = 2**18  # of a model; Kimi K2 has 70,000
# Of a model: its blocks, the linears of all (those of experts once), the experts of a linear.
MOST_LAYERS, MOST_LINEARS, MOST_EXPERTS = 1_000, 5_000, 10_000
TIMEOUT_S = 20.0  # for the hub's answer to a question, with all its headers
CONFIG = "config.json"
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_READ = (".json", ".safetensors", ".gguf")

_GGUF_FIELDS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "vocab_size": "vocab_size",
    "expert_used_count": "num_experts_per_tok",
}
# Tensors of GGUF in the words of transformers: blk.0.ffn_up_exps.weight.
_GGUF_NAMES = (
    (re.compile(r"\.(attn|ffn)_"), r".\1."),
    (re.compile(r"\.(\w+)_exps\b"), r".experts.\1"),
    (re.compile(r"\.(\w+)_shexp\b"), r".shared.\1"),
)


def read_header(name: str, *, revision: str | None = None, path: str | None = None) -> Header:
    """Read the configuration of a model and the headers of its weights, and nothing else of it."""
    # ``path`` is where it lies, if that is not its name, which messages have.
    place = Path(path or name).expanduser()
    if not place.exists() and not is_path(str(path or name)):
        return _of_hub(name, revision)
    if not place.exists():
        raise ModelError(
            f"{name} does not exist on this machine. Give a hub id, a model folder or a .gguf file."
        )
    with _readable(name):
        if place.suffix == ".gguf":
            return _of_gguf(name, place)
        return Header(config=_config(name, place), tensors=_of_folder(name, place))


# Headers of a hundred thousand tensors take seconds, and pages ask for them again and again.
_READING = threading.Lock()


def read_shapes(name: str, *, revision: str | None = None, path: str | None = None) -> ModelShapes:
    """Read the shapes of a model, those of files on this machine once, however many ask."""
    place = Path(path or name).expanduser()
    if not place.exists():
        return model_shapes(name, read_header(name, revision=revision, path=path))
    with _readable(name):
        files = [*place.iterdir()] if place.is_dir() else [place]
        about = [(file, file.stat()) for file in files if file.suffix in _READ]
    state = tuple(sorted((file.name, of.st_size, of.st_mtime_ns) for file, of in about))
    with _READING:
        shapes = _shapes_here(name, str(place), state)
    if isinstance(shapes, ModelShapes):
        return shapes
    raise type(shapes)(str(shapes))


@lru_cache(maxsize=32)
def _shapes_here(
    name: str, path: str, state: tuple[tuple[str, int, int], ...]
) -> ModelShapes | InvalidInput | ModelError:
    del state  # another one is read anew
    try:
        return model_shapes(name, read_header(name, path=path))
    except (InvalidInput, ModelError) as error:
        return type(error)(str(error))  # without what was read


def place_at_hand(path: str, revision: str | None = None) -> Path | None:
    """Where the files of a model lie on this machine; None if they do not."""
    return Path(path) if Path(path).is_absolute() else _cached(path, revision)


def config_at_hand(
    name: str, path: str, *, revision: str | None = None
) -> Mapping[str, Any] | None:
    """Read the configuration of a model if that needs no network."""
    # None if it is not on this machine, or cannot be read: whoever loads the model says why.
    place = place_at_hand(path, revision)
    if place is None:
        return None
    try:
        with _readable(name):
            is_gguf = place.suffix == ".gguf"
            return _of_gguf(name, place).config if is_gguf else _config(name, place)
    except ModelError:
        return None


def longest_of(name: str, revision: str | None = None) -> int | None:
    """The tokens that a model reads, by its configuration, here or on the hub; None if unknown."""
    place = Path(name).expanduser()
    here = place.exists() or is_path(name)
    config = config_at_hand(name, str(place.resolve()) if here else name, revision=revision)
    if config is None and not here and hub_answers():
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError

        with suppress(HfHubHTTPError, HFValidationError, OSError, ModelError):
            file = hf_hub_download(name, CONFIG, revision=revision, etag_timeout=TIMEOUT_S)
            config = _config(name, Path(file).parent)
    return longest_context(config)


def longest_context(config: Mapping[str, Any] | None) -> int | None:
    """The tokens of the longest window that a model reads; None if its configuration is silent."""
    if config is None:
        return None
    text = config.get("text_config")
    values = text if isinstance(text, Mapping) else config
    for name in ("max_position_embeddings", "n_positions"):
        value = values.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


@contextmanager
def _readable(name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ModelError(f"{name} cannot be read: {error.strerror}.") from error


def _config(name: str, folder: Path) -> dict[str, Any]:
    check_config(folder, name)
    with (folder / CONFIG).open("rb") as opened:
        return _parsed_config(name, opened.read(MOST_BYTES + 1))


def _parsed_config(name: str, content: bytes) -> dict[str, Any]:
    if len(content) > MOST_BYTES:
        raise ModelError(f"{name}: its config.json has more than {MOST_BYTES} bytes.")
    try:
        values = json.loads(content)
    except (ValueError, RecursionError):
        raise ModelError(f"{name}: its config.json is not JSON. Get the file again.") from None
    if not isinstance(values, dict):
        raise ModelError(f"{name}: its config.json is not a JSON object. Get the file again.")
    return values


def _of_folder(name: str, folder: Path) -> dict[str, TensorHeader]:
    """The tensors of a folder's files, those that transformers would read."""
    files = [folder / _WEIGHTS]
    if not files[0].is_file():
        index = folder / _INDEX
        if not index.is_file():
            raise _without_weights(name)
        with index.open("rb") as opened:
            content = opened.read(MAX_BYTES + 1)
        files = [folder / each for each in shards_of(content, _INDEX)]
    tensors: dict[str, TensorHeader] = {}
    for file in files:
        if not file.is_file():
            raise _without_shard(name, file.name)
        with file.open("rb") as opened:
            content = opened.read(8)
            content += opened.read(_header_end(content) - 8)
        tensors |= _tensors(name, file.name, content)
        _check_number(name, tensors)
    return tensors


def _header_end(begin: bytes | bytearray) -> int:
    """Where the header of a safetensors file ends, by its first bytes; if it is far, before."""
    return 8 + min(int.from_bytes(begin[:8], "little") if len(begin) >= 8 else 0, MOST_HEADER)


def _tensors(name: str, file: str, content: bytes) -> dict[str, TensorHeader]:
    """What the header of a safetensors file says, by the file's first bytes."""
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length]
    if not 0 < length == len(header):
        raise _damaged(name, file, "it has no header, or one that is cut short")
    try:
        document = json.loads(header)
        document.pop("__metadata__", None)
        return {key: _stored(entry["shape"], entry["dtype"]) for key, entry in document.items()}
    except (ValueError, RecursionError, AttributeError, KeyError, TypeError) as error:
        raise _damaged(name, file, f"its header cannot be read: {error}") from error


def _stored(shape: Any, dtype: Any) -> TensorHeader:
    if not isinstance(shape, list | tuple) or len(shape) > 8 or not isinstance(dtype, str):
        raise ValueError("a tensor has no shape or no dtype")
    if not all(type(size) is int and 0 < size < 2**31 for size in shape):
        raise ValueError("a size is not a whole number above 0")
    return TensorHeader(tuple(shape), dtype)


def _damaged(name: str, file: str, reason: str) -> ModelError:
    return ModelError(f"{name}: {file} is damaged: {shown(reason)}. Get the file again.")


def _without_shard(name: str, file: str) -> ModelError:
    return ModelError(f"{name} has no {file}, which its index names. Get it again.")


def _without_weights(name: str) -> ModelError:
    return ModelError(
        f"{name} has neither {_WEIGHTS} nor {_INDEX}, whose headers say how large a model is. Only "
        "safetensors and GGUF are accepted, since pickled weights can run any code."
    )


def _check_number(name: str, tensors: Mapping[str, Any]) -> None:
    if len(tensors) > MOST_TENSORS:
        raise ModelError(f"{name} has more than {MOST_TENSORS} tensors, which no model has.")


def _cached(name: str, revision: str | None) -> Path | None:
    """The folder of a hub model in the hub's cache on this machine; None if it is not there."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    if ".." in (revision or "") or (revision or "").startswith("/"):
        return None
    try:
        file = try_to_load_from_cache(name, CONFIG, revision=revision)
    except (HFValidationError, OSError, ValueError):
        return None
    return Path(file).parent if isinstance(file, str) else None


def _of_hub(name: str, revision: str | None) -> Header:
    """What the hub has of a model; where it cannot be asked, what its cache has."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    away: type[BaseException] = HfHubHTTPError.__bases__[0]  # of its HTTP library
    try:
        content, commit = asyncio.run(_within_time(_config_on_hub(name, revision)))
        config = _parsed_config(name, content)
        kept = _cached(name, commit)
        if kept is not None and (kept / _WEIGHTS).is_file():
            return Header(config=config, tensors=_of_folder(name, kept))
        return Header(config=config, tensors=_on_hub(name, commit))
    except HFValidationError as error:
        raise ModelError(
            f"{name!r} is neither a folder or file here nor a name on the hub, which looks like "
            "org/name. Check the spelling."
        ) from error
    except (OSError, away) as error:
        kept = _cached(name, revision)
        if kept is not None and any(kept.glob("model*.safetensors")):
            return Header(config=_config(name, kept), tensors=_of_folder(name, kept))
        raise ModelError(
            f"{name} is not a folder here, and the Hugging Face hub cannot be reached "
            f"({type(error).__name__}). Check the network and HF_ENDPOINT, or give a local folder."
        ) from error


async def _within_time(request: Coroutine[Any, Any, _T]) -> _T:
    async with asyncio.timeout(TIMEOUT_S):  # each read alone could wait as often as it likes
        return await request


async def _config_on_hub(name: str, revision: str | None) -> tuple[bytes, str | None]:
    """A model's configuration, and the commit that it is of."""
    from huggingface_hub import get_async_session

    async with get_async_session() as session:
        answer = await _from_hub(session, name, CONFIG, revision, lambda _: MOST_BYTES + 1)
    if answer is None:
        raise ModelError(
            f"{name}: the hub has no such model or revision, or it is private or gated. Check "
            "the spelling, accept its licence on the hub and set HF_TOKEN, or give a local "
            "folder."
        )
    content, commit = answer
    return content, commit or revision


@lru_cache(maxsize=16)
def _on_hub(name: str, commit: str | None) -> dict[str, TensorHeader]:
    """The tensors of a model's files on the hub, whose headers alone are asked for."""
    return asyncio.run(_within_time(_tensors_on_hub(name, commit)))


async def _tensors_on_hub(name: str, commit: str | None) -> dict[str, TensorHeader]:
    from huggingface_hub import get_async_session

    tensors: dict[str, TensorHeader] = {}
    at_once = asyncio.Semaphore(8)
    async with get_async_session() as session:

        async def read(file: str) -> bool:
            async with at_once:
                answer = await _from_hub(session, name, file, commit, _header_end)
            if answer is None:
                return False
            tensors.update(_tensors(name, file, answer[0]))
            _check_number(name, tensors)
            return True

        if await read(_WEIGHTS):
            return tensors
        index = await _from_hub(session, name, _INDEX, commit, lambda _: MAX_BYTES + 1)
        if index is None:
            raise _without_weights(name)
        files = shards_of(index[0], _INDEX)
        there = await asyncio.gather(*map(read, files))
    if not all(there):
        raise _without_shard(name, files[there.index(False)])
    return tensors


async def _from_hub(
    session: Any, name: str, file: str, revision: str | None, end: Callable[[bytearray], int]
) -> tuple[bytes, str | None] | None:
    """The first bytes of a file, up to where they say that is enough; and its commit."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # documented

    headers = {**build_hf_headers(), "accept-encoding": "identity"}  # nothing grows on the way
    request = session.build_request(
        "GET", hf_hub_url(name, file, revision=revision), headers=headers
    )
    hub, commit, content = (request.url.host, request.url.port), None, bytearray()
    for _ in range(5):
        answer = await session.send(request, stream=True, follow_redirects=False)
        try:
            commit = commit or answer.headers.get("x-repo-commit")
            if answer.status_code in (401, 403, 404):
                return None
            if answer.next_request is None and answer.status_code == 200:
                async for chunk in answer.aiter_raw():
                    content += chunk
                    if len(content) >= end(content):
                        break
                return bytes(content), commit
        finally:
            await answer.aclose()
        request = answer.next_request  # without the token, if it goes to another host
        if request is None:
            break
        if request.url.scheme != "https" and hub != (request.url.host, request.url.port):
            raise ModelError(f"{name}: the hub leads {file} to an address without https.")
    raise ModelError(f"{name}: the hub answered {answer.status_code}. Try again later.")


def _of_gguf(name: str, file: Path) -> Header:
    try:
        fields, shapes = read_gguf(file)
        tensors = {key: _stored(shape, "F32") for key, shape in shapes.items()}
    except ValueError as error:
        reason = shown(str(error))
        raise ModelError(f"{name} is not a whole GGUF file: {reason}. Get it again.") from error
    kind = str(fields.get("general.architecture"))
    config = {ours: fields.get(f"{kind}.{field}") for field, ours in _GGUF_FIELDS.items()}
    config |= {"model_type": kind, "dtype": "float32"}  # as transformers makes it dense
    for pattern, words in _GGUF_NAMES:
        tensors = {pattern.sub(words, key): tensor for key, tensor in tensors.items()}
    return Header(config=config, tensors=tensors)


# GGUF files, read without doing the same work again and again, or more than they hold.
MAX_READS = 2**22  # values of a header, some 400 bytes each in memory; Gemma's has two million


class BoundedReader(gguf.GGUFReader):
    """gguf's reader, but what a header declares must be in the file."""

    # gguf itself reads on beyond the end, value by value: 60 bytes that declare an array of 2**60
    # values would fill the memory.

    _reads = 0

    def __init__(self, path: Any, mode: Any = "r") -> None:
        super().__init__(path, mode)
        parts = self.get_field("split.count")
        if parts is not None and int(parts.contents()) > 1:  # transformers reads this file alone
            raise ValueError(
                f"it is one of {int(parts.contents())} parts. Put them together first, with "
                "`llama-gguf-split --merge` of llama.cpp"
            )

    def _get(self, offset: Any, dtype: Any, count: Any = 1, override_order: Any = None) -> Any:
        self._reads += 1
        if isinstance(self.data, np.memmap):  # which takes several times as long for each slice
            self.data: Any = self.data.view(np.ndarray)
        values = super()._get(offset, dtype, count, override_order)
        if len(values) < int(count):
            raise ValueError(f"the file ends in what is declared at byte {int(offset)}")
        if self._reads > MAX_READS:
            raise ValueError(f"its header has more than {MAX_READS} values")
        return values


class _WithoutArrays(BoundedReader):
    """The header alone: of an array the number of its values, which are passed over."""

    def _get_field_parts(self, orig_offs: Any, raw_type: Any) -> Any:
        if raw_type != gguf.GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        kind = gguf.GGUFValueType(int(self._get(orig_offs, np.uint32)[0]))
        length = self._get(orig_offs + 4, np.uint64)
        count, end = int(length[0]), orig_offs + 12
        if kind in self.gguf_scalar_to_np:
            end += count * np.dtype(self.gguf_scalar_to_np[kind]).itemsize
        elif kind == gguf.GGUFValueType.STRING:
            self._reads += count
            if self._reads > MAX_READS:
                raise ValueError(f"its header has more than {MAX_READS} values")
            text_length = struct.Struct("<Q" if self.byte_order == "I" else ">Q")
            for _ in range(count):
                end += 8 + text_length.unpack_from(self.data, end)[0]
        else:
            raise ValueError("its header has arrays of arrays")
        if end > len(self.data):
            raise ValueError(f"the file ends in what is declared at byte {int(orig_offs)}")
        return end - orig_offs, [length], [0], [gguf.GGUFValueType.UINT64]

    def _build_tensors(self, _start_offs: Any, fields: Any) -> None:
        """Nothing of the weights is looked at."""
        self.shapes = {
            bytes(field.parts[1]).decode(): tuple(map(int, field.parts[3][8::-1]))  # 9 at most
            for field in fields
        }


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """Read a header's fields, of an array the number of its values, and the tensors' shapes."""
    # What is not a whole GGUF file is a ValueError.
    try:
        reader = _WithoutArrays(path)
    except (KeyError, IndexError, OverflowError, struct.error) as error:
        raise ValueError(str(error)) from error
    return {name: field.contents() for name, field in reader.fields.items()}, reader.shapes


@contextmanager
def gguf_read_once() -> Iterator[None]:
    """Inside, a GGUF file's header and the table of its tensors' names are parsed once."""
    # transformers parses the header (with all tokens, one by one) for the config, the weights and
    # the tokenizer, and makes the table for each module of the model. For a small model that is
    # most of the time that loading takes.
    ours = {  # transformers looks them up at each call
        "GGUFReader": cache(BoundedReader),
        "get_tensor_name_map": cache(gguf.get_tensor_name_map),
    }
    originals = {name: getattr(gguf, name) for name in ours}
    try:
        for name, replacement in ours.items():
            setattr(gguf, name, replacement)
        yield
    finally:
        for name, original in originals.items():
            setattr(gguf, name, original)
