"""
One PostgreSQL database with three schemas: ``pho``, ``procrastinate`` and ``optuna``.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from psycopg.conninfo import make_conninfo
from sqlalchemy import Connection, Engine, create_engine, event, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, OperationalError
from sqlalchemy.exc import TimeoutError as NoConnectionFree

from storage.studies import DatabaseGone, StorageError, give_up, open_storage
from storage.tables import SCHEMA

_MIGRATION_LOCK = 7_466_446  # any number that nobody else locks in this database
_MIGRATIONS = str(Path(__file__).parent / "migrations")
SCHEMAS = ("pho", "procrastinate", "optuna")
POOL = 20  # connections of one process


class Database:
    """
    The database of a service.

    Args:
        url: ``postgresql://user:password@host/name``; libpq's parameters may follow.
        pool: Connections that this process keeps at most.
        idle_limit_s: The server ends transactions that rest for so long: those of a
            process that is frozen would hold up everybody.

    Raises:
        StorageError: ``url`` is no PostgreSQL URL.
    """

    def __init__(self, url: str, *, pool: int = POOL, idle_limit_s: float = 30.0) -> None:
        self.url = _parse(url)
        self._options = (f"-cidle_in_transaction_session_timeout={round(idle_limit_s * 1000)}",)
        self.engine: Engine = create_engine(
            _with_schema(self.url, "procrastinate", *self._options),
            pool_size=pool,
            max_overflow=0,
            pool_pre_ping=True,  # a restarted server is found again without an error
            pool_timeout=30,
        )

        event.listen(self.engine, "handle_error", give_up)  # Optuna writes here, too: see fence()

    def close(self) -> None:
        """Close the connections."""
        self.engine.dispose()

    @contextmanager
    def transaction(self) -> Iterator[Connection]:
        """
        A transaction: everything in it, or nothing.

        Raises:
            DatabaseGone: The server cannot be reached, or went away.
        """
        try:
            with self.engine.begin() as connection:
                yield connection
        except NoConnectionFree as error:
            raise DatabaseGone("all connections are in use") from error
        except DBAPIError as error:
            if isinstance(error, OperationalError) or error.connection_invalidated:
                raise DatabaseGone(str(error.orig).splitlines()[0]) from error
            raise

    @property
    def conninfo(self) -> str:
        """For libpq, with procrastinate's schema."""
        url = _with_schema(self.url, "procrastinate", *self._options)
        parameters = self.engine.dialect.create_connect_args(url)[1]
        parameters.pop("context", None)  # SQLAlchemy's, for psycopg alone
        return make_conninfo(**parameters)

    @property
    def studies_url(self) -> str:
        """
        For Optuna.

        Trials need not reach the disk one by one: the search's own commit,
        which follows each generation, takes them along.
        """
        url = _with_schema(self.url, "optuna", "-csynchronous_commit=off", *self._options)
        return url.render_as_string(hide_password=False)

    def migrate(self) -> None:
        """
        Create the schemas, or bring them to this version. Several at once take turns.

        Raises:
            DatabaseGone: The server cannot be reached.
            StorageError: It refuses, or was migrated by a newer PHO or a newer Optuna.
        """
        config = Config()
        config.set_main_option("script_location", _MIGRATIONS.replace("%", "%%"))
        with self.transaction() as connection:
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _MIGRATION_LOCK})
            for schema in SCHEMAS:
                connection.execute(text(f"CREATE SCHEMA IF NOT EXISTS {schema}"))
            config.attributes["connection"] = connection
            try:
                command.upgrade(config, "head")
            except CommandError as error:
                raise StorageError(_newer(str(error))) from error
        with self.transaction() as connection:
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _MIGRATION_LOCK})
            with open_storage(self.studies_url, upgrade=True):
                pass

    def check_migrated(self) -> None:
        """
        Raises:
            DatabaseGone: The server cannot be reached, or this version's tables are not there yet.
            StorageError: It was migrated by a newer PHO.
        """
        with self.transaction() as connection:
            versions = MigrationContext.configure(connection, opts={"version_table_schema": SCHEMA})
            found = versions.get_current_revision()
            # What Optuna writes last of its tables, which come after ours.
            whole = connection.scalar(text("SELECT to_regclass('optuna.alembic_version')"))
        if found is not None and found not in known_versions():
            raise StorageError(_newer(f"its version {found!r} is not known here"))
        if found != ScriptDirectory(_MIGRATIONS).get_current_head() or whole is None:
            raise DatabaseGone(
                "the database does not have the tables of this version yet: `pho serve` makes them "
                "when it starts"
            )

    def check(self) -> None:
        """
        Raises:
            DatabaseGone: The server does not answer.
        """
        with self.transaction() as connection:
            connection.execute(text("SELECT 1"))


def known_versions() -> set[str]:
    """Of our tables: those that this PHO can bring to its own."""
    return {script.revision for script in ScriptDirectory(_MIGRATIONS).walk_revisions()}


def _newer(cause: str) -> str:
    return (
        f"the database was migrated by another version of PHO: {cause}. Install the newest of the "
        "versions that use it. What it holds is kept."
    )


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


def _with_schema(url: URL, schema: str, *more: str) -> URL:
    """The URL with a search path, beside the server options that it has already."""
    given = url.query.get("options", ())
    given = (given,) if isinstance(given, str) else given
    options = " ".join((*given, f"-csearch_path={schema}", *more))
    return url.update_query_dict({"options": options})
