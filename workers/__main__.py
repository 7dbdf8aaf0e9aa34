"""
`python -m workers`, which `pho worker` and `pho serve` start.
"""

import gc
import logging
import os
import sys
import warnings
from typing import Any

import click

from pho_service.errors import InvalidInput, PhoError
from pho_service.host.logs import adopt_loggers, configure_logs, configure_tracing
from pho_service.host.machine import install_command, missing_extra
from pho_service.host.settings import read_settings
from pho_service.host.tasks import harness_folder
from storage.records import StageKind
from storage.studies import StorageError


@click.command()
@click.option("--database-url", help="The service's PostgreSQL.  [default: PHO_DATABASE_URL]")
@click.option(
    "--device",
    default="auto",
    show_default=True,
    help="auto, cpu, cuda, cuda:N, or all: every GPU, for models that are larger than one.",
)
@click.option("--stages", "kinds", help=f"Some of {','.join(StageKind)}.  [default: all it can]")
@click.option("--exit-when-idle", "exit_when_idle_s", default=0.0, help="In seconds; 0: never.")
@click.option("--parent", type=int, default=0, hidden=True, help="Stop when it is gone.")
def main(database_url: str | None, kinds: str | None, **options: Any) -> None:
    """Take stages of jobs out of the queue and do them, until SIGTERM or Ctrl-C."""
    warnings.simplefilter("ignore")
    try:
        _run(database_url, kinds, options)
    except InvalidInput as error:
        click.echo(f"pho worker: {error}", err=True)
        sys.exit(2)
    except (PhoError, StorageError) as error:
        click.echo(f"pho worker: {error}", err=True)
        sys.exit(1)
    except ModuleNotFoundError as error:
        needs = missing_extra(error)
        if needs is None:
            raise
        click.echo(f"pho worker {needs}", err=True)
        sys.exit(1)


_TALKATIVE = ("procrastinate", "optuna", "transformers", "datasets", "huggingface_hub", "alembic")


def _run(database_url: str | None, kinds: str | None, options: dict[str, Any]) -> None:
    settings = read_settings(database_url=database_url)
    if database_url is not None:
        os.environ["PHO_DATABASE_URL"] = database_url  # for a process that takes this one's place
    configure_logs(settings.log_format)
    adopt_loggers(_TALKATIVE, logging.ERROR)
    if settings.traces:
        configure_tracing("pho-worker")
    if settings.database_url is None:
        raise InvalidInput(
            "no database is given. Give --database-url, as `pho serve` prints it, or set "
            "PHO_DATABASE_URL."
        )
    chosen = chosen_kinds(kinds)
    from transformers.utils.logging import disable_progress_bar

    from workers.worker import WorkerOptions, run_worker  # torch, after what may be wrong

    adopt_loggers(_TALKATIVE, logging.ERROR)
    disable_progress_bar()  # in a log, a line that nobody can read

    worker = WorkerOptions(kinds=chosen, **options)
    run_worker(settings.database_url.get_secret_value(), settings, worker)
    gc.freeze()  # Python's last collections, over all that torch holds, take seconds


def chosen_kinds(kinds: str | None) -> tuple[StageKind, ...]:
    """The stages of ``--stages``, or all that this installation can do."""
    measures = harness_folder() is not None
    if kinds is None:
        return tuple(kind for kind in StageKind if measures or kind is not StageKind.TASKS)
    try:
        chosen = tuple(StageKind(name.strip()) for name in kinds.split(","))
    except ValueError:
        raise InvalidInput(f"--stages {kinds!r} are not some of {', '.join(StageKind)}.") from None
    if StageKind.TASKS in chosen and not measures:
        raise InvalidInput(
            f"--stages {kinds!r} has tasks, which lm-evaluation-harness measures, and that is not "
            f"installed here. Install it ({install_command('eval')}), or leave tasks out."
        )
    return chosen


if __name__ == "__main__":
    main(prog_name="pho worker")
