"""
Optuna studies as the record of searches.

A study holds every finished trial once; nothing else is stored about a search.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import optuna
from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage
from sqlalchemy import Connection, event, text
from sqlalchemy.engine import ExceptionContext, make_url
from sqlalchemy.exc import (
    ArgumentError,
    NoSuchModuleError,
    OperationalError,
    SQLAlchemyError,
)


class StorageError(Exception):
    """The database of a study cannot be opened, read or written."""


class DatabaseGone(StorageError):
    """The database cannot be reached; trying again later may help."""


@contextmanager
def open_storage(url: str) -> Iterator[RDBStorage]:
    """
    Open Optuna's storage, and close its connections afterwards.

    SQLite files are put into write-ahead logging: a commit is about seven
    times faster there, and still survives a killed process.

    Raises:
        StorageError: ``url`` is no database URL, names a folder that is not
            there, or the database fails, now or inside the ``with`` block.
    """
    check_url(url)
    try:
        storage = RDBStorage(url)
        event.listen(storage.engine, "handle_error", give_up)
        if storage.engine.dialect.name == "sqlite":
            event.listen(storage.engine, "connect", _set_pragmas)
            storage.engine.dispose()  # the connections made so far lack the settings
        try:
            yield storage
        finally:
            storage.remove_session()
            storage.engine.dispose()
    except ImportError as error:
        raise StorageError(f"the driver of {url} is not installed: {error}") from error
    except (SQLAlchemyError, StorageInternalError) as error:
        cause = error if isinstance(error, SQLAlchemyError) else error.__cause__ or error
        reason = str(getattr(cause, "orig", None) or cause).splitlines()[0]
        kind = DatabaseGone if isinstance(cause, OperationalError) else StorageError
        raise kind(f"the database fails: {reason}. What it holds is kept.") from error


@contextmanager
def written_on(storage: RDBStorage, connection: Connection) -> Iterator[None]:
    """Have Optuna write in the transaction of ``connection``, to its own schema."""
    connection.execute(text("SET LOCAL search_path TO optuna"))  # ours are named in full
    sessions = storage.scoped_session
    sessions.remove()
    sessions.configure(bind=connection, join_transaction_mode="create_savepoint")
    try:
        yield
    finally:
        sessions.remove()
        sessions.configure(bind=storage.engine, join_transaction_mode="conditional_savepoint")


def open_study(
    storage: RDBStorage, name: str, *, direction: Literal["minimize", "maximize"]
) -> optuna.Study:
    """
    Create a study, or open it if it is there.

    Args:
        storage: Where.
        name: Unique in the storage.
        direction: Whether low or high values are good.
    """
    return optuna.create_study(
        storage=storage, study_name=name, direction=direction, load_if_exists=True
    )


def study_name(job_name: str, island: int) -> str:
    """The study of a job's island: the first has the job's name."""
    return job_name if island == 0 else f"{job_name} island {island}"


def give_up(context: ExceptionContext) -> None:
    """
    Let nothing be tried again on another connection.

    Optuna does, and would number a trial anew after a server that crashed has
    forgotten those before it.
    """
    if context.is_disconnect and not context.is_pre_ping:
        reason = str(context.original_exception).splitlines()[0]
        raise DatabaseGone(f"the database went away: {reason}. What it holds is kept.")


def _set_pragmas(connection: object, _record: object) -> None:
    cursor = connection.cursor()  # type: ignore[attr-defined]  # a DBAPI connection
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=NORMAL")
    cursor.close()


def check_url(url: str) -> None:
    """
    Raises:
        StorageError: ``url`` is no database URL, names a folder that is not there, or
            a database in memory, which keeps nothing.
    """
    hint = "Write sqlite:///study.db for a file in this folder."
    try:
        parsed = make_url(url)
        parsed.get_dialect()
    except (ArgumentError, NoSuchModuleError):
        raise StorageError(f"{url!r} is not a database URL. {hint}") from None
    if parsed.get_backend_name() == "sqlite":
        if parsed.database in (None, "", ":memory:"):
            raise StorageError(f"{url} is a database in memory, which keeps nothing. {hint}")
        folder = Path(str(parsed.database)).resolve().parent
        if not folder.is_dir():
            raise StorageError(f"the folder {folder} does not exist. Make it first.")
