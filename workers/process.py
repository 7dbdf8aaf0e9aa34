"""
The process that a worker is: its folder, its GPU, and a new process in its place.
"""

import logging
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import NoReturn

import torch
from filelock import FileLock, Timeout

from pho_service.errors import InvalidInput
from pho_service.host.machine import first_words
from pho_service.pruning.hardware import gpus, pick_device

logger = logging.getLogger(__name__)

ALL = "all"  # GPUs of this machine, together
_PREFIX = "pho-worker-"
_LOCK = "in-use"
_MADE_WITHIN_S = 60.0  # a younger folder's worker may be about to take its lock


@contextmanager
def own_folder(parent: Path | None = None) -> Iterator[Path]:
    """An empty folder for as long as the block runs."""
    # Those of workers that were killed are removed: their locks are free.
    parent = parent or Path(tempfile.gettempdir())
    for old_folder in parent.glob(f"{_PREFIX}*"):
        _remove_if_left(old_folder)
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
    """Become a new worker process with this one's number and parent, whatever its threads do."""
    # Nothing of this process is left: a model that is being loaded, or a broken context of a GPU.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    sys.stdout.flush()
    sys.stderr.flush()
    os.chdir("/")
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))  # a GPU's memory is free once its files are closed
    command = [sys.executable, "-P", "-m", "workers", *arguments]
    os.execv(sys.executable, command)  # noqa: S606 - our own interpreter


@contextmanager
def take_device(name: str, locks: Path | None = None) -> Iterator[torch.device]:
    """The device to work on; of GPUs, one that no other worker of this machine has."""
    # What is locked is the card, whichever number a process knows it by. With ``auto`` and ``cuda``
    # it is the first that is free and works. If none is free, ``auto`` shares the first one, with a
    # warning.
    if name == ALL:
        with ExitStack() as stack:
            cards = [stack.enter_context(take_device(str(card), locks)) for card in gpus()]
            if not cards:
                raise InvalidInput("--device all needs GPUs, and torch sees none. Use auto or cpu.")
            yield cards[0]
        return
    device = pick_device(name)
    if device.type != "cuda":
        yield device
        return
    indices = range(torch.cuda.device_count()) if device.index is None else [device.index]
    folder = locks or Path(tempfile.gettempdir())
    busy_cards, why_not = [], []
    for card in (torch.device("cuda", index) for index in indices):
        broken = _why_broken(card)
        if broken is not None:
            why_not.append(f"{card} does not work{broken}")
            logger.warning("%s", why_not[-1])
            continue
        lock = FileLock(folder / f"pho-gpu-{_uuid(card)}.lock", mode=0o666)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            busy_cards.append(card)
            why_not.append(f"{card} (GPU {_uuid(card)}) is another worker's on this machine")
            continue
        except PermissionError:
            words = "whether another user's worker has %s is not known: %s may not be opened"
            logger.warning(words, card, lock.lock_file)
        try:
            yield card
        finally:
            lock.release()
        return
    if name == "auto" and busy_cards:
        logger.warning("all GPUs are taken by other workers: sharing %s", busy_cards[0])
        yield busy_cards[0]
        return
    raise InvalidInput(
        f"--device {name}: {'; '.join(why_not)}. One worker has one GPU: start no more workers "
        "than there are GPUs, or use --device cpu."
    )


def _uuid(card: torch.device) -> str:
    """Return the card's own id: its number depends on CUDA_VISIBLE_DEVICES."""
    return str(torch.cuda.get_device_properties(card).uuid)


def _why_broken(card: torch.device) -> str | None:
    """What is wrong with a card; None if something can be computed on it."""
    try:
        torch.ones(1, device=card).sum().item()
    except RuntimeError as error:
        return first_words(error)
    return None
