"""
Jobs in words and tables, as the verbs for jobs print them.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from pho_service.cli.terminal import show_table, tell
from pho_service.spec.numbers import number, percent

if TYPE_CHECKING:
    from pho_service.api.answers import Job
    from pho_service.library.files import TransferFile

_SHORTEST = 8  # characters of an id, as in the names that jobs have by default


def outcome(job: "Job") -> list[str]:
    """What has come of a job, in lines."""
    lines = []
    if job.best is not None:
        if job.best.perplexities is not None:
            lines.append(f"result       {job.best.perplexities} (perplexities)")
        lines.append(
            f"best         {job.best.method}, objective {number(job.best.objective)}, "
            f"perplexity {number(job.best.perplexity) or 'not measured'}"
        )
        lines.append(f"configuration: pho best {job.id} --out config.json")
    if job.pruned == "done":
        lines.append(f"pruned model:  pho pull {job.id} --out pruned")
    elif job.pruned == "removed":
        lines.append(f"pruned model:  deleted by age; pho pull {job.id} --prune --out pruned")
    for name, quality in (job.validation or {}).items():
        lines.append(f"rank         {name}: Spearman {quality.spearman:+.2f} with perplexity")
    if job.error is not None:
        where = f" at {job.error.layer}" if job.error.layer else ""
        lines.append(f"error        {job.error.type} in {job.error.stage}{where}: ")
        lines[-1] += job.error.message
    return [*lines, *(f"note         {warning}" for warning in job.warnings)]


def show_tasks(job: "Job") -> None:
    """What the dense model and the pruned one of a job scored in tasks."""
    if job.tasks is not None:
        from pho_service.shown.tables import tasks_table

        show_table(tasks_table(job.tasks))


def show_points(job: "Job") -> None:
    """The table of a job with several patterns."""
    from pho_service.shown.tables import points_table

    if not job.points:
        return
    show_table(points_table([each.model_dump() for each in job.points]), spare=("seconds",))
    if job.best is None and any(each.state == "done" for each in job.points):
        tell(f"configuration: pho best {job.id} --pattern PATTERN --out config.json")


def say_transfer(job: "Job", measured: "TransferFile") -> None:
    """What a transfer has measured so far, and what must be said of it."""
    from pho_service.cli.transfer import show_transfer
    from pho_service.spec.configuration import Configuration

    done = job.progress
    tell(f"models       {done.models_done} of {done.models}")
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
    """Perplexities: dense, found, how much higher that is, Wanda, RIA."""
    if job.best is None or job.best.perplexities is None:
        found = job.best.perplexity if job.best else None
        return ["", number(found), "", "", ""]
    good = job.best.perplexities
    dense, pruned, wanda, ria = map(number, (good.dense, good.pruned, good.wanda, good.ria))
    return [dense, pruned, percent(good.rise, signed=True), wanda, ria]


def done(job: "Job") -> str:
    """Progress of a job."""
    done = job.progress
    if job.kind == "transfer":
        return f"{done.models_done}/{done.models} models"
    return f"{done.trials_done}/{done.trials}"


def short_ids(ids: Iterable[str]) -> dict[str, str]:
    """Return the beginnings that tell ids apart, of the same length, at least 8 characters."""
    known = {*ids}
    for length in range(_SHORTEST, 36):
        short = {each: each[:length] for each in known}
        if len({*short.values()}) == len(known):
            return short
    return {each: each for each in known}
