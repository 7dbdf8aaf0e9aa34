"""
One GPU for each worker of a machine.
"""

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from pho_service.models.devices import pick_device

logger = logging.getLogger(__name__)


@contextmanager
def take_device(name: str, locks: Path | None = None) -> Iterator[torch.device]:
    """
    The device to work on; with ``auto``, the first GPU that no other worker has.

    If all are taken, workers share: the first GPU is given again, with a warning.

    Args:
        name: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        locks: Where the files lie that workers of this machine lock; the
            system's temporary folder by default.

    Raises:
        InvalidInput: torch does not know the device, or it does not exist.
    """
    device = pick_device(name)
    if name != "auto" or device.type != "cuda":
        yield device
        return
    folder = locks or Path(tempfile.gettempdir())
    for index in range(torch.cuda.device_count()):
        lock = FileLock(folder / f"pho-gpu-{index}.lock", mode=0o666)
        try:
            lock.acquire(timeout=0)
        except (Timeout, PermissionError):
            continue
        try:
            yield torch.device("cuda", index)
        finally:
            lock.release()
        return
    logger.warning("all GPUs are taken by other workers: sharing the first")
    yield torch.device("cuda", 0)
