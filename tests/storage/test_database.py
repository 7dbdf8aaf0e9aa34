"""The service's database: schemas that are migrated once, and found again after an outage."""

from contextlib import closing

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from storage.database import Database
from storage.studies import DatabaseGone, StorageError, open_storage
from storage.tables import metadata


def test_migrated_is_as_declared(database: Database) -> None:
    """The migrations give the tables that the code declares."""

    def ours(_object: object, _name: object, kind: str, reflected: bool, _other: object) -> bool:
        return not (kind == "table" and reflected and getattr(_object, "schema", None) != "pho")

    with database.transaction() as connection:
        context = MigrationContext.configure(
            connection,
            opts={
                "include_schemas": True,
                "include_name": lambda name, kind, _: kind != "schema" or name == "pho",
                "include_object": ours,
                "version_table_schema": "pho",
            },
        )

        assert compare_metadata(context, metadata) == []


def test_migrating_again_changes_nothing(database: Database) -> None:
    """A second start finds everything there."""
    database.migrate()
    database.check()


def test_tables_of_this_version(database: Database) -> None:
    """What is migrated is known to be; what an older version made is waited for."""
    database.check_migrated()
    with database.transaction() as connection:
        connection.exec_driver_sql("UPDATE pho.alembic_version SET version_num = '0002'")

    with pytest.raises(DatabaseGone, match="`pho serve` makes them"):
        database.check_migrated()


def test_studies_of_an_older_optuna(database: Database) -> None:
    """Optuna's tables are brought to the version of the installed one."""
    with database.transaction() as connection:
        connection.exec_driver_sql("DROP INDEX optuna.ix_trials_study_id")
        connection.exec_driver_sql("UPDATE optuna.alembic_version SET version_num = 'v3.0.0.d'")
    database.migrate()
    with open_storage(database.studies_url) as storage:
        assert storage.get_current_version() == storage.get_head_version()


def test_studies_of_a_newer_optuna(database: Database) -> None:
    """They are not touched."""
    with database.transaction() as connection:
        connection.exec_driver_sql("UPDATE optuna.alembic_version SET version_num = 'v9.0.0.a'")

    with pytest.raises(StorageError, match=r"v9\.0\.0\.a.*Install the newer Optuna"):
        database.migrate()


def test_tables_of_a_newer_version(database: Database) -> None:
    """Those are not touched."""
    with database.transaction() as connection:
        connection.exec_driver_sql("UPDATE pho.alembic_version SET version_num = '9999'")

    with pytest.raises(StorageError, match=r"9999.*Install the newest"):
        database.check_migrated()


def test_no_tables(postgresql: str) -> None:
    """A database that no service has seen is waited for."""
    database = Database(postgresql)  # the server's own, which only holds the others

    with closing(database), pytest.raises(DatabaseGone, match="`pho serve` makes them"):
        database.check_migrated()


@pytest.mark.parametrize("url", ["sqlite:///x.db", "mysql://h/d", "nonsense"])
def test_other_databases(url: str) -> None:
    """The service takes PostgreSQL alone."""
    with pytest.raises(StorageError, match="postgresql://user:password@host/name"):
        Database(url)
