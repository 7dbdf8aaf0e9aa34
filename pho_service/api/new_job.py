"""
The form that submits a job, with what it would take and what else submits it beside it.

It works without scripts; with them, what stands beside follows what is typed.
"""

import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import get_args
from uuid import UUID

from fastapi import APIRouter, Request, Response
from starlette.responses import RedirectResponse

from pho_service.api import jobs
from pho_service.api.answers import PlanAnswer
from pho_service.api.describe import check_search
from pho_service.api.equivalents import equivalents
from pho_service.api.form import MORE, field_label, form_fields, sections
from pho_service.api.form_document import Typed, hint_of_json, is_place, typed_as
from pho_service.api.operations import workers
from pho_service.api.pages import draw
from pho_service.api.plan import Card, planned
from pho_service.api.problems import TOO_MANY_JOBS
from pho_service.api.service import Caller, CallerParam, Service, ServiceParam
from pho_service.api.submission import checks, longest_window
from pho_service.api.typed import Typed as Fields
from pho_service.host.listing import list_roots
from pho_service.planning.headers import config_at_hand
from pho_service.planning.machines import named_machine
from pho_service.planning.plan import format_span
from pho_service.spec.fields import FieldError
from pho_service.spec.job import JobSpec
from pho_service.spec.job_options import document_fields
from storage.records import IdempotencyKeyReused, TooManyJobs

router = APIRouter(include_in_schema=False)

SCRIPT = "form.js"
PATTERNS = ("0.5", "0.6", "0.7", "2:4", "4:8")
CARDS = get_args(Card)
_CONTEXT = "calibration/context_length"
_TOKEN = re.compile(r"[A-Za-z0-9_-]{16,64}")
_OPTION = re.compile(r"(--[a-z][a-z-]*)(?: ([^\s,)]+))?")


@dataclass(kw_only=True)
class Filled:
    """
    A form that was filled in, as far as a job can be made of it.

    Attributes:
        typed: What was typed.
        spec: The job; None if the document is not one.
        fitted: Defaults that follow from the model, by field.
    """

    typed: Typed
    spec: JobSpec | None
    fitted: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, fields: Mapping[str, str], service: Service) -> "Filled":
        """Read a form, and note all that is wrong in it."""
        typed = Typed.of(fields)
        fitted = _fit(typed, service)
        spec = typed.spec()
        told = spec or typed.places()
        for check in () if told is None else checks(told, service):
            try:
                check()
            except FieldError as error:
                if spec is not None or is_place(error.pointer):
                    typed.add_at(error.pointer, str(error))
        return cls(typed=typed, spec=spec, fitted=fitted)

    @property
    def is_right(self) -> bool:
        """Whether it can be submitted."""
        return self.spec is not None and not self.typed.errors


@dataclass(kw_only=True)
class Beside:
    """
    Parts of the page beside the form.

    Attributes:
        card: That the plan is for.
        plan: What the job would take.
        told: Why there is no plan.
        commands: What submits the same, by title.
    """

    card: str
    plan: PlanAnswer | None = None
    told: str = ""
    commands: list[tuple[str, str]] = field(default_factory=list)


@router.api_route("/new", methods=["GET", "HEAD"])
def new(
    request: Request, service: ServiceParam, caller: CallerParam, job: UUID | None = None
) -> Response:
    """Show the form, empty or as another job was submitted."""
    if job is None:
        return _page(request, service, caller, Filled(typed=Typed(fields={}), spec=None))
    asked = service.jobs.get(job, visible_to=caller.visible_to)
    check_search(asked)
    filled = Filled.of(typed_as(asked.spec), service)
    return _page(request, service, caller, filled, quiet=True)


@router.post("/new")
def submit(
    request: Request, fields: Fields, service: ServiceParam, caller: CallerParam
) -> Response:
    """Submit a job as ``POST /v1/jobs`` does, or show the form again with what is wrong."""
    filled = Filled.of(fields, service)
    if filled.spec is None or not filled.is_right:
        return _page(request, service, caller, filled, status=422)
    try:
        job = jobs.take(filled.spec, service, caller, _token(fields))
    except FieldError as error:
        filled.typed.add_at(error.pointer, str(error))
        return _page(request, service, caller, filled, status=422)
    except IdempotencyKeyReused:
        told = "This form has made a job already, of other values. Submit it again for another job."
        filled.typed.add("", told)
        return _page(request, service, caller, filled, status=422, token=_new_token())
    except TooManyJobs as error:
        filled.typed.add("", TOO_MANY_JOBS[error.which])
        return _page(request, service, caller, filled, status=429)
    return RedirectResponse(f"/jobs/{job.id}", 303)


@router.post("/new/check")
def check(request: Request, fields: Fields, service: ServiceParam, caller: CallerParam) -> Response:
    """
    Show the form again with what is wrong, or with what the job would take; submit nothing.

    A script that asks while somebody types says ``quiet``: then errors are not told yet, and the
    hub is not asked for a model's configuration.
    """
    filled = Filled.of(fields, service)
    quiet = "quiet" in fields
    wrong = not filled.is_right and not quiet
    status = 422 if wrong else 200
    return _page(request, service, caller, filled, status=status, quiet=quiet, may_ask_hub=True)


def _page(
    request: Request,
    service: Service,
    caller: Caller,
    filled: Filled,
    *,
    status: int = 200,
    token: str | None = None,
    quiet: bool = False,
    may_ask_hub: bool = False,
) -> Response:
    listing = list_roots(service.access.model_roots, service.access.text_roots)
    return draw(
        "new.html",
        status=status,
        script=SCRIPT,
        caller=caller,
        sections=sections(),
        label=field_label,
        hint_of_json=hint_of_json(),
        more=MORE,
        typed=filled.typed.fields,
        fitted=filled.fitted,
        errors={} if quiet else filled.typed.in_order,
        token=token or _token(filled.typed.fields),
        picks={"models": listing.models, "texts": listing.texts, "patterns": PATTERNS},
        all_listed=listing.is_whole,
        beside=_beside(request, service, caller, filled, may_ask_hub=may_ask_hub and not quiet),
        cards=CARDS,
        span=format_span,
    )


def _beside(
    request: Request, service: Service, caller: Caller, filled: Filled, *, may_ask_hub: bool
) -> Beside:
    asked = filled.typed.fields.get("card", "")
    card = asked if asked in CARDS else _likely_card(service, caller)
    if filled.spec is None or not filled.is_right:
        told = "Once a model and a pattern are given and nothing is wrong, this says how much time "
        return Beside(card=card, told=f"{told}and memory the job would take.")
    url = str(request.base_url).rstrip("/")
    commands = equivalents(filled.spec, url, with_key=caller.key_id is not None)
    beside = Beside(card=card, commands=commands)
    spec, path = filled.spec, service.access.model(filled.spec.model)
    if not may_ask_hub and config_at_hand(spec.model, path, revision=spec.revision) is None:
        beside.told = "“Check and plan” reads the configuration of the model, and says what the "
        beside.told += "job would take."
        return beside
    try:
        beside.plan = planned(spec, service, named_machine(card))
    except FieldError as error:
        beside.told = f"No plan can be made. {_in_words(str(error))}"
        return beside
    beside.plan.ways_out = [_in_words(way) for way in beside.plan.ways_out]
    return beside


def _likely_card(service: Service, caller: Caller) -> str:
    """``cpu`` if all workers that report have no card."""
    devices = {worker.device for worker in workers(service, caller).workers}
    return "cpu" if devices == {"cpu"} else "H100"


def _fit(typed: Typed, service: Service) -> dict[str, str]:
    """Put in the defaults that follow from the models, where nothing is typed."""
    calibration = typed.document.get("calibration", {})
    if not isinstance(calibration, dict) or "context_length" in calibration:
        return {}
    more, revision = typed.document.get("more_models"), typed.document.get("revision")
    names = [typed.document.get("model"), *(more if isinstance(more, list) else ())]
    read = [
        longest_window(name, service.access, revision if isinstance(revision, str) else None)
        for name in names
        if isinstance(name, str)
    ]
    shortest = min((length for length in read if length is not None), default=None)
    if shortest is None or shortest >= form_fields()[_CONTEXT].default:
        return {}
    typed.document["calibration"] = {**calibration, "context_length": shortest}
    return {_CONTEXT: str(shortest)}


def _in_words(text: str) -> str:
    """A message with the names of fields instead of options: ``--dtype bfloat16``."""
    names = {each.name: path for path, each in document_fields().items()}

    def said(option: re.Match[str]) -> str:
        path = names.get(option[1])
        if path not in form_fields():
            return option[0]
        return f"{field_label(str(path))}{f': {option[2]}' if option[2] else ''}"

    return _OPTION.sub(said, text)


def _new_token() -> str:
    """For a form: however often it is sent, it makes one job."""
    return secrets.token_urlsafe(16)


def _token(fields: Mapping[str, str]) -> str:
    """The token that a form came with; another one if that is none of ours."""
    token = fields.get("token", "")
    return token if _TOKEN.fullmatch(token) else _new_token()
