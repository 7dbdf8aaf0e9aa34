"""`pho transfer-job`."""

import json
from collections.abc import Mapping
from typing import Any

import click

from pho_service.cli.groups import GroupedCommand
from pho_service.cli.options import (
    at_least,
    json_option,
    out_file,
    report_options,
    report_spec,
)
from pho_service.cli.plots import plot_file, plot_transfer
from pho_service.cli.remote import end, open_client, pattern_option, url_option
from pho_service.cli.terminal import print_json, say, verb
from pho_service.errors import InvalidInput


@click.command("transfer-job", cls=GroupedCommand)
@click.argument("job_id")
@click.argument("models", metavar="[MODEL...]", nargs=-1)
@pattern_option
@report_options
@click.option("--search", is_flag=True, help="Find the own best of each model, too.")
@click.option("--trials", type=int, help="Number of trials of those searches.  [default: 200]")
@click.option("--seed", type=int, help="Seed of those searches.  [default: 0]")
@click.option("--confirm-text", help="Text to confirm on.  [default: what the calibration leaves]")
@click.option("--text", help="To calibrate on.  [default: as the job]")
@click.option("--stream", is_flag=True, help="Leave the weights on disk.")
@click.option("--name", help="Name of the new job.")
@click.option("--priority", type=int, default=0, show_default=True, help="Higher goes first.")
@click.option("--notify", help="URL of a webhook that is called when it has ended.")
@click.option("--idempotency-key", help="The same key twice makes one job.")
@click.option("--watch", "wait", is_flag=True, help="Wait for it, as `pho watch` does.")
@click.option("--out", help="Write what is measured to this file; implies --watch.")
@click.option("--plot", help="Draw it on this HTML page; implies --watch.")
@url_option
@json_option
@verb
def transfer_job(
    job_id: str,
    models: tuple[str, ...],
    pattern: str | None,
    report: Mapping[str, Any],
    search: bool,
    trials: int | None,
    seed: int | None,
    confirm_text: str | None,
    text: str | None,
    stream: bool,
    name: str | None,
    priority: int,
    notify: str | None,
    idempotency_key: str | None,
    wait: bool,
    out: str | None,
    plot: str | None,
    url: str | None,
    as_json: bool,
) -> None:
    """
    Measure what the job JOB_ID has found on MODEL..., hub ids or paths that the workers see.

    It is a job of its own, a stage for each model; its id is printed. Without
    --report-text or --report-dataset only proxies are compared. Without MODEL, JOB_ID is such a
    job: --out and --plot give what it has measured.

    \b
    Example:
      pho transfer-job d5aed9d3-7b7c-40f9-9896-b5f528363229 org/other \\
          --report-text texts/report.jsonl --search --watch
    """
    from pho_service.host.files import new_file

    at_least(1, trials=trials)
    measured_on = report_spec(report)
    path = None if out is None else out_file(out)
    picture = None if plot is None else plot_file(plot)
    if not models and path is None and picture is None:
        raise InvalidInput("give MODEL..., or --out or --plot for a transfer that is there.")
    if pattern is not None and not models:
        raise InvalidInput(
            f"--pattern {pattern} says which of several patterns is measured: give MODEL..., too."
        )
    own = {
        "trials": trials,
        "seed": seed,
        "confirm": None if confirm_text is None else {"text": confirm_text},
    }
    if any(value is not None for value in own.values()) and not search:
        raise InvalidInput("--trials, --seed and --confirm-text are for --search: give it, too.")
    document: dict[str, Any] = {"stream": stream, "priority": priority}
    searched = _given(**own) if search else None
    document |= _given(
        name=name,
        notify=notify,
        report=measured_on and measured_on.model_dump(exclude_unset=True),
        search=searched,
    )
    with open_client(url) as client:
        job = client.job(job_id)
        if models:
            if text is not None:
                document["calibration"] = _calibration(job.spec["calibration"], text)
            job = client.transfer(
                job_id, models, pattern=pattern, idempotency_key=idempotency_key, **document
            )
            say(f"{job.name}: {job.state}. Follow it with: pho watch {job.id}")
            if not (wait or path or picture):
                if as_json:
                    print_json(job.model_dump(mode="json"))
                else:
                    click.echo(job.id)
                return
            job = client.wait(job.id)
        measured = client.transferred(job.id).model_dump(mode="json")
        if path is not None:
            with new_file(path) as partial:
                partial.write_text(json.dumps(measured, indent=2) + "\n", encoding="utf-8")
            say(f"written {path}")
        if picture is not None:
            found = measured["configuration"]
            title = f"{job.name} at {found['pattern']}, {found['scope']}"
            plot_transfer(measured["targets"], picture, title)
            say(f"written {picture}")
        end(client, job, as_json)


def _given(**fields: Any) -> dict[str, Any]:
    """Those that were given."""
    return {name: value for name, value in fields.items() if value is not None}


def _calibration(of_job: dict[str, Any], text: str) -> dict[str, Any]:
    """The job's calibration on another text."""
    source = ("dataset", "data_file", "split", "field")
    return {
        **{name: value for name, value in of_job.items() if name not in source},
        "text": text,
    }
