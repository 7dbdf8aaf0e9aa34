"""The verbs for jobs that are there: `pho jobs`, `show`, `watch`, `best` and the like."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pho_service.cli.jobs_shown import (
    done,
    good,
    outcome,
    say_transfer,
    short_ids,
    show_points,
    show_tasks,
)
from pho_service.cli.options import at_least, json_option
from pho_service.cli.terminal import print_json, print_table, say, table_width, tell, verb
from pho_service.errors import InvalidInput, ServiceError
from pho_service.spec.numbers import number

if TYPE_CHECKING:
    from pho_service.api.answers import Job
    from pho_service.client import Client

url_option = click.option(
    "--url", help="Address of the service.  [default: PHO_API_URL, or http://127.0.0.1:8000]"
)


pattern_option = click.option("--pattern", help="Which, of a job with several patterns.")


def open_client(url: str | None) -> "Client":
    """A client of the service that ``--url`` or the settings name."""
    from pho_service.client import Client

    return Client(url)


@click.command()
@click.option("--state", "states", multiple=True, help="Only jobs in this state.")
@click.option("--model", "models", multiple=True, help="Only jobs for this model.")
@click.option(
    "--pattern",
    "patterns",
    multiple=True,
    help="Only jobs with this pattern; target: those that look for one.",
)
@click.option("--name", help="Only jobs with this in their name, or at the beginning of their id.")
@click.option(
    "--sort",
    help="created, name, model, pattern, state, perplexity, rise or gain; with a hyphen before it, "
    "the highest first.  [default: -created]",
)
@click.option("--limit", type=int, default=50, show_default=True, help="At most so many.")
@url_option
@json_option
@verb
def jobs(
    states: tuple[Any, ...],
    models: tuple[str, ...],
    patterns: tuple[str, ...],
    name: str | None,
    sort: str | None,
    limit: int,
    url: str | None,
    as_json: bool,
) -> None:
    """
    List jobs, newest first; all filters that are given hold at once.

    --state, --model and --pattern may be given several times: any of theirs will do.
    On a terminal ids are as short as tells them apart, which every verb takes;
    in a pipe they are whole, and each job is a line.

    \b
    Example:
      pho jobs --state running --state queued
      pho jobs --model org/name --pattern 2:4 --sort rise
    """
    from itertools import islice

    at_least(0, limit=limit)
    with open_client(url) as client:
        listed = client.jobs(states, models=models, patterns=patterns, name=name, sort=sort)
        found = list(islice(listed, limit))
    if as_json:
        print_json([job.model_dump(mode="json") for job in found])
        return
    short = short_ids(str(job.id) for job in found)
    rows = [
        [
            str(job.id) if table_width() is None else short[str(job.id)],
            job.name.removesuffix(f" {str(job.id)[:8]}"),
            job.state,
            done(job),
            *good(job),
            number(job.progress.best_value),
        ]
        for job in found
    ]
    columns = [
        "id", "name", "state", "trials", "dense", "perplexity", "rise", "Wanda", "RIA", "objective"
    ]  # fmt: skip
    print_table("Jobs", columns, rows, spare=("objective", "RIA", "Wanda", "dense"))


@click.command()
@click.argument("job_id")
@url_option
@json_option
@verb
def show(job_id: str, url: str | None, as_json: bool) -> None:
    """
    Show a job with its progress; of a transfer, what it has measured so far.

    \b
    Example:
      pho show d5aed9d3-7b7c-40f9-9896-b5f528363229
    """
    with open_client(url) as client:
        job = client.job(job_id)
        measured = client.transferred(job_id) if job.kind == "transfer" else None
    if as_json:
        print_json(job.model_dump(mode="json"))
        return
    if measured is not None:
        tell(f"job          {job.id}\nname         {job.name}\nstate        {job.state}")
        say_transfer(job, measured)
        return
    progress = job.progress
    left = "" if progress.seconds_left is None else f", {progress.seconds_left:.0f} s left"
    shards = f"calibration  {progress.shards_done} of {progress.shards} shards"
    step = progress.step
    at = "" if step is None else f"now          {step.title}, {step.done} of {step.steps}"
    lines = [
        f"job          {job.id}",
        f"name         {job.name}",
        f"state        {job.state}, stage {job.stage or 'none yet'}{left}",
        *([at] if at else []),
        *([shards] if progress.shards else []),
        f"trials       {progress.trials_done} of {progress.trials}, best "
        f"{number(progress.best_value) or 'none yet'}",
        f"perplexities {progress.perplexities_done} of {progress.perplexities}"
        if job.points is None
        else f"patterns     {progress.points_done} of at most {progress.points}",
    ]
    tell("\n".join([*lines, *outcome(job)]))
    show_points(job)
    show_tasks(job)


@click.command()
@click.argument("job_id")
@url_option
@json_option
@verb
def watch(job_id: str, url: str | None, as_json: bool) -> None:
    """
    Wait for a job, with progress bars. Exit code 1 if it failed or was cancelled.

    \b
    Example:
      pho watch d5aed9d3-7b7c-40f9-9896-b5f528363229
    """
    with open_client(url) as client:
        end(client, client.wait(job_id), as_json)


@click.command()
@click.argument("job_id")
@pattern_option
@click.option("--out", help="A file to write.  [default: stdout]")
@url_option
@json_option
@verb
def best(job_id: str, pattern: str | None, out: str | None, url: str | None, as_json: bool) -> None:
    """
    Get the best configuration of a job: the config.json that `pho search` writes.

    Without --out it goes to stdout, as JSON in any case.

    \b
    Example:
      pho best d5aed9d3-7b7c-40f9-9896-b5f528363229 --out config.json
    """
    from pho_service.spec.configuration import write_configuration

    with open_client(url) as client:
        configuration = client.best(job_id, pattern=pattern)
    if out is not None:
        write_configuration(configuration, Path(out))
        say(f"written {out}")
    if out is None or as_json:
        print_json(configuration.model_dump(mode="json"))


@click.command()
@click.argument("job_id")
@click.option("--out", required=True, help="A new or empty folder.")
@click.option("--prune", is_flag=True, help="Have the job pruned first, if it is not, and wait.")
@pattern_option
@url_option
@json_option
@verb
def pull(
    job_id: str, out: str, prune: bool, pattern: str | None, url: str | None, as_json: bool
) -> None:
    """
    Download the pruned model of a job, and check each file by its SHA-256.

    The service has it if the job was submitted with --prune, or if --prune is
    given here. A download that was cut goes on with the same command.

    \b
    Example:
      pho pull d5aed9d3-7b7c-40f9-9896-b5f528363229 --prune --out pruned
      pho prune --check pruned
    """
    from pho_service.host.files import check_free

    if pattern is not None and not prune:
        raise InvalidInput(
            f"--pattern {pattern} says which of several is to be pruned, and the service has one "
            "pruned model of a job. Give --prune, too."
        )
    check_free(Path(out))
    with open_client(url) as client:
        if prune:
            job = client.wait(client.prune(job_id, pattern=pattern).id)
            if job.state != "succeeded":
                end(client, job, as_json=False)
        folder = client.pull(job_id, out, show_progress=True)
        files = client.artifacts(job_id)
    if as_json:
        print_json({"out": str(folder), **files.model_dump(mode="json")})
        return
    say(f"{out}: {len(files.files)} files, {files.bytes} bytes; all hashes are right")


@click.command()
@click.argument("job_id")
@url_option
@json_option
@verb
def cancel(job_id: str, url: str | None, as_json: bool) -> None:
    """
    Cancel a job for good. A worker that is busy with it stops at the next generation.

    \b
    Example:
      pho cancel d5aed9d3-7b7c-40f9-9896-b5f528363229
    """
    with open_client(url) as client:
        _tell(client.cancel(job_id), as_json)


@click.command()
@click.argument("job_id")
@url_option
@json_option
@verb
def pause(job_id: str, url: str | None, as_json: bool) -> None:
    """
    Pause a job; `pho resume` continues it.

    \b
    Example:
      pho pause d5aed9d3-7b7c-40f9-9896-b5f528363229
    """
    with open_client(url) as client:
        _tell(client.pause(job_id), as_json)


@click.command()
@click.argument("job_id")
@url_option
@json_option
@verb
def resume(job_id: str, url: str | None, as_json: bool) -> None:
    """
    Continue a job that is paused or has failed, from what is stored.

    \b
    Example:
      pho resume d5aed9d3-7b7c-40f9-9896-b5f528363229
    """
    with open_client(url) as client:
        _tell(client.resume(job_id), as_json)


@click.command()
@click.argument("job_id")
@click.option("--trials", type=int, required=True, help="How many more, for each island.")
@url_option
@json_option
@verb
def extend(job_id: str, trials: int, url: str | None, as_json: bool) -> None:
    """
    Give a job more trials. They are those of a job that had them from the start.

    What was confirmed before stays a finalist: the result is never worse than it was.

    \b
    Example:
      pho extend d5aed9d3-7b7c-40f9-9896-b5f528363229 --trials 200
    """
    with open_client(url) as client:
        _tell(client.extend(job_id, trials=trials), as_json, with_trials=True)


@click.command()
@click.argument("job_id")
@url_option
@json_option
@verb
def delete(job_id: str, url: str | None, as_json: bool) -> None:
    """
    Delete a job that is over or paused, with its studies. Bundles stay for other jobs.

    \b
    Example:
      pho delete d5aed9d3-7b7c-40f9-9896-b5f528363229
    """
    with open_client(url) as client:
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
@url_option
@json_option
@verb
def workers(url: str | None, as_json: bool) -> None:
    """
    List the workers of a service.

    \b
    Example:
      pho workers --url http://pho.example:8000
    """
    with open_client(url) as client:
        found = client.workers()
    if as_json:
        print_json([worker.model_dump(mode="json") for worker in found])
        return
    columns = ["name", "device", "works on", "stage", "heartbeat"]
    short = short_ids(str(worker.job_id) for worker in found if worker.job_id)
    rows = [
        [
            worker.name,
            worker.device,
            worker.job_id if table_width() is None else short.get(str(worker.job_id)),
            worker.stage,
            f"{worker.heartbeat_at:%H:%M:%S}",
        ]
        for worker in found
    ]
    print_table("Workers", columns, rows, spare=("heartbeat",))


def end(client: "Client", job: "Job", as_json: bool) -> None:
    """Say how a job ended; raise if it has no result."""
    if as_json:
        print_json(job.model_dump(mode="json"))
    elif job.kind == "transfer":
        tell(f"{job.name}: {job.state}")
        say_transfer(job, client.transferred(job.id))
    else:
        tell("\n".join([f"{job.name}: {job.state}", *outcome(job)]))
        show_points(job)
        show_tasks(job)
    if job.state != "succeeded":
        reason = job.error.message if job.error else "it was cancelled."
        raise ServiceError(f"job {job.id} {job.state}: {reason}")
