"""`pho submit`."""

import json
from typing import Any

import click

from pho_service.cli import warm_start
from pho_service.cli.document import DocumentCommand, Given
from pho_service.cli.options import json_option
from pho_service.cli.remote import end, open_client, url_option
from pho_service.cli.terminal import print_json, say, verb
from pho_service.errors import InvalidInput


@click.command(cls=DocumentCommand, fields=("",))
@click.argument("models", metavar="[MODEL...]", nargs=-1)
@click.option("--job", "job_file", help="A job document as a JSON file; - reads stdin.")
@click.option("--idempotency-key", help="The same key twice makes one job.")
@click.option("--watch", "wait", is_flag=True, help="Wait for it, as `pho watch` does.")
@url_option
@json_option
@verb
def submit(
    models: tuple[str, ...],
    given: Given,
    job_file: str | None,
    idempotency_key: str | None,
    wait: bool,
    url: str | None,
    as_json: bool,
) -> None:
    """
    Submit a search job for MODEL, a hub id or a path that the workers see.

    With several models, the search is for a configuration that is good on all
    of them. What is left out has the defaults of `pho search`. The job's id is printed.

    \b
    Example:
      pho submit org/name --pattern 2:4 --text texts/c4.jsonl --watch
      pho submit org/small org/other --pattern 0.5 --over worst
      pho submit org/name --patterns 0.3,0.5,0.7,2:4 --text texts/c4.jsonl
      pho submit org/name --within 5% --text texts/c4.jsonl
      pho submit org/name --pattern 0.5 --tasks boolq,arc_easy --limit 500
      pho submit --job job.json
    """
    spec = job_document(models, job_file, given)
    with open_client(url) as client:
        job = client.submit(spec, idempotency_key=idempotency_key)
        for warning in job.warnings if wait or not as_json else ():
            say(f"note: {warning}")
        if not wait:
            if as_json:
                print_json(job.model_dump(mode="json"))
            else:
                say(f"{job.name}: {job.state}. Follow it with: pho watch {job.id}")
                click.echo(job.id)
            return
        end(client, client.wait(job.id), as_json)


def job_document(
    models: tuple[str, ...], job_file: str | None, given: Given, *, pattern: str | None = None
) -> dict[str, Any]:
    """
    The document of a job, from a file and from options, which count more.

    Args:
        models: MODEL and others, if not those of the file.
        job_file: Name of the file.
        given: The options.
        pattern: If neither says one.

    Raises:
        InvalidInput: A file that is none; a rule is broken, or there is no model or no pattern.
    """
    document = given.document(_read_document(job_file) if job_file else {})
    if models:
        document["model"], document["more_models"] = models[0], [*models[1:]]
    if pattern is not None and not (document.get("patterns") or document.get("target")):
        document.setdefault("pattern", pattern)
    for fields, way in (
        (("model",), "MODEL"),
        (("pattern", "patterns", "target"), "--pattern 0.5 or 2:4, --patterns or --within"),
    ):
        if not any(document.get(field) for field in fields):
            raise InvalidInput(
                f"no {fields[0]} is given. Give {way}, or a document with one by --job."
            )
    spec = given.job(document)
    found = warm_start.of_files(given, spec)
    if any(given("warm_start/found") or ()):  # nothing named: the service's own library
        found += warm_start.of_libraries(given, spec.pruning(), {})
        document["warm_start"]["found"] = warm_start.points(found)
        given.job(document)
    return document


def _read_document(path: str) -> dict[str, Any]:
    try:
        with click.open_file(path, encoding="utf-8") as file:
            document = json.load(file)
    except OSError as error:
        raise InvalidInput(f"--job {path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"--job {path} is not JSON: {error}.") from error
    if not isinstance(document, dict):
        raise InvalidInput(f"--job {path} is not a job document: it must be a JSON object.")
    return document
