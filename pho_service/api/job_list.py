"""
The front page: a table of jobs that is filtered, searched and sorted by its query, each a line
with its search so far drawn small.
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

from pho_service.api import jobs
from pho_service.api.answers import Point
from pho_service.api.jobs import page_of, which_jobs
from pho_service.api.operations import workers
from pho_service.api.pages import Pairs, draw
from pho_service.api.problems import sentence, wrong_parameter
from pho_service.api.service import Caller, CallerParam, Service, ServiceParam
from pho_service.api.view import JobView, span
from pho_service.errors import OutputError
from pho_service.shown.charts import best_so_far
from pho_service.shown.tables import range_of, rises_of
from pho_service.spec.document import number, percent
from storage import records as stored
from storage.keys import QuotaExceeded
from storage.listing import NEWEST, SORTS, Sort
from storage.records import VERBS, JobState, NoSuchJob, StateConflict
from storage.studies import read_course

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
WIDTH, HEIGHT = 80.0, 18.0  # of a drawing, in pixels
STEPS = 40  # of a drawing, at most


@dataclass(frozen=True, kw_only=True)
class JobRow:
    view: JobView
    perplexity: str  # What was measured; of several patterns the lowest and the highest
    measured_on: str  # Which text
    dense: str
    rise: str  # Of its perplexity over the dense model's
    gain: str  # Share by which its perplexity is below RIA's
    # The best objective so far, or the perplexity by sparsity, as the points of a line; empty
    # without two values.
    line: str
    age: str  # How long ago it was submitted


def rows(
    connection: Connection, records: Sequence[stored.JobRecord], now: datetime, *, manned: bool
) -> list[JobRow]:
    """Jobs, with their stages, as rows."""
    views = [JobView(record, now=now, manned=manned) for record in records]
    lines = _lines(connection, views)
    return [_row(view, lines.get(view.record.name, "")) for view in views]


def _row(view: JobView, line: str) -> JobRow:
    points = view.answer.measured
    return JobRow(
        view=view,
        perplexity=range_of(point.perplexity for point in points),
        measured_on=(points[0].measured_on or "") if points else "",
        dense=number(points[0].dense) if points else "",
        rise=rises_of(points),
        gain=range_of(
            (point.ria and 1 - (point.perplexity or 0) / point.ria for point in points), percent
        ),
        line=_curve(points) if view.points else line,
        age=span((view.now - view.record.created_at).total_seconds()),
    )


def _curve(points: Sequence[Point]) -> str:
    """Perplexities by sparsity, as the points of a line from the bottom left; N:M stand beside."""
    shares = [(p.sparsity, p.perplexity or 0.0) for p in points if ":" not in p.pattern]
    if len(shares) < 2:
        return ""
    (left, right), (low, high) = ((min(v), max(v)) for v in zip(*shares, strict=True))
    return " ".join(
        f"{WIDTH * (x - left) / (right - left):.4g},"
        f"{HEIGHT * (high - y) / ((high - low) or 1.0):.3g}"
        for x, y in shares
    )


def _lines(connection: Connection, views: Sequence[JobView]) -> Mapping[str, str]:
    """The best objective so far of each job with one pattern, by its name."""
    view_of = {
        name: view
        for view in views
        if not view.document.several  # whose values do not compare
        for name in view.study_names
    }
    sizes = {name: max(1, -(-view.record.trials // STEPS)) for name, view in view_of.items()}
    runs: dict[str, dict[int, list[float]]] = {}
    for name, place, lowest, highest in read_course(connection, sizes):
        view = view_of[name]
        value = -highest if view.document.is_maximised else lowest
        runs.setdefault(view.record.name, {}).setdefault(place, []).append(value)
    return {
        job.name: _drawn(runs[job.name], -(-job.trials // max(1, -(-job.trials // STEPS))))
        for job in (view.record for view in views)
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


@dataclass(frozen=True, kw_only=True)
class ListView:
    """Which part of the list is looked at, and how; the query of the page."""

    states: tuple[JobState, ...] = ()  # Only jobs in these; none means all
    models: tuple[str, ...] = ()  # Only jobs for these; none means all
    patterns: tuple[str, ...] = ()  # Only jobs with these; none means all
    labels: tuple[str, ...] = ()  # Only jobs with all of these; none means all
    name: str = ""  # Only jobs whose name contains this, or whose id begins with it
    sort: Sort = NEWEST  # The order
    token: str | None = None  # Token of the page
    refresh: bool = True  # Whether it may be loaded again by itself
    chosen: str | None = None  # A job that is chosen to be compared with others

    @classmethod
    def of(cls, query: Sequence[tuple[str, str]]) -> Self:
        pairs = [(name, value) for name, value in query if value]
        states = tuple(value for name, value in pairs if name == "state")
        for state in states:
            if state not in [*JobState]:
                raise wrong_parameter("state", f"must be one of {', '.join(JobState)}")
        fields = dict(pairs)
        sort = next((s for s in SORTS if s == fields.get("sort", NEWEST)), None)
        if sort is None:
            raise wrong_parameter("sort", f"must be one of {', '.join(SORTS)}")
        return cls(
            states=tuple(JobState(state) for state in states),
            models=tuple(value for name, value in pairs if name == "model"),
            patterns=tuple(value for name, value in pairs if name == "pattern"),
            labels=tuple(value for name, value in pairs if name == "label"),
            name=fields.get("name", "").strip(),
            sort=sort,
            token=fields.get("page_token"),
            refresh=fields.get("refresh") != "off",
            chosen=fields.get("compare"),
        )

    @property
    def pairs(self) -> list[tuple[str, str]]:
        fields: list[tuple[str, str | None]] = [("state", state.value) for state in self.states]
        fields += [("model", model) for model in self.models]
        fields += [("pattern", pattern) for pattern in self.patterns]
        fields += [("label", label) for label in self.labels]
        fields += [
            ("name", self.name),
            ("sort", None if self.sort == NEWEST else self.sort),
            ("page_token", self.token),
            ("refresh", None if self.refresh else "off"),
            ("compare", self.chosen),
        ]
        return [(name, value) for name, value in fields if value]

    @property
    def query(self) -> str:
        return f"?{urlencode(self.pairs)}" if self.pairs else ""

    def but(self, **changes: Any) -> "ListView":
        """The first page of the list with some things changed."""
        return replace(self, **{"token": None, **changes})

    @property
    def filters(self) -> list[tuple[str, "ListView"]]:
        """What it is filtered by, in words, each with the list without it."""
        names = {states: name for name, states in FILTERS.items()}
        filters = []
        if self.states:
            state = names.get(self.states, " or ".join(self.states))
            filters.append((f"state {state}", self.but(states=())))
        if self.models:
            filters.append((f"model {' or '.join(self.models)}", self.but(models=())))
        if self.patterns:
            filters.append((f"pattern {' or '.join(self.patterns)}", self.but(patterns=())))
        if self.labels:
            filters.append((f"label {' and '.join(self.labels)}", self.but(labels=())))
        if self.name:
            filters.append((f"name or id {self.name}", self.but(name="")))
        return filters

    @property
    def unfiltered(self) -> "ListView":
        return self.but(states=(), models=(), patterns=(), labels=(), name="")


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
        problem = "No job is chosen. Tick the box at the beginning of a row, then ask again."
        return draw_list(service, caller, view, 422, problem)
    if verb == "delete" and "confirmed" not in typed:
        return _confirm(service, caller, view, chosen)

    def do(job_id: UUID) -> None:
        if verb == "delete":
            jobs.forget(service, job_id, visible_to=caller.visible_to)
        else:
            jobs.act(service, job_id, verb, visible_to=caller.visible_to)

    wrong = [*filter(None, (_tried(service, caller, job_id, do) for job_id in chosen))]
    if wrong:
        outcome = f"{len(chosen) - len(wrong)} of {len(chosen)} jobs were {BULK[verb]}."
        return draw_list(service, caller, view, HTTPStatus.CONFLICT, outcome, wrong)
    return RedirectResponse(f"/{view.query}", 303)


def _ids(texts: Sequence[str]) -> list[UUID]:
    ids = []
    for text in dict.fromkeys(texts):
        try:
            ids.append(UUID(text))
        except ValueError:
            raise HTTPException(422, f"job={text[:80]!r} is not a job's id.") from None
    if len(ids) > MOST:
        raise HTTPException(422, f"{len(ids)} jobs are chosen, but {MOST} are the most at once.")
    return ids


def _tried(
    service: Service, caller: Caller, job_id: UUID, do: Callable[[UUID], None]
) -> str | None:
    """Do something to a job; what is wrong, if it cannot be done."""
    try:
        name = service.jobs.get(job_id, visible_to=caller.visible_to).name
        do(job_id)
    except NoSuchJob:
        return f"{job_id}: this job no longer exists."
    except (StateConflict, OutputError, QuotaExceeded) as error:
        return f"{name}: {str(error).rstrip('.')}."
    return None


def _confirm(service: Service, caller: Caller, view: ListView, chosen: Sequence[UUID]) -> Response:
    """Ask once more before jobs are deleted."""
    records = []
    for job_id in chosen:
        try:
            records.append(service.jobs.get(job_id, visible_to=caller.visible_to))
        except NoSuchJob:
            continue  # somebody else deleted it
    return draw(
        "delete_many.html",
        caller=caller,
        view=view,
        gone=[job for job in records if job.state in VERBS["delete"]],
        kept=[job for job in records if job.state not in VERBS["delete"]],
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
        caller, states=view.states, models=view.models, patterns=view.patterns, labels=view.labels,
        name=view.name,
    )  # fmt: skip
    records, next_token = page_of(service, which, view.sort, PAGE_SIZE, view.token)
    facets = service.jobs.facets(which)
    reporting = workers(service, caller).workers
    now = datetime.now(UTC)
    with service.database.transaction() as connection:
        shown = rows(connection, records, now, manned=bool(reporting))
    moves = problem is None and any(row.view.moves for row in shown)
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
        names={row.view.record.id: row.view.record.name for row in shown},
        next_token=next_token,
        workers=[(w, span((now - w.heartbeat_at).total_seconds())) for w in reporting],
        waiting=any(row.view.record.state.may_work for row in shown),
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
    values = [value for value, _ in counted]
    return [*counted, *((value, 0) for value in dict.fromkeys(chosen) if value not in values)]


def _chosen(
    service: Service, caller: Caller, view: ListView, shown: Sequence[JobRow]
) -> str | None:
    """The name of the job that others are chosen beside, if it is not in the list itself."""
    if view.chosen is None or view.chosen in [str(row.view.record.id) for row in shown]:
        return None
    try:
        return service.jobs.get(UUID(view.chosen), visible_to=caller.visible_to).name
    except (ValueError, NoSuchJob):
        return None
