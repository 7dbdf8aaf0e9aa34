"""The service's database: schemas that are migrated once, and found again after an outage."""

import socket
import time
from contextlib import closing

import psycopg
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from psycopg.conninfo import conninfo_to_dict
from sqlalchemy import create_engine, text
from sqlalchemy.engine import URL, make_url

from storage.database import Database
from storage.studies import (
    DatabaseFull,
    DatabaseGone,
    StorageError,
    StudyStorage,
    open_storage,
    open_study,
)
from storage.tables import metadata


def test_the_migrations_give_the_tables_that_the_code_declares(database):
    def ours(_object, _name, kind, _reflected, _other):
        return kind != "table" or _object.schema == "pho"

    with database.transaction() as connection:
        connection.exec_driver_sql("SET LOCAL search_path = public")  # names of schemas stay
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


def test_what_no_service_has_seen_or_is_only_half_made_is_waited_for(database, postgresql):
    database.check_migrated()
    with database.transaction() as connection:
        connection.exec_driver_sql("DROP TABLE optuna.alembic_version")

    with pytest.raises(DatabaseGone, match="`pho serve` makes them"):
        database.check_migrated()
    others = Database(postgresql)  # the server's own, which only holds the others
    with closing(others), pytest.raises(DatabaseGone, match="`pho serve` makes them"):
        others.check_migrated()


def test_optunas_tables_are_brought_to_the_installed_version_those_of_a_newer_one_not_touched(
    database,
):
    with database.transaction() as connection:
        connection.exec_driver_sql("DROP INDEX optuna.ix_trials_study_id")
        connection.exec_driver_sql("UPDATE optuna.alembic_version SET version_num = 'v3.0.0.d'")
    database.migrate()
    with open_storage(database.studies_url) as storage:
        assert storage.get_current_version() == storage.get_head_version()
    with database.transaction() as connection:
        connection.exec_driver_sql("UPDATE optuna.alembic_version SET version_num = 'v9.0.0.a'")

    with pytest.raises(StorageError, match=r"v9\.0\.0\.a.*Install the newer Optuna"):
        database.migrate()


def test_tables_of_a_version_that_is_not_known_are_not_touched(database):
    for version, said in (
        ("0011", r"version 0011, .*before the first release, .*a new database.*is kept"),
        ("9999", r"by a newer PHO.*9999.*Install that PHO, .* What it holds is kept"),
    ):
        with database.transaction() as connection:
            changed = text("UPDATE pho.alembic_version SET version_num = :version")
            connection.execute(changed, {"version": version})
        for asked in (database.migrate, database.check_migrated):
            with pytest.raises(StorageError, match=said):
                asked()
        with database.transaction() as connection:
            assert connection.scalar(text("SELECT version_num FROM pho.alembic_version")) == version


@pytest.mark.parametrize("url", ["sqlite:///x.db", "mysql://h/d", "nonsense"])
def test_the_service_takes_postgresql_alone(url):
    with pytest.raises(StorageError, match="postgresql://user:password@host/name"):
        Database(url)


def test_a_server_that_accepts_and_says_nothing_is_gone_within_ten_seconds():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"postgresql://u:geheim@127.0.0.1:{listener.getsockname()[1]}/d"
        database = Database(url)
        began = time.monotonic()
        with pytest.raises(DatabaseGone, match="timeout") as caught:
            database.check()
        took_s = time.monotonic() - began
        others = (make_url(database.studies_url).query, conninfo_to_dict(database.conninfo))

    assert took_s < 10
    assert "geheim" not in str(caught.value)
    for parameters in others:
        assert int(str(parameters["connect_timeout"])) < 10
        assert int(str(parameters["tcp_user_timeout"])) < 10_000


def test_no_statement_of_the_service_optuna_or_the_queue_lasts_for_ever(database):
    limits = []
    for url in (database.engine.url, make_url(database.studies_url)):
        engine = create_engine(url)
        with engine.connect() as connection:
            limits.append(connection.exec_driver_sql("SHOW statement_timeout").scalar_one())
        engine.dispose()
    with psycopg.connect(database.conninfo) as queue:
        limits += queue.execute("SHOW statement_timeout").fetchone() or ()
    asked = database.url.update_query_dict({"connect_timeout": "77"})
    own = Database(asked.render_as_string(hide_password=False))

    assert limits == ["2min"] * 3
    assert "connect_timeout=77" in own.conninfo  # a limit of the URL wins


def test_a_connection_in_use_at_the_close_ends_with_its_use(database):
    own = Database(database.url.render_as_string(hide_password=False))
    with own.transaction() as connection:
        used = connection.connection.dbapi_connection
        own.close()
        answer = connection.exec_driver_sql("SELECT 1").scalar_one()

    assert answer == 1
    assert used.closed


def test_studies_that_cannot_be_opened(database, monkeypatch):
    used = []

    def fail(_url, _engine, sessions):
        connection = sessions().connection()
        used.append(connection.connection.dbapi_connection)
        raise DatabaseGone("away")

    monkeypatch.setattr("optuna.storages._rdb.storage._VersionManager", fail)
    with pytest.raises(DatabaseGone):
        StudyStorage(database.studies_url)

    assert [connection.closed for connection in used] == [True]


def test_the_url_for_optunas_programs_has_the_schema_and_no_password():
    database = Database("postgresql://u:geheim@h:77/d?password=geheim&sslmode=require")

    assert database.shown_studies_url == (
        "postgresql+psycopg://u@h:77/d?options=-csearch_path%3Doptuna&sslmode=require"
    )


def test_a_full_disk_is_told_from_an_outage(database):
    raising = "DO $$ BEGIN RAISE EXCEPTION 'no space left' USING ERRCODE = '53100'; END $$"
    with pytest.raises(DatabaseFull, match="no space left"), database.transaction() as connection:
        connection.exec_driver_sql(raising)


def test_the_role_that_reads_studies_does_nothing_else(database):
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


PASSWORDS = ["plain", "p%40%", "{braces}", "%s %d", "a b", "a+b", "@:/?#&=", "ü€", "'\"\\", "%(x)s"]
BASE = URL.create("postgresql", username="u", password="p", host="h", port=5432, database="d")


class TestUrls:
    """What a user writes into the URL gets to where the connections are made."""

    def test_libpq_and_optuna_get_password_and_socket_folder_whatever_is_in_them(self):
        for password in PASSWORDS:
            url = BASE.set(password=password).render_as_string(hide_password=False)
            parsed = conninfo_to_dict(Database(url).conninfo)

            assert parsed["password"] == make_url(Database(url).studies_url).password == password
            assert (parsed["user"], parsed["host"], parsed["dbname"]) == ("u", "h", "d")
        for host in ("/a/with space", "/a/with+plus", "/a/100%41", "/a/b&c=d"):
            url = BASE.set(host=None).update_query_dict({"host": host}).render_as_string()
            database = Database(url)

            assert make_url(database.studies_url).query["host"] == host
            assert conninfo_to_dict(database.conninfo)["host"] == host

    def test_a_url_may_name_several_hosts_of_which_one_is_the_primary(self):
        query = "host=h1:5432&host=h2:5433&target_session_attrs=primary"
        parsed = conninfo_to_dict(Database(f"postgresql://u:p@/d?{query}").conninfo)

        assert (parsed["host"], parsed["port"]) == ("h1,h2", "5432,5433")
        assert parsed["target_session_attrs"] == "primary"

    def test_all_ways_to_write_postgresql_mean_the_same_a_port_is_a_number(self):
        for scheme in ("postgres", "postgresql", "postgresql+psycopg2"):
            database = Database(f"{scheme}://u:p@h/d?sslmode=require")

            assert conninfo_to_dict(database.conninfo)["sslmode"] == "require"
            assert database.studies_url.startswith("postgresql+psycopg://")
        for place in ("h:x", "h1:5432,h2:5433"):
            with pytest.raises(StorageError, match="is not understood"):
                Database(f"postgresql://u:p@{place}/d")

    def test_server_options_are_kept_but_for_schemas(self, database):
        options = "&options=-cstatement_timeout%3D54321%20-cwork_mem%3D5MB%20-csearch_path%3Dpublic"
        given = Database(database.url.render_as_string() + options)
        studies = create_engine(given.studies_url)
        names = ("statement_timeout", "work_mem", "search_path", "synchronous_commit")
        with (
            given.engine.connect() as ours,
            studies.connect() as optunas,
            psycopg.connect(given.conninfo) as queues,
        ):
            shown = [
                [(run(f"SHOW {name}").fetchone() or ())[0] for name in names]
                for run in (ours.exec_driver_sql, optunas.exec_driver_sql, queues.execute)
            ]
        given.close()
        studies.dispose()

        assert shown[1] == ["54321ms", "5MB", "optuna", "off"]
        assert shown[0] == shown[2] == ["54321ms", "5MB", "procrastinate", "on"]
