"""All that a database holds as one file, and back: whole or not at all, over nothing."""

import os
import time
from importlib import import_module
from pathlib import Path

import pytest
from sqlalchemy import text

from storage.backup import back_up, restore
from storage.configurations import ConfigurationStore
from storage.database import SCHEMAS, Database
from storage.jobs import JobStore, NewJob
from storage.keys import KeyStore
from storage.records import NewStage, StageKind
from storage.studies import StorageError, open_storage, open_study

FAKE = """#!/bin/sh
[ "$1" = --version ] && echo "pg_dump (PostgreSQL) {version}" && exit
echo "$@" >> {log}
echo "password $PGPASSWORD" >> {log}
echo "pg_dump: error: this is not the real one" >&2
exit 1
"""


@pytest.fixture
def filled(database):
    key, _ = KeyStore(database).create("laptop", sees_all=False)
    first = NewStage(kind=StageKind.CALIBRATE, lock="bundle")
    new = NewJob(spec={"trials": 10}, name="job", stages=[first], trials=10, max_attempts=3)
    JobStore(database).submit(new, owner_id=key.id)
    ConfigurationStore(database).add({"z": 1, "a": "ü"}, transfers=[], owner_id=None)
    with open_storage(database.studies_url) as storage:
        open_study(storage, "job", direction="minimize").set_user_attr("pattern", "0.5")
    return database


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Puts a pg_dump of this version on the PATH; what it was told is in the file."""

    def put(version):
        log, program = tmp_path / "log", tmp_path / "bin" / "pg_dump"
        program.parent.mkdir()
        program.write_text(FAKE.format(version=version, log=log))
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
        return log

    return put


def contents(database):
    """Every row of every table of ours, as text."""
    with database.transaction() as connection:
        tables = connection.execute(
            text(
                "SELECT format('%I.%I', schemaname, tablename) FROM pg_tables "
                "WHERE schemaname = ANY(:schemas) ORDER BY 1"
            ),
            {"schemas": [*SCHEMAS]},
        ).scalars()
        return {
            table: [*connection.execute(text(f"SELECT t::text FROM {table} t ORDER BY 1"))]  # noqa: S608 - tables' names
            for table in tables
        }


def schemas(database):
    return {table.partition(".")[0] for table in contents(database)}


def test_all(filled, empty_database, tmp_path):
    """
    What is restored is what was backed up, row by row, and new jobs are taken as before; what else
    is in a database is neither written nor in the way.
    """
    before = contents(filled)
    for database in (filled, empty_database):
        with database.transaction() as connection:
            connection.execute(text("CREATE TABLE public.theirs (secret text)"))
            connection.execute(text("INSERT INTO public.theirs VALUES ('a secret of theirs')"))
    back_up(filled, tmp_path / "dump")
    restore(empty_database, tmp_path / "dump")
    after = contents(empty_database)
    first = NewStage(kind=StageKind.CALIBRATE, lock="bundle")
    job, new = JobStore(empty_database).submit(
        NewJob(spec={}, name="more", stages=[first], trials=1, max_attempts=1)
    )

    assert after == before
    assert len(before["pho.jobs"]) == len(before["procrastinate.procrastinate_jobs"]) == 1
    assert len(before["optuna.studies"]) == 1
    assert new
    assert job.number == 2
    assert b"theirs" not in (tmp_path / "dump").read_bytes()


def test_what_a_dump_brings_along_runs_no_program(filled, empty_database, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    hostile, ran = import_module("hostile_dump"), tmp_path / "ran"
    hostile.write_hostile_dump(filled, tmp_path / "dump", hostile.program(ran))
    with pytest.raises(StorageError, match=r"nothing was: .*permission denied"):
        restore(empty_database, tmp_path / "dump")

    assert not ran.exists()
    assert schemas(empty_database) == set()


def test_a_dump_that_sleeps_is_given_up(filled, empty_database, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    monkeypatch.setattr("storage.backup.LEAST_S", 2.0)
    write = import_module("hostile_dump").write_hostile_dump
    write(filled, tmp_path / "dump", "PERFORM pg_sleep(3600)")
    with pytest.raises(StorageError, match=r"dump was not restored within 2 s, and so nothing"):
        restore(empty_database, tmp_path / "dump")

    sleeping = text("SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'COPY pho.evil%'")
    for _ in range(100):
        with empty_database.transaction() as connection:
            if not connection.execute(sleeping).scalar_one():
                break
        time.sleep(0.1)
    else:
        raise AssertionError("the server still sleeps")
    assert schemas(empty_database) == set()


def test_nothing_is_restored_over_what_is_there_there_is_no_backup_of_nothing(
    filled, empty_database, tmp_path
):
    back_up(filled, tmp_path / "dump")
    before = contents(filled)

    with pytest.raises(StorageError, match=r"not empty: it has the schema optuna, .*--data-dir"):
        restore(filled, tmp_path / "dump")
    assert contents(filled) == before
    with pytest.raises(StorageError, match="holds nothing of PHO"):
        back_up(empty_database, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_file_that_lacks_its_end_or_is_no_dump_restores_nothing_at_all(
    filled, empty_database, tmp_path
):
    back_up(filled, tmp_path / "dump")
    whole = (tmp_path / "dump").read_bytes()
    for content, message in (
        (b"", "file cannot be restored, and nothing was.*too short"),
        (whole[: len(whole) * 9 // 10], "file cannot be restored, and nothing was.*end of file"),
        (b"remember the milk\n" * 1000, r"file cannot be restored.*what `pho backup` wrote"),
    ):
        (tmp_path / "file").write_bytes(content)

        with pytest.raises(StorageError, match=message):
            restore(empty_database, tmp_path / "file")
    assert schemas(empty_database) == set()


NEWER = "UPDATE {}.alembic_version SET version_num = '{}'"


def test_a_dump_of_something_else_or_of_newer_tables_is_refused_before_anything_is_done(
    filled, empty_database, tmp_path
):
    for number, (made, message) in enumerate((
        (NEWER.format("pho", "4711"), r"was written by a newer PHO.*4711.*up to 0013\. Install"),
        (NEWER.format("pho", "0004"),
         r"has tables of version 0004.*before the first release, which no release upgrades"),
        (f"{NEWER.format('optuna', 'v9.0.0.a')}; {NEWER.format('pho', '0012')}",
         r"with a newer Optuna: .*v9\.0\.0\.a.* Install that"),
        ("DROP TABLE pho.alembic_version", "is a dump, but not one of PHO"),
    )):  # fmt: skip
        with filled.transaction() as connection:
            connection.exec_driver_sql(made)
        back_up(filled, tmp_path / f"{number}")

        with pytest.raises(StorageError, match=message):
            restore(empty_database, tmp_path / f"{number}")
    assert schemas(empty_database) == set()


def test_password(database_url, fake, tmp_path):
    """Programs get the password by their environment: the command line is for all to see."""
    log = fake(18)
    database = Database(database_url.replace("//pho@", "//pho:hidden@"))
    with pytest.raises(StorageError, match="pg_dump of PostgreSQL fails: this is not the real one"):
        back_up(database, tmp_path / "dump")
    database.close()
    command, password = log.read_text().splitlines()

    assert "user=pho" in command
    assert "hidden" not in command
    assert password.endswith(" hidden")


def test_too_old(filled, fake, tmp_path):
    """A program that is older than the server is passed over."""
    log = fake(9)
    back_up(filled, tmp_path / "dump")

    assert (tmp_path / "dump").stat().st_size > 0
    assert not log.exists()


def test_none(filled, tmp_path, monkeypatch):
    """Without a program for the server, it is said which one is needed."""
    monkeypatch.setattr("storage.backup._programs", lambda _: [])

    with pytest.raises(StorageError, match=r"pg_dump 18 or newer is not found.*on the PATH"):
        back_up(filled, tmp_path / "dump")
