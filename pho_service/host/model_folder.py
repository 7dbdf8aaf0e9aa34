"""
What a model folder's own files name: only files that lie beside them.

A loader joins the names in an index of weights, or in a tokenizer's
configuration, to the folder that it reads. A name with a path in it would
reach any file of the machine, also one outside of the folders that models may
come from. All of them are checked before any is opened.
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pho_service.errors import InvalidInput, ModelError
from pho_service.host.plain import shown

MAX_BYTES = 2**26  # of an index; that of a model with 100,000 tensors has 10 MB
# Files of a folder that name others, beside its *.index.json.
NAMING_FILES = ("config.json", "tokenizer_config.json")
# What loaders never open, although transformers writes paths into them.
_NOT_OPENED = frozenset({"special_tokens_map_file"})
_PLAIN = re.compile(r"[^\\/:\x00-\x1f\x7f]{1,255}")


def check_model_folder(folder: Path) -> None:
    """
    Check the names in ``*.index.json``, ``config.json`` and ``tokenizer_config.json``.

    Nothing else in the folder is looked at, and no weights are read: this takes
    milliseconds, and may be asked before a job is accepted.

    Args:
        folder: Folder of a model. Files that are not there are not missed.

    Raises:
        InvalidInput: A name leads, or could lead, out of the folder.
        ModelError: A file that may name others cannot be read, is not a JSON object, or is too
            large to be one of these.
    """
    indices = sorted(folder.glob("*.index.json"))
    for file in (*indices, *(folder / name for name in NAMING_FILES)):
        if file.is_file():
            check_names(file)


def check_names(file: Path) -> None:
    """
    Check the names in one of these files, wherever it lies; its name says what it is.

    Raises:
        InvalidInput, ModelError: As :func:`check_model_folder`.
    """
    document = _read(file)
    if file.name.endswith(".index.json"):
        names = _of_index(document, file)
    elif file.name == "tokenizer_config.json":
        names = _of_tokenizer(document)
    else:
        weights = document.get("transformers_weights")
        names = iter([] if weights is None else [("transformers_weights", weights)])
    for key, name in names:
        if not is_plain(name):
            raise InvalidInput(
                f"{file.name} names {shown(str(name))!r} ({shown(key)}): a model's files may only "
                "name files that lie in the same folder, by their plain names, without '/', '\\', "
                "':' and '..'. Put the file into the model's folder and write its plain name, or "
                "take the entry out."
            )


def is_plain(name: object) -> bool:
    """Whether a value is a file's name without any path, drive or URL."""
    return isinstance(name, str) and name not in (".", "..") and bool(_PLAIN.fullmatch(name))


def _read(file: Path) -> Mapping[str, Any]:
    """A small JSON object."""
    try:
        with file.open("rb") as opened:
            content = opened.read(MAX_BYTES + 1)
    except OSError as error:
        raise ModelError(f"{file.name} cannot be read: {error.strerror}.") from error
    if len(content) > MAX_BYTES:
        raise ModelError(f"{file.name} is larger than {MAX_BYTES >> 20} MiB, which no model's is.")
    try:
        document = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ModelError(
            f"{file.name} is not JSON: {shown(str(error))}. The download is not complete, or the "
            "file is damaged: get it again."
        ) from error
    if not isinstance(document, dict):
        raise ModelError(f"{file.name} is not a JSON object. Get the model again.")
    return document


def _of_index(document: Mapping[str, Any], file: Path) -> Iterator[tuple[str, object]]:
    """Which file each tensor is in; the first tensor of each file stands for it."""
    weight_map = document.get("weight_map")
    if not isinstance(weight_map, dict):
        raise ModelError(f"{file.name} has no weight_map. Get the model again.")
    seen: set[object] = set()
    for tensor, name in weight_map.items():
        if not isinstance(name, str):
            yield f"weight_map of {tensor}", name
        elif name not in seen:
            seen.add(name)
            yield f"weight_map of {tensor}", name


def _of_tokenizer(document: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    """
    Values that a tokenizer's class may open.

    ``vocab`` and ``merges`` are paths where they are strings, and so are the
    arguments in ``init_inputs``. Empty ones are not looked at.
    """
    for key, value in document.items():
        is_file = key.endswith(("_file", "_files")) and key not in _NOT_OPENED
        if is_file or key in ("vocab", "merges", "init_inputs"):
            yield from ((key, name) for name in _strings(value) if name)


def _strings(value: object) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return [each for each in values if isinstance(each, str)]
