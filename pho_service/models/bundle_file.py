"""
Proxy bundles on disk, as safetensors files.
"""

import errno
import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pho_service.errors import BundleError, PhoError, field_name, shown
from pho_service.host.files import new_file
from pho_service.pruning.bundle import LayerSample, ProxyBundle
from pho_service.pruning.scores import TINY
from pho_service.pruning.statistics import InputStatistics

FORMAT, VERSION = "pho-bundle", 1
MAX_DOCUMENT = 16 * 2**20  # characters; a 70B model's has 100,000, 45,000 experts' masks 4 million


@dataclass(frozen=True, kw_only=True)
class FileKind:
    """A kind of our safetensors files, whose metadata has one JSON object."""

    format: str  # Its name in the metadata
    version: int
    error: type[PhoError]  # Raised where a file is none
    is_none: str  # What is said of another safetensors file
    way_out: str
    of_another_version: str  # What to do with a file of another version

    def damaged(self, path: Path, what: str) -> PhoError:
        return self.error(f"{path} is damaged: {what}. {self.way_out}")

    @contextmanager
    def reading(self, path: Path) -> Iterator[None]:
        """Inside, what safetensors or the disk says is an error of this kind."""
        try:
            yield
        except (SafetensorError, OSError) as error:
            raise self.error(
                f"{path} is damaged or truncated: {shown(str(error), 300)}. {self.way_out}"
            ) from error

    def document(self, file: Any, path: Path) -> dict[str, Any]:
        """The JSON object, of the version that this PHO reads."""
        text = (file.metadata() or {}).get(self.format)
        if text is None:
            raise self.error(f"{path} is a safetensors file, but {self.is_none}. {self.way_out}")
        try:
            document = json.loads(text) if len(text) <= MAX_DOCUMENT else None
        except (ValueError, RecursionError):
            document = None
        if not isinstance(document, dict):
            raise self.damaged(path, "its header holds no document")
        if document.get("version") != self.version:
            raise self.error(
                f"{path} has format version {shown(document.get('version'))}, but this PHO reads "
                f"version {self.version}. {self.of_another_version}"
            )
        return document

    def lacks(self, path: Path, error: Exception) -> PhoError:
        return self.damaged(path, f"its header lacks {shown(str(error), 300)}")


_BUNDLE = FileKind(
    format=FORMAT,
    version=VERSION,
    error=BundleError,
    is_none="no proxy bundle",
    way_out="Make it again with `pho calibrate`.",
    of_another_version="Make the bundle again, or install the PHO that made it.",
)


def write_bundle(bundle: ProxyBundle, path: Path) -> None:
    """Write a bundle; an old file is replaced only when the new one is complete."""
    tensors: dict[str, Tensor] = {}
    for i, layer in enumerate(bundle.layers):
        prefix = f"layers.{i}"
        tensors[f"{prefix}.row_index"] = layer.row_index
        tensors[f"{prefix}.rows"] = layer.rows
        tensors[f"{prefix}.row_mean"] = layer.row_mean
        tensors[f"{prefix}.column_mean"] = layer.column_mean
        tensors[f"{prefix}.fisher"] = layer.fisher
        for k, means in layer.window_means.items():
            tensors[f"{prefix}.window_mean.{k}"] = means
    for i, entry in enumerate(bundle.inputs):
        tensors[f"inputs.{i}.activation_norm"] = entry.activation_norm
        tensors[f"inputs.{i}.root"] = entry.root
    document = {
        "version": VERSION,
        "layers": [
            {
                "name": layer.name,
                "out_features": layer.out_features,
                "input_index": layer.input_index,
                "output_energy": layer.output_energy,
            }
            for layer in bundle.layers
        ],
        "kernel_sizes": list(bundle.kernel_sizes),
        "inputs": len(bundle.inputs),
        "provenance": bundle.provenance,
        "sha256": bundle.contents_sha256,
    }
    metadata = {FORMAT: json.dumps(document, sort_keys=True)}
    with new_file(path) as partial, os_errors():
        save_file({k: t.contiguous() for k, t in tensors.items()}, partial, metadata=metadata)


@contextmanager
def os_errors() -> Iterator[None]:
    """Unwrap what the operating system said while safetensors wrote a file."""
    try:
        yield
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        raise OSError(int(number[1]) if number else errno.EIO, str(error)) from error


def read_bundle(path: str | Path) -> ProxyBundle:
    """
    Read and check a bundle.

    Raises:
        BundleError: Not there, truncated, no bundle, another format version,
            or tensors that contradict the header.
    """
    path = Path(path)
    if not path.is_file():
        raise BundleError(f"the bundle {path} does not exist. {_BUNDLE.way_out}")
    try:
        with _BUNDLE.reading(path), safe_open(path, framework="pt") as file:
            return _assemble(_BUNDLE.document(file, path), _Tensors(file, path))
    except (MemoryError, RuntimeError) as error:  # the latter is torch's
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        raise BundleError(
            f"{path} does not fit into the memory: {error}. Give more, or calibrate a smaller "
            f"bundle: {field_name('calibration/rows_per_layer')} and "
            f"{field_name('calibration/projection_rows')}."
        ) from error


class _Tensors:
    """The tensors of a bundle file, each checked as it is taken."""

    def __init__(self, file: Any, path: Path) -> None:
        self.file = file
        self.path = path
        self.names = set(file.keys())

    def take(self, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """A tensor of this shape (-1 fits any size), finite."""
        if name not in self.names:
            raise _BUNDLE.damaged(self.path, f"{name} is missing")
        view = self.file.get_slice(name)
        actual = view.get_shape()
        fits = len(actual) == len(shape) and all(
            expected in (-1, size) for expected, size in zip(shape, actual, strict=True)
        )
        # A copy: what is read stays a map of the file, and dies with the process if it shrinks.
        tensor: Tensor | None = self.file.get_tensor(name).clone() if fits else None
        if tensor is None or tensor.dtype is not dtype or 0 in actual:
            found = f"{view.get_dtype()} {shown(actual)}"
            raise _BUNDLE.damaged(self.path, f"{name} is {found}, expected {dtype} {list(shape)}")
        if dtype is torch.float32 and not bool(torch.isfinite(tensor).all()):
            raise _BUNDLE.damaged(self.path, f"{name} has NaN or infinity")
        return tensor


def _assemble(document: dict[str, Any], tensors: _Tensors) -> ProxyBundle:
    try:
        kernel_sizes = [int(k) for k in document["kernel_sizes"]]
        count = int(document["inputs"])
        inputs = []
        for i in range(min(count, len(tensors.names))):
            norm = tensors.take(f"inputs.{i}.activation_norm", -1)
            root = tensors.take(f"inputs.{i}.root", -1, len(norm))
            inputs.append(InputStatistics(activation_norm=norm, root=root))
        layers = [
            _layer(f"layers.{i}", entry, kernel_sizes, inputs, tensors)
            for i, entry in enumerate(document["layers"])
        ]
        provenance = dict(document["provenance"])
        dict(provenance.get("model", {}))  # must be an object too
    except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
        raise _BUNDLE.lacks(tensors.path, error) from error
    if not layers or not kernel_sizes:
        raise _BUNDLE.damaged(tensors.path, "it has no layers or kernel sizes")
    bundle = ProxyBundle(layers=layers, inputs=inputs, provenance=provenance)
    sha256 = document.get("sha256")
    if sha256 != bundle.contents_sha256:
        mine = bundle.contents_sha256[:12]
        said = f"its contents have the hash {mine}, but its header says {shown(sha256)[:12]}"
        raise _BUNDLE.damaged(tensors.path, said)
    return bundle


def _layer(
    prefix: str,
    entry: dict[str, Any],
    kernel_sizes: list[int],
    inputs: list[InputStatistics],
    tensors: _Tensors,
) -> LayerSample:
    input_index = int(entry["input_index"])
    if not 0 <= input_index < len(inputs):
        raise _BUNDLE.damaged(tensors.path, f"{prefix} reads no input")
    width = len(inputs[input_index].activation_norm)
    out_features = int(entry["out_features"])
    energy = float(entry["output_energy"])
    if not math.isfinite(energy):
        raise _BUNDLE.damaged(tensors.path, f"{prefix} has an output_energy of {energy}")
    rows = tensors.take(f"{prefix}.rows", -1, width)
    index = tensors.take(f"{prefix}.row_index", len(rows), dtype=torch.int64)
    if int(index.min()) < 0 or int(index.max()) >= out_features:
        raise _BUNDLE.damaged(tensors.path, f"{prefix}.row_index leaves the layer")
    return LayerSample(
        name=str(entry["name"]),
        out_features=out_features,
        input_index=input_index,
        row_index=index,
        rows=rows,
        row_mean=tensors.take(f"{prefix}.row_mean", len(rows)),
        column_mean=tensors.take(f"{prefix}.column_mean", width),
        window_means={
            k: tensors.take(f"{prefix}.window_mean.{k}", len(rows), width).clamp_min_(TINY)
            for k in kernel_sizes
        },
        fisher=tensors.take(f"{prefix}.fisher", out_features),
        output_energy=energy,
    )
