"""
Jobs as rows of the list: a line each, with the search so far drawn small.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Connection

from pho_service.api.answers import Job
from pho_service.api.describe import describe, failure, is_transfer, study_names
from pho_service.api.job_view import asked_sparsity, models_of, moves, span
from pho_service.api.points import is_several
from pho_service.shown.charts import best_so_far
from pho_service.spec.objective import is_maximised
from storage import records as stored
from storage.states import JobState, StageKind
from storage.trials import read_course

WIDTH, HEIGHT = 80.0, 18.0  # of a drawing, in pixels
STEPS = 40  # of a drawing, at most


@dataclass(frozen=True, kw_only=True)
class JobRow:
    """
    A job.

    Attributes:
        job: As the API shows it.
        title: Its name without the part of its id.
        pattern: How sparse they are to be, in short.
        preset: Its name, or "transfer".
        done: Part of ``total``, what its stage counts; 0 of 0 if that counts nothing.
        gain: Share by which its perplexity is below RIA's.
        error: Why it failed.
        line: The best objective so far, as the points of a line; empty without two values.
        age: How long ago it was submitted.
    """

    job: Job
    title: str
    models: Sequence[str]
    pattern: str
    preset: str
    done: int
    total: int
    gain: float | None
    error: str | None
    line: str
    age: str

    @property
    def moves(self) -> bool:
        """Whether it may be another one soon, by itself."""
        return moves(self.job)


def rows(connection: Connection, found: Sequence[stored.Job], now: datetime) -> list[JobRow]:
    """Jobs, with their stages, as rows."""
    lines = _lines(connection, found)
    return [_row(job, lines.get(job.name, ""), now) for job in found]


def _row(job: stored.Job, line: str, now: datetime) -> JobRow:
    shown = describe(job)
    spec = job.spec["configuration"] if is_transfer(job) else job.spec
    good = None if shown.best is None else shown.best.perplexities
    done, total = _progress(shown)
    return JobRow(
        job=shown,
        title=job.name.rpartition(" ")[0] or job.name,
        models=models_of(job),
        pattern=asked_sparsity(spec)[1],
        preset="transfer" if is_transfer(job) else str(spec.get("preset", "score")),
        done=done,
        total=total,
        gain=None if good is None or not good.ria else 1 - good.pruned / good.ria,
        error=failure(job),
        line=line,
        age=span((now - job.created_at).total_seconds()),
    )


def _progress(job: Job) -> tuple[int, int]:
    """How much of its stage is done, of a job that works."""
    if job.state is not JobState.RUNNING:
        return 0, 0
    done = job.progress
    if done.step is not None and job.stage not in (StageKind.SEARCH, StageKind.POINT):
        return done.step.done, done.step.steps
    counted = {
        StageKind.CALIBRATE: (done.shards_done, done.shards),
        StageKind.SEARCH: (done.trials_done, done.trials),
        StageKind.PERPLEXITY: (done.perplexities_done, done.perplexities),
        StageKind.POINT: (done.points_done, done.points),
        StageKind.TRANSFER: (done.models_done, done.models),
    }
    return (0, 0) if job.stage is None else counted.get(job.stage, (0, 0))


def _lines(connection: Connection, found: Sequence[stored.Job]) -> Mapping[str, str]:
    """The best objective so far of each job with one pattern, by its name."""
    sizes: dict[str, int] = {}
    job_of: dict[str, stored.Job] = {}
    for job in found:
        if not is_several(job.spec):  # whose values do not compare
            for name in study_names(job):
                sizes[name] = max(1, -(-job.trials // STEPS))
                job_of[name] = job
    runs: dict[str, dict[int, list[float]]] = {}
    for name, place, lowest, highest in read_course(connection, sizes):
        job = job_of[name]
        value = -highest if is_maximised(job.spec.get("objective", {}).get("name")) else lowest
        runs.setdefault(job.name, {}).setdefault(place, []).append(value)
    return {
        job.name: _drawn(runs[job.name], -(-job.trials // max(1, -(-job.trials // STEPS))))
        for job in found
        if job.name in runs
    }


def _drawn(runs: Mapping[int, Sequence[float]], places: int) -> str:
    """
    The lowest so far of the values of each place, as the points of a line from the top left.

    A search that is over has so many places: the line ends where it has come to.
    """
    if len(runs) < 2:
        return ""
    best = best_so_far([min(runs[place]) for place in sorted(runs)], maximised=False)
    height = (best[0] - best[-1]) or 1.0
    width = WIDTH / (max(places, max(runs) + 1) - 1)
    return " ".join(
        f"{width * place:.4g},{HEIGHT * (best[0] - value) / height:.3g}"
        for place, value in zip(sorted(runs), best, strict=True)
    )
