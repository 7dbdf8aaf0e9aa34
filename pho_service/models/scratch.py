"""
Tensors that are kept on disk for a while: what does not fit into memory.
"""

import shutil
import tempfile
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from pho_service.errors import OutputError
from pho_service.host.settings import Settings
from pho_service.models.bundle_file import os_errors
from pho_service.pruning.memory import format_bytes


def scratch_folder(needed: int) -> Path:
    """
    Give the folder ``scratch`` of the user's cache, on a disk with room for so many bytes.

    Not the system's temporary folder: that is often small, or in memory.

    Raises:
        OutputError: It cannot be made, or the disk has less room.
    """
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
    """
    The same tensors, mapped from a file that lives as long as they do.

    Args:
        tensors: On the CPU.
        folder: For the file, which has no name once it is written.

    Raises:
        OutputError: It cannot be written.
    """
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
