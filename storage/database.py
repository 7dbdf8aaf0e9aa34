"""
One PostgreSQL database with three schemas, and taking turns with everybody who uses it.
"""

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from psycopg.conninfo import make_conninfo
from sqlalchemy import Connection, Engine, create_engine, event, func, select, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, OperationalError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as NoConnectionFree
from sqlalchemy.pool import QueuePool

from storage.studies import (
    DatabaseFull,
    DatabaseGone,
    StorageError,
    end_connections,
    give_up,
    open_storage,
)
from storage.tables import READER, SCHEMA

logger = logging.getLogger(__name__)

_MIGRATION_LOCK = 7_466_446  # any number that nobody else locks in this database
_MIGRATIONS = str(Path(__file__).parent / "migrations")
SCHEMAS = ("pho", "procrastinate", "optuna")
POOL = 20  # connections of one process
MANY_DEAD = 100_000  # rows of a table

# A server that is there and says nothing, or a network that swallows what is sent: told in
# seconds, where libpq would wait for ever or for as long as the system does, which is minutes.
_PATIENCE = {
    "connect_timeout": "5",  # seconds, for each address of the server
    "keepalives_idle": "3",
    "keepalives_interval": "2",
    "keepalives_count": "3",
    "tcp_user_timeout": "8000",  # milliseconds
}
_NO_LIMIT = "-cstatement_timeout=0"
_DISK_FULL = "53100"  # PostgreSQL's code
_AWAY = (SQLAlchemyError, DatabaseGone)
_PING_S = 2.0  # well below the time after which the server ends a transaction that rests
_STATEMENT_S = 120  # a statement that waits longer, say for a lock, is ended by the server


@dataclass(frozen=True, kw_only=True)
class TableState:
    name: str  # With its schema
    rows: int  # About, as PostgreSQL counts them
    dead: int  # Rows that were deleted or replaced and still take space
    vacuumed_at: datetime | None  # By somebody or by PostgreSQL itself; None: never

    @property
    def is_swollen(self) -> bool:
        """Far beyond the fifth of dead rows at which PostgreSQL vacuums by itself."""
        return self.dead > MANY_DEAD and self.dead > self.rows

    def __str__(self) -> str:
        at = self.vacuumed_at
        last = "never" if at is None else f"last at {at.astimezone(UTC):%Y-%m-%d %H:%M} UTC"
        way = ": is autovacuum off? `VACUUM` it" if self.is_swollen else ", which has the most"
        return f"{self.dead:,} beside {self.rows:,} rows in {self.name}, vacuumed {last}{way}"


class Database:
    """The database of a service."""

    # A server that cannot be reached, or accepts and does not answer, is :class:`DatabaseGone`
    # within ten seconds, unless the URL has time-outs of its own.

    def __init__(self, url: str, *, pool: int = POOL, idle_limit_s: float = 30.0) -> None:
        self._user_url = _parse(url)
        patience = {k: v for k, v in _PATIENCE.items() if k not in self._user_url.query}
        self.url = self._user_url.update_query_dict(patience)
        self._options = (f"-cidle_in_transaction_session_timeout={round(idle_limit_s * 1000)}",)
        self._limit = f"-cstatement_timeout={_STATEMENT_S * 1000}"
        self.engine: Engine = create_engine(
            _with_schema(self.url, "procrastinate", *self._options, before=self._limit),
            pool_size=pool,
            max_overflow=0,
            pool_pre_ping=True,  # a restarted server is found again without an error
            pool_timeout=30,
        )

        self.waiting = 0  # threads that wait for a connection
        self._counting = threading.Lock()
        event.listen(self.engine, "handle_error", give_up)  # Optuna writes here, too: see fence()

    def close(self) -> None:
        """Close the connections; one that another thread is using, once it gives it back."""
        end_connections(self.engine)

    @contextmanager
    def transaction(self) -> Iterator[Connection]:
        """A transaction: everything in it, or nothing."""
        try:
            with self._connect() as connection, connection.begin():
                yield connection
        except NoConnectionFree as error:
            raise DatabaseGone("all connections are in use") from error
        except DBAPIError as error:
            if getattr(error.orig, "sqlstate", None) == _DISK_FULL:
                raise DatabaseFull(str(error.orig).splitlines()[0]) from error
            if isinstance(error, OperationalError) or error.connection_invalidated:
                raise DatabaseGone(str(error.orig).splitlines()[0]) from error
            raise

    def _connect(self) -> Connection:
        with self._counting:
            self.waiting += 1
        try:
            return self.engine.connect()
        finally:
            with self._counting:
                self.waiting -= 1

    def pool(self) -> tuple[int, int]:
        """How many connections are in use, and how many may be."""
        pool = self.engine.pool
        assert isinstance(pool, QueuePool)
        return pool.checkedout(), pool.size()

    def server(self) -> tuple[str, int]:
        """The server's version, and the bytes of this database there."""
        size = func.pg_database_size(func.current_database())
        version = func.current_setting("server_version")
        with self.transaction() as connection:
            row = connection.execute(select(version, size)).one()
        return row[0], row[1]

    def tables(self) -> list[TableState]:
        """Those of the three schemas that need a vacuum, or the one with the most dead rows."""
        query = text(
            "SELECT schemaname || '.' || relname AS name, n_live_tup AS rows, n_dead_tup AS dead,"
            " greatest(last_vacuum, last_autovacuum) AS vacuumed_at FROM pg_stat_user_tables"
            " WHERE schemaname = ANY(:schemas) ORDER BY n_dead_tup DESC, 1"
        )
        with self.transaction() as connection:
            rows = connection.execute(query, {"schemas": [*SCHEMAS]})
            tables = [TableState(**row._mapping) for row in rows]
        return [table for table in tables if table.is_swollen] or tables[:1]

    @property
    def conninfo(self) -> str:
        """For libpq, with procrastinate's schema."""
        url = _with_schema(self.url, "procrastinate", *self._options, before=self._limit)
        parameters = self.engine.dialect.create_connect_args(url)[1]
        parameters.pop("context", None)  # SQLAlchemy's, for psycopg alone
        return make_conninfo(**parameters)

    @property
    def studies_url(self) -> str:
        """For Optuna."""
        # Trials need not reach the disk one by one: the search's own commit, which follows each
        # generation, takes them along.
        return self._studies_url(self._limit)

    def _studies_url(self, limit: str) -> str:
        options = ("-csynchronous_commit=off", *self._options)
        url = _with_schema(self.url, "optuna", *options, before=limit)
        return url.render_as_string(hide_password=False)

    @property
    def shown_studies_url(self) -> str:
        url = _with_schema(self._user_url, "optuna").difference_update_query(["password"])
        return URL.create(
            url.drivername, username=url.username, host=url.host, port=url.port,
            database=url.database, query=url.query,
        ).render_as_string()  # fmt: skip

    def migrate(self) -> None:
        """Create the schemas, or bring them to this version. Several at once take turns."""
        config = Config()
        config.set_main_option("script_location", _MIGRATIONS.replace("%", "%%"))
        with self._taking_turns() as connection:
            check_version(_version(connection), "the database")
            for schema in SCHEMAS:
                connection.execute(text(f"CREATE SCHEMA IF NOT EXISTS {schema}"))
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
        with self._taking_turns(), open_storage(self._studies_url(_NO_LIMIT), upgrade=True):
            pass

    def let_read(self) -> None:
        """Make a role that reads all studies and does nothing else, or bring it up to date."""
        # It has no password: the server says who may be it. That of a service's own PostgreSQL lets
        # in who runs the service; see :class:`~storage.embedded.Postmaster`.
        with self._taking_turns() as connection:
            query = text("SELECT 1 FROM pg_roles WHERE rolname = :name")
            if connection.scalar(query, {"name": READER}) is None:
                connection.execute(text(f"CREATE ROLE {READER} LOGIN"))
            for statement in (
                f"ALTER ROLE {READER} SET default_transaction_read_only = on",
                f"ALTER ROLE {READER} SET search_path = optuna",
                f"GRANT USAGE ON SCHEMA optuna TO {READER}",
                f"GRANT SELECT ON ALL TABLES IN SCHEMA optuna TO {READER}",
            ):
                connection.execute(text(statement))

    @contextmanager
    def _taking_turns(self) -> Iterator[Connection]:
        """A transaction in which no other process migrates, and which may take its time."""
        with self.transaction() as connection:
            connection.execute(text("SET LOCAL statement_timeout = 0"))
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _MIGRATION_LOCK})
            yield connection

    def check_migrated(self) -> None:
        with self.transaction() as connection:
            version = _version(connection)
            # What Optuna writes last of its tables, which come after ours.
            optunas_tables = connection.scalar(text("SELECT to_regclass('optuna.alembic_version')"))
        check_version(version, "the database")
        if version != ScriptDirectory(_MIGRATIONS).get_current_head() or optunas_tables is None:
            raise DatabaseGone(
                "the database does not have the tables of this version yet: `pho serve` makes them "
                "when it starts"
            )

    def check(self) -> None:
        with self.transaction() as connection:
            connection.execute(text("SELECT 1"))


def known_versions() -> set[str]:
    """Return the versions of our tables that this PHO can upgrade."""
    return {script.revision for script in ScriptDirectory(_MIGRATIONS).walk_revisions()}


def check_version(version: str | None, place: str) -> None:
    versions = known_versions()
    if version is None or version in versions:
        return
    if version < min(versions):
        raise StorageError(
            f"{place} has tables of version {version}, of a PHO before the first release, which no "
            "release upgrades. Begin with the --data-dir of a new folder or the --database-url of "
            "a new database. What it holds is kept."
        )
    raise StorageError(
        f"{place} was written by a newer PHO: its tables are of version {version}, and this PHO "
        f"knows versions up to {max(versions)}. Install that PHO, or a newer one. What it holds is "
        "kept."
    )


def _version(connection: Connection) -> str | None:
    options = {"version_table_schema": SCHEMA}
    return MigrationContext.configure(connection, opts=options).get_current_revision()


def _parse(url: str) -> URL:
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        raise StorageError(
            "the database URL is not understood. Write postgresql://user:password@host/name."
        ) from None
    if parsed.get_backend_name() not in ("postgresql", "postgres"):
        raise StorageError(
            f"the database URL is for {parsed.get_backend_name()!r}, but the service needs "
            "PostgreSQL. Write postgresql://user:password@host/name."
        )
    return parsed.set(drivername="postgresql+psycopg")


def _with_schema(url: URL, schema: str, *more: str, before: str = "") -> URL:
    """The URL with a search path, beside the server options that it has already."""
    parts = url.query.get("options", ())
    parts = (parts,) if isinstance(parts, str) else parts
    options = " ".join(filter(None, (before, *parts, f"-csearch_path={schema}", *more)))
    return url.update_query_dict({"options": options})


@contextmanager
def taking_turns(database: Database, name: str, wait: Callable[[], None]) -> Iterator[None]:
    """Inside, nobody else of this database is inside with the same name."""
    # It is a help and no guarantee: while the database is away, all go on. A process that dies, or
    # is frozen, holds up nobody for long: its transaction, which is kept awake from here, is ended.
    connection = _begun(database, name, wait)
    if connection is None:
        yield
        return
    end = threading.Event()
    awake = threading.Thread(target=_keep_awake, args=[connection, end], daemon=True)
    awake.start()
    try:
        yield
    finally:
        end.set()
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


def _keep_awake(connection: Connection, end: threading.Event) -> None:
    while not end.wait(_PING_S):
        try:
            connection.scalar(select(1))
        except _AWAY as error:
            logger.warning("others may take their turns too, the database is away: %s", error)
            return


def _end(connection: Connection) -> None:
    with suppress(*_AWAY):
        connection.close()  # which ends its transaction
