"""
Tensors and finished blocks that are kept on disk for a while: what does not fit into memory.
"""

import json
import logging
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pho_service.errors import OutputError
from pho_service.host.files import new_file
from pho_service.host.settings import Settings
from pho_service.models.bundle_file import os_errors
from pho_service.progress import Look, never
from pho_service.pruning.masks import LinearMask
from pho_service.pruning.statistics import PrunableLinear
from pho_service.spec.document import format_bytes

logger = logging.getLogger(__name__)


def scratch_folder(needed: int) -> Path:
    """Give the folder ``scratch`` of the user's cache, on a disk with room for so many bytes."""
    # Not the system's temporary folder: that is often small, or in memory.
    folder = Settings().cache_dir.expanduser() / "scratch"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise OutputError(
            f"{folder} cannot be made: {error.strerror}. Set PHO_CACHE_DIR."
        ) from error
    if free < needed:
        raise OutputError(
            f"{folder} has room for {format_bytes(free)}, but {format_bytes(needed)} may be "
            "written there. Free some space, or set PHO_CACHE_DIR to a folder on "
            "another disk."
        )
    return folder


def mapped_copy(tensors: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    if not tensors:
        return {}
    try:
        # The name goes at once; the system keeps a file that is mapped.
        with os_errors(), tempfile.TemporaryDirectory(prefix="pho-", dir=folder) as temporary:
            path = Path(temporary) / "tensors.safetensors"
            save_file({name: t.contiguous() for name, t in tensors.items()}, path)
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in tensors}
    except OSError as error:
        raise OutputError(
            f"{folder} cannot hold what a streamed model writes: "
            f"{error.strerror or error}. Free some space there, or give a folder on another disk."
        ) from error


_META = "pho-block"  # of a block that is kept on disk until its model is saved


@dataclass(frozen=True, kw_only=True)
class KeptBlock:
    weights: Mapping[str, Tensor]  # Weights of its pruned linears, (out_features, in_features)
    masks: Mapping[str, LinearMask]  # Their masks
    record: Mapping[str, Any]  # JSON values: what its training came to

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
    """A folder of them."""

    folder: Path  # Made when the first block is kept
    key: str  # Names all that a block depends on. A file with another key is not read
    spare: bool = False  # Where they cannot be written, work goes on without them
    look: Look = never  # Called when one is kept, and work could go on behind it later

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
        """Write a block, whole or not at all."""
        try:
            self._write(name, block)
        except OutputError as error:
            if not self.spare:
                raise
            logger.warning("a trained block is not kept: %s", error)
        else:
            self.look()

    def _write(self, name: str, block: KeptBlock) -> None:
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
            self.folder.mkdir(parents=self.spare, exist_ok=True)
        except OSError as error:
            raise OutputError(f"{self.folder} cannot be made: {error.strerror}.") from error
        with new_file(self._path(name)) as partial, os_errors():
            # Copies: experts are parts of one tensor, and linears share an order.
            copies = {key: t.to("cpu", copy=True).contiguous() for key, t in tensors.items()}
            save_file(copies, partial, metadata={_META: json.dumps(about)})

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"
