"""
Blocks that are pruned and trained already, kept on disk until their model is saved.

A reconstruction takes minutes to hours; killed, it goes on with the block that it was in. Each
block is one safetensors file, ``{name}.safetensors``: ``{linear}:weight`` in the model's dtype,
``{linear}:keep`` (bool) and, where the linear has one, ``{linear}:order``. Its metadata has one
entry, ``pho-block``: a JSON object with ``key``, ``group_keep`` by linear, and ``record``.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pho_service.errors import OutputError
from pho_service.host.files import new_file
from pho_service.models.bundle_file import os_errors
from pho_service.pruning.masks import LinearMask
from pho_service.pruning.statistics import PrunableLinear

_META = "pho-block"


@dataclass(frozen=True, kw_only=True)
class KeptBlock:
    """
    Kept state of a block.

    Attributes:
        weights: Weights of its pruned linears, (out_features, in_features).
        masks: Their masks.
        record: JSON values: what its training came to.
    """

    weights: Mapping[str, Tensor]
    masks: Mapping[str, LinearMask]
    record: Mapping[str, Any]

    @classmethod
    def of(
        cls,
        linears: Mapping[str, PrunableLinear],
        masks: Mapping[str, LinearMask],
        record: Mapping[str, Any],
    ) -> Self:
        """The linears as they are now, with their masks."""
        return cls(
            weights={name: linears[name].weight for name in masks}, masks=masks, record=record
        )

    def put_into(self, linears: Mapping[str, PrunableLinear]) -> Iterator[tuple[str, LinearMask]]:
        """Give the linears their weights; yields the name and the mask of each."""
        for name, mask in self.masks.items():
            linears[name].weight.copy_(self.weights[name])
            yield name, mask


@dataclass(frozen=True, kw_only=True)
class KeptBlocks:
    """
    A folder of them.

    Attributes:
        folder: Made when the first block is kept.
        key: Names all that a block depends on. A file with another key is not read.
    """

    folder: Path
    key: str

    def read(self, name: str) -> KeptBlock | None:
        """A block by its name; None if it is not there, of another key, or broken."""
        try:
            with safe_open(self._path(name), framework="pt") as file:
                about = json.loads((file.metadata() or {})[_META])
                if about["key"] != self.key:
                    return None
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no dict
                masks = {
                    linear: LinearMask(
                        keep=tensors[f"{linear}:keep"],
                        order=tensors.get(f"{linear}:order"),
                        group_keep=group_keep,
                    )
                    for linear, group_keep in about["group_keep"].items()
                }
                weights = {linear: tensors[f"{linear}:weight"] for linear in masks}
                return KeptBlock(weights=weights, masks=masks, record=about["record"])
        except (OSError, SafetensorError, ValueError, KeyError):
            return None

    def keep(self, name: str, block: KeptBlock) -> None:
        """
        Write a block, whole or not at all.

        Raises:
            OutputError: It cannot be written.
        """
        tensors = {}
        for linear, mask in block.masks.items():
            tensors[f"{linear}:weight"] = block.weights[linear]
            tensors[f"{linear}:keep"] = mask.keep
            if mask.order is not None:
                tensors[f"{linear}:order"] = mask.order
        about = {
            "key": self.key,
            "group_keep": {linear: mask.group_keep for linear, mask in block.masks.items()},
            "record": dict(block.record),
        }
        try:
            self.folder.mkdir(exist_ok=True)
        except OSError as error:
            raise OutputError(f"{self.folder} cannot be made: {error.strerror}.") from error
        with new_file(self._path(name)) as partial, os_errors():
            # Copies: experts are parts of one tensor, and linears share an order.
            copies = {key: t.to("cpu", copy=True).contiguous() for key, t in tensors.items()}
            save_file(copies, partial, metadata={_META: json.dumps(about)})

    def remove(self) -> None:
        """Remove the folder, if there is one."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"
