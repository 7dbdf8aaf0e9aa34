"""
``/v1/jobs``: submit, look, and say what to do with a job.
"""

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from typing import Annotated
from uuid import UUID

import optuna
from fastapi import APIRouter, Header, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.concurrency import run_in_threadpool

from pho_service.api.answers import Job, JobPage, Trial, TrialPage
from pho_service.api.describe import (
    check_one_pattern,
    check_search,
    configuration_of,
    describe,
    islands,
    studies_in_words,
)
from pho_service.api.listing import Asked, PageSize, PageToken, Sorted, decode, page_of
from pho_service.api.problems import RETRY_AFTER_S, NoSuchIsland, documented
from pho_service.api.schema import EVENT, PATTERN
from pho_service.api.service import Caller, CallerParam, Service, ServiceParam
from pho_service.api.submission import checks, enter
from pho_service.errors import OutputError
from pho_service.spec.job import JobSpec
from pho_service.spec.job_size import check_size
from pho_service.spec.samplers import MAX_TRIALS
from storage import records as stored
from storage.listing import NEWEST
from storage.states import StageKind
from storage.studies import DatabaseGone, open_storage, study_name
from storage.trials import read_trials

logger = logging.getLogger(__name__)

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])

EVENTS_EVERY_S = 0.5  # how often a stream looks for new events

OnePattern = Annotated[
    str | None,
    Query(
        description="One of the patterns of a job that has several.",
        json_schema_extra={"pattern": PATTERN},
    ),
]
IdempotencyKey = Annotated[
    str | None,
    Header(
        min_length=1,
        max_length=255,
        pattern=r"^[\x21-\x7e]+$",
        description="The same key twice makes one job.",
    ),
]


class Extension(BaseModel):
    """Number of trials to add to a search."""

    model_config = ConfigDict(extra="forbid", strict=True)

    trials: int = Field(ge=1, le=MAX_TRIALS, description="Additional trials for each island.")


@router.post("", status_code=202, response_model=Job, responses=documented(413, 422))
def submit(
    spec: JobSpec,
    service: ServiceParam,
    caller: CallerParam,
    response: Response,
    idempotency_key: IdempotencyKey = None,
) -> Job:
    """Submit a search job. The answer comes at once; the job then runs by itself."""
    job = take(spec, service, caller, idempotency_key)
    response.headers["Location"] = f"/v1/jobs/{job.id}"
    return describe(job, service.notes(job))


def take(
    spec: JobSpec, service: Service, caller: Caller, idempotency_key: str | None
) -> stored.Job:
    """
    Store the job of a document, if it keeps to the rules of this service.

    Raises:
        FieldError: It does not; names the field.
        IdempotencyKeyReused, TooManyJobs: As :meth:`JobStore.submit`.
    """
    for check in checks(spec, service):
        check()
    return enter(
        service.jobs,
        spec.placed(service.access),
        asked=spec,
        owner_id=caller.key_id,
        idempotency_key=idempotency_key,
        settings=service.settings,
    )


@router.get("", response_model=JobPage, responses=documented(422))
def list_jobs(
    service: ServiceParam,
    asked: Asked,
    sort: Sorted = NEWEST,
    page_size: PageSize = 50,
    page_token: PageToken = None,
) -> JobPage:
    """List jobs, newest first or as `sort` says; all filters that are given hold at once."""
    found, token = page_of(service, asked, sort, page_size, page_token)
    return JobPage(jobs=[describe(job) for job in found], next_page_token=token)


@router.get("/{job_id:uuid}", response_model=Job, responses=documented(404, 422))
def show(job_id: UUID, service: ServiceParam, caller: CallerParam) -> Job:
    """Show a job with its progress."""
    job = service.jobs.get(job_id, visible_to=caller.visible_to)
    return describe(job, service.notes(job))


@router.delete(
    "/{job_id:uuid}", status_code=204, response_class=Response, responses=documented(404, 409, 422)
)
def delete(job_id: UUID, service: ServiceParam, caller: CallerParam) -> None:
    """
    Delete a job that is over or paused, with its studies and the files of its pruned model.

    Bundles stay for other jobs.
    """
    forget(service, job_id, visible_to=caller.visible_to)


def forget(service: Service, job_id: UUID, *, visible_to: UUID | None = None) -> None:
    """
    Delete a job, its studies and the files of its pruned model.

    Raises:
        NoSuchJob, StateConflict: As :meth:`JobStore.deleting`.
        OutputError: The artifact store is away; the job stays.
    """
    with (
        service.jobs.deleting(job_id, visible_to=visible_to) as job,
        open_storage(service.database.studies_url) as storage,
    ):
        if job.pruning is not None or job.of_kind(StageKind.TASKS):
            service.pruned.remove(job_id)
        for name in studies_in_words(job):
            try:
                optuna.delete_study(study_name=name, storage=storage)
            except KeyError:  # it never began, or was deleted by a deletion that was cut off
                continue


def _verb(name: str, summary: str) -> None:
    @router.post(
        f"/{{job_id:uuid}}:{name}",
        status_code=202,
        response_model=Job,
        responses=documented(404, 409, 422),
        name=name,
        summary=name.capitalize(),
        description=summary,
    )
    def ask(job_id: UUID, service: ServiceParam, caller: CallerParam) -> Job:
        return describe(service.jobs.ask(job_id, name, visible_to=caller.visible_to))


_verb("cancel", "Cancel a job. A worker that is busy with it stops at the next generation.")
_verb("pause", "Pause a job. A worker that is busy with it stops at the next generation.")
_verb("resume", "Continue a job that is paused or has failed, from what is stored.")


@router.post(
    "/{job_id:uuid}:extend",
    status_code=202,
    response_model=Job,
    responses=documented(404, 409, 413, 422),
)
def extend(job_id: UUID, extension: Extension, service: ServiceParam, caller: CallerParam) -> Job:
    """
    Give a search more trials. Confirmed candidates stay finalists, so the result cannot get worse.

    The files of its pruned model are deleted; `prune` in its document writes the new one's.
    """
    job = service.jobs.get(job_id, visible_to=caller.visible_to)
    check_search(job)
    check_one_pattern(job)
    spec = JobSpec.model_validate(job.spec)
    check_size(spec, service.limits, more_trials=extension.trials)
    had_files = job.pruning is not None
    job = service.jobs.ask(
        job_id,
        "extend",
        visible_to=caller.visible_to,
        trials=extension.trials,
        max_trials=min(MAX_TRIALS, service.limits.trials // spec.islands),  # at the same time, too
    )
    if had_files:  # of a model that is not the best any more
        try:
            service.pruned.remove(job_id)
        except OutputError as error:
            logger.warning("the files of a pruned model stay: %s", error)
    return describe(job)


@router.get("/{job_id:uuid}/trials", response_model=TrialPage, responses=documented(404, 409, 422))
def trials(
    job_id: UUID,
    service: ServiceParam,
    caller: CallerParam,
    island: Annotated[
        int, Query(ge=0, le=63, description="Which; of several patterns, which in their order.")
    ] = 0,
    page_size: PageSize = 100,
    page_token: PageToken = None,
) -> TrialPage:
    """List the trials of one island of a search by number."""
    job = service.jobs.get(job_id, visible_to=caller.visible_to)
    check_search(job)
    count = islands(job)
    if island >= count:
        raise NoSuchIsland(count)
    after = decode(page_token)
    first = 0 if after is None else after + 1
    with service.database.transaction() as connection:
        name = study_name(job.name, island)
        found = read_trials(connection, name, first=first, limit=page_size + 1)
    measured = {
        s.number: s.result["perplexity"]
        for s in job.of_kind(StageKind.PERPLEXITY)
        if s.result is not None
    }
    page = [
        Trial(
            island=island,
            number=t.number,
            state="complete" if t.value is not None else "failed",
            method=t.user_attrs["method"],
            value=t.value,
            perplexity=measured.get(t.number * count + island, t.user_attrs.get("perplexity")),
            scope=t.user_attrs["scope"],
            coefficients=t.user_attrs["coefficients"],
            failure=t.user_attrs.get("failure"),
            seconds=t.user_attrs.get("seconds"),
        )
        for t in found[:page_size]
    ]
    more = len(found) > page_size
    return TrialPage(trials=page, next_page_token=str(page[-1].number) if more else None)


@router.get(
    "/{job_id:uuid}/best",
    responses={
        200: {"description": "config.json", "content": {"application/json": {"schema": {
            "type": "object"}}}},
        **documented(404, 409, 422),
    },
    response_class=Response,
)  # fmt: skip
def best(
    job_id: UUID, service: ServiceParam, caller: CallerParam, pattern: OnePattern = None
) -> Response:
    """
    Get the best configuration: the config.json that `pho search` writes.

    A job with patterns has one for each; that of a target is of the sparsity that it has found.
    Models and texts of the service's folders are named from there, without the path to them.
    """
    job = service.jobs.get(job_id, visible_to=caller.visible_to)
    found = service.access.without_places(job.with_tasks(configuration_of(job, pattern)))
    text = json.dumps(found, indent=2) + "\n"
    return Response(text, media_type="application/json")


@router.get(
    "/{job_id:uuid}/events",
    responses={
        200: {"description": "A stream of server-sent events; it ends with the job.",
              "content": {"text/event-stream": {"schema": EVENT}}},
        **documented(404, 422),
    },
    response_class=EventSourceResponse,
)  # fmt: skip
async def events(
    job_id: UUID,
    request: Request,
    service: ServiceParam,
    caller: CallerParam,
    last_event_id: Annotated[
        int, Header(ge=0, lt=2**63, description="Continue after this event.")
    ] = 0,
) -> EventSourceResponse:
    """Follow a job: states, stages, progress, retries. Each event's data is JSON."""
    await run_in_threadpool(service.jobs.get, job_id, visible_to=caller.visible_to)

    async def stream() -> AsyncIterator[ServerSentEvent]:
        after = last_event_id
        while not await request.is_disconnected():
            try:
                if not await run_in_threadpool(service.lets_in, caller):
                    return  # the key was revoked meanwhile
                job = await run_in_threadpool(_unless_deleted, service, job_id)
                found = await run_in_threadpool(service.jobs.events, job_id, after=after)
            except DatabaseGone as error:
                logger.warning("a stream of events waits for the database: %s", error)
                await asyncio.sleep(RETRY_AFTER_S)
                continue
            for event in found:
                after = event.id
                data = {**event.data, "at": event.created_at.isoformat()}
                yield ServerSentEvent(id=str(event.id), event=event.kind, data=json.dumps(data))
            if job is None or (job.state.is_over and not found):
                return
            if not found:
                await asyncio.sleep(EVENTS_EVERY_S)

    return EventSourceResponse(stream())


def _unless_deleted(service: ServiceParam, job_id: UUID) -> stored.Job | None:
    try:
        return service.jobs.get(job_id)
    except stored.NoSuchJob:
        return None
