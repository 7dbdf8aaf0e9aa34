"""The verbs that talk to a service: `pho submit`, `jobs`, `show`, `watch`, `best` and the like."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pho_service.cli.options import at_least
from pho_service.cli.terminal import print_json, print_table, say, verb
from pho_service.errors import InvalidInput, ServiceError
from pho_service.spec import (
    ALLOCATIONS,
    OBJECTIVES,
    PERMUTATIONS,
    PRESETS,
    REPRUNINGS,
    SAMPLERS,
    UPDATES,
    WEIGHTINGS,
)

if TYPE_CHECKING:
    from pho_service.client import Client
    from pho_service.documents import Job

_url_option = click.option(
    "--url", help="Of the service.  [default: PHO_API_URL, else http://127.0.0.1:8000]"
)
_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout.")


def _client(url: str | None) -> "Client":
    from pho_service.client import Client

    return Client(url)


@click.command()
@click.argument("model", required=False)
@click.option("--job", "job_file", help="A job document as a JSON file; - reads stdin.")
@click.option("--pattern", help="Share of weights to remove (0.5), or N kept of M (2:4).")
@click.option("--scope", type=click.Choice(["row", "layer", "global"]))
@click.option("--name", help="Of the job and its study.")
@click.option("--text", help="To calibrate on: a file that the workers see.")
@click.option("--dataset", help="To calibrate on: a data set.  [default: C4]")
@click.option("--data-file", help="One file of the data set.")
@click.option("--samples", type=int, help="Windows of that text.  [default: 128]")
@click.option("--context-length", type=int, help="Tokens of a window.  [default: 2048]")
@click.option("--confirm-text", help="To confirm on.  [default: what the calibration leaves]")
@click.option("--candidates", type=int, help="Finalists, beside baselines.  [default: 5]")
@click.option("--no-confirm", is_flag=True, help="Measure no perplexity.")
@click.option("--validate", type=int, help="Rank so many random candidates both ways, too.")
@click.option("--objective", type=click.Choice(OBJECTIVES))
@click.option("--weighting", type=click.Choice(WEIGHTINGS))
@click.option("--sampler", type=click.Choice(list(SAMPLERS)))
@click.option("--stream", is_flag=True, default=None, help="Leave the weights on disk.")
@click.option("--preset", type=click.Choice(PRESETS), help="What is searched.  [default: score]")
@click.option("--allocation", type=click.Choice(ALLOCATIONS), help="Of the sparsity.")
@click.option("--permutation", type=click.Choice(PERMUTATIONS), help="Of channels, for N:M.")
@click.option("--repruning", type=click.Choice(REPRUNINGS), help="Of a finished mask.")
@click.option("--update", type=click.Choice(UPDATES), help="Of the weights that stay.")
@click.option("--space", "bounds", multiple=True, help="Bounds: name=low:high, name=value.")
@click.option("--trials", type=int, help="Of each island.  [default: 200]")
@click.option("--islands", type=int, help="Searches with seeds of their own.  [default: 1]")
@click.option("--seed", type=int, help="[default: 0]")
@click.option("--priority", type=int, help="Higher goes first.  [default: 0]")
@click.option("--timeout", "timeout_s", type=float, help="Seconds of each island's search.")
@click.option("--idempotency-key", help="The same key twice makes one job.")
@click.option("--watch", "wait", is_flag=True, help="Wait for it, as `pho watch` does.")
@_url_option
@_json_option
@verb
def submit(
    job_file: str | None,
    idempotency_key: str | None,
    wait: bool,
    url: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """
    Submit a search job for MODEL, a hub id or a path that the workers see.

    What is left out has the defaults of `pho search`. The job's id is printed.

    \b
    Example:
      pho submit org/name --pattern 2:4 --text texts/c4.jsonl --watch
      pho submit --job job.json
    """
    spec = _read_document(job_file) if job_file else {}
    _merge(spec, options)
    with _client(url) as client:
        job = client.submit(spec, idempotency_key=idempotency_key)
        if not wait:
            if as_json:
                print_json(job.model_dump(mode="json"))
            else:
                say(f"{job.name}: {job.state}. Follow it with: pho watch {job.id}")
                click.echo(job.id)
            return
        _end(client.wait(job.id), as_json)


@click.command()
@click.option("--state", "states", multiple=True, help="Only jobs in this state.")
@click.option("--limit", type=int, default=50, show_default=True, help="At most so many.")
@_url_option
@_json_option
@verb
def jobs(states: tuple[Any, ...], limit: int, url: str | None, as_json: bool) -> None:
    """
    List jobs, newest first.

    \b
    Example:
      pho jobs --state running --state queued
    """
    from itertools import islice

    at_least(0, limit=limit)
    with _client(url) as client:
        found = list(islice(client.jobs(states), limit))
    if as_json:
        print_json([job.model_dump(mode="json") for job in found])
        return
    rows = [
        [
            job.id, job.name, job.state, f"{job.progress.trials_done}/{job.progress.trials}",
            _number(job.progress.best_value), _number(job.best.perplexity if job.best else None),
        ]
        for job in found
    ]  # fmt: skip
    columns = ["id", "name", "state", "trials", "best", "perplexity"]
    print_table("Jobs", columns, rows)


@click.command()
@click.argument("job_id")
@_url_option
@_json_option
@verb
def show(job_id: str, url: str | None, as_json: bool) -> None:
    """
    Show a job with its progress.

    \b
    Example:
      pho show d5aed9d3-7b7c-40f9-9896-b5f528363229
    """
    with _client(url) as client:
        job = client.job(job_id)
    if as_json:
        print_json(job.model_dump(mode="json"))
        return
    progress = job.progress
    left = "" if progress.seconds_left is None else f", {progress.seconds_left:.0f} s left"
    lines = [
        f"job          {job.id}",
        f"name         {job.name}",
        f"state        {job.state}, stage {job.stage or 'none yet'}{left}",
        f"trials       {progress.trials_done} of {progress.trials}, best "
        f"{_number(progress.best_value) or 'none yet'}",
        f"perplexities {progress.perplexities_done} of {progress.perplexities}",
    ]
    click.echo("\n".join([*lines, *_outcome(job)]))


@click.command()
@click.argument("job_id")
@_url_option
@_json_option
@verb
def watch(job_id: str, url: str | None, as_json: bool) -> None:
    """
    Wait for a job, with progress bars. Exit code 1 if it failed or was cancelled.

    \b
    Example:
      pho watch d5aed9d3-7b7c-40f9-9896-b5f528363229
    """
    with _client(url) as client:
        _end(client.wait(job_id), as_json)


@click.command()
@click.argument("job_id")
@click.option("--out", help="A file to write.  [default: stdout]")
@_url_option
@_json_option
@verb
def best(job_id: str, out: str | None, url: str | None, as_json: bool) -> None:
    """
    Get the best configuration of a job: the config.json that `pho search` writes.

    Without --out it goes to stdout, as JSON in any case.

    \b
    Example:
      pho best d5aed9d3-7b7c-40f9-9896-b5f528363229 --out config.json
    """
    from pho_service.configuration import write_configuration

    with _client(url) as client:
        configuration = client.best(job_id)
    if out is not None:
        write_configuration(configuration, Path(out))
        say(f"written {out}")
    if out is None or as_json:
        print_json(configuration.model_dump(mode="json"))


@click.command()
@click.argument("job_id")
@_url_option
@_json_option
@verb
def cancel(job_id: str, url: str | None, as_json: bool) -> None:
    """
    Stop a job for good. A worker that is busy with it stops at the next generation.

    \b
    Example:
      pho cancel d5aed9d3-7b7c-40f9-9896-b5f528363229
    """
    with _client(url) as client:
        _tell(client.cancel(job_id), as_json)


@click.command()
@click.argument("job_id")
@_url_option
@_json_option
@verb
def pause(job_id: str, url: str | None, as_json: bool) -> None:
    """
    Put a job down; `pho resume` goes on with it.

    \b
    Example:
      pho pause d5aed9d3-7b7c-40f9-9896-b5f528363229
    """
    with _client(url) as client:
        _tell(client.pause(job_id), as_json)


@click.command()
@click.argument("job_id")
@_url_option
@_json_option
@verb
def resume(job_id: str, url: str | None, as_json: bool) -> None:
    """
    Go on with a job that is paused or has failed, from what is stored.

    \b
    Example:
      pho resume d5aed9d3-7b7c-40f9-9896-b5f528363229
    """
    with _client(url) as client:
        _tell(client.resume(job_id), as_json)


@click.command()
@click.argument("job_id")
@click.option("--trials", type=int, required=True, help="How many more, for each island.")
@_url_option
@_json_option
@verb
def extend(job_id: str, trials: int, url: str | None, as_json: bool) -> None:
    """
    Give a job more trials: the result is that of a job that had them from the start.

    \b
    Example:
      pho extend d5aed9d3-7b7c-40f9-9896-b5f528363229 --trials 200
    """
    with _client(url) as client:
        _tell(client.extend(job_id, trials=trials), as_json, with_trials=True)


@click.command()
@click.argument("job_id")
@_url_option
@_json_option
@verb
def delete(job_id: str, url: str | None, as_json: bool) -> None:
    """
    Delete a job that is over or paused, with its studies. Bundles stay for other jobs.

    \b
    Example:
      pho delete d5aed9d3-7b7c-40f9-9896-b5f528363229
    """
    with _client(url) as client:
        client.delete(job_id)
    if as_json:
        print_json({"deleted": job_id})
        return
    say("deleted")


def _tell(job: "Job", as_json: bool, *, with_trials: bool = False) -> None:
    """Say what a job is now."""
    if as_json:
        print_json(job.model_dump(mode="json"))
        return
    say(f"job is {job.state}" + (f", with {job.progress.trials} trials" if with_trials else ""))


@click.command()
@_url_option
@_json_option
@verb
def workers(url: str | None, as_json: bool) -> None:
    """
    List the workers of a service.

    \b
    Example:
      pho workers --url http://pho.example:8000
    """
    with _client(url) as client:
        found = client.workers()
    if as_json:
        print_json([worker.model_dump(mode="json") for worker in found])
        return
    columns = ["name", "device", "works on", "stage", "heartbeat"]
    rows = [[w.name, w.device, w.job_id, w.stage, f"{w.heartbeat_at:%H:%M:%S}"] for w in found]
    print_table("Workers", columns, rows)


def _read_document(path: str) -> dict[str, Any]:
    try:
        with click.open_file(path, encoding="utf-8") as file:
            document = json.load(file)
    except OSError as error:
        raise InvalidInput(f"--job {path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"--job {path} is not JSON: {error}.") from error
    if not isinstance(document, dict):
        raise InvalidInput(f"--job {path} is no job document: it must be a JSON object.")
    return document


# Where an option stands in the document, if not under its own name.
_PLACES = {
    "text": ("calibration", "text"),
    "dataset": ("calibration", "dataset"),
    "data_file": ("calibration", "data_file"),
    "samples": ("calibration", "samples"),
    "context_length": ("calibration", "context_length"),
    "confirm_text": ("confirm", "text"),
    "candidates": ("confirm", "candidates"),
    "validate": ("validation", "candidates"),
    "objective": ("objective", "name"),
    "weighting": ("objective", "weighting"),
    "allocation": ("steps", "allocation", "method"),
    "permutation": ("steps", "permutation"),
    "repruning": ("steps", "repruning"),
    "update": ("steps", "update"),
}


def _merge(spec: dict[str, Any], options: dict[str, Any]) -> None:
    """Put the options that were given into the document."""
    from pho_service.search.space import parse_bounds

    no_confirm, bounds = options.pop("no_confirm"), parse_bounds(options.pop("bounds"))
    for name, value in options.items():
        if value is None:
            continue
        *folders, last = _PLACES.get(name, (name,))
        place = spec
        for folder in folders:
            place = place.setdefault(folder, {})
            if not isinstance(place, dict):
                raise InvalidInput(
                    f"--{name.replace('_', '-')} has no place in the job document: its {folder!r} "
                    "is no object. Leave one of them out."
                )
        place[last] = value
    if bounds:
        space = spec.setdefault("search_space", {})
        if not isinstance(space, dict):
            raise InvalidInput("--space has no place in the job document: leave one of them out.")
        space.update({k: list(v) for k, v in bounds.items()})
    if no_confirm:
        spec["confirm"] = None


def _end(job: "Job", as_json: bool) -> None:
    """Say how a job ended; raise if it has no result."""
    if as_json:
        print_json(job.model_dump(mode="json"))
    else:
        click.echo("\n".join([f"{job.name}: {job.state}", *_outcome(job)]))
    if job.state != "succeeded":
        reason = job.error.message if job.error else "it was cancelled."
        raise ServiceError(f"job {job.id} {job.state}: {reason}")


def _outcome(job: "Job") -> list[str]:
    lines = []
    if job.best is not None:
        lines.append(
            f"best         {job.best.method}, objective {_number(job.best.objective)}, "
            f"perplexity {_number(job.best.perplexity) or 'not measured'}"
        )
        lines.append(f"configuration: pho best {job.id} --out config.json")
    for name, quality in (job.validation or {}).items():
        lines.append(f"rank         {name}: Spearman {quality.spearman:+.2f} with perplexity")
    if job.error is not None:
        where = f" at {job.error.layer}" if job.error.layer else ""
        lines.append(f"error        {job.error.type} in {job.error.stage}{where}: ")
        lines[-1] += job.error.message
    return [*lines, *(f"note         {warning}" for warning in job.warnings)]


def _number(value: float | None) -> str | None:
    return None if value is None else f"{value:.6g}"
