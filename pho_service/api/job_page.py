"""
The pages of a job and of several jobs side by side: results, stages, charts and buttons.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Annotated, Any, Literal, cast
from urllib.parse import parse_qsl
from uuid import UUID

from fastapi import APIRouter, Query, Request, Response
from pydantic import ValidationError
from starlette.responses import RedirectResponse

from pho_service.api import artifacts, jobs
from pho_service.api.answers import Point
from pho_service.api.job_list import REFRESH_S, JobHead, ListView, draw_list, view
from pho_service.api.pages import Typed, draw
from pho_service.api.problems import (
    TOO_MANY_JOBS,
    Conflict,
    field_problem,
    problem,
    sentence,
    wrong_parameter,
)
from pho_service.api.report import rated_values
from pho_service.api.service import Caller, CallerParam, Service, ServiceParam
from pho_service.api.stepper import span
from pho_service.shown.charts import curves_chart, searches_chart
from pho_service.shown.tables import result_in_words, rise_of
from pho_service.spec.document import number
from pho_service.spec.fields import FieldError
from pho_service.spec.transfer import TransferRequest
from storage import records as stored
from storage.keys import QuotaExceeded
from storage.records import NoSuchJob, StateConflict, TooManyJobs, TooManyTrials

router = APIRouter(include_in_schema=False)

MOST_FITTING = 20  # jobs that are shown for the beginning of an id


@router.api_route("/jobs/{job_id:uuid}", methods=["GET", "HEAD"])
def show(job_id: UUID, service: ServiceParam, caller: CallerParam) -> Response:
    """Show a job: its result first, then how it goes."""
    return _page(service, caller, job_id)


@router.api_route("/jobs/{beginning}", methods=["GET", "HEAD"])
def find(beginning: str, service: ServiceParam, caller: CallerParam) -> Response:
    """Lead from the beginning of an id to the page of its job; if it fits several, show those."""
    fits: list[stored.JobRecord] = []
    if re.fullmatch(jobs.BEGINNING, beginning):
        which = jobs.which_jobs(caller, id_begins=beginning)
        fits = service.jobs.page(which, limit=MOST_FITTING)
    if not fits:
        told = f"No job has the id {beginning[:40]}, nor one that begins so. It may be deleted."
        return problem(404, "no_such_job", told)
    if len(fits) == 1:
        return RedirectResponse(f"/jobs/{fits[0].id}", 302)
    return draw("several.html", status=300, caller=caller, beginning=beginning, fits=fits)


@router.post("/jobs/{job_id:uuid}/extend")
def extend(job_id: UUID, typed: Typed, service: ServiceParam, caller: CallerParam) -> Response:
    """Give a search more trials."""

    def ask() -> UUID:
        trials = typed.get("trials", "").strip()
        extension = jobs.Extension.model_validate_json(f'{{"trials": {trials or "null"}}}')
        jobs.extend(job_id, extension, service, caller)
        return job_id

    return _asked(service, caller, job_id, ask, jobs.Extension)


@router.post("/jobs/{job_id:uuid}/transfer")
def transfer(job_id: UUID, typed: Typed, service: ServiceParam, caller: CallerParam) -> Response:
    """Measure what a job has found on other models, and show the job that does it."""

    def ask() -> UUID:
        names = [line.strip() for line in typed.get("models", "").splitlines() if line.strip()]
        request = TransferRequest.model_validate({"models": names})
        return jobs.transfer(job_id, request, service, caller, Response()).id

    return _asked(service, caller, job_id, ask, TransferRequest)


@router.post("/jobs/{job_id:uuid}/{verb}")
def ask(
    job_id: UUID,
    verb: Literal["pause", "resume", "cancel", "prune", "delete"],
    typed: Typed,
    service: ServiceParam,
    caller: CallerParam,
) -> Response:
    """Do what a button says, and go back to the page that it was on."""
    asked = ListView.of(parse_qsl(typed.get("view", "").removeprefix("?")))
    on_job_page = typed.get("back") == "job"
    try:
        if verb == "delete":
            jobs.delete(job_id, service, caller)
            return RedirectResponse(f"/{asked.query}", 303)
        if verb == "prune":
            artifacts.asked(service, job_id, visible_to=caller.visible_to)
        else:
            service.jobs.ask(job_id, verb, visible_to=caller.visible_to)
    except NoSuchJob:
        return draw_list(service, caller, asked, 404, "This job no longer exists.")
    except (StateConflict, Conflict) as error:
        if on_job_page:
            return _page(service, caller, job_id, 409, _sentence(str(error)))
        return draw_list(service, caller, asked, 409, _sentence(str(error)))
    if on_job_page:
        return RedirectResponse(f"/jobs/{job_id}", 303)
    return RedirectResponse(f"/{asked.query}#job-{job_id}", 303)


@router.api_route("/jobs/{job_id:uuid}/delete", methods=["GET", "HEAD"])
def confirm_deletion(
    job_id: UUID, request: Request, service: ServiceParam, caller: CallerParam
) -> Response:
    """Ask once more before a job is deleted."""
    job = service.jobs.get(job_id, visible_to=caller.visible_to)
    asked = ListView.of(request.query_params.multi_items())
    head = JobHead.of(job, datetime.now(UTC))
    return draw("delete.html", caller=caller, head=head, view=asked)


@router.api_route("/jobs/{job_id:uuid}/files", methods=["GET", "HEAD"])
def files(job_id: UUID, service: ServiceParam, caller: CallerParam) -> Response:
    """Show the files of a job's pruned model, to be downloaded."""
    job = service.jobs.get(job_id, visible_to=caller.visible_to)
    return draw("files.html", caller=caller, job=job, found=artifacts.listed(job))


def _asked(
    service: Service,
    caller: Caller,
    job_id: UUID,
    ask: Callable[[], UUID],
    model: type[jobs.Extension] | type[TransferRequest],
) -> Response:
    """Do what a form of the page asks, and show the job that does it, or what is wrong."""
    try:
        return RedirectResponse(f"/jobs/{ask()}", 303)
    except ValidationError as error:
        faults = [field_problem({**each, "loc": ("body", *each["loc"])}, model)
                  for each in error.errors()]  # fmt: skip
        told, status = " ".join(_sentence(fault["detail"]) for fault in faults), 422
    except (FieldError, TooManyTrials) as error:
        told, status = _sentence(str(error)), 422
    except (StateConflict, Conflict) as error:
        told, status = _sentence(str(error)), 409
    except TooManyJobs as error:
        told, status = TOO_MANY_JOBS[error.which], 429
    except QuotaExceeded as error:
        told, status = _sentence(str(error)), 429
    return _page(service, caller, job_id, status, told)


def _page(
    service: Service,
    caller: Caller,
    job_id: UUID,
    status: int = HTTPStatus.OK,
    problem: str | None = None,
) -> Response:
    job = service.jobs.get(job_id, visible_to=caller.visible_to)
    shown = view(service, caller, job, datetime.now(UTC))
    return draw(
        "job.html",
        status=status,
        script="live.js",
        caller=caller,
        view=shown,
        problem=problem,
        refresh_s=REFRESH_S if shown.head.moves and problem is None else 0,
        address=f"/jobs/{job_id}",
    )


def _sentence(told: str) -> str:
    return f"{sentence(told.rstrip('.'))}."


# Jobs side by side: what was asked differently, what each found, and their searches on one scale.
FEWEST, MOST = 2, 8  # jobs on a page
_HIDDEN = "configuration"  # it would fill the page


@dataclass(frozen=True, kw_only=True)
class Line:
    """A setting or a figure of all jobs, as text; empty where a job has none."""

    name: str
    values: Sequence[str]

    @property
    def differs(self) -> bool:
        return len({*self.values}) > 1


@router.api_route("/compare", methods=["GET", "HEAD"])
def compare(
    service: ServiceParam, caller: CallerParam, job: Annotated[Sequence[UUID], Query()] = ()
) -> Response:
    """Show jobs side by side."""
    chosen = list(dict.fromkeys(job))
    if not FEWEST <= len(chosen) <= MOST:
        raise wrong_parameter(
            "job", f"names {len(chosen)} jobs, but {FEWEST} to {MOST} are shown side by side"
        )
    found = [service.jobs.get(each, visible_to=caller.visible_to) for each in chosen]
    now = datetime.now(UTC)
    heads = [JobHead.of(each, now) for each in found]
    curves = {each.job.name: each.job.measured for each in heads}
    points = [(each, cast("list[Point | None]", curves[each.job.name]) or [None]) for each in heads]
    columns = [(each, point) for each, some in points for point in some]
    charts = [
        curves_chart([(name, [p.model_dump() for p in some]) for name, some in curves.items()]),
        searches_chart([(each.name, *rated_values(service, each)) for each in found]),
    ]
    return draw(
        "compare.html",
        caller=caller,
        columns=[(each.job, len(some)) for each, some in points],
        alone=[(each.job, 1) for each in heads],
        figures=_figures(columns),
        settings=_settings([each.spec for each in found]),
        charts=[chart for chart in charts if chart is not None],
    )


def _figures(columns: Sequence[tuple[JobHead, Point | None]]) -> list[Line]:
    """What was found, by job; of one with several patterns, in a column for each."""
    points = [point for _, point in columns]
    rows = [
        ("Pattern", [point.pattern if point else head.facts[0][1] for head, point in columns]),
        ("State", [str(head.job.state) for head, _ in columns]),
        ("Result", [result_in_words(vars(point)) if point else "" for point in points]),
    ]
    for title, name in (
        ("Perplexity, pruned", "perplexity"), ("Dense", "dense"), ("Wanda", "wanda"),
        ("RIA", "ria"),
    ):  # fmt: skip
        rows.append((title, [number(getattr(point, name, None)) for point in points]))
    rises = [rise_of(point) if point else "" for point in points]
    best = [point.proxy if point else h.job.progress.best_value for h, point in columns]
    trials = [(point and point.trials) or h.job.progress.of("search").done for h, point in columns]
    rows += [
        ("Against dense", rises),
        ("Objective", [number(value) for value in best]),
        ("Trials", [f"{count}" for count in trials]),
        ("Time", [f"took {span(p.seconds)}" if p and p.seconds else h.time for h, p in columns]),
    ]
    return [Line(name=name, values=values) for name, values in rows if any(values)]


def _settings(specs: Sequence[Mapping[str, Any]]) -> list[Line]:
    """Every field that a job has, those that differ first."""
    flat = [_flat(spec) for spec in specs]
    names = dict.fromkeys(name for each in flat for name in each)
    rows = [Line(name=name, values=[each.get(name, "") for each in flat]) for name in names]
    return sorted(rows, key=lambda row: not row.differs)


def _flat(document: Mapping[str, Any], above: str = "") -> dict[str, str]:
    """The leaves of a document by their paths; what is not given is left out."""
    found: dict[str, str] = {}
    for name, value in document.items():
        if isinstance(value, Mapping) and value and name != _HIDDEN:
            found |= _flat(value, f"{above}{name}.")
        elif value is not None and name != _HIDDEN:
            found[f"{above}{name}"] = value if isinstance(value, str) else json.dumps(value)
    return found
