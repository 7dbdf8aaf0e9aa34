"""
The configuration of a model: of a folder, a GGUF file's header, or one file of the hub.
"""

import json
import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import httpx

from pho_service.errors import ModelError
from pho_service.host.access import is_path

MOST_BYTES = 2**22  # of a configuration; those of the hub have some kilobytes
MOST_VALUES = 2**21  # of a GGUF header; Gemma's vocabulary has a quarter of a million tokens
HUB = "https://huggingface.co"
TIMEOUT_S = 10.0

_GGUF_FAMILIES = {
    "llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma": "gemma", "gemma2": "gemma2",
    "gemma3": "gemma3_text", "phi3": "phi3",
}  # fmt: skip
_GGUF_FIELDS = {
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "context_length": "max_position_embeddings",
    "vocab_size": "vocab_size",
}
_NUMBERS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _ARRAY = 8, 9


def read_config(
    name: str, *, revision: str | None = None, path: str | None = None
) -> dict[str, Any]:
    """
    Read the configuration of a model, and nothing else of it.

    Args:
        name: Model folder, .gguf file, or hub id.
        revision: Branch, tag or commit; hub ids only.
        path: Where the model lies, if that is not its name, which messages have.

    Raises:
        ModelError: It does not exist, cannot be reached, or is not a configuration.
    """
    place = Path(path or name).expanduser()
    if not place.exists() and not is_path(str(path or name)):
        return _hub_config(name, revision or "main")
    if not place.exists():
        raise ModelError(
            f"{name} does not exist on this machine. Give a hub id, a model folder or a .gguf file."
        )
    if place.is_dir():
        place /= "config.json"
    if not place.is_file():
        raise ModelError(f"{name} has no config.json, so it is not a Hugging Face model folder.")
    try:
        with place.open("rb") as file:
            if place.suffix == ".gguf":
                return _gguf_config(name, file)
            return _parsed(name, file.read(MOST_BYTES + 1))
    except OSError as error:
        raise ModelError(f"{name} cannot be read: {error.strerror}.") from error


def config_at_hand(name: str, path: str, *, revision: str | None = None) -> dict[str, Any] | None:
    """
    Read the configuration of a model if that needs no network.

    Args:
        name: The model's, for messages.
        path: Where it lies, or its hub id, of which the hub's cache on this machine may have one.
        revision: Branch, tag or commit; hub ids only.

    Returns:
        None if it is not on this machine, or cannot be read: whoever loads the model says why.
    """
    place = Path(path)
    if not place.is_absolute():
        found = _cached(path, revision or "main")
        if found is None:
            return None
        place = found
    try:
        return read_config(name, path=str(place))
    except ModelError:
        return None


def _cached(name: str, revision: str) -> Path | None:
    """The folder of a hub model in the cache that transformers fills; None if it is not there."""
    home = os.environ.get("HF_HOME", "~/.cache/huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE", f"{home}/hub")).expanduser()
    if ".." in revision or revision.startswith("/"):
        return None
    folder = cache / f"models--{name.replace('/', '--')}"
    try:
        commit = (folder / "refs" / revision).read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        commit = revision
    found = folder / "snapshots" / commit
    try:
        return found if (found / "config.json").is_file() else None
    except (OSError, ValueError):
        return None


def longest_context(config: Mapping[str, Any]) -> int | None:
    """The tokens of the longest window that a model reads; None if its configuration is silent."""
    text = config.get("text_config")
    values = text if isinstance(text, Mapping) else config
    for name in ("max_position_embeddings", "n_positions"):
        value = values.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


def _parsed(name: str, content: bytes) -> dict[str, Any]:
    """The object that a config.json is."""
    if len(content) > MOST_BYTES:
        raise ModelError(f"{name}: its config.json has more than {MOST_BYTES} bytes.")
    try:
        values = json.loads(content)
    except (ValueError, RecursionError):
        raise ModelError(f"{name}: its config.json is not JSON. Get the file again.") from None
    if not isinstance(values, dict):
        raise ModelError(f"{name}: its config.json is not a JSON object. Get the file again.")
    return values


def _hub_config(name: str, revision: str) -> dict[str, Any]:
    """The config.json of a model on the hub, asked for by plain HTTP."""
    endpoint = os.environ.get("HF_ENDPOINT", HUB).rstrip("/")
    token = os.environ.get("HF_TOKEN")
    headers = {"authorization": f"Bearer {token}"} if token else {}
    try:
        answer = httpx.get(
            f"{endpoint}/{name}/resolve/{revision}/config.json",
            headers=headers, timeout=TIMEOUT_S, follow_redirects=True,
        )  # fmt: skip
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ModelError(
            f"{name} is not a folder here, and the Hugging Face hub cannot be reached "
            f"({type(error).__name__}). Check the network and HF_ENDPOINT, or give a local folder."
        ) from error
    if answer.status_code in (401, 403, 404):
        raise ModelError(
            f"{name}: the hub has no such model or revision, or it is private or gated. Check the "
            "spelling, accept its licence on the hub and set HF_TOKEN, or give a local folder."
        )
    if answer.status_code != 200:
        raise ModelError(f"{name}: the hub answered {answer.status_code}. Try again later.")
    return _parsed(name, answer.content)


def _gguf_config(name: str, file: BinaryIO) -> dict[str, Any]:
    """The header of a GGUF file in the words of a config.json; what it declares is bounded."""
    try:
        fields, tensors = _gguf_header(file)
    except (struct.error, UnicodeDecodeError, ValueError, OverflowError) as error:
        raise ModelError(f"{name} is not a whole GGUF file: {error}. Get it again.") from error
    kind = str(fields.get("general.architecture"))
    config: dict[str, Any] = {"model_type": _GGUF_FAMILIES.get(kind, kind), "dtype": "float32"}
    for field, ours in _GGUF_FIELDS.items():
        if f"{kind}.{field}" in fields:
            config[ours] = fields[f"{kind}.{field}"]
    config.setdefault("vocab_size", fields.get("tokenizer.ggml.tokens"))
    config["tie_word_embeddings"] = "output.weight" not in tensors
    if fields.get(f"{kind}.expert_count"):
        config |= {
            "model_type": "mixtral",
            "num_local_experts": fields[f"{kind}.expert_count"],
            "num_experts_per_tok": fields.get(f"{kind}.expert_used_count"),
        }
    return config


def _gguf_header(file: BinaryIO) -> tuple[dict[str, Any], set[str]]:
    """Plain values by name, an array as its length; and the names of the tensors."""
    read = _Reader(file)
    if file.read(4) != b"GGUF":
        raise ValueError("it does not begin with GGUF")
    version, tensors, values = read.numbers("<IQQ")
    if version not in (2, 3):
        raise ValueError(f"it has version {version}, known are 2 and 3")
    fields = {}
    for _ in read.times(values):
        key = read.string()
        fields[key] = read.value(read.numbers("<I")[0])
    names = set()
    for _ in read.times(tensors):
        names.add(read.string())
        (dimensions,) = read.numbers("<I")
        for _ in read.times(dimensions):
            read.numbers("<Q")
        read.numbers("<IQ")
    return fields, names


class _Reader:
    """Reads a header value by value, and no more of them than a header may have."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._left = MOST_VALUES

    def times(self, count: int) -> Iterator[int]:
        """As ``range``, unless that is more than may be read."""
        for number in range(count):
            self._left -= 1
            if self._left < 0:
                raise ValueError(f"its header declares more than {MOST_VALUES} values")
            yield number

    def numbers(self, layout: str) -> tuple[Any, ...]:
        """Numbers in the layout of ``struct``."""
        return struct.unpack(layout, self._file.read(struct.calcsize(layout)))

    def string(self) -> str:
        """A text of at most the size of a configuration."""
        return self._text().decode()

    def _text(self) -> bytes:
        (length,) = self.numbers("<Q")
        if length > MOST_BYTES:
            raise ValueError(f"its header declares a text of {length} bytes")
        text = self._file.read(length)
        if len(text) < length:
            raise ValueError("it ends in its header")
        return text

    def value(self, kind: int) -> Any:
        """A value of this kind; of an array its length."""
        if kind == _STRING:
            return self.string()
        if kind in _NUMBERS:
            return self.numbers(f"<{_NUMBERS[kind]}")[0]
        if kind != _ARRAY:
            raise ValueError(f"its header has a value of the unknown kind {kind}")
        inner, length = self.numbers("<IQ")
        if inner in _NUMBERS:
            self._file.seek(length * struct.calcsize(f"<{_NUMBERS[inner]}"), os.SEEK_CUR)
        else:
            for _ in self.times(length):
                self._text() if inner == _STRING else self.value(inner)
        return length
