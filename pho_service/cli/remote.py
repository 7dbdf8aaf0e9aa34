"""
The verbs that ask a service: submit, jobs, show, watch, best, transfer-job and the like.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import click
from click.shell_completion import CompletionItem

from pho_service.cli import library
from pho_service.cli.document import DocumentCommand, Given
from pho_service.cli.options import (
    all_options,
    at_least,
    json_verb,
    out_file,
    plot_file,
    plot_transfer,
)
from pho_service.cli.terminal import (
    print_json,
    print_table,
    say,
    show_table,
    table_width,
    tell,
)
from pho_service.errors import InvalidInput, PhoError, ServiceError
from pho_service.spec.document import JOB, MODEL, PRUNED, TEXT, FieldShown, number
from pho_service.spec.job_options import Field, option_fields

if TYPE_CHECKING:
    from pho_service.api.answers import Job, Submitted
    from pho_service.client import Client
    from pho_service.library import TransferFile


# Jobs in words and tables, as the verbs for jobs print them.
_SHORTEST = 8  # characters of an id, as in the names that jobs have by default


def outcome(job: "Job") -> list[str]:
    """What has come of a job, in lines."""
    lines = []
    if job.best is not None:
        if (headline := job.best.headline) is not None:
            if job.recovery is not None:
                headline = job.recovery.headline(headline)
            lines.append(f"result       {headline.sentence}")
        lines.append(
            f"chosen       {job.best.method}, objective {number(job.best.objective)}, "
            f"perplexity {number(job.best.perplexity) or 'not measured'}"
        )
        if job.recovery is not None:
            lines.append(f"recovery     {job.recovery}")
        lines.append(f"configuration: pho best {job.short} --out config.json")
    if job.pruned == "done":
        lines.append(f"pruned model:  pho pull {job.short} --out pruned")
    elif job.pruned == "removed":
        lines.append(f"pruned model:  deleted by age; pho pull {job.short} --prune --out pruned")
    for name, quality in (job.validation or {}).items():
        lines.append(f"rank         {name}: Spearman {quality.spearman:+.2f} with perplexity")
    if job.error is not None:
        where = f" at {job.error.layer}" if job.error.layer else ""
        lines.append(f"error        {job.error.type} in {job.error.stage}{where}: ")
        lines[-1] += job.error.message
    return [*lines, *(f"note         {warning}" for warning in job.warnings)]


def show_after(job: "Job") -> None:
    """What a job's pruned model scores in tasks."""
    if job.tasks is not None:
        from pho_service.shown.tables import tasks_table

        show_table(tasks_table(job.tasks))


def show_points(job: "Job") -> None:
    """The table of a job with several patterns."""
    from pho_service.shown.tables import points_table

    if not job.points:
        return
    show_table(points_table([point.model_dump() for point in job.points]), spare=("seconds",))
    if job.best is None and any(point.state == "done" for point in job.points):
        tell(f"configuration: pho best {job.short} --pattern PATTERN --out config.json")


def say_transfer(job: "Job", measured: "TransferFile") -> None:
    """What a transfer has measured so far, and what must be said of it."""
    from pho_service.cli.transfer import show_transfer
    from pho_service.spec.configuration import Configuration

    done = job.progress.of("transfer")
    tell(f"models       {done.done} of {done.total}")
    show_transfer(
        [target.model_dump(mode="json") for target in measured.targets],
        f"what job {measured.source} found",
        Configuration.model_validate(measured.configuration),
    )
    if job.error is not None:
        tell(f"error        {job.error.type}: {job.error.message}")
    for warning in job.warnings:
        tell(f"note         {warning}")


def good(job: "Job") -> list[str]:
    """Perplexities: dense, pruned, its text, its rise, Wanda, RIA; of several, the range."""
    from pho_service.shown.tables import range_of, rises_of

    measurements = job.measured
    dense, pruned, wanda, ria = (
        range_of(getattr(measurement, name) for measurement in measurements)
        for name in ("dense", "perplexity", "wanda", "ria")
    )
    texts = ", ".join({point.measured_on or "": None for point in measurements})
    return [dense, pruned, texts, rises_of(measurements), wanda, ria]


def done(job: "Job") -> str:
    if job.kind == "transfer":
        done = job.progress.of("transfer")
        return f"{done.done}/{done.total} models"
    done = job.progress.of("search")
    return f"{done.done}/{done.total}"


def short_ids(ids: Iterable[str]) -> dict[str, str]:
    """Return the beginnings that tell ids apart, of the same length, at least 8 characters."""
    whole_ids = {*ids}
    for length in range(_SHORTEST, 36):
        short = {whole_id: whole_id[:length] for whole_id in whole_ids}
        if len({*short.values()}) == len(whole_ids):
            return short
    return {whole_id: whole_id for whole_id in whole_ids}


def _ids(ctx: click.Context, _: click.Parameter, beginning: str) -> list[CompletionItem]:
    """The ids of jobs that begin so, for the completion of a shell."""
    try:
        with open_client(ctx.params.get("url")) as client:
            return [
                CompletionItem(str(job.id), help=f"{job.name}, {job.state}")
                for job in islice(client.jobs(name=beginning or None), 50)
                if str(job.id).startswith(beginning)
            ]
    except PhoError:
        return []  # a shell has no place for it


job_argument = click.argument("job_id", shell_complete=_ids)
url_option = click.option(
    "--url", help="Address of the service.  [default: PHO_API_URL, or http://127.0.0.1:8000]"
)


service_verb = all_options(url_option, json_verb)
of_a_job = all_options(job_argument, service_verb)
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
@click.option(
    "--label", "labels", multiple=True, help="Only jobs with this label: NAME=VALUE, or just NAME."
)
@click.option("--name", help="Only jobs with this in their name, or at the beginning of their id.")
@click.option(
    "--sort",
    help="created, name, model, pattern, state, perplexity, rise or gain; with a hyphen before it, "
    "the highest first.  [default: -created]",
)
@click.option("--limit", type=int, default=50, show_default=True, help="At most so many.")
@service_verb
def jobs(
    states: tuple[Any, ...],
    models: tuple[str, ...],
    patterns: tuple[str, ...],
    labels: tuple[str, ...],
    name: str | None,
    sort: str | None,
    limit: int,
    url: str | None,
    as_json: bool,
) -> None:
    """
    List jobs, newest first; all filters that are given hold at once.

    --state, --model and --pattern may be given several times: any of theirs will
    do; of several --label all must hold. On a terminal ids are shortened, in a
    pipe they are whole.

    \b
    Example:
      pho jobs --state running --state queued
      pho jobs --model org/name --pattern 2:4 --sort rise
    """
    from itertools import islice

    at_least(0, limit=limit)
    with open_client(url) as client:
        listed = client.jobs(
            states, models=models, patterns=patterns, labels=labels, name=name, sort=sort
        )
        job_list = list(islice(listed, limit))
    if as_json:
        print_json([job.model_dump(mode="json") for job in job_list])
        return
    short = short_ids(str(job.id) for job in job_list)
    rows = [
        [
            str(job.id) if table_width() is None else short[str(job.id)],
            job.title,
            job.state,
            done(job),
            *good(job),
            "" if job.points else number(job.progress.best_value),  # those of points do not compare
            ", ".join(f"{label}={value}" for label, value in job.labels.items()),
        ]
        for job in job_list
    ]
    columns = [
        "id", "name", "state", "trials", "dense", "perplexity", "measured on", "against dense",
        "Wanda", "RIA", "objective", "labels",
    ]  # fmt: skip
    if not any(job.labels for job in job_list):
        columns, rows = columns[:-1], [row[:-1] for row in rows]
    print_table("Jobs", columns, rows, spare=("objective", "RIA", "Wanda", "measured on", "dense"))


@click.command()
@of_a_job
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
    step = progress.step
    at = "" if step is None else f"now          {step.title}, {step.done} of {step.steps}"
    lines = [
        f"job          {job.id}",
        f"name         {job.name}",
        *(f"label        {name}={value}" for name, value in job.labels.items()),
        f"state        {job.state}, stage {job.stage or 'none yet'}{left}",
        *([at] if at else []),
        f"best so far  {number(progress.best_value) or 'none yet'}",
        *(
            f"{piece.stage:<12} {piece.done} of {piece.total} {piece.unit}"
            for piece in progress.pieces
        ),
    ]
    tell("\n".join([*lines, *outcome(job)]))
    show_points(job)
    show_after(job)


@click.command()
@of_a_job
def watch(job_id: str, url: str | None, as_json: bool) -> None:
    """
    Wait for a job, with progress bars. Exit code 1 if it failed or was cancelled.

    \b
    Example:
      pho watch d5aed9d3-7b7c-40f9-9896-b5f528363229
    """
    from pho_service.api.answers import NO_WORKER

    with open_client(url) as client:
        if NO_WORKER in client.job(job_id).warnings:
            say(f"note: {NO_WORKER}")
        end(client, client.wait(job_id), as_json)


@click.command()
@job_argument
@pattern_option
@click.option("--out", help="A file to write.  [default: stdout]")
@service_verb
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
@job_argument
@click.option("--out", required=True, help="A new or empty folder.")
@click.option("--prune", is_flag=True, help="Have the job pruned first, if it is not, and wait.")
@pattern_option
@service_verb
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
        folder = client.pull(job_id, out, progress=True)
        files = client.artifacts(job_id)
    if as_json:
        print_json({"out": str(folder), **files.model_dump(mode="json")})
        return
    say(f"{out}: {len(files.files)} files, {files.bytes} bytes; all hashes are right")


def _change(name: str, about: str) -> click.Command:
    """A verb that says what is to become of a job."""

    @of_a_job
    def change(job_id: str, url: str | None, as_json: bool) -> None:
        with open_client(url) as client:
            _tell(getattr(client, name)(job_id), as_json)

    example = f"pho {name} d5aed9d3-7b7c-40f9-9896-b5f528363229"
    return click.command(name, help=f"{about}\n\n\b\nExample:\n  {example}")(change)


cancel = _change(
    "cancel",
    "Cancel a job for good. A worker that is busy with it stops at the next generation.",
)
pause = _change("pause", "Pause a job; `pho resume` continues it.")
resume = _change("resume", "Continue a job that is paused or has failed, from what is stored.")


@click.command()
@job_argument
@click.option("--trials", type=int, required=True, help="How many more, for each island.")
@service_verb
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
@of_a_job
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
    if as_json:
        print_json(job.model_dump(mode="json"))
        return
    say(
        f"job is {job.state}"
        + (f", with {job.progress.of('search').total} trials" if with_trials else "")
    )


@click.group(invoke_without_command=True)
@click.pass_context
@service_verb
def workers(context: click.Context, url: str | None, as_json: bool) -> None:
    """
    List the workers of a service, or have one end.

    \b
    Example:
      pho workers --url http://pho.example:8000
      pho workers drain gpu-node-7:4711
    """
    if context.invoked_subcommand is not None:
        return
    with open_client(url) as client:
        worker_list = client.workers()
    if as_json:
        print_json([worker.model_dump(mode="json") for worker in worker_list])
        return
    columns = ["name", "device", "works on", "stage", "takes stages", "heartbeat"]
    short = short_ids(str(worker.job_id) for worker in worker_list if worker.job_id)
    rows = [
        [
            worker.name,
            worker.device,
            worker.job_id if table_width() is None else short.get(str(worker.job_id)),
            worker.stage,
            "no: ends" if worker.drain else "no: other store" if worker.other_store else "yes",
            f"{worker.heartbeat_at:%H:%M:%S}",
        ]
        for worker in worker_list
    ]
    print_table("Workers", columns, rows, spare=("heartbeat",))


@workers.command("drain")
@click.argument("name")
@click.option(
    "--now", is_flag=True, help="Hand back the stage that it has in hand, instead of finishing it."
)
@service_verb
def drain_worker(name: str, now: bool, url: str | None, as_json: bool) -> None:
    """
    Have the worker NAME take no more stages, and end.

    It finishes the stage that it has in hand first, which may take an hour;
    a search that must give way to another job ends with its turn. With --now
    it hands the stage back, and another worker goes on with it.
    """
    with open_client(url) as client:
        namesakes = [w for w in client.workers() if name in (w.name, str(w.id))]
        if len(namesakes) != 1:
            raise InvalidInput(
                f"{len(namesakes) or 'no'} workers that reported lately are called {name!r}. `pho "
                "workers` shows the names, `pho workers --json` the ids, which also do."
            )
        worker = client.drain(namesakes[0].id, now=now)
    if as_json:
        print_json(worker.model_dump(mode="json"))
        return
    first = "hands back" if now else "finishes"
    work = f"{first} {worker.stage} of job {worker.job_id}" if worker.stage else "has no stage"
    say(f"{worker.name} {work}, takes no more, and ends.")


def end(client: "Client", job: "Job", as_json: bool) -> None:
    """Say how a job ended; raise if it has no result."""
    if as_json:
        print_json(job.model_dump(mode="json"))
    elif job.kind == "transfer":
        tell(f"{job.title} {job.short}: {job.state}")
        say_transfer(job, client.transferred(job.id))
    else:
        tell("\n".join([f"{job.title} {job.short}: {job.state}", *outcome(job)]))
        show_points(job)
        show_after(job)
    if job.state == "failed" and not as_json:  # which said why
        raise ServiceError(f"job {job.id} failed.")
    if job.state != "succeeded":
        reason = job.error.message if job.error else "it was cancelled."
        raise ServiceError(f"job {job.id} {job.state}: {reason}")


@dataclass(frozen=True, kw_only=True)
class JobFile:
    """
    A document beside the options, which count more.

    Attributes:
        job: A job document as a JSON file; - reads stdin.
    """

    job: Annotated[str | None, FieldShown(section=JOB)] = None


@dataclass(frozen=True, kw_only=True)
class _NewJobAsk:
    """
    How a job is made, and waited for.

    Attributes:
        idempotency_key: The same key twice makes one job.
        watch: Wait for it, as `pho watch` does.
    """

    idempotency_key: Annotated[str | None, FieldShown(section=JOB)] = None
    watch: Annotated[bool, FieldShown(section=JOB)] = False


@dataclass(frozen=True, kw_only=True)
class _SubmitAsk(JobFile, _NewJobAsk):
    """What is submitted, and how."""


@click.command(
    cls=DocumentCommand, fields=("",), needed="--patterns, --within or --job", ask=_SubmitAsk
)
@click.argument("models", metavar="[MODEL...]", nargs=-1)
@service_verb
def submit(
    models: tuple[str, ...], given: Given, ask: _SubmitAsk, url: str | None, as_json: bool
) -> None:
    """
    Submit a search job for MODEL, a hub id or a path that the workers see.

    With several models, the search is for a configuration that is good on all
    of them. The job's id is printed.

    \b
    Example:
      pho submit org/name --pattern 2:4 --text texts/c4.jsonl --watch
      pho submit org/small org/other --pattern 0.5 --over worst
      pho submit org/name --patterns 0.3,0.5,0.7,2:4 --text texts/c4.jsonl
      pho submit org/name --within 5% --text texts/c4.jsonl
      pho submit org/name --pattern 0.5 --tasks boolq,arc_easy --limit 500
      pho submit --job job.json
    """
    spec = job_document(models, ask.job, given)
    with open_client(url) as client:
        job = client.submit(spec, idempotency_key=ask.idempotency_key)
        _follow(client, job, ask, as_json)


@click.command(cls=DocumentCommand, fields=("",), ask=_NewJobAsk, hidden=(MODEL, TEXT, PRUNED))
@job_argument
@service_verb
def fork(job_id: str, given: Given, ask: _NewJobAsk, url: str | None, as_json: bool) -> None:
    """
    Submit a job like JOB_ID that begins with those of its trials that lie inside --space.

    Options change the document of JOB_ID; each bound of --space that is not given
    stays. What the values of its trials depend on cannot change: the model, the
    pattern, the texts, the preset and the objective. The job's id is printed.

    \b
    Example:
      pho fork d5aed9d3 --space row_share=0.2:0.4 --space kernel_sizes=3,5 --trials 100
    """
    with open_client(url) as client:
        job = client.fork(job_id, idempotency_key=ask.idempotency_key, **given.document())
        _follow(client, job, ask, as_json)


def _follow(client: "Client", job: "Submitted", ask: _NewJobAsk, as_json: bool) -> None:
    """Tell what is known of a new job, and wait for it if that is asked."""
    for warning in job.warnings if ask.watch or not as_json else ():
        say(f"note: {warning}")
    if ask.watch:
        end(client, client.wait(job.id), as_json)
    elif as_json:
        print_json(job.model_dump(mode="json"))
    else:
        say(f"{job.name}: {job.state}. Follow it with: pho watch {str(job.id)[:_SHORTEST]}")
        click.echo(job.id)


def job_document(
    models: tuple[str, ...], job_file: str | None, given: Given, *, pattern: str | None = None
) -> dict[str, Any]:
    """The document of a job, from a file and from options, which count more."""
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
    candidates = library.of_files(given, spec)
    if any(given("warm_start/found") or ()):  # nothing named: the service's own library
        candidates += library.of_libraries(given, spec.pruning(), {})
        document["warm_start"]["found"] = library.points(candidates)
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


@dataclass(frozen=True, kw_only=True)
class _TransferJobAsk(_NewJobAsk):
    """
    What is measured of a job, and where it is written.

    Attributes:
        pattern: Which, of a job with several patterns.
        out: Write what is measured to this file; implies --watch.
        plot: Draw it on this HTML page; implies --watch.
    """

    pattern: Annotated[str | None, FieldShown(section=MODEL)] = None
    out: str | None = None
    plot: str | None = None


def _transfer_fields() -> Mapping[str, Field]:
    from pho_service.spec.transfer import TransferRequest

    return option_fields(TransferRequest)


@click.command(
    "transfer-job",
    cls=DocumentCommand,
    source=_transfer_fields,
    fields=(
        "report", "search", "calibration/text", "dtype", "stream", "name", "labels", "priority",
        "max_attempts", "notify",
    ),
    ask=_TransferJobAsk,
)  # fmt: skip
@job_argument
@click.argument("models", metavar="[MODEL...]", nargs=-1)
@service_verb
def transfer_job(
    job_id: str,
    models: tuple[str, ...],
    given: Given,
    ask: _TransferJobAsk,
    url: str | None,
    as_json: bool,
) -> None:
    """
    Measure what the job JOB_ID has found on MODEL..., hub ids or paths that the workers see.

    It is a job of its own, whose id is printed. Without --report-text or
    --report-dataset only proxies are compared. --text is to calibrate on; without
    it, the job's text is. Without MODEL, JOB_ID is such a job: --out and --plot
    give what it has measured.

    \b
    Example:
      pho transfer-job d5aed9d3-7b7c-40f9-9896-b5f528363229 org/other \\
          --report-text texts/report.jsonl --search --watch
    """
    from pho_service.host.files import write_json
    from pho_service.spec.transfer import TransferRequest

    path = None if ask.out is None else out_file(ask.out)
    picture = None if ask.plot is None else plot_file(ask.plot)
    if not models and path is None and picture is None:
        raise InvalidInput("give MODEL..., or --out or --plot for a transfer that is there.")
    if ask.pattern is not None and not models:
        raise InvalidInput(
            f"--pattern {ask.pattern} says which of several patterns is measured: give MODEL..., "
            "too."
        )
    options = [given.names[path] for path in given.said if path.startswith("search/")]
    if options and "search" not in given.said:
        raise InvalidInput(f"{', '.join(options)}: for --search alone. Give it, too.")
    document = given.document()
    if models:
        given.read(TransferRequest, {**document, "models": [*models]})
    with open_client(url) as client:
        job = client.job(job_id)
        if models:
            if "calibration" in document:
                text = document["calibration"]["text"]
                document["calibration"] = _calibration(job.spec["calibration"], text)
            job = client.transfer(
                job_id,
                models,
                pattern=ask.pattern,
                idempotency_key=ask.idempotency_key,
                **document,
            )
            say(f"{job.name}: {job.state}. Follow it with: pho watch {job.short}")
            if not (ask.watch or path or picture):
                if as_json:
                    print_json(job.model_dump(mode="json"))
                else:
                    click.echo(job.id)
                return
            job = client.wait(job.id)
        measured = client.transferred(job.id).model_dump(mode="json")
        if path is not None:
            write_json(path, measured)
            say(f"written {path}")
        if picture is not None:
            configuration = measured["configuration"]
            title = f"{job.name} at {configuration['pattern']}, {configuration['scope']}"
            plot_transfer(measured["targets"], picture, title)
            say(f"written {picture}")
        end(client, job, as_json)


def _calibration(of_job: dict[str, Any], text: str) -> dict[str, Any]:
    source = ("dataset", "data_file", "split", "field")
    return {
        **{name: value for name, value in of_job.items() if name not in source},
        "text": text,
    }
