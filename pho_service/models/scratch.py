"""
What is kept on disk for a while: tensors that do not fit into memory, and work that is done once.
"""

import json
import logging
import math
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pho_service.errors import OutputError
from pho_service.host.files import new_file
from pho_service.host.settings import Settings
from pho_service.models.bundle_file import os_errors
from pho_service.progress import Look, never
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


_META = "pho-record"


@dataclass(frozen=True, kw_only=True)
class Record:
    """Outcome of a piece of work."""

    values: Mapping[str, Any] = field(default_factory=dict)  # JSON values
    tensors: Mapping[str, Tensor] = field(default_factory=dict)  # Each with memory of its own


@dataclass(frozen=True, kw_only=True)
class Memo:
    """A folder of records, by name, so that what was done is not done again."""

    folder: Path  # Made when the first record is kept
    key: str  # Names all that the work depends on. A record with another key is not read
    spare: bool = False  # Where they cannot be written, work goes on without them
    look: Look = never  # Called when one is kept, and work could go on behind it later

    def read(self, name: str) -> Record | None:
        """A record by its name; None if it is not there, of another key or name, or broken."""
        return self._read(name, tensors=True)

    def holds(self, name: str) -> bool:
        """Whether :meth:`read` finds a record, as far as its header tells."""
        return self._read(name, tensors=False) is not None

    def _read(self, name: str, *, tensors: bool) -> Record | None:
        try:
            with safe_open(self.path(name), framework="pt") as file:
                about = json.loads((file.metadata() or {})[_META])
                if [about["key"], about["name"]] != [self.key, name]:
                    return None
                keys = [*file.keys()] if tensors else []
                return Record(values=about["values"], tensors={k: file.get_tensor(k) for k in keys})
        except (OSError, SafetensorError, ValueError, KeyError, TypeError):
            return None

    def keep(self, name: str, record: Record) -> None:
        """Write a record, whole or not at all."""
        try:
            self._write(name, record)
        except OutputError as error:
            if not self.spare:
                raise
            logger.warning("the record of %s is not kept: %s", name, error)
        else:
            self.look()

    def _write(self, name: str, record: Record) -> None:
        about = {"key": self.key, "name": name, "values": dict(record.values)}
        tensors = {key: tensor.contiguous() for key, tensor in record.tensors.items()}
        try:
            self.folder.mkdir(parents=self.spare, exist_ok=True)
        except OSError as error:
            raise OutputError(f"{self.folder} cannot be made: {error.strerror}.") from error
        with new_file(self.path(name)) as partial, os_errors():
            save_file(tensors, partial, metadata={_META: json.dumps(about)})

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"


@dataclass(kw_only=True)
class Rows:
    """Rows of 32-bit numbers in a file that grows, beside the record of how many are kept."""

    # Each row is written to its own place, not to the end: a worker that was taken for dead, and
    # goes on, then writes what is there already.
    memo: Memo
    name: str
    count: int = 0
    shape: tuple[int, ...] = ()  # Of a row, once there is one

    @classmethod
    def kept(cls, memo: Memo, name: str) -> "Rows":
        record, rows = memo.read(name), cls(memo=memo, name=name)
        if record is not None and rows._path.is_file():
            rows.count, rows.shape = record.values["rows"], tuple(record.values["shape"])
        return rows

    @property
    def _path(self) -> Path:
        return self.memo.folder / f"{self.name}.rows"

    def add(self, rows: Tensor) -> None:
        """Add some, (rows, ...), int32, which are there for others once they are kept."""
        self.shape = tuple(rows.shape[1:])
        self._path.touch()
        with self._path.open("rb+") as file:
            file.seek(4 * self.count * math.prod(self.shape))
            file.write(rows.contiguous().numpy().tobytes())
        self.count += len(rows)

    def keep(self) -> None:
        """Write down how many there are; what they are outlasts a loss of power."""
        with self._path.open("rb+") as file:
            os.fsync(file.fileno())
        self.memo.keep(self.name, Record(values={"rows": self.count, "shape": self.shape}))

    def read(self) -> Tensor:
        """(rows, ...), int32: pages of the file, which take no memory that others need."""
        size = self.count * math.prod(self.shape)
        numbers = torch.from_file(str(self._path), shared=False, size=size, dtype=torch.int32)
        return numbers.view(self.count, *self.shape)
