"""
What the files of a model say before its weights are read: a folder's, a GGUF file's, or the hub's.
"""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from pho_service.errors import ModelError
from pho_service.host.access import is_path
from pho_service.host.model_folder import check_names
from pho_service.host.plain import shown
from pho_service.planning.shapes import Header, Stored

MOST_BYTES = 2**22  # of a configuration; those of the hub have some kilobytes
MOST_HEADER = 2**24  # bytes of a safetensors header; a hundred thousand tensors have 12 MB
MOST_TENSORS = 2**20  # of a model
TIMEOUT_S = 10.0
CONFIG = "config.json"
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"

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
    """
    Read the configuration of a model and the headers of its weights, and nothing else of it.

    ``path`` is where it lies, if that is not its name, which messages have.
    """
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


def config_at_hand(
    name: str, path: str, *, revision: str | None = None
) -> Mapping[str, Any] | None:
    """
    Read the configuration of a model if that needs no network.

    None if it is not on this machine, or cannot be read: whoever loads the model says why.
    """
    place = Path(path) if Path(path).is_absolute() else _cached(path, revision)
    if place is None:
        return None
    try:
        with _readable(name):
            is_gguf = place.suffix == ".gguf"
            return _of_gguf(name, place).config if is_gguf else _config(name, place)
    except ModelError:
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


@contextmanager
def _readable(name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ModelError(f"{name} cannot be read: {error.strerror}.") from error


def _config(name: str, folder: Path) -> dict[str, Any]:
    """The object that a config.json is."""
    file = folder / CONFIG
    if not file.is_file():
        raise ModelError(f"{name} has no config.json, so it is not a Hugging Face model folder.")
    with file.open("rb") as opened:
        content = opened.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise ModelError(f"{name}: its config.json has more than {MOST_BYTES} bytes.")
    try:
        values = json.loads(content)
    except (ValueError, RecursionError):
        raise ModelError(f"{name}: its config.json is not JSON. Get the file again.") from None
    if not isinstance(values, dict):
        raise ModelError(f"{name}: its config.json is not a JSON object. Get the file again.")
    return values


def _of_folder(name: str, folder: Path) -> dict[str, Stored]:
    """The tensors of a folder's files, those that transformers would read."""
    files = [folder / _WEIGHTS]
    if not files[0].is_file():
        index = folder / _INDEX
        if not index.is_file():
            raise _without_weights(name)
        check_names(index)
        named = json.loads(index.read_bytes())["weight_map"].values()
        files = [folder / each for each in sorted({*named})]
    tensors: dict[str, Stored] = {}
    for file in files:
        if not file.is_file():
            raise ModelError(f"{name} has no {file.name}, which its index names. Get it again.")
        tensors |= _of_safetensors(name, file)
        _check_number(name, tensors)
    return tensors


def _of_safetensors(name: str, file: Path) -> dict[str, Stored]:
    """The tensors that the header of a file lists."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = opened.read(length) if length <= MOST_HEADER else b""
    if not 0 < length == len(header):
        raise _damaged(name, file.name, "it has no header, or one that is cut short")
    try:
        document = json.loads(header)
        document.pop("__metadata__", None)
        return {key: _stored(entry["shape"], entry["dtype"]) for key, entry in document.items()}
    except (ValueError, RecursionError, AttributeError, KeyError, TypeError) as error:
        raise _damaged(name, file.name, f"its header cannot be read: {error}") from error


def _stored(shape: Any, dtype: Any) -> Stored:
    if not isinstance(shape, list | tuple) or len(shape) > 8 or not isinstance(dtype, str):
        raise ValueError("a tensor has no shape or no dtype")
    if not all(type(size) is int and 0 < size < 2**31 for size in shape):
        raise ValueError("a size is not a whole number above 0")
    return Stored(tuple(shape), dtype)


def _damaged(name: str, file: str, reason: str) -> ModelError:
    return ModelError(f"{name}: {file} is damaged: {shown(reason)}. Get the file again.")


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
        found = try_to_load_from_cache(name, CONFIG, revision=revision)
    except (HFValidationError, OSError, ValueError):
        return None
    return Path(found).parent if isinstance(found, str) else None


def _of_hub(name: str, revision: str | None) -> Header:
    """What the hub has of a model; where it cannot be asked, what its cache has."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    away: type[BaseException] = HfHubHTTPError.__bases__[0]  # of its HTTP library
    try:
        # hf_hub_download alone would ask a hub that is away for 23 seconds.
        about = get_hf_file_metadata(hf_hub_url(name, CONFIG, revision=revision), timeout=TIMEOUT_S)
        if (about.size or 0) > MOST_BYTES:
            raise ModelError(f"{name}: its config.json has more than {MOST_BYTES} bytes.")
        commit = about.commit_hash or revision
        folder = Path(hf_hub_download(name, CONFIG, revision=commit)).parent
        config = _config(name, folder)
        if (folder / _WEIGHTS).is_file():
            return Header(config=config, tensors=_of_folder(name, folder))
        return Header(config=config, tensors=_on_hub(name, commit))
    except HFValidationError as error:
        raise ModelError(
            f"{name!r} is neither a folder or file here nor a name on the hub, which looks like "
            "org/name. Check the spelling."
        ) from error
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", 0)
        if status in (401, 403, 404):
            raise ModelError(
                f"{name}: the hub has no such model or revision, or it is private or gated. Check "
                "the spelling, accept its licence on the hub and set HF_TOKEN, or give a local "
                "folder."
            ) from error
        raise ModelError(f"{name}: the hub answered {status}. Try again later.") from error
    except (OSError, away) as error:
        kept = _cached(name, revision)
        if kept is not None and any(kept.glob("model*.safetensors")):
            return Header(config=_config(name, kept), tensors=_of_folder(name, kept))
        raise ModelError(
            f"{name} is not a folder here, and the Hugging Face hub cannot be reached "
            f"({type(error).__name__}). Check the network and HF_ENDPOINT, or give a local folder."
        ) from error


@lru_cache(maxsize=16)
def _on_hub(name: str, commit: str | None) -> dict[str, Stored]:
    """The tensors of a model's files on the hub, whose headers alone are asked for."""
    from huggingface_hub import get_safetensors_metadata
    from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError

    try:
        files = get_safetensors_metadata(name, revision=commit).files_metadata.values()
        tensors = {
            key: _stored(info.shape, info.dtype)
            for file in files
            for key, info in file.tensors.items()
        }
    except NotASafetensorsRepoError as error:
        raise _without_weights(name) from error
    except (SafetensorsParsingError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise _damaged(name, "one of its files", str(error)) from error
    _check_number(name, tensors)
    return tensors


def _of_gguf(name: str, file: Path) -> Header:
    """The header of a GGUF file in the words of transformers."""
    from pho_service.planning.gguf_header import read_gguf

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
