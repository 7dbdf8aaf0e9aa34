"""The service's database: schemas that are migrated once, and found again after an outage."""

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from storage.database import Database
from storage.studies import StorageError
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


@pytest.mark.parametrize("url", ["sqlite:///x.db", "mysql://h/d", "nonsense"])
def test_other_databases(url: str) -> None:
    """The service takes PostgreSQL alone."""
    with pytest.raises(StorageError, match="postgresql://user:password@host/name"):
        Database(url)
