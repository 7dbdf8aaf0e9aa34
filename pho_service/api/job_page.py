"""
The pages of a job and of several jobs side by side: results, stages, charts and buttons.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from http import HTTPStatus
from typing import Annotated, Any, Literal
from urllib.parse import parse_qsl
from uuid import UUID

from fastapi import APIRouter, Query, Request, Response
from pydantic import ValidationError
from starlette.responses import RedirectResponse

from pho_service.api import artifacts, jobs
from pho_service.api.answers import ArtifactList, Point
from pho_service.api.job_list import REFRESH_S, ListView, draw_list
from pho_service.api.operations import workers
from pho_service.api.pages import Typed, draw
from pho_service.api.problems import (
    TOO_MANY_JOBS,
    Conflict,
    field_problem,
    problem,
    sentence,
    wrong_parameter,
)
from pho_service.api.report import collected, rated_values
from pho_service.api.service import Caller, CallerParam, Service, ServiceParam
from pho_service.api.stepper import StepRow, steps, time_left
from pho_service.api.submission import likely_card
from pho_service.api.view import JobView, span
from pho_service.shown.charts import curves_chart, searches_chart
from pho_service.shown.page import sections
from pho_service.shown.parts import Section
from pho_service.shown.tables import result_in_words, rise_of
from pho_service.spec.document import number
from pho_service.spec.fields import FieldError
from pho_service.spec.transfer import TransferRequest
from storage import records as stored
from storage.keys import QuotaExceeded
from storage.records import NoSuchJob, StageKind, StateConflict, TooManyJobs, TooManyTrials
from storage.studies import study_ids

router = APIRouter(include_in_schema=False)

LOGS = 100  # parts of logs that are shown, the newest
LOG_LINES = 300  # the newest
_SHOWN = (  # of the report, in this order
    "result", "curve", "recovery", "speed", "tasks", "search", "finalists", "layers", "transfer",
    "writing",
)  # fmt: skip
FEWEST, MOST = 2, 8  # jobs side by side
_HIDDEN = "configuration"  # it would fill the page


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What is known of a job now, beside the sections of its report."""

    head: JobView
    # A word and the number in optuna-dashboard of each, for those who may look there.
    studies: Sequence[tuple[str, int]]
    steps: Sequence[StepRow]  # In the order of the work
    left: str  # How long it takes still in all; empty if that is not known
    sections: Sequence[Section]  # Of the report
    # Numbers of the studies in optuna-dashboard that trials of charts are in; none if it may not
    # be looked at. Trial n is in the (n mod count)th.
    trials_at: Sequence[int]
    happened: Section
    logs: Sequence["Logged"]  # What workers have logged, the oldest first
    files: ArtifactList | None  # Files of the pruned model; None if there are none


@dataclass(frozen=True, kw_only=True)
class Logged:
    """Lines that a worker has logged of a stage, and the stage."""

    title: str
    lines: Sequence[str]


def contents(
    service: Service, caller: Caller, job: stored.JobRecord, now: datetime | None = None
) -> Contents:
    """Gather what the page of a job shows."""
    reporting = workers(service, caller).workers
    view = JobView(job, now=now, notes=service.notes(job), manned=bool(reporting))
    numbers = {}
    names = view.studies_in_words
    if caller.sees_all:  # others may not look into the dashboard
        with service.database.transaction() as connection:
            numbers = study_ids(connection, [*names])
    parts = {section.id: section for section in sections(collected(service, view))}
    rows = steps(view, reporting)
    return Contents(
        head=view,
        studies=[(word, numbers[name]) for name, word in names.items() if name in numbers],
        steps=rows,
        left=time_left(service, view, rows, likely_card(reporting)),
        sections=[
            parts[name]
            for name in _SHOWN
            if name in parts and (parts[name].is_known or (name == "result" and view.moves))
        ],
        trials_at=[numbers.get(name, 0) for name in view.study_names * bool(numbers)]
        if not view.document.several
        else [],
        happened=Section(id="happened", title="Events", events=parts["happened"].events),
        logs=_logs(
            service.jobs.logs(job.id, limit=LOGS),
            named=caller.sees_all,
            reason=None if view.error is None else f"failed: {view.error.message}",
        ),
        files=artifacts.listed(view) if view.pruned == "done" else None,
    )


def _logs(
    events: Sequence[stored.EventRecord], *, named: bool, reason: str | None = None
) -> list[Logged]:
    """The last lines of each kind of stage and worker, but for those that end with a reason."""
    lines_of: dict[str, list[str]] = {}
    left = LOG_LINES
    for event in reversed(events):
        data = event.data
        title = StageKind(data["stage"]).heading + f", {data['worker']}" * named
        lines = [line for line in data["lines"] if reason is None or not line.endswith(reason)]
        lines = lines[-left:] if left else []
        left -= len(lines)
        if lines:
            lines_of[title] = [*lines, *lines_of.get(title, [])]
    return [Logged(title=title, lines=lines) for title, lines in reversed(lines_of.items())]


@router.api_route("/jobs/{job_id:uuid}", methods=["GET", "HEAD"])
def show(job_id: UUID, service: ServiceParam, caller: CallerParam) -> Response:
    """Show a job: its result first, then how it goes."""
    return _page(service, caller, job_id)


@router.api_route("/jobs/{beginning}", methods=["GET", "HEAD"])
def find(beginning: str, service: ServiceParam, caller: CallerParam) -> Response:
    """Lead from the beginning of an id to the page of its job; if it fits several, show those."""
    fits = jobs.jobs_beginning(service, caller, beginning)
    if not fits:
        detail = (
            f"No job has the id {beginning[:40]}, nor one that begins so. It may have been deleted."
        )
        return problem(404, "no_such_job", detail)
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

    return _form_answer(service, caller, job_id, ask, jobs.Extension)


@router.post("/jobs/{job_id:uuid}/transfer")
def transfer(job_id: UUID, typed: Typed, service: ServiceParam, caller: CallerParam) -> Response:
    """Measure what a job has found on other models, and show the job that does it."""

    def ask() -> UUID:
        names = [line.strip() for line in typed.get("models", "").splitlines() if line.strip()]
        request = TransferRequest.model_validate({"models": names})
        return jobs.transfer(job_id, request, service, caller, Response()).id

    return _form_answer(service, caller, job_id, ask, TransferRequest)


@router.post("/jobs/{job_id:uuid}/{verb}")
def ask(
    job_id: UUID,
    verb: Literal["pause", "resume", "cancel", "prune", "delete"],
    typed: Typed,
    service: ServiceParam,
    caller: CallerParam,
) -> Response:
    """Do what a button says, and go back to the page that it was on."""
    listed = ListView.of(parse_qsl(typed.get("view", "").removeprefix("?")))
    on_job_page = typed.get("back") == "job"
    try:
        if verb == "delete":
            jobs.delete(job_id, service, caller)
            return RedirectResponse(f"/{listed.query}", 303)
        if verb == "prune":
            artifacts.write_pruned(service, job_id, visible_to=caller.visible_to)
        else:
            jobs.act(service, job_id, verb, visible_to=caller.visible_to)
    except NoSuchJob:
        return draw_list(service, caller, listed, 404, "This job no longer exists.")
    except (StateConflict, Conflict) as error:
        if on_job_page:
            return _page(service, caller, job_id, 409, _sentence(str(error)))
        return draw_list(service, caller, listed, 409, _sentence(str(error)))
    if on_job_page:
        return RedirectResponse(f"/jobs/{job_id}", 303)
    return RedirectResponse(f"/{listed.query}#job-{job_id}", 303)


@router.api_route("/jobs/{job_id:uuid}/delete", methods=["GET", "HEAD"])
def confirm_deletion(
    job_id: UUID, request: Request, service: ServiceParam, caller: CallerParam
) -> Response:
    """Ask once more before a job is deleted."""
    job = service.jobs.get(job_id, visible_to=caller.visible_to)
    listed = ListView.of(request.query_params.multi_items())
    return draw("delete.html", caller=caller, head=JobView(job), view=listed)


@router.api_route("/jobs/{job_id:job}/report", methods=["GET", "HEAD"])
def report(job_id: jobs.JobId) -> Response:
    """Lead to the report, which people look for below the page of its job."""
    return RedirectResponse(f"/v1/jobs/{job_id}/report", 307)


@router.api_route("/jobs/{job_id:uuid}/files", methods=["GET", "HEAD"])
def files(job_id: UUID, service: ServiceParam, caller: CallerParam) -> Response:
    """Show the files of a job's pruned model, to be downloaded."""
    job = service.jobs.get(job_id, visible_to=caller.visible_to)
    return draw("files.html", caller=caller, job=job, listing=artifacts.listed(JobView(job)))


def _form_answer(
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
        problem, status = " ".join(_sentence(fault["detail"]) for fault in faults), 422
    except (FieldError, TooManyTrials) as error:
        problem, status = _sentence(str(error)), 422
    except (StateConflict, Conflict) as error:
        problem, status = _sentence(str(error)), 409
    except TooManyJobs as error:
        problem, status = TOO_MANY_JOBS[error.which], 429
    except QuotaExceeded as error:
        problem, status = _sentence(str(error)), 429
    return _page(service, caller, job_id, status, problem)


def _page(
    service: Service,
    caller: Caller,
    job_id: UUID,
    status: int = HTTPStatus.OK,
    problem: str | None = None,
) -> Response:
    job = service.jobs.get(job_id, visible_to=caller.visible_to)
    page = contents(service, caller, job)
    return draw(
        "job.html",
        status=status,
        script="job.js",
        caller=caller,
        view=page,
        problem=problem,
        refresh_s=REFRESH_S if page.head.moves and problem is None else 0,
        address=f"/jobs/{job_id}",
    )


def _sentence(message: str) -> str:
    return f"{sentence(message.rstrip('.'))}."


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
    service: ServiceParam, caller: CallerParam, job: Annotated[Sequence[str], Query()] = ()
) -> Response:
    """Show jobs side by side: what was asked differently, what was found, one scale for all."""
    names = [*dict.fromkeys(job)]
    if len(names) <= MOST:
        names = [*dict.fromkeys(str(jobs.job_id_of(service, caller, name)) for name in names)]
    if not FEWEST <= len(names) <= MOST:
        raise wrong_parameter(
            "job", f"names {len(names)} jobs, but {FEWEST} to {MOST} are shown side by side"
        )
    views = [JobView(service.jobs.get(UUID(name), visible_to=caller.visible_to)) for name in names]
    points: list[tuple[JobView, Sequence[Point | None]]] = [
        (view, view.answer.measured or [None]) for view in views
    ]
    curves = [
        (view.record.name, [point.model_dump() for point in view.answer.measured]) for view in views
    ]
    values = [(view.record.name, *rated_values(service, view)) for view in views]
    charts = [curves_chart(curves), searches_chart(values)]
    return draw(
        "compare.html",
        script="job.js",
        caller=caller,
        columns=[(view.answer, len(columns)) for view, columns in points],
        alone=[(view.answer, 1) for view in views],
        figures=_figures([(view, point) for view, columns in points for point in columns]),
        settings=_settings([view.record.spec for view in views]),
        charts=[chart for chart in charts if chart is not None],
    )


def _figures(columns: Sequence[tuple[JobView, Point | None]]) -> list[Line]:
    """What was found, by job; of one with several patterns, in a column for each."""
    points = [point for _, point in columns]
    patterns = [point.pattern if point else view.document.sparsity[1] for view, point in columns]
    values = [p.proxy if p else view.progress.best_value for view, p in columns]
    trials = [(p and p.trials) or view.progress.of("search").done for view, p in columns]
    times = [f"took {span(p.seconds)}" if p and p.seconds else view.time for view, p in columns]
    rows = {
        "Pattern": patterns,
        "State": [str(view.record.state) for view, _ in columns],
        "Result": [result_in_words(vars(point)) if point else "" for point in points],
        "Perplexity, pruned": [number(point.perplexity if point else None) for point in points],
        "Measured on": [(point and point.measured_on) or "" for point in points],
        "Dense": [number(point.dense if point else None) for point in points],
        "Wanda": [number(point.wanda if point else None) for point in points],
        "RIA": [number(point.ria if point else None) for point in points],
        "Against dense": [rise_of(point) if point else "" for point in points],
        "Objective": [number(value) for value in values],
        "Trials": [f"{count}" for count in trials],
        "Time": times,
    }
    return [Line(name=name, values=values) for name, values in rows.items() if any(values)]


def _settings(specs: Sequence[Mapping[str, Any]]) -> list[Line]:
    """Every field that a job has."""
    leaves = [_flat(spec) for spec in specs]
    names = dict.fromkeys(name for fields in leaves for name in fields)
    return [Line(name=name, values=[fields.get(name, "") for fields in leaves]) for name in names]


def _flat(document: Mapping[str, Any], above: str = "") -> dict[str, str]:
    """The leaves of a document by their paths; what is not given is left out."""
    leaves: dict[str, str] = {}
    for name, value in document.items():
        if isinstance(value, Mapping) and value and name != _HIDDEN:
            leaves |= _flat(value, f"{above}{name}.")
        elif value is not None and name != _HIDDEN:
            leaves[f"{above}{name}"] = value if isinstance(value, str) else json.dumps(value)
    return leaves
