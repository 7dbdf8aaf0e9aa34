"""
``/v1/jobs/{id}/report``: a job as a page, from all that is stored of it.
"""

from dataclasses import replace
from datetime import UTC, datetime
from uuid import UUID

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse
from optuna.trial import FrozenTrial

from pho_service.api.describe import failure, is_transfer, islands, study_names
from pho_service.api.job_view import EVENTS, told
from pho_service.api.points import answer_stage, curve, is_several
from pho_service.api.problems import documented
from pho_service.api.service import Caller, CallerParam, Service, ServiceParam
from pho_service.report import words
from pho_service.report.data import Report, StageTime
from pho_service.report.layers import LayerCell
from pho_service.report.page import content_security_policy, render
from pho_service.report.study import MeasuredTrials, importances, trials_of, with_measurements
from pho_service.spec.configuration import Configuration
from pho_service.spec.job import JobSpec
from pho_service.spec.transfer import TransferSpec
from pho_service.tuning.plan import CORRECTS
from storage import records as stored
from storage.states import StageKind, StageState
from storage.trials import read_trials

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])

MOST_TRIALS = 10_000  # that are read, which takes seconds; of whole islands, the first in any case


@router.get(
    "/{job_id:uuid}/report",
    responses={
        200: {"description": "One page that needs no network.",
              "content": {"text/html": {"schema": {"type": "string"}}}},
        **documented(404, 422),
    },
    response_class=HTMLResponse,
)  # fmt: skip
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
    found = _of_transfer(job) if is_transfer(job) else _of_search(service, job)
    events = service.jobs.history(job.id, limit=EVENTS)
    happened = [(event.created_at, told(event)) for event in events]
    return render(replace(found, happened=happened, job_page=back))


def _of_transfer(job: stored.Job) -> Report:
    spec = TransferSpec.model_validate(job.spec)
    results = [stage.result for stage in job.of_kind(StageKind.TRANSFER)]
    found = spec.found()
    return Report(
        title=job.name,
        subject="transfer",
        made_at=datetime.now(UTC),
        state=job.state.value,
        asked=words.transfer_in_words(spec),
        error=failure(job),
        configuration=found,
        transfers=[result for result in results if result],
        stages=[_time(stage) for stage in job.stages],
        document=words.transfer_document(spec),
        commands=words.transfer_commands(spec),
        versions=found.versions,
    )


def _of_search(service: Service, job: stored.Job) -> Report:
    spec = JobSpec.model_validate(job.spec)
    configuration = (
        None if job.best is None else Configuration.model_validate(job.with_tasks(job.best))
    )
    several = is_several(job.spec)
    answer = answer_stage(job) if several else None
    studies = _studies(service, job, answer)
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
    maximised = spec.plan(0).direction == "maximize"
    transfers = (
        []
        if job.best is None
        else service.configurations.transfers(job.best, owner_id=job.owner_id)
    )
    return Report(
        title=job.name,
        subject="search",
        made_at=datetime.now(UTC),
        state=job.state.value,
        asked=words.search_in_words(spec),
        error=failure(job),
        warnings=job.warnings or [],
        configuration=configuration,
        objective=spec.request(0).objective.label,
        maximised=maximised,
        trials=with_measurements(
            trials, MeasuredTrials(perplexities=measured, divergences=compared), configuration
        ),
        left_out=sum(stage.done for stage in job.of_kind(StageKind.SEARCH)[len(studies) :]),
        several=several,
        curve=curve(job),
        importance=importances(studies, maximised=maximised),
        layers=_layers(job),
        transfers=transfers,
        stages=[_time(stage) for stage in job.stages],
        document=job.spec,
        commands=words.search_commands(),
        prune_commands=words.prune_commands(str(job.id), spec),
        versions={} if configuration is None else configuration.versions,
    )


def _studies(
    service: Service, job: stored.Job, answer: stored.Stage | None
) -> list[list[FrozenTrial]]:
    """
    Return the trials of the first islands; none for a search that has not begun. With several
    patterns, they are those of the answer.
    """
    found: list[list[FrozenTrial]] = []
    names = study_names(job)
    if is_several(job.spec):
        names = [] if answer is None else [names[answer.number]]
    for name in names:
        with service.database.transaction() as connection:
            found.append(read_trials(connection, name, attributes=["method", CORRECTS]))
        if sum(map(len, found)) >= MOST_TRIALS:
            break
    return found


def _layers(job: stored.Job) -> dict[str, list[LayerCell]]:
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
