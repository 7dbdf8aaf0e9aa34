"""
Taking turns with everybody else who uses a database.
"""

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress

from sqlalchemy import Connection, func, select
from sqlalchemy.exc import SQLAlchemyError

from storage.database import Database
from storage.studies import DatabaseGone

logger = logging.getLogger(__name__)

_AWAY = (SQLAlchemyError, DatabaseGone)
_PING_S = 2.0  # well below the time after which the server ends a transaction that rests


@contextmanager
def taking_turns(database: Database, name: str, wait: Callable[[], None]) -> Iterator[None]:
    """
    Inside, nobody else of this database is inside with the same name.

    It is a help and no guarantee: while the database is away, all go on. A process that dies, or is
    frozen, holds up nobody for long: its transaction, which is kept awake from here, is ended.

    Args:
        database: Database of all who take turns.
        name: What to take turns with.
        wait: Called again and again while another one is inside; may leave by raising.
    """
    connection = _begun(database, name, wait)
    if connection is None:
        yield
        return
    left = threading.Event()
    awake = threading.Thread(target=_keep_awake, args=[connection, left], daemon=True)
    awake.start()
    try:
        yield
    finally:
        left.set()
        awake.join()
        _end(connection)


def _begun(database: Database, name: str, wait: Callable[[], None]) -> Connection | None:
    """A connection whose transaction holds the lock; None if the database does not answer."""
    lock = select(func.pg_try_advisory_xact_lock(func.hashtextextended(name, 0)))
    while True:
        try:
            with ExitStack() as stack:
                connection = stack.enter_context(database.engine.connect())
                if connection.scalar(lock):
                    stack.pop_all()
                    return connection
        except _AWAY as error:
            logger.warning("no turns are taken, the database is away: %s", error)
            return None
        wait()  # without a connection, which another thread may need


def _keep_awake(connection: Connection, left: threading.Event) -> None:
    while not left.wait(_PING_S):
        try:
            connection.scalar(select(1))
        except _AWAY as error:
            logger.warning("others may take their turns too, the database is away: %s", error)
            return


def _end(connection: Connection) -> None:
    with suppress(*_AWAY):
        connection.close()  # which ends its transaction
