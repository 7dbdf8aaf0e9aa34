"""
The front page: all jobs and workers, the form that submits a job, and buttons for what can be done.

No script runs on these pages. What they do is done by the code of ``/v1``; errors come back as
pages, and who may send a form is checked by :mod:`pho_service.api.guard`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Annotated, Literal, Self
from urllib.parse import parse_qsl, urlencode
from uuid import UUID

from fastapi import APIRouter, Depends, Request, Response
from starlette.exceptions import HTTPException
from starlette.responses import RedirectResponse

from pho_service.api import artifacts, form, jobs
from pho_service.api.cards import Card, card, span
from pho_service.api.describe import study_names
from pho_service.api.operations import workers
from pho_service.api.pages import draw
from pho_service.api.problems import TOO_MANY_JOBS, Conflict, wrong_parameter
from pho_service.api.service import Caller, CallerParam, Service, ServiceParam
from pho_service.spec.fields import FieldError
from storage.records import IdempotencyKeyReused, NoSuchJob, StateConflict, TooManyJobs
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
        token: Of the page.
        refresh: Whether it may be loaded again by itself.
    """

    states: tuple[str, ...] = ()
    token: str | None = None
    refresh: bool = True

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
        )

    @property
    def query(self) -> str:
        """The same as a query, with its question mark."""
        pairs = [("state", state) for state in self.states]
        pairs += [] if self.token is None else [("page_token", self.token)]
        pairs += [] if self.refresh else [("refresh", "off")]
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
    return _list(service, caller, View.of(request.query_params.multi_items()))


@router.api_route("/new", methods=["GET", "HEAD"])
def new(caller: CallerParam) -> Response:
    """Show the form."""
    return _form(caller, form.DEFAULTS, form.new_token(), {})


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
    return RedirectResponse(f"/#job-{job.id}", 303)


@router.post("/jobs/{job_id:uuid}/{verb}")
def ask(
    job_id: UUID,
    verb: Literal["pause", "resume", "cancel", "prune", "delete"],
    typed: Typed,
    service: ServiceParam,
    caller: CallerParam,
) -> Response:
    """Do what a button says, and go back to the list."""
    view = View.of(parse_qsl(typed.get("view", "").removeprefix("?")))
    try:
        if verb == "delete":
            jobs.delete(job_id, service, caller)
            return RedirectResponse(f"/{view.query}", 303)
        if verb == "prune":
            artifacts.asked(service, job_id, visible_to=caller.visible_to)
        else:
            service.jobs.ask(job_id, verb, visible_to=caller.visible_to)
    except NoSuchJob:
        return _list(service, caller, view, 404, "This job is not there any more.")
    except (StateConflict, Conflict) as error:
        told = str(error)
        return _list(service, caller, view, 409, f"{told[:1].upper()}{told[1:].rstrip('.')}.")
    return RedirectResponse(f"/{view.query}#job-{job_id}", 303)


@router.api_route("/jobs/{job_id:uuid}/delete", methods=["GET", "HEAD"])
def confirm_deletion(
    job_id: UUID, request: Request, service: ServiceParam, caller: CallerParam
) -> Response:
    """Ask once more before a job is deleted."""
    job = service.jobs.get(job_id, visible_to=caller.visible_to)
    view = View.of(request.query_params.multi_items())
    return draw("delete.html", caller=caller, card=card(job, {}, datetime.now(UTC)), view=view)


@router.api_route("/jobs/{job_id:uuid}/files", methods=["GET", "HEAD"])
def files(job_id: UUID, service: ServiceParam, caller: CallerParam) -> Response:
    """Show the files of a job's pruned model, to be downloaded."""
    job = service.jobs.get(job_id, visible_to=caller.visible_to)
    return draw("files.html", caller=caller, job=job, found=artifacts.listed(job))


def _list(
    service: Service,
    caller: Caller,
    view: View,
    status: int = HTTPStatus.OK,
    problem: str | None = None,
) -> Response:
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
    """Whether somebody must work on one of them."""
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
