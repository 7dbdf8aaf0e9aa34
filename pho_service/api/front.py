"""
The front page with all jobs and workers, and the form that submits a job.

No script runs on these pages. What they do is done by the code of ``/v1``; errors come back as
pages, and who may send a form is checked by :mod:`pho_service.api.guard`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Annotated, Self
from urllib.parse import parse_qsl, urlencode
from uuid import UUID

from fastapi import APIRouter, Depends, Request, Response
from starlette.exceptions import HTTPException
from starlette.responses import RedirectResponse

from pho_service.api import form, jobs
from pho_service.api.cards import Card, card, span
from pho_service.api.describe import check_search, study_names
from pho_service.api.operations import workers
from pho_service.api.pages import draw
from pho_service.api.problems import TOO_MANY_JOBS, wrong_parameter
from pho_service.api.service import Caller, CallerParam, Service, ServiceParam
from pho_service.spec.fields import FieldError
from storage.records import IdempotencyKeyReused, TooManyJobs
from storage.states import JobState
from storage.studies import study_ids

router = APIRouter(include_in_schema=False)

PAGE_SIZE = 20
REFRESH_S = 10
FILTERS: dict[str, tuple[JobState, ...]] = {
    "all": (),
    "queued": (JobState.QUEUED,),
    "running": (JobState.RUNNING, JobState.PAUSING, JobState.CANCELLING),
    "paused": (JobState.PAUSED,),
    "succeeded": (JobState.SUCCEEDED,),
    "failed": (JobState.FAILED,),
    "cancelled": (JobState.CANCELLED,),
}
_MOST_FIELDS = 20  # of a form


@dataclass(frozen=True, kw_only=True)
class View:
    """
    Which part of the list is looked at; the query of the page.

    Attributes:
        states: Only jobs in these; none means all.
        token: Token of the page.
        refresh: Whether it may be loaded again by itself.
        chosen: A job that is chosen to be compared with others.
    """

    states: tuple[str, ...] = ()
    token: str | None = None
    refresh: bool = True
    chosen: str | None = None

    @classmethod
    def of(cls, query: Sequence[tuple[str, str]]) -> Self:
        """
        Raises:
            RequestValidationError: There is no such state.
        """
        states = tuple(value for name, value in query if name == "state")
        for state in states:
            if state not in [*JobState]:
                raise wrong_parameter("state", f"must be one of {', '.join(JobState)}")
        found = dict(query)
        return cls(
            states=states,
            token=found.get("page_token"),
            refresh=found.get("refresh") != "off",
            chosen=found.get("compare"),
        )

    @property
    def query(self) -> str:
        """The same as a query, with its question mark."""
        pairs = [("state", state) for state in self.states]
        pairs += [] if self.token is None else [("page_token", self.token)]
        pairs += [] if self.refresh else [("refresh", "off")]
        pairs += [] if self.chosen is None else [("compare", self.chosen)]
        return f"?{urlencode(pairs)}" if pairs else ""

    def only(self, states: tuple[str, ...]) -> "View":
        """The first page of the jobs in these states."""
        return replace(self, states=states, token=None)

    def page(self, token: str | None) -> "View":
        """Another page of the same list; None is the first."""
        return replace(self, token=token)

    def refreshed(self, *, by_itself: bool) -> "View":
        """The same, loaded again by itself or not."""
        return replace(self, refresh=by_itself)


async def _typed(request: Request) -> dict[str, str]:
    """The fields of a form, each once; the last counts."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/x-www-form-urlencoded":
        raise HTTPException(
            415, "This takes a form, as application/x-www-form-urlencoded. /v1/jobs takes JSON."
        )
    body = await request.body()
    try:
        pairs = parse_qsl(body.decode(), keep_blank_values=True, max_num_fields=_MOST_FIELDS)
    except ValueError as error:
        raise HTTPException(422, "The form cannot be read. Go back, and send it again.") from error
    return {name: value.replace("\r\n", "\n") for name, value in pairs}


Typed = Annotated[dict[str, str], Depends(_typed)]


@router.api_route("/", methods=["GET", "HEAD"])
def show(request: Request, service: ServiceParam, caller: CallerParam) -> Response:
    """Show jobs, newest first, and workers."""
    return draw_list(service, caller, View.of(request.query_params.multi_items()))


@router.api_route("/new", methods=["GET", "HEAD"])
def new(service: ServiceParam, caller: CallerParam, job: UUID | None = None) -> Response:
    """Show the form, empty or as another job was submitted."""
    typed = form.DEFAULTS
    if job is not None:
        asked = service.jobs.get(job, visible_to=caller.visible_to)
        check_search(asked)
        typed = form.typed_as(asked.spec)
    return _form(caller, typed, form.new_token(), {})


@router.post("/new")
def submit(typed: Typed, service: ServiceParam, caller: CallerParam) -> Response:
    """Submit a job as ``POST /v1/jobs`` does, or show the form again with what is wrong."""
    token = form.token_of(typed)
    try:
        job = jobs.take(form.read_spec(typed), service, caller, token)
    except form.WrongForm as error:
        return _form(caller, typed, token, error.errors, status=422)
    except FieldError as error:
        return _form(caller, typed, token, form.WrongForm.of(error).errors, status=422)
    except IdempotencyKeyReused:
        told = "This form has made a job already, of other values. Submit it again for another job."
        return _form(caller, typed, form.new_token(), {"": [told]}, status=422)
    except TooManyJobs as error:
        return _form(caller, typed, token, {"": [TOO_MANY_JOBS[error.which]]}, status=429)
    return RedirectResponse(f"/jobs/{job.id}", 303)


def draw_list(
    service: Service,
    caller: Caller,
    view: View,
    status: int = HTTPStatus.OK,
    problem: str | None = None,
) -> Response:
    """
    Answer with the list.

    Args:
        service: Service of the process.
        caller: Whose jobs are shown.
        view: Which of them.
        status: Status of the answer.
        problem: What could not be done.
    """
    found, next_token = jobs.page_of(service, caller, view.states, PAGE_SIZE, view.token)
    studies = {}
    if caller.sees_all:  # others may not look into the dashboard
        with service.database.transaction() as connection:
            names = [name for job in found for name in study_names(job)]
            studies = study_ids(connection, names)
    now = datetime.now(UTC)
    cards = [card(job, studies, now) for job in found]
    moves = problem is None and any(each.moves for each in cards)
    return draw(
        "jobs.html",
        status=status,
        caller=caller,
        view=view,
        filters=FILTERS,
        cards=cards,
        names={each.job.id: each.job.name for each in cards},
        next_token=next_token,
        workers=[(w, span((now - w.heartbeat_at).total_seconds())) for w in
                 workers(service, caller).workers],
        waiting=_waiting(cards),
        now=now,
        problem=problem,
        every_s=REFRESH_S,
        refresh_s=REFRESH_S if moves and view.refresh else 0,
        address=f"/{view.query}",
    )  # fmt: skip


def _waiting(cards: Sequence[Card]) -> bool:
    """Tell whether somebody must work on one of them."""
    return any(each.job.state in ("queued", "running") for each in cards)


def _form(
    caller: Caller,
    typed: dict[str, str],
    token: str,
    errors: dict[str, list[str]],
    *,
    status: int = HTTPStatus.OK,
) -> Response:
    return draw(
        "new.html",
        status=status,
        caller=caller,
        labels=form.LABELS,
        options=form.OPTIONS,
        hints=form.hints(),
        typed={name: typed.get(name, default) for name, default in form.DEFAULTS.items()},
        token=token,
        errors=errors,
    )
