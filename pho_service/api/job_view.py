"""
What the page of a job shows: its result, its stages, its search as a chart, and what happened.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from pho_service.api import artifacts
from pho_service.api.answers import ArtifactList
from pho_service.api.cards import Card, card, span
from pho_service.api.chart import Search, draw_search
from pho_service.api.describe import is_transfer, step_of, studies_in_words
from pho_service.api.points import is_several
from pho_service.api.service import Caller, Service
from pho_service.report.drawing import Drawing
from pho_service.report.layers import LayerCell
from pho_service.spec.configuration import Configuration, Rating
from storage import records as stored
from storage.states import VALIDATION, VERBS, StageKind, StageState
from storage.studies import study_ids

EVENTS = 50  # that are shown, the newest
LOGS = 100  # parts of logs that are shown, the newest
LOG_LINES = 300  # the newest
FINALISTS = 20  # that are shown, the best
_TITLES = {
    StageKind.TRANSFER: "Measure on other models",
    StageKind.CALIBRATE: "Calibrate",
    StageKind.POINT: "Search and confirm each pattern",
    StageKind.SEARCH: "Search",
    StageKind.CONFIRM: "Choose the finalists",
    StageKind.PERPLEXITY: "Measure perplexities",
    StageKind.FINISH: "Choose the best",
    StageKind.TASKS: "Measure tasks, dense and pruned",
    StageKind.PRUNE: "Write the pruned model",
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """
    A perplexity in the table of the result.

    Attributes:
        name: Name of the model or method.
        perplexity: None if its model gives none.
        rise: Share by which it is above the dense model's; None for the dense model.
        found: Whether it is the result.
    """

    name: str
    perplexity: float | None
    rise: float | None
    found: bool = False


@dataclass(frozen=True, kw_only=True)
class StageRow:
    """
    All stages of a kind.

    Attributes:
        title: What they do.
        state: ``failed``, ``running``, ``waiting`` or ``done``.
        done: Part of ``total`` that is done: trials of searches, steps of one stage, or
            stages of several.
        total: 0 if it is not known.
        at: What they are at, and for how long.
        attempts: How often one was begun, if more than once.
    """

    title: str
    state: str
    done: int
    total: int
    at: str
    attempts: int


@dataclass(frozen=True, kw_only=True)
class Happened:
    """An event, in words."""

    at: datetime
    told: str


@dataclass(frozen=True, kw_only=True)
class Logged:
    """Lines that a worker has logged of a stage, and the stage."""

    title: str
    lines: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class Layers:
    """The sparsity of each kind of linear in each block of a model."""

    model: str
    kinds: Sequence[str]
    rows: Sequence[tuple[str, Sequence[float | None]]]


@dataclass(frozen=True, kw_only=True)
class JobView:
    """
    A job, whole.

    Attributes:
        card: What the list shows of it, too.
        results: Perplexities of the result and of what it is judged by.
        stages: By kind, in the order of the work.
        chart: None before there are trials, of transfers, and of several patterns.
        trials: That the chart is of.
        finalists: The best first.
        layers: By model.
        events: The newest first.
        logs: What workers have logged, the oldest first.
        files: Files of the pruned model; None if there are none.
        extensible: Whether it can be given more trials.
    """

    card: Card
    results: Sequence[Row]
    stages: Sequence[StageRow]
    chart: Drawing | None
    trials: int
    finalists: Sequence[Rating]
    layers: Sequence[Layers]
    events: Sequence[Happened]
    logs: Sequence[Logged]
    files: ArtifactList | None
    extensible: bool


def view(service: Service, caller: Caller, job: stored.Job, now: datetime) -> JobView:
    """Everything that is known of a job."""
    studies = {}
    with service.database.transaction() as connection:
        if caller.sees_all:  # others may not look into the dashboard
            studies = study_ids(connection, [*studies_in_words(job)])
        search = Search.read(connection, job)
    shown = card(job, studies, now, service.notes(job))
    found = None if job.best is None else Configuration.model_validate(job.best)
    return JobView(
        card=shown,
        results=[] if found is None else _results(found),
        stages=_stages(job, now),
        chart=draw_search(search),
        trials=len(search.values),
        finalists=_finalists(job, found),
        layers=_layers(job),
        events=[
            Happened(at=event.created_at, told=told(event))
            for event in service.jobs.history(job.id, limit=EVENTS)
        ],
        logs=_logs(service.jobs.logs(job.id, limit=LOGS), named=caller.sees_all),
        files=artifacts.listed(job) if shown.job.pruned == "done" else None,
        extensible=not is_transfer(job)
        and not is_several(job.spec)
        and job.state in VERBS["extend"],
    )


def _results(found: Configuration) -> list[Row]:
    measured = found.perplexities
    if measured is None:
        return []
    rows = [Row(name="dense", perplexity=measured.dense, rise=None)]
    rows += [
        Row(
            name=name,
            perplexity=value,
            rise=None if value is None else value / measured.dense - 1,
            found=name == "pruned",
        )
        for name, value in (
            ("pruned", measured.pruned), ("Wanda", measured.wanda), ("RIA", measured.ria)
        )
    ]  # fmt: skip
    return rows


def _stages(job: stored.Job, now: datetime) -> list[StageRow]:
    rows = []
    for kind in dict.fromkeys(stage.kind for stage in job.stages):
        mine = [stage for stage in job.stages if stage.kind is kind]
        done, total = sum(stage.state is StageState.DONE for stage in mine), len(mine)
        if kind is StageKind.SEARCH:
            done, total = sum(stage.done for stage in mine), job.trials * len(mine)
        step = next(filter(None, map(step_of, mine)), None)
        if step is not None and len(mine) == 1:
            done, total = step.done, step.steps
        at = [] if step is None else [step.title]
        at += _seconds(mine, job.finished_at or now)
        rows.append(
            StageRow(
                title=_TITLES.get(kind, kind.value.capitalize()),
                state=_state(mine),
                done=done,
                total=total,
                at=", ".join(at),
                attempts=max(stage.attempt for stage in mine),
            )
        )
    return rows


def _state(stages: Sequence[stored.Stage]) -> str:
    """Return the state of several stages: the one that a user must know first."""
    states = {stage.state for stage in stages}
    for state in (StageState.FAILED, StageState.RUNNING, StageState.WAITING):
        if state in states:
            return state.value
    return StageState.DONE.value


def _seconds(stages: Sequence[stored.Stage], by: datetime) -> list[str]:
    """How long it took from the first to the last of them, or to this time if they are not done."""
    begun = [stage.started_at for stage in stages if stage.started_at is not None]
    if not begun:
        return []
    ended = [stage.finished_at or by for stage in stages]
    return [span((max(ended) - min(begun)).total_seconds())]


def _finalists(job: stored.Job, found: Configuration | None) -> list[Rating]:
    if found is not None and found.candidates:
        return found.candidates[:FINALISTS]
    measured = [
        Rating(
            method=((each.params or {}).get("candidate") or {}).get("method", ""),
            trial=each.number,
            perplexity=(each.result or {}).get("perplexity"),
        )
        for each in job.of_kind(StageKind.PERPLEXITY)
        if each.number < VALIDATION
    ]
    return sorted(measured, key=lambda each: each.perplexity or math.inf)[:FINALISTS]


def _layers(job: stored.Job) -> list[Layers]:
    found = []
    for stage in job.of_kind(StageKind.FINISH):
        for model, cells in ((stage.result or {}).get("layers") or {}).items():
            shares = {(c.block, c.kind): c.sparsity for c in map(LayerCell.of, cells)}
            kinds = list(dict.fromkeys(kind for _, kind in shares))
            blocks = dict.fromkeys(block for block, _ in shares)
            rows = [(block, [shares.get((block, kind)) for kind in kinds]) for block in blocks]
            found.append(Layers(model=model, kinds=kinds, rows=rows))
    return found


def _logs(events: Sequence[stored.Event], *, named: bool) -> list[Logged]:
    """The last lines, those of a kind of stage, a worker and an attempt together."""
    found: dict[str, list[str]] = {}
    left = LOG_LINES
    for event in reversed(events):
        data = event.data
        kind = StageKind(data["stage"])
        title = _TITLES.get(kind, kind.value.capitalize())
        title += f", {data['worker']}" * named
        if data["attempt"] > 1:
            title += f", attempt {data['attempt']}"
        lines = data["lines"][-left:] if left else []
        left -= len(lines)
        if lines:
            found[title] = [*lines, *found.get(title, [])]
    return [Logged(title=title, lines=lines) for title, lines in reversed(found.items())]


def told(event: stored.Event) -> str:
    """An event, in words."""
    data = event.data
    if event.kind == "stage":
        kind = StageKind(data["stage"])
        return f"began: {_TITLES.get(kind, kind.value).lower()}"
    if event.kind == "retry":
        return f"{data['stage']} failed, and is tried again: {data['message']} ({data['type']})"
    error = data.get("error")
    why = f": {error['message']} ({error['type']})" if error else ""
    return f"{data.get('state', event.kind)}{why}"
