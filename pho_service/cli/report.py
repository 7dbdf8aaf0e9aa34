"""`pho report`."""

import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pho_service.cli.options import out_file
from pho_service.cli.remote import open_client, service_verb
from pho_service.cli.terminal import print_json, say
from pho_service.errors import InvalidInput, StudyError
from pho_service.spec.job_options import prune_command, search_command

if TYPE_CHECKING:
    from collections.abc import Mapping

    import optuna

    from pho_service.library import LibraryFile
    from pho_service.shown.report import Report


@click.command()
@click.argument("name", metavar="JOB_ID|STUDY")
@click.option("--out", default="report.html", show_default=True, help="The page.")
@click.option("--study", help="Database of a local study: sqlite:///study.db. No service is asked.")
@click.option(
    "--config",
    help="With --study: what the search found, a config.json; or a transfer.json, which also says "
    "what that was worth on other models.",
)
@service_verb
def report(
    name: str, out: str, study: str | None, config: str | None, url: str | None, as_json: bool
) -> None:
    """
    Write a job, or a study of `pho search`, as one page of HTML that needs no network.

    JOB_ID is a job of the service, in any state. With --study, STUDY is the
    name of a local study, as `pho search` prints it.

    \b
    Example:
      pho report d5aed9d3-7b7c-40f9-9896-b5f528363229 --out report.html
      pho report "SmolLM2-135M 0.5 global" --study sqlite:///study.db --config config.json
    """
    from pho_service.host.files import write_text

    path = out_file(out)
    if config is not None and study is None:
        raise InvalidInput("--config is for a local study: give --study, too.")
    if study is None:
        if not re.fullmatch("[0-9a-fA-F-]{4,36}", name):  # the client looks for the job
            raise InvalidInput(
                f"{name!r} is not a job id; `pho jobs` shows those. For a local study give its "
                "database, too: --study sqlite:///study.db."
            )
        with open_client(url) as client:
            page = client.report(name)
    else:
        page = _of_study(name, study, config)
    write_text(path, page)
    say(f"written {path}")
    if as_json:
        print_json({"out": str(path)})


def _of_study(name: str, url: str, config: str | None) -> str:
    from pho_service.library import read_library_file
    from pho_service.shown.page import render
    from storage.studies import StorageError, open_storage

    file = None if config is None else read_library_file(Path(config))
    try:
        _check_there(url)
        with open_storage(url) as storage:
            return render(_collected(_load(name, storage, url), url, file, config))
    except StorageError as error:
        raise StudyError(f"--study {_shown(url)}: {error}") from error


def _check_there(url: str) -> None:
    """Refuse a file that is not there: to open it would make it."""
    from sqlalchemy.engine import make_url

    from storage.studies import StorageError, check_url

    check_url(url)
    parsed = make_url(url)
    if parsed.get_backend_name() == "sqlite" and not Path(str(parsed.database)).is_file():
        raise StorageError("there is no such file. `pho search` makes one.")


def _load(name: str, storage: Any, url: str) -> "optuna.Study":
    import optuna

    try:
        return optuna.load_study(study_name=name, storage=storage)
    except KeyError:
        study_names = optuna.get_all_study_names(storage)
        there = ", ".join(repr(study_name) for study_name in study_names[:20]) or "none"
        raise StudyError(f"--study {_shown(url)} has no study {name!r}. It has: {there}.") from None


def _collected(
    study: "optuna.Study", url: str, file: "LibraryFile | None", config: str | None
) -> "Report":
    from pho_service.shown.page import study_report
    from storage.studies import record_of

    record = record_of(study)
    if "pattern" not in record:
        raise StudyError(f"study {study.study_name!r} is not one of `pho search`.")
    configuration = None if file is None else file.configuration
    if configuration is not None and configuration.search.get("study") != study.study_name:
        raise InvalidInput(
            f"--config is of study {configuration.search.get('study')!r}, not of "
            f"{study.study_name!r}. Give the one that this search wrote, or none."
        )
    return replace(
        study_report(study, configuration),
        transfers=[] if file is None else [t.model_dump(mode="json") for t in file.targets],
        commands=[_again(record, len(study.get_trials(deepcopy=False)), url)],
        prune_commands=[] if config is None else _prunes(record, config),
    )


def _again(record: "Mapping[str, Any]", trials: int, url: str) -> str:
    """The `pho search` whose study has this record."""
    from pho_service.cli.document import WARM
    from pho_service.shown.words import study_document

    warm = [word for name in record.get(WARM, []) for word in ("--warm-start", name)]
    return search_command(study_document(record, trials), *warm, "--study", _shown(url))


def _prunes(record: "Mapping[str, Any]", config: str) -> list[str]:
    """The `pho prune` of each model of a study, with its configuration."""
    from pho_service.shown.words import study_document

    document = study_document(record, 0)
    models = [document["model"], *(document.get("more_models") or [])]
    return [prune_command(str(model), config, document) for model in models]


def _shown(url: str) -> str:
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        return make_url(url).render_as_string(hide_password=True)
    except ArgumentError:
        return url
