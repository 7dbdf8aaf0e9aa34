"""
The form that submits a job.

No script runs on its page. What it does is done by the code of ``/v1``; errors come back as
pages, and who may send a form is checked by :mod:`pho_service.api.guard`.
"""

from http import HTTPStatus
from uuid import UUID

from fastapi import APIRouter, Response
from starlette.responses import RedirectResponse

from pho_service.api import form, jobs
from pho_service.api.describe import check_search
from pho_service.api.pages import draw
from pho_service.api.problems import TOO_MANY_JOBS
from pho_service.api.service import Caller, CallerParam, ServiceParam
from pho_service.api.typed import Typed
from pho_service.spec.fields import FieldError
from storage.records import IdempotencyKeyReused, TooManyJobs

router = APIRouter(include_in_schema=False)


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
