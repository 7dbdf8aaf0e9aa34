"""
Jobs as rows of the list: a line each, with the search so far drawn small.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Connection

from pho_service.api.answers import Job
from pho_service.api.cards import asked_sparsity, models_of, span
from pho_service.api.describe import describe, failure, is_transfer, study_names
from pho_service.api.points import is_several
from storage import records as stored
from storage.states import JobState, StageKind
from storage.trials import read_course

WIDTH, HEIGHT = 80.0, 18.0  # of a drawing, in pixels
STEPS = 40  # of a drawing, at most


@dataclass(frozen=True, kw_only=True)
class Row:
    """
    A job.

    Attributes:
        job: As the API shows it.
        title: Its name without the part of its id.
        models: All of them.
        pattern: How sparse they are to be, in short.
        preset: Its name, or "transfer".
        done: Part of ``total``, what its stage counts; 0 of 0 if that counts nothing.
        total: See ``done``.
        rise: Share by which its perplexity is above the dense model's.
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
    rise: float | None
    gain: float | None
    error: str | None
    line: str
    age: str

    @property
    def moves(self) -> bool:
        """Whether it may be another one soon, by itself."""
        return not (self.job.state.is_over or self.job.state is JobState.PAUSED)


def rows(connection: Connection, found: Sequence[stored.Job], now: datetime) -> list[Row]:
    """
    Jobs as rows.

    Args:
        connection: In a transaction.
        found: With their stages.
        now: The time.
    """
    lines = _lines(connection, found)
    return [_row(job, lines.get(job.name, ""), now) for job in found]


def _row(job: stored.Job, line: str, now: datetime) -> Row:
    shown = describe(job)
    spec = job.spec["configuration"] if is_transfer(job) else job.spec
    good = None if shown.best is None else shown.best.perplexities
    done, total = _progress(shown)
    return Row(
        job=shown,
        title=job.name.rpartition(" ")[0] or job.name,
        models=models_of(job),
        pattern=asked_sparsity(spec)[1],
        preset="transfer" if is_transfer(job) else str(spec.get("preset", "score")),
        done=done,
        total=total,
        rise=None if good is None else good.rise,
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
        maximised = job.spec.get("objective", {}).get("name") == "gini"
        value = -highest if maximised else lowest
        runs.setdefault(job.name, {}).setdefault(place, []).append(value)
    return {
        job.name: _drawn(runs[job.name], -(-job.trials // max(1, -(-job.trials // STEPS))))
        for job in found
        if job.name in runs
    }


def _drawn(runs: Mapping[int, Sequence[float]], places: int) -> str:
    """
    The best so far, as the points of a line from the top left.

    Args:
        runs: Values of which the lowest is the best, by their place in the search.
        places: How many there are when the search is over: the line ends where it has come to.
    """
    if len(runs) < 2:
        return ""
    best: list[float] = []
    for place in sorted(runs):
        value = min(runs[place])
        best.append(min(best[-1], value) if best else value)
    height = (best[0] - best[-1]) or 1.0
    width = WIDTH / (max(places, max(runs) + 1) - 1)
    return " ".join(
        f"{width * place:.4g},{HEIGHT * (best[0] - value) / height:.3g}"
        for place, value in zip(sorted(runs), best, strict=True)
    )
