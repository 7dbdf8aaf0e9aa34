"""
The process that a worker is: the folder that it works in, and a new process in its place.
"""

import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

from filelock import FileLock, Timeout

_PREFIX = "pho-worker-"
_LOCK = "in-use"
_MADE_WITHIN_S = 60.0  # a younger folder's worker may be about to take its lock


@contextmanager
def own_folder(parent: Path | None = None) -> Iterator[Path]:
    """
    An empty folder for as long as the block runs.

    Those of workers that were killed are removed: their locks are free.
    """
    parent = parent or Path(tempfile.gettempdir())
    for left in parent.glob(f"{_PREFIX}*"):
        _remove_if_left(left)
    with (
        tempfile.TemporaryDirectory(prefix=_PREFIX, dir=parent) as folder,
        FileLock(Path(folder) / _LOCK),
    ):
        yield Path(folder)


def _remove_if_left(folder: Path) -> None:
    lock = folder / _LOCK
    with suppress(OSError, Timeout):  # there is no lock yet, or another worker has it
        status = lock.stat()
        old = time.time() - status.st_mtime > _MADE_WITHIN_S
        if old and status.st_uid == os.geteuid():
            with FileLock(lock, timeout=0):
                shutil.rmtree(folder, ignore_errors=True)


def start_anew(arguments: Sequence[str]) -> NoReturn:
    """
    Become a new worker process, with the same number and parent, whatever this one's threads do.

    Nothing of this process is left: a model that is being loaded, or a broken context of a GPU.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    sys.stdout.flush()
    sys.stderr.flush()
    os.chdir("/")
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))  # a GPU's memory is free once its files are closed
    command = [sys.executable, "-m", "workers", *arguments]
    os.execv(sys.executable, command)  # noqa: S606 - our own interpreter
