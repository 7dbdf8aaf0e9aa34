"""
The files of a model's folder, and what they may name: only files that lie beside them.
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pho_service.errors import InvalidInput, ModelError, shown

MAX_BYTES = 2**26  # of an index; that of a model with 100,000 tensors has 10 MB
# Files of a folder that name others, beside its *.index.json.
NAMING_FILES = ("config.json", "tokenizer_config.json")
TOKENIZER = "tokenizer.json"  # whose decoder makes texts of tokens
_LONGEST = 1000  # characters that a decoder puts in the place of others
# The most that a configuration may ask for of what makes a module each; Kimi K2 has 384 experts.
_MOST = {
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers"), 1_000),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts"), 10_000),
}
# What loaders never open, although transformers writes paths into them.
_NOT_OPENED = frozenset({"special_tokens_map_file"})
PACKED_SUFFIX = ".pho"  # suffix of a file that `pho pack` writes
MOST_FILES = 1000  # files and folders of a model; large ones have some hundred shards
_PLAIN = re.compile(r"[^\\/:\x00-\x1f\x7f]{1,255}")


def is_packed(path: Path) -> bool:
    """Return whether a path is a packed model, by its name alone."""
    return path.suffix == PACKED_SUFFIX and path.is_file()


def check_config(folder: Path, name: str) -> None:
    """Raise ModelError where a folder holds no model of Hugging Face."""
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"{name} has no config.json, so it is not a Hugging Face model folder. Give the folder "
            "that has one, or a .gguf file."
        )


def check_model_folder(folder: Path, tokenizer_bytes: int = MAX_BYTES) -> None:
    """
    Check the names in ``*.index.json``, ``config.json`` and ``tokenizer_config.json``, and the
    decoder in a ``tokenizer.json`` of so many bytes at most.
    """
    # Nothing else in the folder is looked at, and no weights are read: this takes milliseconds, and
    # may be asked before a job is accepted.
    indices = sorted(folder.glob("*.index.json"))
    for file in (*indices, *(folder / name for name in NAMING_FILES)):
        if file.is_file():
            check_names(file)
    tokenizer = folder / TOKENIZER
    if tokenizer.is_file() and not tokenizer_bytes < tokenizer.stat().st_size <= MAX_BYTES:
        check_names(tokenizer)


def check_names(file: Path) -> None:
    """Check the names in one of these files, wherever it lies; its name says what it is."""
    try:
        with file.open("rb") as opened:
            content = opened.read(MAX_BYTES + 1)
    except OSError as error:
        raise ModelError(f"{file.name} cannot be read: {error.strerror}.") from error
    _checked(content, file.name)


def shards_of(content: bytes, file: str) -> list[str]:
    """The files that an index names, in order."""
    shards = sorted(_checked(content, file))
    if len(shards) > MOST_FILES:
        raise ModelError(f"{file} names {len(shards)} files, and {MOST_FILES} are the most.")
    return shards


def _checked(content: bytes, file: str) -> list[str]:
    """The names in one of these files, each of which is plain."""
    document = _parsed(content, file)
    if file.endswith(".index.json"):
        names = _of_index(document, file)
    elif file == TOKENIZER:
        _check_decoder(document.get("decoder"))
        names = iter(())
    elif file == "tokenizer_config.json":
        names = _of_tokenizer(document)
    else:
        check_counts(document, file)
        weights = document.get("transformers_weights")
        names = iter([] if weights is None else [("transformers_weights", weights)])
    plain_names = []
    for key, name in names:
        if not is_plain(name):
            raise InvalidInput(
                f"{file} names {shown(str(name))!r} ({shown(key)}): a model's files may only "
                "name files that lie in the same folder, by their plain names, without '/', '\\', "
                "':' and '..'. Put the file into the model's folder and write its plain name, or "
                "take the entry out."
            )
        plain_names.append(str(name))
    return plain_names


def check_counts(config: Mapping[str, Any], file: str) -> None:
    """Check how many modules a configuration asks for, before any library makes them."""
    for values in (config, *config.values()):
        for field, most in _MOST.items() if isinstance(values, Mapping) else ():
            if isinstance(value := values.get(field), int) and value > most:
                raise InvalidInput(
                    f"{file} says {field}={value}, and {most} are the most that a model may have. "
                    "Check that it is the file of a language model."
                )


def _check_decoder(decoder: Any) -> None:
    """Raise ModelError if a decoder makes a page of a token."""
    parts = [decoder]
    while parts:
        part = parts.pop()
        if isinstance(part, str) and len(part) > _LONGEST:
            raise ModelError(
                f"tokenizer.json has a text of {len(part):,} characters in its decoder, and "
                f"{_LONGEST:,} are the most. Get the model again."
            )
        parts += part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()


def is_plain(name: object) -> bool:
    """Return whether a value is a file's name without any path, drive or URL."""
    return isinstance(name, str) and name not in (".", "..") and bool(_PLAIN.fullmatch(name))


def _parsed(content: bytes, file: str) -> Mapping[str, Any]:
    """A small JSON object."""
    if len(content) > MAX_BYTES:
        raise ModelError(f"{file} is larger than {MAX_BYTES >> 20} MiB, which no model's is.")
    try:
        document = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ModelError(
            f"{file} is not JSON: {shown(str(error))}. The download is not complete, or the "
            "file is damaged: get it again."
        ) from error
    if not isinstance(document, dict):
        raise ModelError(f"{file} is not a JSON object. Get the model again.")
    return document


def _of_index(document: Mapping[str, Any], file: str) -> Iterator[tuple[str, object]]:
    """Which file each tensor is in; the first tensor of each file stands for it."""
    weight_map = document.get("weight_map")
    if not isinstance(weight_map, dict):
        raise ModelError(f"{file} has no weight_map. Get the model again.")
    seen: set[object] = set()
    for tensor, name in weight_map.items():
        if not isinstance(name, str):
            yield f"weight_map of {tensor}", name
        elif name not in seen:
            seen.add(name)
            yield f"weight_map of {tensor}", name


def _of_tokenizer(document: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    """Values that a tokenizer's class may open."""
    # ``vocab`` and ``merges`` are paths where they are strings, and so are the arguments in
    # ``init_inputs``. Empty ones are not looked at.
    for key, value in document.items():
        is_file = key.endswith(("_file", "_files")) and key not in _NOT_OPENED
        if is_file or key in ("vocab", "merges", "init_inputs"):
            values = value if isinstance(value, list) else [value]
            yield from ((key, name) for name in values if name and isinstance(name, str))


def check_not_quantised(folder: Path, way_out: str) -> None:
    """Raise ModelError for a folder whose weights are quantised, whatever could load it."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        how = config.get("quantization_config")
    except (OSError, ValueError, AttributeError):
        return  # whoever loads it says so
    if how:
        method = how.get("quant_method", "unknown") if isinstance(how, dict) else how
        raise ModelError(f"{folder.name} has quantised weights ({method}). {way_out}")
