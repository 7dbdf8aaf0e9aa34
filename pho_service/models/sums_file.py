"""
The sums of a calibration's shard on disk, for a short while: one safetensors file.

Format version 1. The header's metadata has one entry, ``pho-sums``, a JSON object with ``version``,
``key`` (of the bundle), ``shard``, ``readers``, ``input_of``, ``fisher`` (names) and
``gradient_tokens``. Tensors are named ``squares.{i}``, ``moments.{i}`` and ``fisher.{i}``.
"""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from pho_service.errors import BundleError
from pho_service.host.files import new_file
from pho_service.models.bundle_file import os_errors
from pho_service.pruning.sums import Sums

FORMAT = "pho-sums"
VERSION = 1


def write_sums(sums: Sums, path: Path, *, key: str, shard: int) -> None:
    """
    Write the sums of a shard, whole or not at all.

    Args:
        sums: Sums, on any device.
        path: Its folder must exist.
        key: Key of the bundle.
        shard: Its number.

    Raises:
        OutputError: No space, no permission, no such folder.
    """
    names = list(sums.fisher)
    document = {
        "version": VERSION,
        "key": key,
        "shard": shard,
        "readers": sums.readers,
        "input_of": sums.input_of,
        "fisher": names,
        "gradient_tokens": [sums.gradient_tokens[name] for name in names],
    }
    tensors = {
        **{f"squares.{i}": each for i, each in enumerate(sums.squares)},
        **{f"moments.{i}": each for i, each in enumerate(sums.moments)},
        **{f"fisher.{i}": sums.fisher[name] for i, name in enumerate(names)},
    }
    with new_file(path) as partial, os_errors():
        metadata = {FORMAT: json.dumps(document)}
        save_file({k: t.contiguous() for k, t in tensors.items()}, partial, metadata=metadata)


def read_sums(path: Path, *, key: str, shard: int) -> Sums:
    """
    Read the sums of a shard, on the CPU.

    Raises:
        BundleError: Not there, damaged, of another version, or of another shard.
    """
    try:
        with safe_open(path, framework="pt") as file:
            document = json.loads((file.metadata() or {})[FORMAT])
            if [document["version"], document["key"], document["shard"]] != [VERSION, key, shard]:
                raise BundleError(f"{path} has the sums of something else")
            inputs = range(len(document["readers"]))
            names = document["fisher"]
            fisher = [file.get_tensor(f"fisher.{i}").clone() for i in range(len(names))]
            return Sums(
                readers=document["readers"],
                input_of=document["input_of"],
                # Copies: a map dies with the process if the file shrinks.
                squares=[file.get_tensor(f"squares.{i}").clone() for i in inputs],
                moments=[file.get_tensor(f"moments.{i}").clone() for i in inputs],
                fisher=dict(zip(names, fisher, strict=True)),
                gradient_tokens=dict(zip(names, document["gradient_tokens"], strict=True)),
            )
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise BundleError(f"{path} has no sums of a calibration: {error}") from error
