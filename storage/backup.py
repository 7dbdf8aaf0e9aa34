"""
All that a service's database holds, as one file of PostgreSQL's own pg_dump, and back.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import optuna
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from sqlalchemy import text

from storage import studies
from storage.database import SCHEMAS, Database, check_version
from storage.embedded import programs
from storage.studies import StorageError

LEAST_S = 120.0  # that a restore may take, and more for a large file
SLOWEST = 250_000  # bytes of a file that are restored in a second, at least


def back_up(database: Database, file: Path) -> None:
    """Write everything that a database holds for the service, as of one moment."""
    # The service may run meanwhile. Nothing else of the database is in the file.
    if not _schemas(database):
        raise StorageError("the database holds nothing of PHO: `pho serve` was never started on it")
    schemas = [f"--schema={schema}" for schema in SCHEMAS]
    _run("pg_dump", database, "--format=custom", *schemas, f"--file={file}", "--dbname={server}")


def restore(database: Database, file: Path) -> None:
    """Fill a database from such a file, all of it or nothing, and bring it to this version."""
    schemas = _schemas(database)
    if schemas:
        raise StorageError(
            f"the database is not empty: it has the schema {', '.join(schemas)}, and nothing is "
            "overwritten. Give the --data-dir of a new folder, or the --database-url of a new "
            "database."
        )
    check_version(_revision(database, file, "pho"), str(file))
    revision = _revision(database, file, "optuna")
    if revision not in studies.known_versions():
        raise StorageError(
            f"{file} was written with a newer Optuna: its studies are in tables of version "
            f"{revision}, which Optuna {optuna.__version__} does not know. Install that Optuna."
        )
    options = ("--single-transaction", "--exit-on-error", "--dbname={server}")
    longest_s = LEAST_S + file.stat().st_size / SLOWEST
    _run("pg_restore", database, *options, str(file), file=file, longest_s=longest_s)
    database.migrate()


def _schemas(database: Database) -> list[str]:
    query = text("SELECT nspname FROM pg_namespace WHERE nspname = ANY(:names) ORDER BY 1")
    with database.transaction() as connection:
        return [*connection.execute(query, {"names": [*SCHEMAS]}).scalars()]


def _revision(database: Database, file: Path, schema: str) -> str:
    """The version of the tables of a schema in a dump."""
    table = ("--data-only", f"--schema={schema}", "--table=alembic_version", "--file=-")
    written = _run("pg_restore", database, *table, str(file), file=file)
    match = re.search(rf"^COPY {schema}\.alembic_version .*\n(\S+)$", written, re.M)
    if match is None:
        raise StorageError(f"{file} is a dump, but not one of PHO. `pho backup` writes those.")
    return match[1]


def _run(
    program: str,
    database: Database,
    *arguments: str,
    file: Path | None = None,
    longest_s: float | None = None,
) -> str:
    """What a program of PostgreSQL prints, without owners and grants, which are the server's."""
    # Its ``{server}`` is the database, without the password, which all who list processes would
    # see.
    url = database.url.set(drivername="postgresql").render_as_string(hide_password=False)
    parameters = {k: str(v) for k, v in conninfo_to_dict(url).items() if v is not None}
    password = parameters.pop("password", None)
    server = make_conninfo(**parameters)
    command = [
        _program(program, database), "--no-owner", "--no-privileges",
        *(a.replace("{server}", server) for a in arguments),
    ]  # fmt: skip
    with subprocess.Popen(  # noqa: S603 - a program of PostgreSQL, without a shell
        command,
        env={**os.environ, **({} if password is None else {"PGPASSWORD": password})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as running:
        try:
            printed, errors = running.communicate(timeout=longest_s)
        except subprocess.TimeoutExpired as error:
            raise StorageError(
                f"{file} was not restored within {longest_s:.0f} s, and so nothing was. A backup "
                "of that size takes less: is it what `pho backup` wrote? If so, restore it on the "
                "machine of the database."
            ) from error
        finally:
            running.terminate()  # if it still runs: it ends what it does on the server, too
    if running.returncode:
        lines = errors.strip().splitlines() or [f"exit code {running.returncode}"]
        reason = next((line for line in lines if "error:" in line), lines[0])
        reason = reason.removeprefix(f"{program}: ").removeprefix("error: ").rstrip(".")
        raise StorageError(
            f"{program} of PostgreSQL fails: {reason}."
            if file is None
            else f"{file} cannot be restored, and nothing was: {reason}. Is it what `pho backup` "
            "wrote, all of it?"
        )
    return printed


def _program(name: str, database: Database) -> str:
    """The path of a program for the server's version, or else for the next newer one there is."""
    # A much newer pg_restore sets what an old server does not know.
    with database.transaction() as connection:
        query = text("SELECT current_setting('server_version_num')::int / 10000")
        server = int(connection.execute(query).scalar_one())
    candidates = [
        (version, path) for path in _programs(name) if (version := _version(path)) >= server
    ]
    if not candidates:
        raise StorageError(
            f"{name} {server} or newer is not found, and the database's server is version "
            f"{server}. Install PostgreSQL's client programs, so that {name} is on the PATH."
        )
    return min(candidates, key=lambda candidate: candidate[0])[1]


def _programs(name: str) -> Iterator[str]:
    on_path = shutil.which(name)
    if on_path is not None:
        yield on_path
    yield from (str(folder / name) for folder in programs().values())


def _version(program: str) -> int:
    """The major version of a program of PostgreSQL; 0 if it does not run."""
    try:
        answer = subprocess.run(  # noqa: S603 - found above
            [program, "--version"], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return 0
    match = re.search(r"(\d+)", answer)
    return int(match[1]) if match else 0
