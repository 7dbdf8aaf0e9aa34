"""`pho submit`."""

import json
from typing import Any

import click

from pho_service.cli.options import all_options, json_option, parse_bytes
from pho_service.cli.remote import end, open_client, url_option
from pho_service.cli.terminal import print_json, say, verb
from pho_service.errors import InvalidInput
from pho_service.spec.objective import OBJECTIVES, OVER, WEIGHTINGS
from pho_service.spec.presets import PRESETS
from pho_service.spec.samplers import SAMPLERS
from pho_service.spec.steps import ALLOCATIONS, PERMUTATIONS, REPRUNINGS, UPDATES

# The fields of a job's document, for whoever makes one.
job_options = all_options(
    click.option("--pattern", help="Share of weights to remove (0.5), or N kept of M (2:4)."),
    click.option("--scope", type=click.Choice(["row", "layer", "global"])),
    click.option("--name", help="Of the job and its study."),
    click.option("--text", help="To calibrate on: a file that the workers see."),
    click.option("--dataset", help="To calibrate on: a data set.  [default: C4]"),
    click.option("--data-file", help="One file of the data set."),
    click.option("--samples", type=int, help="Windows of that text.  [default: 128]"),
    click.option("--fisher-samples", type=int, help="Run backward.  [default: samples / 4]"),
    click.option("--rows-per-layer", type=int, help="Of each linear in the bundle.  [default: 16]"),
    click.option("--projection-rows", type=int, help="0: the full Gram matrix.  [default: 128]"),
    click.option("--context-length", type=int, help="Tokens of a window.  [default: 2048]"),
    click.option("--confirm-text", help="To confirm on.  [default: what the calibration leaves]"),
    click.option("--confirm-windows", type=int, help="Of that text.  [default: 16]"),
    click.option("--candidates", type=int, help="Finalists, beside baselines.  [default: 5]"),
    click.option("--no-confirm", is_flag=True, help="Measure no perplexity."),
    click.option("--validate", type=int, help="Rank so many random candidates both ways, too."),
    click.option("--mixed-precision", is_flag=True, default=None, help="As in `pho calibrate`."),
    click.option("--calibration-memory", help="As in `pho calibrate`: 8GiB."),
    click.option("--objective", type=click.Choice(OBJECTIVES)),
    click.option("--weighting", type=click.Choice(WEIGHTINGS)),
    click.option("--over", type=click.Choice(OVER), help="Of several models.  [default: mean]"),
    click.option("--sampler", type=click.Choice(list(SAMPLERS))),
    click.option("--warm-start", is_flag=True, help="Begin with what the library has."),
    click.option("--compare-cold", is_flag=True, help="With it: say how many trials that saved."),
    click.option("--revision", help="Branch, tag or commit of a hub model."),
    click.option("--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"])),
    click.option("--stream", is_flag=True, default=None, help="Leave the weights on disk."),
    click.option("--preset", type=click.Choice(PRESETS), help="[default: score]"),
    click.option("--allocation", type=click.Choice(ALLOCATIONS), help="Of the sparsity."),
    click.option("--permutation", type=click.Choice(PERMUTATIONS), help="Of channels, for N:M."),
    click.option("--repruning", type=click.Choice(REPRUNINGS), help="Of a finished mask."),
    click.option("--update", type=click.Choice(UPDATES), help="Of the weights that stay."),
    click.option("--space", "bounds", multiple=True, help="Bounds: name=low:high, name=value."),
    click.option("--trials", type=int, help="Of each island.  [default: 200]"),
    click.option("--islands", type=int, help="Searches with seeds of their own.  [default: 1]"),
    click.option("--seed", type=int, help="[default: 0]"),
    click.option("--priority", type=int, help="Higher goes first.  [default: 0]"),
    click.option("--timeout", "timeout_s", type=float, help="Seconds of each island's search."),
)


@click.command()
@click.argument("models", metavar="[MODEL...]", nargs=-1)
@click.option("--job", "job_file", help="A job document as a JSON file; - reads stdin.")
@job_options
@click.option("--idempotency-key", help="The same key twice makes one job.")
@click.option("--watch", "wait", is_flag=True, help="Wait for it, as `pho watch` does.")
@url_option
@json_option
@verb
def submit(
    models: tuple[str, ...],
    job_file: str | None,
    idempotency_key: str | None,
    wait: bool,
    url: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """
    Submit a search job for MODEL, a hub id or a path that the workers see.

    With several models, the search is for a configuration that is good on all
    of them. What is left out has the defaults of `pho search`. The job's id is printed.

    \b
    Example:
      pho submit org/name --pattern 2:4 --text texts/c4.jsonl --watch
      pho submit org/small org/other --pattern 0.5 --over worst
      pho submit --job job.json
    """
    spec = job_document(models, job_file, options)
    with open_client(url) as client:
        job = client.submit(spec, idempotency_key=idempotency_key)
        if not wait:
            if as_json:
                print_json(job.model_dump(mode="json"))
            else:
                say(f"{job.name}: {job.state}. Follow it with: pho watch {job.id}")
                click.echo(job.id)
            return
        end(client, client.wait(job.id), as_json)


def job_document(
    models: tuple[str, ...], job_file: str | None, options: dict[str, Any]
) -> dict[str, Any]:
    """
    The document of a job, from a file and from options, which count more.

    Raises:
        InvalidInput: A file that is none, or neither has a model and a pattern.
    """
    spec = _read_document(job_file) if job_file else {}
    if options["compare_cold"] and not options["warm_start"]:
        raise InvalidInput("--compare-cold compares with a warm start: give --warm-start, too.")
    _merge(spec, {**_document_options(models, options)})
    for field, way in (("model", "MODEL"), ("pattern", "--pattern 0.5 or 2:4")):
        if not spec.get(field):
            raise InvalidInput(f"no {field} is given. Give {way}, or a document with one by --job.")
    return spec


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


def _document_options(models: tuple[str, ...], options: dict[str, Any]) -> dict[str, Any]:
    """Options in the form that the document has them."""
    memory = options.pop("calibration_memory")
    warm, compare = options.pop("warm_start"), options.pop("compare_cold")
    return {
        **options,
        "model": models[0] if models else None,
        "more_models": [*models[1:]] or None,
        "memory_bytes": None if memory is None else parse_bytes(memory),
        "warm_start": {"compare_cold": compare} if warm else None,
    }


# Where an option stands in the document, if not under its own name.
_PLACES = {
    "text": ("calibration", "text"),
    "dataset": ("calibration", "dataset"),
    "data_file": ("calibration", "data_file"),
    "samples": ("calibration", "samples"),
    "context_length": ("calibration", "context_length"),
    "fisher_samples": ("calibration", "fisher_samples"),
    "rows_per_layer": ("calibration", "rows_per_layer"),
    "projection_rows": ("calibration", "projection_rows"),
    "confirm_text": ("confirm", "text"),
    "confirm_windows": ("confirm", "windows"),
    "candidates": ("confirm", "candidates"),
    "validate": ("validation", "candidates"),
    "mixed_precision": ("calibration", "mixed_precision"),
    "memory_bytes": ("calibration", "memory_bytes"),
    "objective": ("objective", "name"),
    "over": ("objective", "over"),
    "weighting": ("objective", "weighting"),
    "allocation": ("steps", "allocation", "method"),
    "permutation": ("steps", "permutation"),
    "repruning": ("steps", "repruning"),
    "update": ("steps", "update"),
}


def _merge(spec: dict[str, Any], options: dict[str, Any]) -> None:
    """Put the options that were given into the document."""
    from pho_service.spec.space import parse_bounds

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
