"""A PostgreSQL of one's own: folders, restarts, outages, and first starts that come together."""

import shutil
import subprocess
import sys
import tempfile
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import psycopg
import pytest

import storage.database
from storage.database import Database
from storage.embedded import Postmaster, embedded_postgresql, running_url
from storage.jobs import JobStore, NewJob
from storage.records import NewStage, StageKind
from storage.studies import DatabaseGone, StorageError, open_storage


@contextmanager
def short_folder():
    """A folder whose path fits a socket's."""
    folder = Path(tempfile.mkdtemp(prefix="pho"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


@pytest.fixture
def folder():
    with short_folder() as made:
        yield made


@pytest.fixture(scope="module")
def made_before():
    """A folder in which a server was, with its note of the time when it ran."""
    with short_folder() as made:
        with embedded_postgresql(made):
            note = (made / "postgresql" / "postmaster.pid").read_text()
        (made / "note").write_text(note)
        yield made


@pytest.fixture
def used(made_before, folder):
    """A copy of it: to make one takes longer."""
    subprocess.run(["cp", "--archive", f"{made_before}/.", folder], check=True)
    note = (folder / "note").read_text().replace(str(made_before), str(folder))
    (folder / "note").write_text(note)
    return folder


def serves(folder):
    """Whether a server starts on a folder, and answers."""
    with embedded_postgresql(folder) as url:
        database = Database(url)
        database.check()
        database.close()
    return True


@pytest.fixture(scope="module")
def own_server():
    with short_folder() as made:
        found = Postmaster(made / "postgresql")
        found.start()
        try:
            database = Database(found.url)
            database.migrate()
            database.close()
            yield found
        finally:
            found.stop()


@pytest.fixture
def server(own_server):
    if not own_server.lives():
        own_server.start()
    return own_server


@pytest.fixture
def own_database(server):
    database = Database(server.url)
    at_once(lambda _: database.check())
    yield database
    database.close()


def at_once(call):
    """Do something in four threads."""
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(call, range(4)))


def submit(database):
    """The id of a new job."""
    first = NewStage(kind=StageKind.CALIBRATE)
    new = NewJob(spec={}, name="n", stages=[first], trials=1, max_attempts=1)
    return JobStore(database).submit(new)[0].id


def jobs(database):
    """The ids of all jobs, newest first."""
    return [job.id for job in JobStore(database).page()]


class TestFolder:
    """One service on a folder, which keeps what it holds."""

    def test_after_the_block_that_fails_the_server_is_gone(self, used):
        urls = []
        with suppress(ZeroDivisionError), embedded_postgresql(used) as url:
            urls.append(url)
            raise ZeroDivisionError

        assert running_url(used) is None
        with pytest.raises(DatabaseGone):
            Database(urls[0]).check()

    def test_a_second_service_on_the_folder_is_told_the_way_out(self, used):
        with (
            embedded_postgresql(used) as url,
            pytest.raises(
                StorageError, match=rf"{used} is in use .*Stop that one, or give another"
            ),
            embedded_postgresql(used),
        ):
            pass

        assert url

    def test_other_processes_find_the_server_as_long_as_it_runs(self, server):
        running = running_url(server.folder.parent)
        server.stop()
        stopped = running_url(server.folder.parent)

        assert running is not None
        assert Database(running).url == Database(server.url).url
        assert stopped is None

    def test_a_folder_without_a_server_has_no_url(self, folder):
        assert running_url(folder) is None
        assert running_url(folder / "not there") is None

    @pytest.mark.parametrize(
        "name", ["~a+b", pytest.param("100%41-ümläut", marks=pytest.mark.thorough)]
    )
    def test_a_folder_with_an_odd_name_serves_as_well(self, folder, name):
        with embedded_postgresql(folder / name) as url:
            database = Database(url)
            try:
                database.migrate()
                with open_storage(database.studies_url) as studies:
                    none = studies.get_all_studies()
                with psycopg.connect(database.conninfo) as connection:
                    one = connection.execute("SELECT 1").fetchone()
            finally:
                database.close()

        assert none == []
        assert one == (1,)

    @pytest.mark.parametrize(
        "name", ["a b", "a'b", 'a"b', "a&touch ran", "a$HOME", "a;touch ran", "a,b"]
    )
    def test_initdb_starts_programs_by_a_shell_a_name_that_it_would_take_apart_is_refused(
        self, folder, monkeypatch, name
    ):
        monkeypatch.chdir(folder)
        with pytest.raises(StorageError, match="--data-dir"), embedded_postgresql(folder / name):
            pass

        assert not (folder / "ran").exists()
        assert not (folder / name / "postgresql").exists()

    @pytest.mark.parametrize(
        "path",
        ["{0}/file", "{0}/file/far/below", "/proc/pho", "~nobody-of-this-name/pho"],
        ids=["file", "below one", "even by root", "nobody's"],
    )
    def test_a_folder_that_cannot_be_made_is_named(self, folder, path):
        (folder / "file").write_text("here before")
        named = path.format(folder)
        with (
            pytest.raises(StorageError, match=f"the data folder {named} cannot be used"),
            embedded_postgresql(Path(named)),
        ):
            pass

        assert (folder / "file").read_text() == "here before"

    def test_a_server_that_does_not_start_says_where_its_log_is(self, used):
        (used / "postgresql" / "global" / "pg_control").write_bytes(b"nonsense")
        for _ in range(2):  # the folder is free again
            with (
                pytest.raises(StorageError, match="PostgreSQL does not start on") as caught,
                embedded_postgresql(used),
            ):
                pass

            assert f"Its log is {used / 'postgresql' / 'log'}" in str(caught.value)
            assert "--database-url" in str(caught.value)

    def test_a_killed_services_server_is_taken_over_with_all_jobs(self, used):
        code = (
            "import time\nfrom pathlib import Path\n"
            "from storage.database import Database\n"
            "from storage.embedded import embedded_postgresql\n"
            f"with embedded_postgresql(Path({str(used)!r})) as url:\n"
            "    Database(url).migrate(); print(url, flush=True); time.sleep(600)\n"
        )
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as service:
            assert service.stdout is not None
            database = Database(service.stdout.readline().decode().strip())
            job = submit(database)
            database.close()
            service.kill()
        with embedded_postgresql(used) as url:
            database = Database(url)
            found = jobs(database)
            database.close()

        assert found == [job]
        assert running_url(used) is None

    def stale(self, used, number):
        """The folder of a server that died, whose process number another process has now."""
        stale = used / "postgresql" / "postmaster.pid"
        note = (used / "note").read_text().splitlines()
        stale.write_text("\n".join([str(number), *note[1:], ""]))
        shutil.chown(stale, (used / "postgresql" / "PG_VERSION").stat().st_uid)

    def test_the_process_that_has_a_dead_servers_number_is_left_alone(self, used):
        with subprocess.Popen(["sleep", "60"]) as bystander:
            try:
                self.stale(used, bystander.pid)
                before = running_url(used)
                served = serves(used)
                left_alone = bystander.poll() is None
            finally:
                bystander.kill()

        assert before is None
        assert served
        assert left_alone

    def test_so_is_another_postgresql(self, used, own_database):
        number = Path(str(own_database.url.query["host"]), "postmaster.pid").read_text().split()[0]
        self.stale(used, int(number))

        assert running_url(used) is None
        assert serves(used)
        own_database.check()

    @pytest.mark.parametrize("text", ["", "nonsense\n" * 8], ids=["empty", "nonsense"])
    def test_half_a_note_of_a_server_that_lost_its_power_stops_no_other(self, used, text):
        (used / "postgresql" / "postmaster.pid").write_text(text)

        assert running_url(used) is None
        assert serves(used)


class TestOutage:
    """A server that goes is told from one that is broken, and found again when it comes back."""

    def test_each_use_says_it_is_gone(self, server, own_database):
        server.stop()
        for call in (
            own_database.check,
            own_database.migrate,
            lambda: jobs(own_database),
            lambda: submit(own_database),
            open_storage(own_database.studies_url).__enter__,
        ):
            with pytest.raises(DatabaseGone) as caught:
                call()

            assert str(caught.value)
            assert "\n" not in str(caught.value)
        assert "What it holds is kept" in str(caught.value)  # Optuna's storage

    @pytest.mark.parametrize(
        ("stop_s", "noticed"), [(30.0, True), (0.0, True), (30.0, False)],
        ids=["in order", "power lost", "not noticed"],
    )  # fmt: skip
    def test_back(self, server, own_database, stop_s, noticed):
        """After a restart the same object works at once, with all its connections and all jobs."""
        job = submit(own_database)
        server.stop(stop_s)
        if noticed:
            with pytest.raises(DatabaseGone):
                own_database.check()
        server.start()
        at_once(lambda _: own_database.check())

        assert jobs(own_database)[0] == job

    @pytest.mark.parametrize(("stop_s", "then"), [(30.0, "more"), (0.0, "commit")])
    def test_a_transaction_that_the_outage_breaks_off_says_so_and_has_done_nothing(
        self, server, own_database, stop_s, then
    ):
        submit(own_database)

        def broken_off():
            with own_database.transaction() as connection:
                connection.exec_driver_sql("UPDATE pho.jobs SET name = 'broken off'")
                server.stop(stop_s)
                if then == "more":
                    connection.exec_driver_sql("SELECT 1")

        with pytest.raises(DatabaseGone):
            broken_off()
        server.start()

        assert "broken off" not in {job.name for job in JobStore(own_database).page()}

    def test_a_server_that_never_was_is_gone_as_well_its_password_is_not_told(self):
        database = Database("postgresql://u:geheim@127.0.0.1:1/d")
        with pytest.raises(DatabaseGone) as caught:
            database.check()

        assert "geheim" not in str(caught.value)
        assert "127.0.0.1" in str(caught.value)

    def test_a_refused_statement_is_no_outage(self, own_database):
        with pytest.raises(Exception, match="nosuch") as caught, own_database.transaction() as c:
            c.exec_driver_sql("SELECT nosuch")

        assert not isinstance(caught.value, StorageError)

    def test_what_the_caller_raises_comes_out_as_it_is(self, own_database):
        job = submit(own_database)

        def broken():
            with own_database.transaction() as connection:
                connection.exec_driver_sql("DELETE FROM pho.jobs")
                raise KeyError("mine")

        with pytest.raises(KeyError, match="mine"):
            broken()

        assert job in jobs(own_database)


class TestMigrate:
    """The first start, or many first starts at once."""

    @pytest.fixture
    def empty(self, server):
        """The URL of a database without any schema."""
        name = f"empty_{uuid.uuid4().hex}"
        with psycopg.connect(Database(server.url).conninfo, autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")
        return server.url.replace("/postgres?", f"/{name}?")

    def test_threads_that_migrate_at_once_take_turns(self, empty):
        database = Database(empty)
        for _ in range(2):
            at_once(lambda _: database.migrate())
        submit(database)
        found = jobs(database)
        database.close()

        assert len(found) == 1

    def test_broken_off(self, empty, monkeypatch):
        """A migration that fails half-way leaves nothing; the next one does it all."""
        database = Database(empty)
        with monkeypatch.context() as patched:
            patched.setattr("procrastinate.schema.SchemaManager.get_schema", lambda: "SELECT 1 / 0")
            with pytest.raises(Exception, match="division by zero"):
                database.migrate()
        with database.transaction() as connection:
            left = connection.exec_driver_sql(
                "SELECT nspname FROM pg_namespace WHERE nspname IN ('pho', 'optuna')"
            ).all()
        database.migrate()
        submit(database)
        database.close()

        assert left == []

    def test_the_migrations_are_found_wherever_pho_is_installed(self, empty, folder, monkeypatch):
        installed = folder / "100%(s) odd"
        shutil.copytree(Path(storage.database.__file__).parent, installed)
        monkeypatch.setattr(storage.database, "__file__", str(installed / "database.py"))
        database = Database(empty)
        database.migrate()
        job = submit(database)
        found = jobs(database)
        database.close()

        assert found == [job]
