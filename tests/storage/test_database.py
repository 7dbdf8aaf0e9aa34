"""The service's database: schemas that are migrated once, and found again after an outage."""

import socket
import time
import uuid
from collections.abc import Callable
from contextlib import closing
from typing import Any

import psycopg
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import create_engine, insert, select, text
from sqlalchemy.engine import make_url
from sqlalchemy.orm import Session, scoped_session

from storage import tables
from storage.database import Database
from storage.records import JobState, StageKind, StageState
from storage.studies import (
    DatabaseFull,
    DatabaseGone,
    StorageError,
    StudyStorage,
    open_storage,
    open_study,
)
from storage.tables import metadata


def test_the_migrations_give_the_tables_that_the_code_declares(database: Database) -> None:
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


def test_a_second_start_finds_everything_there(database: Database) -> None:
    database.migrate()
    database.check()


def test_tables_of_this_version(database: Database) -> None:
    """What is migrated is known to be; what an older version made is waited for."""
    database.check_migrated()
    with database.transaction() as connection:
        connection.exec_driver_sql("UPDATE pho.alembic_version SET version_num = '0010'")

    with pytest.raises(DatabaseGone, match="`pho serve` makes them"):
        database.check_migrated()


def test_optunas_tables_are_brought_to_the_version_of_the_installed_one(database: Database) -> None:
    with database.transaction() as connection:
        connection.exec_driver_sql("DROP INDEX optuna.ix_trials_study_id")
        connection.exec_driver_sql("UPDATE optuna.alembic_version SET version_num = 'v3.0.0.d'")
    database.migrate()
    with open_storage(database.studies_url) as storage:
        assert storage.get_current_version() == storage.get_head_version()


def test_they_are_not_touched(database: Database) -> None:
    with database.transaction() as connection:
        connection.exec_driver_sql("UPDATE optuna.alembic_version SET version_num = 'v9.0.0.a'")

    with pytest.raises(StorageError, match=r"v9\.0\.0\.a.*Install the newer Optuna"):
        database.migrate()


def test_those_are_not_touched(database: Database) -> None:
    with database.transaction() as connection:
        connection.exec_driver_sql("UPDATE pho.alembic_version SET version_num = '9999'")

    with pytest.raises(StorageError, match=r"by a newer PHO.*9999.*Install that PHO"):
        database.check_migrated()


@pytest.mark.parametrize("asked", [Database.migrate, Database.check_migrated])
def test_tables_of_before_the_first_release(
    database: Database, asked: Callable[[Database], None]
) -> None:
    with database.transaction() as connection:
        connection.exec_driver_sql("UPDATE pho.alembic_version SET version_num = '0009'")

    with pytest.raises(StorageError, match=r"version 0009, .* those of version 0010 .*kept"):
        asked(database)
    with database.transaction() as connection:
        assert connection.scalar(text("SELECT version_num FROM pho.alembic_version")) == "0009"


def test_tables_before_fields_were_left_out(database: Database) -> None:
    now = {"preset": "best", "calibration": {"samples": 6}, "warm_start": {"count": 3}}
    then = {
        "preset": "best-reconstructed", "preset_meaning": {"of": "best"},
        "calibration": {"samples": 6, "stop": "early"},
        "warm_start": {"count": 3, "compare_cold": True},
    }  # fmt: skip
    sealed = {"local": True, "documents": "d", "weights_scheme": 2}
    with database.transaction() as connection:
        connection.exec_driver_sql("UPDATE pho.alembic_version SET version_num = '0010'")
        values = {"id": uuid.uuid4(), "name": "old", "spec": then, "state": JobState.QUEUED,
                  "priority": 0, "trials": 1, "max_attempts": 1, "fingerprint": b""}  # fmt: skip
        connection.execute(insert(tables.jobs).values(values))
        stage = {"job_id": values["id"], "kind": StageKind.CALIBRATE, "number": 0,
                 "state": StageState.DONE, "result": {"inputs": sealed}}  # fmt: skip
        connection.execute(insert(tables.stages).values(stage))
    database.migrate()
    with database.transaction() as connection:
        found = connection.scalar(select(tables.jobs.c.spec))
        params, result = connection.execute(
            select(tables.stages.c.params, tables.stages.c.result)
        ).one()

    assert found == now
    assert (params, result) == (None, {"inputs": {"local": True}})


def test_a_database_that_no_service_has_seen_is_waited_for(postgresql: str) -> None:
    database = Database(postgresql)  # the server's own, which only holds the others

    with closing(database), pytest.raises(DatabaseGone, match="`pho serve` makes them"):
        database.check_migrated()


@pytest.mark.parametrize("url", ["sqlite:///x.db", "mysql://h/d", "nonsense"])
def test_the_service_takes_postgresql_alone(url: str) -> None:
    with pytest.raises(StorageError, match="postgresql://user:password@host/name"):
        Database(url)


def test_silent_server() -> None:
    """A server that accepts and says nothing is gone within ten seconds, for Optuna as well."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"postgresql://u:geheim@127.0.0.1:{listener.getsockname()[1]}/d"
        database = Database(url)
        began = time.monotonic()
        with pytest.raises(DatabaseGone, match="timeout") as caught:
            database.check()
        took_s = time.monotonic() - began
        others = (
            make_url(database.studies_url).query,
            psycopg.conninfo.conninfo_to_dict(database.conninfo),
        )

    assert took_s < 10
    assert "geheim" not in str(caught.value)
    for parameters in others:
        assert int(str(parameters["connect_timeout"])) < 10
        assert int(str(parameters["tcp_user_timeout"])) < 10_000


def test_time_limits(database: Database) -> None:
    """No statement of the service, Optuna or the queue lasts for ever; the URL's limits win."""
    asked = database.url.update_query_dict(
        {"connect_timeout": "77", "options": "-cstatement_timeout=7s"}
    )
    own = Database(asked.render_as_string(hide_password=False))
    limits = []
    for each in (database, own):
        for url in (each.engine.url, make_url(each.studies_url)):
            engine = create_engine(url)
            with engine.connect() as connection:
                limits.append(connection.exec_driver_sql("SHOW statement_timeout").scalar_one())
            engine.dispose()
        with psycopg.connect(each.conninfo) as queue:
            limits += queue.execute("SHOW statement_timeout").fetchone() or ()
    own.close()

    assert limits == ["2min"] * 3 + ["7s"] * 3
    assert "connect_timeout=77" in own.conninfo


def test_close_while_in_use(database: Database) -> None:
    """A connection that a thread still uses when the database is closed ends with its use."""
    own = Database(database.url.render_as_string(hide_password=False))
    with own.transaction() as connection:
        used: Any = connection.connection.dbapi_connection
        own.close()
        answer = connection.exec_driver_sql("SELECT 1").scalar_one()

    assert answer == 1
    assert used.closed


def test_studies_that_cannot_be_opened(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[Any] = []

    def fail(_url: str, _engine: object, sessions: scoped_session[Session]) -> None:
        connection = sessions().connection()
        used.append(connection.connection.dbapi_connection)
        raise DatabaseGone("away")

    monkeypatch.setattr("optuna.storages._rdb.storage._VersionManager", fail)
    with pytest.raises(DatabaseGone):
        StudyStorage(database.studies_url)

    assert [connection.closed for connection in used] == [True]


def test_url_to_be_shown() -> None:
    """The URL for Optuna's programs has the schema and no password: that of PGPASSWORD counts."""
    database = Database("postgresql://u:geheim@h:77/d?password=geheim&sslmode=require")

    assert database.shown_studies_url == (
        "postgresql+psycopg://u@h:77/d?options=-csearch_path%3Doptuna&sslmode=require"
    )


def test_a_full_disk_is_told_from_an_outage(database: Database) -> None:
    raising = "DO $$ BEGIN RAISE EXCEPTION 'no space left' USING ERRCODE = '53100'; END $$"
    with pytest.raises(DatabaseFull, match="no space left"), database.transaction() as connection:
        connection.exec_driver_sql(raising)


def test_reader(database: Database) -> None:
    """The role that reads studies does nothing else, also without its own setting."""
    database.let_read()
    database.let_read()
    with open_storage(database.studies_url) as storage:
        open_study(storage, "job", direction="minimize")
    reader = database.url.set(username="pho_reader").render_as_string()
    with open_storage(reader) as storage:
        studies = [study.study_name for study in storage.get_all_studies()]
    engine = create_engine(reader, isolation_level="AUTOCOMMIT")
    refused = []
    with engine.connect() as connection:
        connection.exec_driver_sql("SET default_transaction_read_only = off")
        for statement in (
            "DELETE FROM optuna.studies", "SELECT * FROM pho.keys",
            "CREATE TABLE public.mine (a int)",
            "SELECT * FROM procrastinate.procrastinate_jobs", "CREATE TABLE optuna.mine (a int)",
            "CREATE ROLE mine", "COPY optuna.studies TO PROGRAM 'id'",
        ):  # fmt: skip
            with pytest.raises(Exception, match="permission denied") as caught:
                connection.exec_driver_sql(statement)
            refused.append(type(getattr(caught.value, "orig", None)))
    engine.dispose()

    assert studies == ["job"]
    assert set(refused) == {psycopg.errors.InsufficientPrivilege}
