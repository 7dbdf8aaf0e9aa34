"""
The front page: a table of jobs that is filtered, searched and sorted by its query, what can be
asked of several of them at once, and the workers.

Its script only keeps it as it is now; without, the browser loads it again by itself.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Any, Self
from urllib.parse import parse_qsl, urlencode
from uuid import UUID

from fastapi import APIRouter, Request, Response
from starlette.exceptions import HTTPException
from starlette.responses import RedirectResponse

from pho_service.api import jobs
from pho_service.api.job_rows import JobRow, rows
from pho_service.api.job_view import span
from pho_service.api.listing import page_of, which_jobs
from pho_service.api.operations import workers
from pho_service.api.pages import draw
from pho_service.api.problems import sentence, wrong_parameter
from pho_service.api.service import Caller, CallerParam, Service, ServiceParam
from pho_service.api.typed import Pairs
from pho_service.errors import OutputError
from storage.listing import NEWEST, SORTS, Sort
from storage.records import NoSuchJob, StateConflict
from storage.states import VERBS, JobState

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
    "rise": "above dense, lowest first",
    "-gain": "below RIA, highest first",
}


@dataclass(frozen=True, kw_only=True)
class View:
    """
    Which part of the list is looked at, and how; the query of the page.

    Attributes:
        states: Only jobs in these; none means all.
        models: Only jobs for these; none means all.
        patterns: Only jobs with these; none means all.
        name: Only jobs whose name contains this, or whose id begins with it.
        sort: The order.
        token: Token of the page.
        refresh: Whether it may be loaded again by itself.
        chosen: A job that is chosen to be compared with others.
    """

    states: tuple[JobState, ...] = ()
    models: tuple[str, ...] = ()
    patterns: tuple[str, ...] = ()
    name: str = ""
    sort: Sort = NEWEST
    token: str | None = None
    refresh: bool = True
    chosen: str | None = None

    @classmethod
    def of(cls, query: Sequence[tuple[str, str]]) -> Self:
        """
        Raises:
            RequestValidationError: There is no such state or order.
        """
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
        """The same as fields of a query."""
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
        """The same as a query, with its question mark."""
        return f"?{urlencode(self.pairs)}" if self.pairs else ""

    def but(self, **changes: Any) -> "View":
        """The first page of the list with some things changed."""
        return replace(self, **{"token": None, **changes})

    @property
    def filters(self) -> list[tuple[str, "View"]]:
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
    def unfiltered(self) -> "View":
        """The same list with all jobs."""
        return self.but(states=(), models=(), patterns=(), name="")


@router.api_route("/", methods=["GET", "HEAD"])
def show(request: Request, service: ServiceParam, caller: CallerParam) -> Response:
    """Show jobs and workers."""
    return draw_list(service, caller, View.of(request.query_params.multi_items()))


@router.api_route("/jobs", methods=["GET", "HEAD"])
def lead(request: Request) -> Response:
    """Lead to the list, which is where people look for it."""
    return RedirectResponse(f"/?{request.url.query}" if request.url.query else "/", 303)


@router.post("/jobs")
def ask(pairs: Pairs, service: ServiceParam, caller: CallerParam) -> Response:
    """Do what a button says to all jobs that are chosen; before they are deleted, ask once more."""
    typed = dict(pairs)
    view = View.of(parse_qsl(typed.get("view", "").removeprefix("?")))
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
    """Each once."""
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


def _confirm(service: Service, caller: Caller, view: View, chosen: Sequence[UUID]) -> Response:
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
    view: View,
    status: int = HTTPStatus.OK,
    problem: str | None = None,
    details: Sequence[str] = (),
) -> Response:
    """
    Answer with the list.

    Args:
        service: Service of the process.
        caller: Whose jobs are shown.
        view: Which of them.
        status: Status of the answer.
        problem: What could not be done.
        details: More of that, a sentence for each job.
    """
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
        waiting=_waiting(shown),
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


def _chosen(service: Service, caller: Caller, view: View, shown: Sequence[JobRow]) -> str | None:
    """The name of the job that others are chosen beside, if it is not in the list itself."""
    if view.chosen is None or view.chosen in [str(each.job.id) for each in shown]:
        return None
    try:
        return service.jobs.get(UUID(view.chosen), visible_to=caller.visible_to).name
    except (ValueError, NoSuchJob):
        return None


def _waiting(shown: Sequence[JobRow]) -> bool:
    """Tell whether somebody must work on one of them."""
    return any(each.job.state in (JobState.QUEUED, JobState.RUNNING) for each in shown)
