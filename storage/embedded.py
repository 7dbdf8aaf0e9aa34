"""
A PostgreSQL of one's own, from a wheel: for a service on one machine, and for the tests.
"""

import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from storage.postmaster import Postmaster
from storage.server_user import name_of
from storage.studies import StorageError

logger = logging.getLogger(__name__)

_QUICK_S = 10.0  # a server that dies sooner is started again more slowly
_SLOWEST_S = 30.0
_STOP_S = 5.0  # for what it does in order; the next start reads its log if it was not


@contextmanager
def embedded_postgresql(data_dir: Path) -> Iterator[str]:
    """
    Start a server on ``data_dir/postgresql``, give its URL, and stop it afterwards.

    One that dies meanwhile is started again. It listens on a socket in that folder
    alone and lets in who started it, nobody else: see :class:`~storage.postmaster.Postmaster`.
    Folders above keep their rights.

    Raises:
        StorageError: The folder cannot be made, others may write into it, it is in use
            by another service, or the server does not start.
    """
    try:
        data_dir = data_dir.expanduser().resolve()
        server = Postmaster(data_dir / "postgresql")
        data_dir.parent.mkdir(parents=True, exist_ok=True)
        # Root's server is another user, who must get through to its own folder.
        data_dir.mkdir(mode=0o700 if os.geteuid() else 0o711, exist_ok=True)
        _check_owner(data_dir)
        lock = FileLock(data_dir / "lock", mode=0o600)
        lock.acquire(timeout=0)
    except Timeout as error:
        raise StorageError(
            f"the data folder {data_dir} is in use by another `pho serve`. Stop that one, or give "
            "another --data-dir."
        ) from error
    except (OSError, RuntimeError) as error:
        raise StorageError(f"the data folder {data_dir} cannot be used: {error}.") from error
    try:
        server.start()
        with _watched(server):
            yield server.url
    finally:
        server.stop(_STOP_S)
        lock.release()


def running_url(data_dir: Path) -> str | None:
    """The URL of the server that another process runs on this folder; None if there is none."""
    server = _server(data_dir)
    return None if server is None or server.process() is None else server.url


def reading_url(data_dir: Path) -> str | None:
    """The same, for Optuna, as the role that reads studies and nothing else."""
    server = _server(data_dir)
    return None if server is None or server.process() is None else server.reading_url


def _server(data_dir: Path) -> Postmaster | None:
    try:
        return Postmaster(data_dir.expanduser().resolve() / "postgresql")
    except (StorageError, RuntimeError):  # of such a name none runs
        return None


def _check_owner(data_dir: Path) -> None:
    """Who may write there may put another database in our place, or lead root elsewhere."""
    found = data_dir.stat()
    if found.st_uid not in (0, os.geteuid()):
        raise StorageError(
            f"the data folder {data_dir} belongs to the user {name_of(found.st_uid)}, and the "
            f"service would be run by {name_of(os.geteuid())}. Start it as the user that it "
            f"belongs to, or give another --data-dir."
        )
    if found.st_mode & 0o002:
        raise StorageError(
            f"everybody may write into the data folder {data_dir}. Close it with "
            f"`chmod o-w {data_dir}`, or give a --data-dir in it."
        )


@contextmanager
def _watched(server: Postmaster) -> Iterator[None]:
    """Start the server again when it dies, until the block is left."""
    stopping = threading.Event()
    watcher = threading.Thread(target=_watch, args=(server, stopping), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        stopping.set()
        watcher.join()


def _watch(server: Postmaster, stopping: threading.Event) -> None:
    began, wait_s = time.monotonic(), 0.0
    while not stopping.wait(0.1):
        if server.lives():
            continue
        logger.warning("PostgreSQL ended with code %s; it is started again", server.exit_code)
        quick = time.monotonic() - began < _QUICK_S
        wait_s = min(_SLOWEST_S, max(0.2, 2 * wait_s)) if quick else 0.0
        if stopping.wait(wait_s):
            return
        began = time.monotonic()
        try:
            server.start(stopping)
        except StorageError as error:
            if not stopping.is_set():
                logger.warning("%s It is tried again", error)
        else:
            logger.warning("PostgreSQL answers again")
