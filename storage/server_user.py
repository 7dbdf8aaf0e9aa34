"""
The user of the system that a PostgreSQL of one's own runs as.
"""

import os
import pwd
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from storage.studies import StorageError

_RUN_AS = "pgserver"  # root's servers: PostgreSQL refuses to run as root


@dataclass(frozen=True, kw_only=True)
class ServerUser:
    """
    Whom a server runs as, and what it takes to start a program as that user.

    Attributes:
        name, number, group: Name, user id and group id of the user.
    """

    name: str
    number: int
    group: int

    def rights(self, descriptor: int | None = None) -> dict[str, Any]:
        """
        Options of :class:`subprocess.Popen`: the user, with nothing of our secrets.

        Args:
            descriptor: An open file that the program inherits.
        """
        kept = ("PATH", "LANG", "LANGUAGE", "TZ")
        environment = {k: v for k, v in os.environ.items() if k in kept or k.startswith("LC_")}
        options: dict[str, Any] = {"env": environment, "cwd": "/", "umask": 0o077}
        if descriptor is not None:
            options["pass_fds"] = (descriptor,)
        if os.geteuid() == 0:
            options |= {"user": self.number, "group": self.group, "extra_groups": ()}
        return options

    def may_enter(self, folder: Path) -> bool:
        """Whether all folders down to this one are open to the user."""
        if os.geteuid():
            return True  # it is ourselves
        done = subprocess.run(  # noqa: S603 - fixed words
            ["/bin/sh", "-c", '[ -x "$1" ]', "sh", str(folder)], check=False, **self.rights()
        )
        return done.returncode == 0

    @contextmanager
    def reaching(self, folder: Path) -> Iterator[tuple[str, int]]:
        """
        A name by which the user reaches its folder, also below folders that are closed to it.

        Those stay as they are: the user's program inherits the opened folder, and
        finds it in its own list of open files.

        Yields:
            The name, and the number of the open folder, which the program must inherit.
        """
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            open_to_it = self.may_enter(folder)
            yield str(folder) if open_to_it else f"/proc/self/fd/{descriptor}", descriptor
        finally:
            os.close(descriptor)


def server_user() -> ServerUser:
    """
    Ourselves, or for root a user ``pgserver``, which is made if it is not there.

    Raises:
        StorageError: It cannot be made, or we have no name.
    """
    number = os.geteuid()
    try:
        found = pwd.getpwuid(number) if number else _made()
    except KeyError:
        raise StorageError(
            f"the user number {number} has no name on this machine, and PostgreSQL needs one. Give "
            "it one in /etc/passwd, or give --database-url of a PostgreSQL that runs."
        ) from None
    return ServerUser(name=found.pw_name, number=found.pw_uid, group=found.pw_gid)


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
        done = subprocess.run(  # noqa: S603 - fixed words
            command, capture_output=True, text=True, check=False
        )
        said = done.stderr.strip()
    except OSError as error:
        said = str(error)
    try:
        return pwd.getpwnam(_RUN_AS)
    except KeyError:
        raise StorageError(
            f"PostgreSQL does not run as root, and a user {_RUN_AS} for it cannot be made: {said}. "
            "Start the service as an ordinary user, or give --database-url of a PostgreSQL that "
            "runs."
        ) from None
