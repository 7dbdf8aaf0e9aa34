"""
The front page: a table of jobs that is filtered, searched and sorted by its query.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Any, Self
from urllib.parse import parse_qsl, urlencode
from uuid import UUID

from fastapi import APIRouter, Request, Response
from sqlalchemy import Connection
from starlette.exceptions import HTTPException
from starlette.responses import RedirectResponse

from pho_service.api import artifacts, jobs
from pho_service.api.answers import ArtifactList, Job, Point
from pho_service.api.describe import (
    describe,
    failure,
    is_several,
    is_transfer,
    studies_in_words,
    study_names,
)
from pho_service.api.jobs import page_of, which_jobs
from pho_service.api.operations import workers
from pho_service.api.pages import Pairs, draw
from pho_service.api.plan import likely_card
from pho_service.api.problems import sentence, wrong_parameter
from pho_service.api.report import collected
from pho_service.api.service import Caller, CallerParam, Service, ServiceParam
from pho_service.api.stepper import StepRow, span, steps, time_left
from pho_service.errors import OutputError
from pho_service.shown.charts import best_so_far
from pho_service.shown.page import sections
from pho_service.shown.parts import Section
from pho_service.shown.tables import range_of, rises_of
from pho_service.spec.curve import Target
from pho_service.spec.document import number, percent
from pho_service.spec.objective import is_maximised
from storage import records as stored
from storage.listing import NEWEST, SORTS, Sort
from storage.records import VERBS, JobState, NoSuchJob, StageKind, StateConflict
from storage.studies import read_course, study_ids

# What the page of a job shows: a head that is alive, over the sections of its report.
LOGS = 100  # parts of logs that are shown, the newest
LOG_LINES = 300  # the newest
_ASKED_HERE = ("pause", "resume", "cancel")  # with a button; the others need more than that
_FIRST = ("result", "curve", "recovery", "writing")  # above the buttons
_SHOWN = ("tasks", "search", "finalists", "layers", "transfer")


@dataclass(frozen=True, kw_only=True)
class JobHead:
    """A job: what was asked, how far it is, and what can be asked of it."""

    job: Job  # As the API shows it
    models: Sequence[str]
    facts: Sequence[tuple[str, str]]  # What was asked, in some words: a name and a value each
    error: str | None  # Why it failed
    time: str  # How long it takes still, or took
    verbs: Sequence[str]  # What can be asked of it
    deletable: bool

    @classmethod
    def of(cls, job: stored.JobRecord, now: datetime) -> "JobHead":
        """The head of a job, with its stages."""
        shown = describe(job)
        return cls(
            job=shown,
            models=models_of(job),
            facts=_facts(job),
            error=failure(job),
            time=_time(shown, now),
            verbs=_verbs(job),
            deletable=job.state in VERBS["delete"],
        )

    @property
    def moves(self) -> bool:
        """Whether it may be another one soon, by itself."""
        return moves(self.job)


def moves(job: Job) -> bool:
    """Whether a job may be another one soon, by itself."""
    return not (job.state.is_over or job.state is JobState.PAUSED)


@dataclass(frozen=True, kw_only=True)
class Logged:
    """Lines that a worker has logged of a stage, and the stage."""

    title: str
    lines: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class JobView:
    head: JobHead
    # A word and the number in optuna-dashboard of each, for those who may look there.
    studies: Sequence[tuple[str, int]]
    steps: Sequence[StepRow]  # In the order of the work
    left: str  # How long it takes still in all; empty if that is not known
    first: Sequence[Section]  # Sections of the report that stand above the buttons
    sections: Sequence[Section]  # Those below them
    happened: Section  # The last of them
    logs: Sequence[Logged]  # What workers have logged, the oldest first
    files: ArtifactList | None  # Files of the pruned model; None if there are none
    extensible: bool  # Whether it can be given more trials


def view(service: Service, caller: Caller, job: stored.JobRecord, now: datetime) -> JobView:
    known, head = {}, JobHead.of(job, now)
    if caller.sees_all:  # others may not look into the dashboard
        with service.database.transaction() as connection:
            known = study_ids(connection, [*studies_in_words(job)])
    found = {section.id: section for section in sections(collected(service, job))}
    reporting = workers(service, caller).workers
    rows = steps(job, head.job.progress, reporting, now)
    return JobView(
        head=head,
        studies=[(w, known[name]) for name, w in studies_in_words(job).items() if name in known],
        steps=rows,
        left=time_left(service, job, head.job.progress, rows, likely_card(reporting)),
        first=[found[name] for name in _FIRST if name in found],
        sections=[found[name] for name in _SHOWN if name in found and found[name].is_known],
        happened=Section(id="happened", title="What happened", events=found["happened"].events),
        logs=_logs(service.jobs.logs(job.id, limit=LOGS), named=caller.sees_all),
        files=artifacts.listed(job) if head.job.pruned == "done" else None,
        extensible=not is_transfer(job)
        and not is_several(job.spec)
        and job.state in VERBS["extend"],
    )


def _logs(events: Sequence[stored.EventRecord], *, named: bool) -> list[Logged]:
    """The last lines, those of a kind of stage and a worker together."""
    found: dict[str, list[str]] = {}
    left = LOG_LINES
    for event in reversed(events):
        data = event.data
        title = StageKind(data["stage"]).heading + f", {data['worker']}" * named
        lines = data["lines"][-left:] if left else []
        left -= len(lines)
        if lines:
            found[title] = [*lines, *found.get(title, [])]
    return [Logged(title=title, lines=lines) for title, lines in reversed(found.items())]


def _verbs(job: stored.JobRecord) -> list[str]:
    """What has a button, because it changes something."""
    found = [v for v in _ASKED_HERE if VERBS[v].get(job.state, job.state) is not job.state]
    prunable = job.state is JobState.SUCCEEDED and not is_transfer(job)
    if (
        prunable
        and job.best is not None
        and not job.spec.get("more_models")
        and describe(job).pruned != "done"
    ):
        found.append("prune")
    return found


def models_of(job: stored.JobRecord) -> list[str]:
    """The models of a search or a transfer, as its document names them."""
    if is_transfer(job):
        return [*job.spec["models"]]
    return [job.spec["model"], *job.spec.get("more_models", ())]


def _facts(job: stored.JobRecord) -> list[tuple[str, str]]:
    spec = job.spec["configuration"] if is_transfer(job) else job.spec
    facts = [asked_sparsity(spec)]
    if spec.get("scope"):
        facts.append(("Scope", str(spec["scope"])))
    if is_transfer(job):
        return [*facts, ("Transfer of", f"job {job.spec['source']}")]
    return [*facts, ("Preset", str(spec.get("preset", "score")))]


def asked_sparsity(spec: Mapping[str, Any]) -> tuple[str, str]:
    """How sparse a model is to be: a name and a value."""
    if spec.get("patterns"):
        return ("Patterns", ", ".join(map(str, spec["patterns"])))
    if spec.get("target"):
        return ("Target", f"within {Target.model_validate(spec['target'])}")
    return ("Pattern", str(spec["pattern"]))


def _time(job: Job, now: datetime) -> str:
    if job.progress.seconds_left is not None:
        return f"{job.stage}: about {span(job.progress.seconds_left)} left"
    if job.started_at is None:
        return "not begun"
    if job.finished_at is None:
        return f"{span((now - job.started_at).total_seconds())} since it began"
    return f"took {span((job.finished_at - job.started_at).total_seconds())}"


# Jobs as rows of the list: a line each, with the search so far drawn small.
WIDTH, HEIGHT = 80.0, 18.0  # of a drawing, in pixels
STEPS = 40  # of a drawing, at most


@dataclass(frozen=True, kw_only=True)
class JobRow:
    job: Job  # As the API shows it
    models: Sequence[str]
    pattern: str  # How sparse they are to be, in short
    preset: str  # Its name, or "transfer"
    perplexity: str  # What was measured; of several patterns the lowest and the highest
    dense: str
    rise: str  # Of its perplexity over the dense model's
    gain: str  # Share by which its perplexity is below RIA's
    error: str | None  # Why it failed
    # The best objective so far, or the perplexity by sparsity, as the points of a line; empty
    # without two values.
    line: str
    age: str  # How long ago it was submitted

    @property
    def moves(self) -> bool:
        """Whether it may be another one soon, by itself."""
        return moves(self.job)


def rows(connection: Connection, found: Sequence[stored.JobRecord], now: datetime) -> list[JobRow]:
    """Jobs, with their stages, as rows."""
    lines = _lines(connection, found)
    return [_row(job, lines.get(job.name, ""), now) for job in found]


def _row(job: stored.JobRecord, line: str, now: datetime) -> JobRow:
    shown = describe(job)
    spec = job.spec["configuration"] if is_transfer(job) else job.spec
    found = shown.measured
    return JobRow(
        job=shown,
        models=models_of(job),
        pattern=asked_sparsity(spec)[1],
        preset="transfer" if is_transfer(job) else str(spec.get("preset", "score")),
        perplexity=range_of(each.perplexity for each in found),
        dense=number(found[0].dense) if found else "",
        rise=rises_of(found),
        gain=range_of(
            (each.ria and 1 - (each.perplexity or 0) / each.ria for each in found), percent
        ),
        error=failure(job),
        line=_curve(found) if shown.points else line,
        age=span((now - job.created_at).total_seconds()),
    )


def _curve(found: Sequence[Point]) -> str:
    """Perplexities by sparsity, as the points of a line from the bottom left; N:M stand beside."""
    points = [(e.sparsity, e.perplexity or 0.0) for e in found if ":" not in e.pattern]
    if len(points) < 2:
        return ""
    (left, right), (low, high) = ((min(each), max(each)) for each in zip(*points, strict=True))
    return " ".join(
        f"{WIDTH * (x - left) / (right - left):.4g},"
        f"{HEIGHT * (high - y) / ((high - low) or 1.0):.3g}"
        for x, y in points
    )


def _lines(connection: Connection, found: Sequence[stored.JobRecord]) -> Mapping[str, str]:
    """The best objective so far of each job with one pattern, by its name."""
    sizes: dict[str, int] = {}
    job_of: dict[str, stored.JobRecord] = {}
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
    """The lowest so far of the values of each place, as the points of a line from the top left."""
    # A search that is over has so many places: the line ends where it has come to.
    if len(runs) < 2:
        return ""
    best = best_so_far([min(runs[place]) for place in sorted(runs)], maximised=False)
    height = (best[0] - best[-1]) or 1.0
    width = WIDTH / (max(places, max(runs) + 1) - 1)
    return " ".join(
        f"{width * place:.4g},{HEIGHT * (best[0] - value) / height:.3g}"
        for place, value in zip(sorted(runs), best, strict=True)
    )


router = APIRouter(include_in_schema=False)

PAGE_SIZE = 50
REFRESH_S = 10  # without scripts
LIVE_S, IDLE_S = 3, 15  # with them, while a job may move and while none does
MOST = 200  # jobs that something is asked of at once
FILTERS: dict[str, tuple[JobState, ...]] = {
    "all": (),
    "queued": (JobState.QUEUED,),
    "running": (JobState.RUNNING, JobState.PAUSING, JobState.CANCELLING),
    "paused": (JobState.PAUSED,),
    "succeeded": (JobState.SUCCEEDED,),
    "failed": (JobState.FAILED,),
    "cancelled": (JobState.CANCELLED,),
}
BULK = {"pause": "paused", "resume": "resumed", "cancel": "cancelled", "delete": "deleted"}
ORDERS: dict[Sort, str] = {
    "-created": "newest first",
    "created": "oldest first",
    "name": "name",
    "model": "model",
    "pattern": "pattern",
    "state": "state",
    "perplexity": "perplexity, lowest first",
    "rise": "against dense, lowest first",
    "-gain": "below RIA, highest first",
}


@dataclass(frozen=True, kw_only=True)
class ListView:
    """Which part of the list is looked at, and how; the query of the page."""

    states: tuple[JobState, ...] = ()  # Only jobs in these; none means all
    models: tuple[str, ...] = ()  # Only jobs for these; none means all
    patterns: tuple[str, ...] = ()  # Only jobs with these; none means all
    name: str = ""  # Only jobs whose name contains this, or whose id begins with it
    sort: Sort = NEWEST  # The order
    token: str | None = None  # Token of the page
    refresh: bool = True  # Whether it may be loaded again by itself
    chosen: str | None = None  # A job that is chosen to be compared with others

    @classmethod
    def of(cls, query: Sequence[tuple[str, str]]) -> Self:
        given = [(name, value) for name, value in query if value]
        states = tuple(value for name, value in given if name == "state")
        for state in states:
            if state not in [*JobState]:
                raise wrong_parameter("state", f"must be one of {', '.join(JobState)}")
        found = dict(given)
        asked = found.get("sort", NEWEST)
        sort = next((each for each in SORTS if each == asked), None)
        if sort is None:
            raise wrong_parameter("sort", f"must be one of {', '.join(SORTS)}")
        return cls(
            states=tuple(JobState(state) for state in states),
            models=tuple(value for name, value in given if name == "model"),
            patterns=tuple(value for name, value in given if name == "pattern"),
            name=found.get("name", "").strip(),
            sort=sort,
            token=found.get("page_token"),
            refresh=found.get("refresh") != "off",
            chosen=found.get("compare"),
        )

    @property
    def pairs(self) -> list[tuple[str, str]]:
        found: list[tuple[str, str | None]] = [("state", state.value) for state in self.states]
        found += [("model", model) for model in self.models]
        found += [("pattern", pattern) for pattern in self.patterns]
        found += [
            ("name", self.name),
            ("sort", None if self.sort == NEWEST else self.sort),
            ("page_token", self.token),
            ("refresh", None if self.refresh else "off"),
            ("compare", self.chosen),
        ]
        return [(name, value) for name, value in found if value]

    @property
    def query(self) -> str:
        return f"?{urlencode(self.pairs)}" if self.pairs else ""

    def but(self, **changes: Any) -> "ListView":
        """The first page of the list with some things changed."""
        return replace(self, **{"token": None, **changes})

    @property
    def filters(self) -> list[tuple[str, "ListView"]]:
        """What it is filtered by, in words, each with the list without it."""
        named = {states: name for name, states in FILTERS.items()}
        found = []
        if self.states:
            told = named.get(self.states, " or ".join(self.states))
            found.append((f"state {told}", self.but(states=())))
        if self.models:
            found.append((f"model {' or '.join(self.models)}", self.but(models=())))
        if self.patterns:
            found.append((f"pattern {' or '.join(self.patterns)}", self.but(patterns=())))
        if self.name:
            found.append((f"name or id {self.name}", self.but(name="")))
        return found

    @property
    def unfiltered(self) -> "ListView":
        return self.but(states=(), models=(), patterns=(), name="")


@router.api_route("/", methods=["GET", "HEAD"])
def show(request: Request, service: ServiceParam, caller: CallerParam) -> Response:
    """Show jobs and workers."""
    return draw_list(service, caller, ListView.of(request.query_params.multi_items()))


@router.api_route("/jobs", methods=["GET", "HEAD"])
def lead(request: Request) -> Response:
    """Lead to the list, which is where people look for it."""
    return RedirectResponse(f"/?{request.url.query}" if request.url.query else "/", 303)


@router.post("/jobs")
def ask(pairs: Pairs, service: ServiceParam, caller: CallerParam) -> Response:
    """Do what a button says to all jobs that are chosen; before they are deleted, ask once more."""
    typed = dict(pairs)
    view = ListView.of(parse_qsl(typed.get("view", "").removeprefix("?")))
    verb = typed.get("verb", "")
    if verb not in BULK:
        raise HTTPException(422, f"verb={verb!r} must be one of {', '.join(BULK)}.")
    chosen = _ids([value for name, value in pairs if name == "job"])
    if not chosen:
        told = "No job is chosen. Tick the box at the beginning of a row, then ask again."
        return draw_list(service, caller, view, 422, told)
    if verb == "delete" and "confirmed" not in typed:
        return _confirm(service, caller, view, chosen)

    def do(job_id: UUID) -> None:
        if verb == "delete":
            jobs.forget(service, job_id, visible_to=caller.visible_to)
        else:
            service.jobs.ask(job_id, verb, visible_to=caller.visible_to)

    wrong = [*filter(None, (_tried(service, caller, job_id, do) for job_id in chosen))]
    if wrong:
        told = f"{len(chosen) - len(wrong)} of {len(chosen)} jobs were {BULK[verb]}."
        return draw_list(service, caller, view, HTTPStatus.CONFLICT, told, wrong)
    return RedirectResponse(f"/{view.query}", 303)


def _ids(given: Sequence[str]) -> list[UUID]:
    found = []
    for each in dict.fromkeys(given):
        try:
            found.append(UUID(each))
        except ValueError:
            raise HTTPException(422, f"job={each[:80]!r} is not a job's id.") from None
    if len(found) > MOST:
        raise HTTPException(422, f"{len(found)} jobs are chosen, but {MOST} are the most at once.")
    return found


def _tried(
    service: Service, caller: Caller, job_id: UUID, do: Callable[[UUID], None]
) -> str | None:
    """Do something to a job; what is wrong, if it cannot be done."""
    try:
        name = service.jobs.get(job_id, visible_to=caller.visible_to).name
        do(job_id)
    except NoSuchJob:
        return f"{job_id}: this job no longer exists."
    except (StateConflict, OutputError) as error:
        return f"{name}: {str(error).rstrip('.')}."
    return None


def _confirm(service: Service, caller: Caller, view: ListView, chosen: Sequence[UUID]) -> Response:
    """Ask once more before jobs are deleted."""
    found = []
    for job_id in chosen:
        try:
            found.append(service.jobs.get(job_id, visible_to=caller.visible_to))
        except NoSuchJob:
            continue  # somebody else deleted it
    return draw(
        "delete_many.html",
        caller=caller,
        view=view,
        gone=[job for job in found if job.state in VERBS["delete"]],
        kept=[job for job in found if job.state not in VERBS["delete"]],
    )


def draw_list(
    service: Service,
    caller: Caller,
    view: ListView,
    status: int = HTTPStatus.OK,
    problem: str | None = None,
    details: Sequence[str] = (),
) -> Response:
    which = which_jobs(
        caller, states=view.states, models=view.models, patterns=view.patterns, name=view.name
    )
    found, next_token = page_of(service, which, view.sort, PAGE_SIZE, view.token)
    facets = service.jobs.facets(which)
    now = datetime.now(UTC)
    with service.database.transaction() as connection:
        shown = rows(connection, found, now)
    moves = problem is None and any(each.moves for each in shown)
    live = problem is None and view.refresh
    return draw(
        "jobs.html",
        status=status,
        script="live.js",
        caller=caller,
        view=view,
        filters=FILTERS,
        orders=ORDERS if view.sort in ORDERS else {**ORDERS, view.sort: view.sort},
        facets=facets,
        models=_with(facets.models, view.models),
        patterns=_with(facets.patterns, view.patterns),
        total=sum(n for s, n in facets.states.items() if s in (view.states or [*JobState])),
        rows=shown,
        names={each.job.id: each.job.name for each in shown},
        next_token=next_token,
        workers=[(w, span((now - w.heartbeat_at).total_seconds())) for w in
                 workers(service, caller).workers],
        waiting=any(e.job.state in (JobState.QUEUED, JobState.RUNNING) for e in shown),
        now=now,
        problem=problem and sentence(problem),
        details=details,
        every_s=REFRESH_S,
        live_s=(LIVE_S if moves else IDLE_S) if live else 0,
        refresh_s=REFRESH_S if moves and view.refresh else 0,
        address=f"/{view.query}",
        chosen_name=_chosen(service, caller, view, shown),
    )  # fmt: skip


def _with(counted: Sequence[tuple[str, int]], chosen: Sequence[str]) -> list[tuple[str, int]]:
    """The values of a facet, with those that are chosen and that no job has."""
    known = [value for value, _ in counted]
    return [*counted, *((value, 0) for value in dict.fromkeys(chosen) if value not in known)]


def _chosen(
    service: Service, caller: Caller, view: ListView, shown: Sequence[JobRow]
) -> str | None:
    """The name of the job that others are chosen beside, if it is not in the list itself."""
    if view.chosen is None or view.chosen in [str(each.job.id) for each in shown]:
        return None
    try:
        return service.jobs.get(UUID(view.chosen), visible_to=caller.visible_to).name
    except (ValueError, NoSuchJob):
        return None
