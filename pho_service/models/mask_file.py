"""
The masks of a pruned model on disk: one safetensors file with one bit a weight.

Format version 1. The header's metadata has one entry (more would be written
in random order): ``pho-masks``, a JSON object with ``version``, ``layers``
(name, shape, in the model's order) and ``metadata``. Tensors are named
``{name}.keep`` (uint8, the mask's rows one after the other, the first weight
in the highest bit of the first byte, padded with zeros at the end of the
mask) and, where a linear has one, ``{name}.order`` (int32).
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pho_service.errors import ModelError, shown
from pho_service.host.files import new_file
from pho_service.models.bundle_file import FileKind, os_errors
from pho_service.models.loading import sha256_each
from pho_service.pruning.masks import pack, unpack

# In a folder of its own: some servers take every *.safetensors beside a model for weights.
MASKS = "pruning/masks.safetensors"
MAX_FEATURES = 2**31  # what an order's int32 can number
MASK_FORMAT = "pho-masks"
_GROUPS = (4, 8, 16, 32)  # M of N:M that is looked for in a model that was pruned elsewhere
_MASKS = FileKind(
    format=MASK_FORMAT,
    version=1,
    error=ModelError,
    is_none="holds no masks",
    way_out="Prune the model again with `pho prune`.",
    of_another_version="Install the PHO that pruned the model, or prune it again.",
)


@dataclass(frozen=True, kw_only=True)
class LayerMask:
    """Weights that one linear keeps."""

    # (out_features, in_features), bool. True = kept. In the channel order of the saved model.
    keep: Tensor
    # (in_features,), int64: the channel at each position of the order in which N:M groups were cut.
    # None: the natural order.
    order: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class PackedMask:
    bits: Tensor  # (ceil(numel / 8),), uint8, as :func:`pack` gives it
    shape: tuple[int, ...]  # (out_features, in_features)
    order: Tensor | None = None  # As in a :class:`LayerMask`

    @classmethod
    def of(cls, mask: LayerMask) -> "PackedMask":
        keep, order = mask.keep, mask.order
        if keep.dtype is not torch.bool or keep.dim() != 2 or not keep.numel():
            raise ValueError(f"a {keep.dtype} tensor {tuple(keep.shape)} is not a mask")
        if order is not None:
            whole = not order.is_floating_point() and order.dtype is not torch.bool
            order = order.cpu()
            if order.dim() != 1 or not whole or not is_permutation(order, keep.shape[1]):
                raise ValueError(
                    f"the order is not a permutation of {keep.shape[1]} input channels"
                )
        return cls(bits=pack(keep), shape=tuple(keep.shape), order=order)

    @property
    def keep(self) -> Tensor:
        """(out_features, in_features), bool, unpacked again each time."""
        return unpack(self.bits, self.shape)


def write_masks(
    masks: Iterable[tuple[str, LayerMask | PackedMask]] | Mapping[str, LayerMask],
    path: Path,
    *,
    metadata: dict[str, Any],
) -> dict[str, str]:
    """Write the masks of a model; an old file is replaced only when the new one is complete."""
    # The same masks are the same bytes. All are held packed until the last one has come.
    tensors: dict[str, Tensor] = {}
    shapes: dict[str, list[int]] = {}
    hashes: dict[str, str] = {}
    for name, mask in masks.items() if isinstance(masks, Mapping) else masks:
        if name in shapes:
            raise ValueError(f"{name} has two masks")
        try:
            packed = mask if isinstance(mask, PackedMask) else PackedMask.of(mask)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        shapes[name] = list(packed.shape)
        tensors[f"{name}.keep"] = packed.bits
        if packed.order is not None:
            tensors[f"{name}.order"] = packed.order.to(torch.int32).contiguous()
    if not shapes:
        raise ValueError("there are no masks to write")
    bits = sha256_each(tensors[f"{name}.keep"] for name in shapes)
    hashes = dict(zip(shapes, bits, strict=True))
    document = {
        "version": _MASKS.version,
        "layers": [{"name": name, "shape": shape} for name, shape in shapes.items()],
        "metadata": metadata,
    }
    header = {MASK_FORMAT: json.dumps(document, sort_keys=True)}
    with new_file(path) as partial, os_errors():
        save_file(tensors, partial, metadata=header)
    return hashes


def weight_sha256(weight: Tensor) -> str:
    """Hash of a weight's bytes in its dtype, (out_features, in_features), row after row."""
    return next(sha256_each([weight]))


def is_permutation(order: Tensor, length: int) -> bool:
    """Return whether ``order``, a 1-D tensor of whole numbers, has each of 0..length-1 once."""
    return torch.equal(order.sort().values, torch.arange(length, dtype=order.dtype))


def _sha256(data: Tensor) -> str:
    return hashlib.sha256(data.numpy().data).hexdigest()


class MaskFile:
    """A file of masks that stays open: each mask is read when it is asked for."""

    def __init__(
        self, path: Path, file: Any, shapes: dict[str, tuple[int, int]], metadata: dict[str, Any]
    ) -> None:
        self.path = path
        self.shapes = shapes
        self.metadata = metadata
        self._file = file
        self._tensors = set(file.keys())

    @property
    def names(self) -> list[str]:
        """The linears, in the model's order."""
        return list(self.shapes)

    def mask(self, name: str) -> LayerMask:
        shape = self.shapes[name]
        keep = unpack(self._read(f"{name}.keep"), shape)
        if f"{name}.order" not in self._tensors:
            return LayerMask(keep=keep)
        order = self._read(f"{name}.order").long()
        if not is_permutation(order, shape[1]):
            wrong = f"{name}.order is not a permutation of {shape[1]} input channels"
            raise _MASKS.damaged(self.path, wrong)
        return LayerMask(keep=keep, order=order)

    def sha256(self, name: str) -> str:
        """The hash of a mask's packed bits, as :func:`write_masks` gave it."""
        return _sha256(self._read(f"{name}.keep"))

    def _read(self, tensor: str) -> Tensor:
        try:
            # A copy: what is read stays a map of the file, and dies with the process if it shrinks.
            copy: Tensor = self._file.get_tensor(tensor).clone()
        except SafetensorError as error:
            raise _MASKS.damaged(self.path, str(error)) from error
        return copy


def read_masks(path: Path) -> MaskFile:
    """Open a file of masks and check its header; no mask is read yet."""
    path = path.expanduser()
    if not path.is_file():
        raise ModelError(f"the masks {path} do not exist. {_MASKS.way_out}")
    with _MASKS.reading(path):
        file: Any = safe_open(path, framework="pt")
        document = _MASKS.document(file, path)
        shapes = _shapes(document, path)
        _check_tensors(file, shapes, path)
    metadata = document.get("metadata")
    if not isinstance(metadata, dict):
        raise _MASKS.damaged(path, "its header lacks metadata")
    return MaskFile(path, file, shapes, metadata)


def _shapes(document: dict[str, Any], path: Path) -> dict[str, tuple[int, int]]:
    """The shape of each linear's mask."""
    shapes: dict[str, tuple[int, int]] = {}
    try:
        for layer in document["layers"]:
            out_features, in_features = layer["shape"]
            if not (_is_size(out_features) and _is_size(in_features)):
                wrong = f"{shown(layer['name'])} has the shape {shown(layer['shape'])}"
                raise _MASKS.damaged(path, wrong)
            shapes[str(layer["name"])] = (out_features, in_features)
        complete = len(shapes) == len(document["layers"]) > 0
    except (KeyError, TypeError, ValueError) as error:
        raise _MASKS.lacks(path, error) from error
    if not complete:
        raise _MASKS.damaged(path, "it has no layers, or a layer twice in its header")
    return shapes


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= MAX_FEATURES


def _check_tensors(file: Any, shapes: dict[str, tuple[int, int]], path: Path) -> None:
    """Raise ModelError unless the file has the tensors of these masks and no others."""
    names = set(file.keys())
    expected: dict[str, tuple[str, list[int]]] = {}
    for name, (out_features, in_features) in shapes.items():
        expected[f"{name}.keep"] = ("U8", [(out_features * in_features + 7) // 8])
        if f"{name}.order" in names:
            expected[f"{name}.order"] = ("I32", [in_features])
    if names != set(expected):
        odd = ", ".join(map(shown, sorted(names ^ set(expected))[:4]))
        raise _MASKS.damaged(path, f"{odd} should not be in it, or is missing")
    for tensor, (dtype, shape) in expected.items():
        view = file.get_slice(tensor)
        actual = (str(view.get_dtype()), view.get_shape())
        if actual != (dtype, shape):
            what = f"{shown(tensor)} is {actual[0]} {shown(actual[1])}, expected {dtype} {shape}"
            raise _MASKS.damaged(path, what)


def groups_of(keep: Tensor) -> tuple[int | None, int | None]:
    """N and M of a mask, (out_features, in_features), that keeps N of each M; None of others."""
    for group in _GROUPS:
        if keep.shape[1] % group == 0:
            counts = keep.reshape(-1, group).sum(dim=1)
            if bool((counts == counts[0]).all()):
                return int(counts[0]), group
    return None, None
