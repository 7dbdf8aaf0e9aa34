"""`pho backup` and `pho restore`."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pho_service.cli.serve import service_options
from pho_service.cli.terminal import say, verb
from pho_service.errors import InvalidInput, OutputError

if TYPE_CHECKING:
    from storage.database import Database


@click.command()
@click.option("--out", "file", required=True, type=click.Path(path_type=Path), help="A new file.")
@service_options
@verb
def backup(file: Path, database_url: str | None, data_dir: str | None) -> None:
    """
    Write all jobs, studies, keys and the library of a service to one file.

    The service may go on meanwhile: the file has everything as of one moment.
    It is a custom-format dump of PostgreSQL's pg_dump. Bundles are not in it:
    a job whose bundle is lost makes it again. Nor are the files of pruned
    models: copy the folder `pruned` of the artifact store, or prune again.

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
        f"Wrote {file}. Bundles are not in it: a job whose bundle is lost makes it again. Nor are "
        "the files of pruned models: copy the folder `pruned` of the artifact store, too."
    )


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@service_options
@verb
def restore(file: Path, database_url: str | None, data_dir: str | None) -> None:
    """
    Fill an empty database with what `pho backup` wrote to FILE.

    All of it or nothing is restored, and then brought to this version of PHO.
    A database that holds anything of PHO is left as it is: give a new data
    folder, or the URL of a new database.

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
        found = sum(JobStore(database).counts()[0].values())
    say(f"Restored {found} jobs. `pho serve` goes on with those that are not over.")


@contextmanager
def _opened(database_url: str | None, data_dir: str | None) -> "Iterator[Database]":
    """The database of a service as it is, whether one runs on it or not."""
    from pho_service.api.serving import any_database_url
    from pho_service.errors import StudyError
    from pho_service.host.settings import read_settings
    from storage.database import Database
    from storage.studies import StorageError

    try:
        settings = read_settings(database_url=database_url, data_dir=data_dir)
        with any_database_url(settings) as url:
            database = Database(url)
            try:
                yield database
            finally:
                database.close()
    except StorageError as error:
        raise StudyError(str(error)) from error
