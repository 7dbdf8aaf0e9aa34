"""A PostgreSQL of one's own: folders, restarts, outages, and first starts that come together."""

import shutil
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import psycopg
import pytest

import storage.database
from storage.database import Database
from storage.embedded import Postmaster, embedded_postgresql, running_url
from storage.jobs import JobStore
from storage.records import NewStage, StageKind
from storage.studies import DatabaseGone, StorageError, open_storage


@contextmanager
def short_folder() -> Iterator[Path]:
    """A folder whose path fits a socket's."""
    folder = Path(tempfile.mkdtemp(prefix="pho"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


@pytest.fixture
def folder() -> Iterator[Path]:
    """An own one."""
    with short_folder() as made:
        yield made


class Server:
    """
    A PostgreSQL that a test may stop and start.

    Attributes:
        url: Of a migrated database.
        data: Its folder.
    """

    def __init__(self, data: Path) -> None:
        self.data = data
        self._postmaster = Postmaster(data)
        self.url = self._postmaster.url
        self.start()

    def stop(self, mode: str = "fast") -> None:
        """``fast`` goes in order, ``immediate`` as if the power went."""
        self._postmaster.stop(30.0 if mode == "fast" else 0.0)

    def start(self) -> None:
        """If it is not running."""
        if not self._postmaster.lives():
            self._postmaster.start()


@pytest.fixture(scope="module")
def own_server() -> Iterator[Server]:
    """One for all tests of this file that need no fresh one."""
    with short_folder() as made:
        found = Server(made / "postgresql")
        try:
            database = Database(found.url)
            database.migrate()
            database.close()
            yield found
        finally:
            found.stop()


@pytest.fixture
def server(own_server: Server) -> Iterator[Server]:
    """It, running before and after the test."""
    own_server.start()
    yield own_server
    own_server.start()


@pytest.fixture
def own_database(server: Server) -> Iterator[Database]:
    """Its database, with connections that were used before."""
    database = Database(server.url)
    at_once(lambda _: database.check())
    yield database
    database.close()


def at_once(call: Callable[[int], object]) -> None:
    """Do something in four threads."""
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(call, range(4)))


def submit(database: Database) -> uuid.UUID:
    """The id of a new job."""
    first = NewStage(kind=StageKind.CALIBRATE)
    return JobStore(database).submit({}, name="n", first=first, trials=1, max_attempts=1)[0].id


def jobs(database: Database) -> list[uuid.UUID]:
    """The ids of all jobs, newest first."""
    return [job.id for job in JobStore(database).page()]


class TestFolder:
    """One service on a folder, which keeps what it holds."""

    def test_restart(self, folder: Path) -> None:
        """What was stored is there after a restart, also in the same process."""
        with embedded_postgresql(folder) as url:
            database = Database(url)
            database.migrate()
            job = submit(database)
            database.close()
        with embedded_postgresql(folder) as url:
            again = Database(url)
            found = jobs(again)
            again.close()

        assert found == [job]

    def test_stopped(self, folder: Path) -> None:
        """After the block, also one that fails, the server is gone and the folder free."""

        urls = []
        with suppress(ZeroDivisionError), embedded_postgresql(folder) as url:
            urls.append(url)
            raise ZeroDivisionError
        database = Database(urls[0])

        assert running_url(folder) is None
        with pytest.raises(DatabaseGone):
            database.check()

    def test_in_use(self, folder: Path) -> None:
        """A second service on the folder is told the way out, and the first one goes on."""
        with embedded_postgresql(folder) as url:
            with (
                pytest.raises(StorageError, match=f"{folder} is in use by another") as caught,
                embedded_postgresql(folder),
            ):
                pass
            database = Database(url)
            database.check()
            database.close()

        assert "Stop that one, or give another --data-dir" in str(caught.value)

    def test_running_url(self, server: Server) -> None:
        """Other processes find the server of a folder, as long as it runs."""
        running = running_url(server.data.parent)
        server.stop()
        stopped = running_url(server.data.parent)

        assert running is not None
        assert Database(running).url == Database(server.url).url
        assert stopped is None

    def test_a_folder_without_a_server_has_no_url(self, folder: Path) -> None:
        assert running_url(folder) is None
        assert running_url(folder / "not there") is None

    @pytest.mark.parametrize(
        "name",
        ["~a+b", *(pytest.param(n, marks=pytest.mark.thorough) for n in ("100%41", "ümläut"))],
    )
    def test_odd_names(self, folder: Path, name: str) -> None:
        """A folder with an odd name serves as well, for the queue and Optuna too."""
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
    def test_names_for_a_shell(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, name: str
    ) -> None:
        """initdb starts programs by a shell: a name that it would take apart is refused."""
        monkeypatch.chdir(folder)
        with (
            pytest.raises(StorageError, match="--data-dir"),
            embedded_postgresql(folder / name),
        ):
            pass

        assert not (folder / "ran").exists()
        assert not (folder / name / "postgresql").exists()

    @pytest.mark.parametrize("path", ["file", "file/below", "file/far/below"])
    def test_not_a_folder(self, folder: Path, path: str) -> None:
        """A folder that cannot be made is named, with the reason."""
        (folder / "file").write_text("here before")
        with (
            pytest.raises(StorageError, match=f"the data folder {folder / path} cannot be used"),
            embedded_postgresql(folder / path),
        ):
            pass

        assert (folder / "file").read_text() == "here before"

    def test_a_folder_in_which_nothing_can_be_made_is_named_even_to_root(self) -> None:
        with (
            pytest.raises(StorageError, match="the data folder /proc/pho cannot be used"),
            embedded_postgresql(Path("/proc/pho")),
        ):
            pass

    def test_so_is_the_home_of_a_user_who_is_not_there(self) -> None:
        with (
            pytest.raises(StorageError, match="nobody-of-this-name"),
            embedded_postgresql(Path("~nobody-of-this-name/pho")),
        ):
            pass

    def test_broken_data(self, folder: Path) -> None:
        """A server that does not start on its data says where its log is; the folder is free."""
        with embedded_postgresql(folder):
            pass
        (folder / "postgresql" / "global" / "pg_control").write_bytes(b"nonsense")
        for _ in range(2):
            with (
                pytest.raises(StorageError, match="PostgreSQL does not start on") as caught,
                embedded_postgresql(folder),
            ):
                pass

            assert f"Its log is {folder / 'postgresql' / 'log'}" in str(caught.value)
            assert "--database-url" in str(caught.value)

    def test_killed_service(self, folder: Path) -> None:
        """After kill -9 of the service, the next one takes its server over, with all jobs."""
        code = (
            f"with embedded_postgresql(Path({str(folder)!r})) as url:\n"
            "    database = Database(url); database.migrate()\n"
            "    print(submit(database), flush=True); time.sleep(60)\n"
        )
        with run(code) as service:
            assert service.stdout is not None
            job = uuid.UUID(service.stdout.readline().strip())
            service.kill()
        with embedded_postgresql(folder) as url:
            database = Database(url)
            found = jobs(database)
            database.close()

        assert found == [job]
        assert running_url(folder) is None

    def stale(self, folder: Path, number: int) -> None:
        """The folder of a server that died, whose process number another process has now."""
        with embedded_postgresql(folder):
            note = (folder / "postgresql" / "postmaster.pid").read_text().splitlines()
        stale = folder / "postgresql" / "postmaster.pid"
        stale.write_text("\n".join([str(number), *note[1:], ""]))
        shutil.chown(stale, (folder / "postgresql" / "PG_VERSION").stat().st_uid)

    def test_number_of_another_process(self, folder: Path) -> None:
        """The process that has a dead server's number is left alone; the server starts."""
        with subprocess.Popen(["sleep", "60"]) as bystander:
            try:
                self.stale(folder, bystander.pid)
                before = running_url(folder)
                with embedded_postgresql(folder) as url:
                    database = Database(url)
                    database.check()
                    database.close()
                left_alone = bystander.poll() is None
            finally:
                bystander.kill()

        assert before is None
        assert left_alone

    def test_so_is_another_postgresql(self, folder: Path, own_database: Database) -> None:
        number = Path(str(own_database.url.query["host"]), "postmaster.pid").read_text().split()[0]
        self.stale(folder, int(number))
        before = running_url(folder)
        with embedded_postgresql(folder) as url:
            database = Database(url)
            database.check()
            database.close()

        assert before is None
        own_database.check()

    @pytest.mark.parametrize("text", ["", "nonsense\n" * 8], ids=["empty", "nonsense"])
    def test_half_a_note(self, folder: Path, text: str) -> None:
        """What a server left that lost its power while it started does not stop the next."""
        with embedded_postgresql(folder):
            pass
        (folder / "postgresql" / "postmaster.pid").write_text(text)
        before = running_url(folder)
        with embedded_postgresql(folder) as url:
            database = Database(url)
            database.check()
            database.close()

        assert before is None


class TestOutage:
    """A server that goes is told from one that is broken, and found again when it comes back."""

    def test_gone(self, server: Server, own_database: Database) -> None:
        """Without the server, each use says that the database is gone, in one line."""
        server.stop()
        for call in (
            own_database.check,
            own_database.migrate,
            lambda: jobs(own_database),
            lambda: submit(own_database),
        ):
            with pytest.raises(DatabaseGone) as caught:
                call()

            assert str(caught.value)
            assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("mode", ["fast", "immediate"])
    def test_back(self, server: Server, own_database: Database, mode: str) -> None:
        """After a restart the same object works at once, with all its connections and all jobs."""
        job = submit(own_database)
        server.stop(mode)
        with pytest.raises(DatabaseGone):
            own_database.check()
        server.start()
        at_once(lambda _: own_database.check())

        assert jobs(own_database)[0] == job

    def test_back_unnoticed(self, server: Server, own_database: Database) -> None:
        """A restart between two uses is not even noticed."""
        server.stop()
        server.start()
        at_once(lambda _: own_database.check())

        assert jobs(own_database) is not None

    @pytest.mark.parametrize("mode", ["fast", "immediate"])
    @pytest.mark.parametrize("then", ["more", "commit"])
    def test_a_transaction_that_the_outage_breaks_off_says_so_and_has_done_nothing(
        self, server: Server, own_database: Database, mode: str, then: str
    ) -> None:
        submit(own_database)

        def broken_off() -> None:
            with own_database.transaction() as connection:
                connection.exec_driver_sql("UPDATE pho.jobs SET name = 'broken off'")
                server.stop(mode)
                if then == "more":
                    connection.exec_driver_sql("SELECT 1")

        with pytest.raises(DatabaseGone):
            broken_off()
        server.start()

        assert "broken off" not in {job.name for job in JobStore(own_database).page()}

    def test_studies(self, server: Server, own_database: Database) -> None:
        """Optuna's storage says the same when it cannot be opened."""
        server.stop()
        with (
            pytest.raises(DatabaseGone, match="What it holds is kept"),
            open_storage(own_database.studies_url),
        ):
            pass

    def test_a_server_that_never_was_is_gone_as_well_its_password_is_not_told(self) -> None:
        database = Database("postgresql://u:geheim@127.0.0.1:1/d")
        with pytest.raises(DatabaseGone) as caught:
            database.check()

        assert "geheim" not in str(caught.value)
        assert "127.0.0.1" in str(caught.value)

    def test_mistakes_are_no_outage(self, own_database: Database) -> None:
        """A statement that PostgreSQL refuses is a programmer's fault, not an outage."""
        with pytest.raises(Exception, match="nosuch") as caught, own_database.transaction() as c:
            c.exec_driver_sql("SELECT nosuch")

        assert not isinstance(caught.value, StorageError)

    def test_errors_pass_through(self, own_database: Database) -> None:
        """What the caller raises comes out as it is, and the transaction is undone."""
        job = submit(own_database)

        def broken() -> None:
            with own_database.transaction() as connection:
                connection.exec_driver_sql("DELETE FROM pho.jobs")
                raise KeyError("mine")

        with pytest.raises(KeyError, match="mine"):
            broken()

        assert job in jobs(own_database)


class TestMigrate:
    """The first start, or many first starts at once."""

    @pytest.fixture
    def empty(self, server: Server) -> str:
        """The URL of a database without any schema."""
        name = f"empty_{uuid.uuid4().hex}"
        with psycopg.connect(Database(server.url).conninfo, autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")
        return server.url.replace("/postgres?", f"/{name}?")

    def test_processes_at_once(self, empty: str) -> None:
        """Processes that start together on an empty database take turns, and all succeed."""
        starts = [
            run(
                f"database = Database({empty!r})\n"
                "print('ready', flush=True); sys.stdin.readline()\n"
                "database.migrate(); print(submit(database))\n"
            )
            for _ in range(2)
        ]
        for start in starts:
            assert start.stdout is not None
            assert start.stdout.readline() == "ready\n"
        for start in starts:
            assert start.stdin is not None
            start.stdin.write("go\n")
            start.stdin.flush()
        made = [uuid.UUID(start.communicate(timeout=240)[0].strip()) for start in starts]
        database = Database(empty)
        found = jobs(database)
        database.close()

        assert [start.returncode for start in starts] == [0, 0]
        assert sorted(found) == sorted(made)

    def test_threads_at_once(self, empty: str) -> None:
        """So do threads, and starts on a database that is migrated already."""
        database = Database(empty)
        for _ in range(2):
            at_once(lambda _: database.migrate())
        submit(database)
        found = jobs(database)
        database.close()

        assert len(found) == 1

    def test_broken_off(self, empty: str, monkeypatch: pytest.MonkeyPatch) -> None:
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

    def test_newer(self, empty: str) -> None:
        """A database of a newer PHO is refused with the way out, and kept."""
        database = Database(empty)
        database.migrate()
        job = submit(database)
        with database.transaction() as connection:
            connection.exec_driver_sql("UPDATE pho.alembic_version SET version_num = '9999'")
        with pytest.raises(StorageError, match=r"Install that PHO, .* What it holds is kept"):
            database.migrate()
        found = jobs(database)
        database.close()

        assert found == [job]

    def test_the_migrations_are_found_wherever_pho_is_installed(
        self, empty: str, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        installed = folder / "100%(s) odd"
        shutil.copytree(Path(storage.database.__file__).parent, installed)
        monkeypatch.setattr(storage.database, "__file__", str(installed / "database.py"))
        database = Database(empty)
        database.migrate()
        job = submit(database)
        found = jobs(database)
        database.close()

        assert found == [job]


def run(code: str) -> subprocess.Popen[str]:
    """Another Python, with what this file imports."""
    prelude = (
        "import sys, time\nfrom pathlib import Path\n"
        "from storage.database import Database\n"
        "from storage.embedded import embedded_postgresql\n"
        "from storage.jobs import JobStore\nfrom storage.records import NewStage\n"
        "from storage.records import StageKind\n"
        "def submit(database):\n"
        "    first = NewStage(kind=StageKind.CALIBRATE)\n"
        "    job, _ = JobStore(database).submit(\n"
        "        {}, name='n', first=first, trials=1, max_attempts=1)\n"
        "    return job.id\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", prelude + code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
