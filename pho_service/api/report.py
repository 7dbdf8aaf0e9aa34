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

from pho_service.api.describe import (
    answer_stage,
    curve,
    failure,
    is_several,
    is_transfer,
    islands,
    points,
    recovery,
    study_names,
)
from pho_service.api.problems import documented_file
from pho_service.api.service import Caller, CallerParam, Service, ServiceParam
from pho_service.shown import words
from pho_service.shown.page import MeasuredTrials, importances, render, trials_of, with_measurements
from pho_service.shown.parts import content_security_policy
from pho_service.shown.report import LayerCell, Report, StageTime
from pho_service.spec.configuration import Configuration
from pho_service.spec.job import JobSpec
from pho_service.spec.objective import is_maximised
from pho_service.spec.transfer import TransferSpec
from pho_service.tuning.plan import CORRECTS
from storage import records as stored
from storage.records import StageKind, StageState
from storage.studies import read_trials

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])

EVENTS, MOST_EVENTS = 50, 1000  # the newest that are shown, and that are read for them
MOST_TRIALS = 10_000  # that are read, which takes seconds; of whole islands, the first in any case


@router.get(
    "/{job_id:uuid}/report",
    responses=documented_file(
        "One page that needs no network.", 404, 422, kind="text/html", schema={"type": "string"}
    ),
    response_class=HTMLResponse,
)
async def report(
    job_id: UUID, request: Request, service: ServiceParam, caller: CallerParam
) -> HTMLResponse:
    """
    Get everything that is known of a job as a page: result, search, layers, timings, commands.

    Who accepts ``text/html`` by name, as browsers do, gets a page with a way back to the job's.
    """
    in_browser = "text/html" in request.headers.get("accept", "")
    back = f"/jobs/{job_id}" if in_browser else None
    page = await service.heavy.run(_page, job_id, service, caller, back)
    headers = {"Content-Security-Policy": content_security_policy(), "Vary": "Accept"}
    return HTMLResponse(page, headers=headers)


def _page(job_id: UUID, service: Service, caller: Caller, back: str | None) -> str:
    job = service.jobs.get(job_id, visible_to=caller.visible_to)
    return render(replace(collected(service, job, whole=True), job_page=back))


def collected(service: Service, job: stored.JobRecord, *, whole: bool = False) -> Report:
    """What is known of a job; the whole also says how much each coefficient mattered."""
    found = _of_transfer(job) if is_transfer(job) else _of_search(service, job, whole=whole)
    events = without_turns(service.jobs.history(job.id, limit=MOST_EVENTS))[:EVENTS]
    return replace(found, happened=[(event.created_at, told(event)) for event in events])


def without_turns(events: Sequence[stored.EventRecord]) -> list[stored.EventRecord]:
    """Leave out all turns of a search but the last: a long one gives up hundreds."""
    said = [(each.kind, each.data.get("stage"), each.data.get("why")) for each in events]
    return [
        event
        for number, event in enumerate(events)
        if not {"why", "attempt"} & {*event.data} or number < 2 or said[number] != said[number - 2]
    ]


def told(event: stored.EventRecord) -> str:
    """An event, in words."""
    data = event.data
    if event.kind in ("stage", "put_down"):
        heading = StageKind(data["stage"]).heading.lower()
        if event.kind == "put_down":
            reason = {"turn": "gave its turn to another job", "stopped": "its worker stopped"}
            return f"put down: {heading}, {reason[data['why']]}"
        again = "tried again" if data.get("failures") else "went on"
        return f"{again if 'attempt' in data else 'began'}: {heading}"
    if event.kind == "retry":
        return f"{data['stage']} failed, and is tried again: {data['message']} ({data['type']})"
    error = data.get("error")
    why = f": {error['message']} ({error['type']})" if error else ""
    return f"{data.get('state', event.kind)}{why}"


def rated_values(service: Service, job: stored.JobRecord) -> tuple[list[float], bool]:
    """The values of a search with one pattern, by trial, and whether high ones are good."""
    found = [] if is_several(job.spec) else _studies(service, job, None, whole=False)
    values = [trial.value for trial in trials_of(found, islands(job))]
    finite = [value for value in values if value is not None and math.isfinite(value)]
    return finite, is_maximised(job.spec.get("objective", {}).get("name"))


def _of_transfer(job: stored.JobRecord) -> Report:
    spec = TransferSpec.model_validate(job.spec)
    results = [stage.result for stage in job.of_kind(StageKind.TRANSFER)]
    found = spec.found()
    return Report(
        title=job.name,
        subject="transfer",
        state=job.state.value,
        asked=words.transfer_in_words(spec),
        error=failure(job),
        configuration=found,
        transfers=[result for result in results if result],
        stages=[_time(stage) for stage in job.stages],
        document=spec.model_dump(mode="json", exclude={"kind", "source", "configuration"}),
        commands=words.transfer_commands(spec),
        versions=found.versions,
    )


def _of_search(service: Service, job: stored.JobRecord, *, whole: bool) -> Report:
    spec = JobSpec.model_validate(job.spec)
    configuration = (
        None if job.best is None else Configuration.model_validate(job.with_tasks(job.best))
    )
    several = is_several(job.spec)
    answer = answer_stage(job) if several else None
    studies = _studies(service, job, answer, whole=whole)
    measured = {
        stage.number: float(stage.result["perplexity"])
        for stage in job.of_kind(StageKind.PERPLEXITY)
        if stage.result is not None and stage.result["perplexity"] is not None
    }
    compared = {
        int(number): float(value)
        for stage in job.of_kind(StageKind.CONFIRM)
        for number, value in ((stage.result or {}).get("divergences") or {}).items()
    }
    trials = trials_of(studies, 1 if several else islands(job))
    objective = spec.request(0).objective
    maximised = is_maximised(objective.name)
    transfers = (
        []
        if job.best is None
        else service.configurations.transfers(job.best, owner_id=job.owner_id)
    )
    return Report(
        title=job.name,
        subject="search",
        state=job.state.value,
        asked=words.search_in_words(spec),
        error=failure(job),
        warnings=[*(job.warnings or ()), *service.notes(job)],
        configuration=configuration,
        recovery=recovery(job),
        objective=objective.label,
        maximised=maximised,
        trials=with_measurements(
            trials, MeasuredTrials(perplexities=measured, divergences=compared), configuration
        ),
        left_out=sum(stage.done for stage in job.of_kind(StageKind.SEARCH)[len(studies) :]),
        points=[each.model_dump() for each in points(job) or ()] if several else None,
        curve=curve(job),
        importance=importances(studies, maximised=maximised) if whole else {},
        layers=_layers(job),
        transfers=transfers,
        stages=[_time(stage) for stage in job.stages],
        document=job.spec,
        commands=words.search_commands(),
        prune_commands=words.prune_commands(str(job.id)[:8], spec),
        versions={} if configuration is None else configuration.versions,
    )


def _studies(
    service: Service, job: stored.JobRecord, answer: stored.Stage | None, *, whole: bool
) -> list[list[FrozenTrial]]:
    """The trials of the first islands that have begun; of several patterns, those of the answer."""
    found: list[list[FrozenTrial]] = []
    names = study_names(job)
    if is_several(job.spec):
        names = [] if answer is None else [names[answer.number]]
    for name in names:
        with service.database.transaction() as connection:
            attributes = ["method", CORRECTS] if whole else ["method"]
            found.append(read_trials(connection, name, attributes=attributes, params=whole))
        if sum(map(len, found)) >= MOST_TRIALS:
            break
    return found


def _layers(job: stored.JobRecord) -> dict[str, list[LayerCell]]:
    """By model; none of a job that has not ended well."""
    for stage in job.of_kind(StageKind.FINISH):
        layers = (stage.result or {}).get("layers") or {}
        return {model: [LayerCell.of(cell) for cell in cells] for model, cells in layers.items()}
    return {}


def _time(stage: stored.Stage) -> StageTime:
    seconds = stage.elapsed_s or None
    if stage.result is not None and "seconds" in stage.result:
        seconds = float(stage.result["seconds"])
    elif seconds is None and stage.started_at and stage.finished_at:
        seconds = (stage.finished_at - stage.started_at).total_seconds()
    return StageTime(
        kind=stage.kind.value,
        done=stage.state is StageState.DONE,
        seconds=seconds,
        attempts=stage.attempt,
    )
