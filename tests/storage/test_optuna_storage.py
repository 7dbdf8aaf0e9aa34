"""Optuna's own tests of a storage, on the service's: its own schema, commits that do not wait."""

import pytest
from optuna.storages import RDBStorage
from optuna.testing.pytest_storages import StorageTestCase

from storage.studies import open_storage


@pytest.fixture(scope="module")
def database(shared_database):
    return shared_database


@pytest.mark.thorough
class TestOptunaStorage(StorageTestCase):
    """What Optuna asks of a storage, the one of the service gives."""

    @pytest.fixture
    def storage(self, database, monkeypatch):
        """Opened as the workers open it; copies that a test unpickles are closed as well."""
        with database.transaction() as connection:
            connection.exec_driver_sql("TRUNCATE optuna.studies CASCADE")
        monkeypatch.setattr("storage.studies._PAGE", 2)  # so that several are read
        copies = []
        unpickle = RDBStorage.__setstate__

        def unpickle_and_note(self, state):
            unpickle(self, state)
            copies.append(self)

        monkeypatch.setattr(RDBStorage, "__setstate__", unpickle_and_note)
        with open_storage(database.studies_url) as storage:
            yield storage
        for copy in copies:
            copy.remove_session()
            copy.engine.dispose()


@pytest.mark.thorough
class TestOptunaStorageInAFile(StorageTestCase):
    """The same of a file, as `pho search` opens it."""

    @pytest.fixture
    def storage(self, tmp_path):
        with open_storage(f"sqlite:///{tmp_path / 'study.db'}") as storage:
            yield storage


def test_optuna_the_queue_and_the_service_each_have_their_tables(database):
    query = (
        "SELECT schemaname, array_agg(tablename::text) AS names FROM pg_tables "
        "WHERE schemaname NOT IN ('pg_catalog', 'information_schema') GROUP BY schemaname"
    )
    with database.transaction() as connection:
        tables = {row.schemaname: set(row.names) for row in connection.exec_driver_sql(query)}

    assert set(tables) == {"optuna", "pho", "procrastinate"}
    assert {"trials", "studies", "alembic_version"} <= tables["optuna"]
    assert {"jobs", "stages", "alembic_version"} <= tables["pho"]
    assert {name.split("_")[0] for name in tables["procrastinate"]} == {"procrastinate"}
