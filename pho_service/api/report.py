"""
All that is stored of a job, as a report; ``/v1/jobs/{id}/report`` shows it as one page.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from uuid import UUID

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse
from optuna.trial import FrozenTrial

from pho_service.api.jobs import JobId
from pho_service.api.problems import documented_file
from pho_service.api.service import Caller, CallerParam, Service, ServiceParam
from pho_service.api.view import JobView, result_seconds
from pho_service.shown import words
from pho_service.shown.page import MeasuredTrials, importances, render, trials_of, with_measurements
from pho_service.shown.parts import content_security_policy
from pho_service.shown.report import LayerCell, Report, StageTime
from pho_service.spec.configuration import Configuration
from pho_service.spec.objective import is_maximised
from storage import records as stored
from storage.records import StageKind, StageState
from storage.studies import read_trials

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])

EVENTS, MOST_EVENTS = 50, 1000  # the newest that are shown, and that are read for them
MOST_WITH_COEFFICIENTS = 1000  # of a job whose page tells them: reading those of more takes long
MOST_TRIALS = 10_000  # that are read, which takes seconds; of whole islands, the first in any case


@router.get(
    "/{job_id:job}/report",
    responses=documented_file(
        "One page that needs no network.", 404, 422, kind="text/html", schema={"type": "string"}
    ),
    response_class=HTMLResponse,
)
async def report(
    job_id: JobId, request: Request, service: ServiceParam, caller: CallerParam
) -> HTMLResponse:
    """
    Get everything that is known of a job as a page: result, search, layers, timings, commands.

    A client that accepts ``text/html`` by name, as browsers do, gets a page with a link to the job.
    """
    in_browser = "text/html" in request.headers.get("accept", "")
    back = f"/jobs/{job_id}" if in_browser else None
    page = await service.heavy.run(_page, job_id, service, caller, back)
    headers = {"Content-Security-Policy": content_security_policy(), "Vary": "Accept"}
    return HTMLResponse(page, headers=headers)


def _page(job_id: UUID, service: Service, caller: Caller, back: str | None) -> str:
    job = service.jobs.get(job_id, visible_to=caller.visible_to)
    view = JobView(job, notes=service.notes(job))
    return render(replace(collected(service, view, whole=True), job_page=back))


def collected(service: Service, view: JobView, *, whole: bool = False) -> Report:
    """What is known of a job; the whole also says how much each coefficient mattered."""
    of_transfer = view.document.is_transfer
    report = _of_transfer(view) if of_transfer else _of_search(service, view, whole=whole)
    events = without_turns(service.jobs.history(view.record.id, limit=MOST_EVENTS))[:EVENTS]
    error = view.record.error or {}
    happened = [(event.created_at, in_words(event, error.get("message"))) for event in events]
    return replace(report, happened=happened)


def without_turns(events: Sequence[stored.EventRecord]) -> list[stored.EventRecord]:
    """Leave out all turns of a search but the last: a long one gives up hundreds."""
    turns = [(event.kind, event.data.get("stage"), event.data.get("why")) for event in events]
    return [
        event
        for n, event in enumerate(events)
        if not {"why", "attempt"} & {*event.data} or n < 2 or turns[n] != turns[n - 2]
    ]


def in_words(event: stored.EventRecord, failure: str | None = None) -> str:
    """An event, in words; why the job failed in the end is told elsewhere."""
    data = event.data
    if event.kind in ("stage", "put_down"):
        heading = StageKind(data["stage"]).heading.lower()
        if event.kind == "put_down":
            reason = {"turn": "another job's turn", "stopped": "its worker stopped"}
            return f"interrupted: {heading}, {reason[data['why']]}"
        again = "retried" if data.get("failures") else "resumed"
        return f"{again if 'attempt' in data else 'began'}: {heading}"
    if event.kind == "retry":
        return f"{data['stage']} failed and will be retried: {data['message']} ({data['type']})"
    error = data.get("error")
    why = f": {error['message']} ({error['type']})" if error else ""
    if error and error["message"] == failure:
        why = f" ({error['type']})"
    return f"{data.get('state', event.kind)}{why}"


def rated_values(service: Service, view: JobView) -> tuple[list[float], bool]:
    """The values of a search with one pattern, by trial, and whether high ones are good."""
    studies = [] if view.document.several else _studies(service, view, whole=False)
    values = [trial.value for trial in trials_of(studies, view.islands)]
    finite = [value for value in values if value is not None and math.isfinite(value)]
    return finite, view.document.is_maximised


def _of_transfer(view: JobView) -> Report:
    job, spec = view.record, view.transfer
    configuration = spec.found()
    return Report(
        title=job.name,
        subject="transfer",
        state=job.state.value,
        asked=words.transfer_in_words(spec),
        error=view.failure,
        configuration=configuration,
        transfers=view.transfers,
        stages=[_time(stage) for stage in job.stages],
        document=spec.model_dump(mode="json", exclude={"kind", "source", "configuration"}),
        commands=words.transfer_commands(spec),
        versions=configuration.versions,
    )


def _of_search(service: Service, view: JobView, *, whole: bool) -> Report:
    job, spec, several = view.record, view.spec, view.document.several
    configuration = transfers = None
    if job.best is not None:
        configuration = Configuration.model_validate(job.with_tasks(job.best))
        transfers = service.configurations.transfers(job.best, owner_id=job.owner_id)
    studies = _studies(service, view, whole=whole)
    measured = {n: value for n, value in view.perplexities.items() if value is not None}
    maximised, rated_by = is_maximised(spec.objective.name), spec.request(0).rated_by
    return Report(
        title=job.name,
        subject="search",
        state=job.state.value,
        asked=words.search_in_words(spec),
        error=view.failure,
        warnings=[*(job.warnings or ()), *view.notes],
        configuration=configuration,
        recovery=view.recovery,
        speed=view.speed,
        objective=rated_by,
        maximised=maximised,
        trials=with_measurements(
            trials_of(studies, 1 if several else view.islands),
            MeasuredTrials(perplexities=measured, divergences=view.divergences),
            configuration,
        ),
        left_out=sum(stage.done for stage in job.of_kind(StageKind.SEARCH)[len(studies) :]),
        points=None if view.points is None else [point.model_dump() for point in view.points],
        curve=view.curve,
        importance=importances(studies, maximised=maximised) if whole else {},
        layers={
            model: [LayerCell.of(cell) for cell in cells]
            for model, cells in view.finished.layers.items()
        },
        transfers=transfers or [],
        stages=[_time(stage) for stage in job.stages],
        document=job.spec,
        commands=words.search_commands(),
        prune_commands=words.prune_commands(str(job.id)[:8], spec, written=view.pruned == "done"),
        versions={} if configuration is None else configuration.versions,
    )


def _studies(service: Service, view: JobView, *, whole: bool) -> list[list[FrozenTrial]]:
    """The trials of the first islands that have begun; of several patterns, those of the answer."""
    studies: list[list[FrozenTrial]] = []
    names = view.study_names
    coefficients = whole or view.record.trials * max(1, view.islands) <= MOST_WITH_COEFFICIENTS
    if view.document.several:
        answer = view.answer_stage
        names = [] if answer is None else [names[answer.number]]
    for name in names:
        with service.database.transaction() as connection:
            studies.append(
                read_trials(connection, name, attributes=["method"], params=coefficients)
            )
        if sum(map(len, studies)) >= MOST_TRIALS:
            break
    return studies


def _time(stage: stored.Stage) -> StageTime:
    seconds = result_seconds(stage)
    if seconds is None:
        seconds = stage.elapsed_s or None
    if seconds is None and stage.started_at and stage.finished_at:
        seconds = (stage.finished_at - stage.started_at).total_seconds()
    return StageTime(
        kind=stage.kind.value,
        done=stage.state is StageState.DONE,
        seconds=seconds,
        attempts=stage.attempt,
    )
