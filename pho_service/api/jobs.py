"""
``/v1/jobs``: submit, list, look, transfer, and say what to do with a job.

Pages share which jobs a list has, in which order, and how the beginning of an id names one.
"""

import asyncio
import json
import logging
import re
from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any
from uuid import UUID

import optuna
from fastapi import APIRouter, Body, Depends, Header, Query, Request, Response
from fastapi import Path as PathParam
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.concurrency import run_in_threadpool
from starlette.convertors import StringConvertor, register_url_convertor

from pho_service.api.answers import Job, JobPage, Submitted, Trial, TrialPage
from pho_service.api.problems import (
    RETRY_AFTER_S,
    AmbiguousId,
    NoSuchIsland,
    documented,
    documented_file,
    json_file,
    wrong_parameter,
)
from pho_service.api.schema import EVENT, PAGE_TOKEN, PATTERN
from pho_service.api.service import Caller, CallerParam, Service, ServiceParam
from pho_service.api.submission import check_uploads, doubts, enter, shorter, take
from pho_service.api.view import JobView
from pho_service.errors import OutputError
from pho_service.library import TransferFile, TransferTarget
from pho_service.spec.fields import check_field
from pho_service.spec.job import JobSpec
from pho_service.spec.job_options import changed
from pho_service.spec.objective import MAX_TRIALS
from pho_service.spec.transfer import TransferRequest, TransferSpec
from storage import records as stored
from storage.listing import NEWEST, JobFilter, Sort
from storage.records import JobState, StageKind
from storage.studies import DatabaseGone, open_storage, read_trials, study_name

logger = logging.getLogger(__name__)

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])

EVENTS_EVERY_S = 0.5  # how often a stream looks for new events


BEGINNING = "[0-9a-fA-F-]{4,36}"  # of an id that is looked for
ID_DIGITS = 32
MOST_NAMED = 3  # jobs whose ids begin alike

PageSize = Annotated[int, Query(ge=1, le=200, description="At most so many.")]
PageToken = Annotated[
    str | None,
    Query(
        description="The next_page_token of the page before.",
        json_schema_extra={"pattern": PAGE_TOKEN},
    ),
]
Sorted = Annotated[
    Sort,
    Query(
        description="What the list is sorted by; with a hyphen before it, the highest or the "
        "newest first. `rise` is the share by which the perplexity is above the dense model's, "
        "`gain` the share by which it is below RIA's. Jobs without the value come last."
    ),
]


def which_jobs(
    caller: Caller,
    *,
    states: Sequence[JobState] = (),
    models: Sequence[str] = (),
    patterns: Sequence[str] = (),
    labels: Sequence[str] = (),
    name: str | None = None,
    id_begins: str | None = None,
) -> JobFilter:
    """The jobs of a list that a caller may see."""
    return JobFilter(
        visible_to=caller.visible_to,
        states=states,
        models=models,
        patterns=patterns,
        labels=labels,
        name=(name or "").strip() or None,
        id_begins=None if id_begins is None else id_begins.replace("-", "").lower(),
    )


async def _filter(
    caller: CallerParam,
    state: Annotated[list[JobState] | None, Query(description="Only jobs in these states.")] = None,
    model: Annotated[
        list[str] | None,
        Query(description="Only jobs for one of these models, as their documents name them."),
    ] = None,
    pattern: Annotated[
        list[str] | None,
        Query(
            description="Only jobs that have one of these patterns, among others or alone; "
            "`target` has those that look for the highest sparsity."
        ),
    ] = None,
    label: Annotated[
        list[str] | None,
        Query(description="Only jobs that have all of these labels: NAME=VALUE, or just NAME."),
    ] = None,
    name: Annotated[
        str | None,
        Query(
            description="Only jobs whose name contains this, in capitals or not, or whose id "
            "begins with it."
        ),
    ] = None,
    id_begins: Annotated[
        str | None,
        Query(
            alias="id",
            pattern=f"^{BEGINNING}$",
            description="Only jobs whose id begins with it; four digits or more, hyphens or not.",
        ),
    ] = None,
) -> JobFilter:
    return which_jobs(
        caller,
        states=state or (),
        models=model or (),
        patterns=pattern or (),
        labels=label or (),
        name=name,
        id_begins=id_begins,
    )


Filter = Annotated[JobFilter, Depends(_filter)]


class _Segment(StringConvertor):
    """A part of a path up to the colon of a verb."""

    regex = "[^/:]+"


register_url_convertor("job", _Segment())
MOST_FITTING = 20  # jobs that are told for the beginning of an id


def jobs_beginning(service: Service, caller: Caller, beginning: str) -> list[stored.JobRecord]:
    """The jobs whose ids begin so, of those that a caller may see."""
    if not re.fullmatch(BEGINNING, beginning):
        return []
    which = which_jobs(caller, id_begins=beginning)
    return service.jobs.page(which, limit=MOST_FITTING)


def job_id_of(service: Service, caller: Caller, beginning: str) -> UUID:
    """The id that begins so, of the jobs that a caller may see."""
    if len(beginning.replace("-", "")) == ID_DIGITS and re.fullmatch(BEGINNING, beginning):
        return UUID(beginning)
    fits = jobs_beginning(service, caller, beginning)
    if not fits:
        raise stored.NoSuchJob(beginning)
    if len(fits) > 1:
        raise AmbiguousId(
            f"The ids of several jobs begin with {beginning}: "
            f"{', '.join(f'{job.id} ({job.name})' for job in fits[:MOST_NAMED])}"
            f"{', and more' if len(fits) > MOST_NAMED else ''}. Give more of it."
        )
    return fits[0].id


def _job_id(
    service: ServiceParam,
    caller: CallerParam,
    job_id: Annotated[
        str,
        PathParam(
            description="Id of the job, or its beginning: four digits or more.",
            json_schema_extra={"pattern": f"^{BEGINNING}$"},
        ),
    ],
) -> UUID:
    return job_id_of(service, caller, job_id)


JobId = Annotated[UUID, Depends(_job_id)]


def page_of(
    service: Service, which: JobFilter, sort: Sort, size: int, token: str | None
) -> tuple[list[stored.JobRecord], str | None]:
    """The jobs of a page, and the token of the next page if there is one."""
    # That of the newest first is a job's number, so that jobs which come or go meanwhile move no
    # other; in other orders, whose values change while jobs run, it is how many were given before.
    after = decode(token)
    if sort == NEWEST:
        records = service.jobs.page(which, before=after, limit=size + 1)
        last = str(records[size - 1].number) if len(records) > size else None
    else:
        skip = after or 0
        records = service.jobs.page(which, sort=sort, skip=skip, limit=size + 1)
        last = str(skip + size) if len(records) > size else None
    return records[:size], last


LAST_NUMBER = 2**31 - 2  # of a trial, which the study keeps in four bytes


def decode(token: str | None) -> int | None:
    """What a page token stands for; None begins with the first page."""
    if token is not None and not re.fullmatch(PAGE_TOKEN, token):
        raise wrong_parameter(
            "page_token", "is not one of our tokens: leave it out to begin with the first page"
        )
    return None if token is None else int(token)


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


@router.post("", status_code=202, response_model=Submitted, responses=documented(413, 422))
def submit(
    spec: JobSpec,
    service: ServiceParam,
    caller: CallerParam,
    response: Response,
    idempotency_key: IdempotencyKey = None,
) -> Submitted:
    """Submit a search job. The answer comes at once; the job then runs by itself."""
    return _submitted(spec, service, caller, response, idempotency_key)


def _submitted(
    spec: JobSpec, service: Service, caller: Caller, response: Response, key: str | None
) -> Submitted:
    job = take(spec, service, caller, key)
    place = f"/v1/jobs/{job.id}"
    response.headers["Location"] = place
    warnings = [*(job.warnings or ()), *service.notes(job), *shorter(spec, job)]
    return Submitted(
        id=job.id,
        name=job.name,
        state=job.state,
        warnings=[*warnings, *doubts(spec, service.access)],
        links={"job": place, "events": f"{place}/events", "page": f"/jobs/{job.id}"},
    )


@router.get("", response_model=JobPage, responses=documented(422))
def list_jobs(
    service: ServiceParam,
    which: Filter,
    sort: Sorted = NEWEST,
    page_size: PageSize = 50,
    page_token: PageToken = None,
) -> JobPage:
    """List jobs, newest first or as `sort` says; all filters that are given hold at once."""
    records, token = page_of(service, which, sort, page_size, page_token)
    manned = service.manned()
    views = [JobView(job, manned=manned) for job in records]
    return JobPage(jobs=[view.answer for view in views], next_page_token=token)


@router.get("/{job_id:job}", response_model=Job, responses=documented(404, 422))
def show(job_id: JobId, service: ServiceParam, caller: CallerParam) -> Job:
    """Show a job with its progress."""
    job = service.jobs.get(job_id, visible_to=caller.visible_to)
    return JobView(job, notes=service.notes(job)).answer


@router.delete(
    "/{job_id:job}", status_code=204, response_class=Response, responses=documented(404, 409, 422)
)
def delete(job_id: JobId, service: ServiceParam, caller: CallerParam) -> None:
    """
    Delete a job that is over or paused, with its studies and the files of its pruned model.

    Bundles stay for other jobs.
    """
    forget(service, job_id, visible_to=caller.visible_to)


def forget(service: Service, job_id: UUID, *, visible_to: UUID | None = None) -> None:
    """Delete a job, its studies and the files of its pruned model."""
    with (
        open_storage(service.database.studies_url) as storage,
        service.jobs.deleting(job_id, storage, visible_to=visible_to) as job,
    ):
        if job.pruning is not None or job.of_kind(StageKind.TASKS):
            service.pruned.remove(job_id)
        for name in JobView(job).studies_in_words:
            try:
                optuna.delete_study(study_name=name, storage=storage)
            except KeyError:  # it never began
                continue


def act(service: Service, job_id: UUID, verb: str, *, visible_to: UUID | None) -> stored.JobRecord:
    """Cancel, pause or resume a job; one that starts over counts for its key's quota again."""
    tokens, job = 0, service.jobs.get(job_id, visible_to=visible_to)
    if verb == "resume" and job.state is JobState.FAILED and not job.has_done:
        view = JobView(job)
        spec = view.transfer if view.document.is_transfer else view.spec
        tokens = spec.check_size(service.limits)
    return service.jobs.ask(job_id, verb, visible_to=visible_to, tokens=tokens)


def _verb(name: str, summary: str) -> None:
    @router.post(
        f"/{{job_id:job}}:{name}",
        status_code=202,
        response_model=Job,
        responses=documented(404, 409, 422),
        name=name,
        summary=name.capitalize(),
        description=summary,
    )
    def ask(job_id: JobId, service: ServiceParam, caller: CallerParam) -> Job:
        return JobView(act(service, job_id, name, visible_to=caller.visible_to)).answer


_verb("cancel", "Cancel a job. A worker that is busy with it stops at the next generation.")
_verb("pause", "Pause a job. A worker that is busy with it stops at the next generation.")
_verb("resume", "Continue a job that is paused or has failed, from what is stored.")


@router.post(
    "/{job_id:job}:extend",
    status_code=202,
    response_model=Job,
    responses=documented(404, 409, 413, 422),
)
def extend(job_id: JobId, extension: Extension, service: ServiceParam, caller: CallerParam) -> Job:
    """
    Give a search more trials. Finalists stay finalists, so the result cannot get worse.

    The files of its pruned model are deleted; `prune` in its document writes the new one's.
    """
    job = service.jobs.get(job_id, visible_to=caller.visible_to)
    view = JobView(job)
    view.check_search()
    view.check_scored()
    view.check_one_pattern()
    spec = view.spec
    tokens = spec.extension(extension.trials, service.limits, timed=service.timed_tokens(spec))
    had_files = job.pruning is not None
    most = min(MAX_TRIALS, service.limits.trials // spec.islands)  # of several at a time, too
    job = service.jobs.ask(
        job_id, "extend", visible_to=caller.visible_to, trials=extension.trials, max_trials=most,
        tokens=tokens,
    )  # fmt: skip
    if had_files:  # of a model that is not the best any more
        try:
            service.pruned.remove(job_id)
        except OutputError as error:
            logger.warning("the files of a pruned model stay: %s", error)
    return JobView(job).answer


@router.post(
    "/{job_id:job}:fork",
    status_code=202,
    response_model=Submitted,
    responses=documented(404, 409, 413, 422),
)
def fork(
    job_id: JobId,
    changes: Annotated[
        dict[str, Any],
        Body(description="What changes in the job's document; of parts, field by field."),
    ],
    service: ServiceParam,
    caller: CallerParam,
    response: Response,
    idempotency_key: IdempotencyKey = None,
) -> Submitted:
    """
    Submit a job like this one that begins with its trials inside the search space, with values.

    The search space may change, and all else that these values do not depend on.
    """
    view = JobView(service.jobs.get(job_id, visible_to=caller.visible_to))
    view.check_search()
    document = {**view.record.spec, "fork_of": str(job_id), "warm_start": None}
    try:
        spec = JobSpec.model_validate(changed(document, changes))
    except ValidationError as error:
        faults = [{**fault, "loc": ("body", *fault["loc"])} for fault in error.errors()]
        raise RequestValidationError(faults) from error
    return _submitted(spec, service, caller, response, idempotency_key)


@router.get("/{job_id:job}/trials", response_model=TrialPage, responses=documented(404, 409, 422))
def trials(
    job_id: JobId,
    service: ServiceParam,
    caller: CallerParam,
    island: Annotated[
        int, Query(ge=0, le=63, description="Which; of several patterns, which in their order.")
    ] = 0,
    page_size: PageSize = 100,
    page_token: PageToken = None,
) -> TrialPage:
    """List the trials of one island of a search by number."""
    view = JobView(service.jobs.get(job_id, visible_to=caller.visible_to))
    view.check_search()
    count = view.islands
    if island >= count:
        raise NoSuchIsland(count)
    after = decode(page_token)
    first = 0 if after is None else min(after, LAST_NUMBER) + 1
    with service.database.transaction() as connection:
        name = study_name(view.record.name, island)
        frozen_trials = read_trials(connection, name, first=first, limit=page_size + 1)
    perplexities = view.perplexities
    page = [
        Trial(
            island=island,
            number=t.number,
            state="complete" if t.value is not None else "failed",
            method=t.user_attrs["method"],
            value=t.value,
            perplexity=perplexities.get(t.number * count + island, t.user_attrs.get("perplexity")),
            scope=t.user_attrs["scope"],
            coefficients=t.user_attrs["coefficients"],
            failure=t.user_attrs.get("failure"),
            seconds=t.user_attrs.get("seconds"),
        )
        for t in frozen_trials[:page_size]
    ]
    more = len(frozen_trials) > page_size
    return TrialPage(trials=page, next_page_token=str(page[-1].number) if more else None)


@router.get(
    "/{job_id:job}/best",
    responses=documented_file("config.json", 404, 409, 422),
    response_class=Response,
)
def best(
    job_id: JobId, service: ServiceParam, caller: CallerParam, pattern: OnePattern = None
) -> Response:
    """
    Get the best configuration: the config.json that `pho search` writes.

    A job with patterns has one for each; that of a target is of the sparsity that it has found.
    Models and texts of the service's folders are named from there, without the path to them.
    """
    job = service.jobs.get(job_id, visible_to=caller.visible_to)
    configuration = job.with_tasks(JobView(job).configuration(pattern))
    return json_file(service.access.without_places(configuration))


@router.get(
    "/{job_id:job}/events",
    responses=documented_file(
        "A stream of server-sent events; it ends with the job.", 404, 422,
        kind="text/event-stream", schema=EVENT,
    ),
    response_class=EventSourceResponse,
)  # fmt: skip
async def events(
    job_id: JobId,
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
                new_events = await run_in_threadpool(service.jobs.events, job_id, after=after)
            except DatabaseGone as error:
                logger.warning("a stream of events waits for the database: %s", error)
                await asyncio.sleep(RETRY_AFTER_S)
                continue
            for event in new_events:
                after = event.id
                data = {**event.data, "at": event.created_at.isoformat()}
                yield ServerSentEvent(id=str(event.id), event=event.kind, data=json.dumps(data))
            if job is None or (job.state.is_over and not new_events):
                return
            if not new_events:
                await asyncio.sleep(EVENTS_EVERY_S)

    return EventSourceResponse(stream())


def _unless_deleted(service: ServiceParam, job_id: UUID) -> stored.JobRecord | None:
    try:
        return service.jobs.get(job_id)
    except stored.NoSuchJob:
        return None


@router.post(
    "/{job_id:job}:transfer",
    status_code=202,
    response_model=Job,
    responses=documented(404, 409, 413, 422),
)
def transfer(
    job_id: JobId,
    request: TransferRequest,
    service: ServiceParam,
    caller: CallerParam,
    response: Response,
    idempotency_key: IdempotencyKey = None,
    pattern: OnePattern = None,
) -> Job:
    """Measure a job's configuration on other models, in a job with a stage for each model."""
    source = service.jobs.get(job_id, visible_to=caller.visible_to)
    view = JobView(source)
    view.check_scored()
    configuration = view.configuration(pattern)
    request.check_access(service.access)
    check_uploads(request, service, caller)
    spec = TransferSpec.of(request, str(source.id), configuration, source.spec)
    tokens = spec.check_size(service.limits)
    if request.notify is not None:
        check_field("notify", service.webhooks.check, request.notify)
    placed = TransferSpec.of(
        request.placed(service.access), str(source.id), configuration, source.spec
    )
    job = enter(
        service.jobs, placed, submitted=spec, owner_id=caller.key_id,
        idempotency_key=idempotency_key, settings=service.settings, tokens=tokens,
    )  # fmt: skip
    response.headers["Location"] = f"/v1/jobs/{job.id}"
    return JobView(job).answer


@router.get(
    "/{job_id:job}/transfer",
    responses=documented_file("transfer.json", 404, 409, 422),
    response_class=Response,
)
def measured(job_id: JobId, service: ServiceParam, caller: CallerParam) -> Response:
    """Get what a transfer has measured so far: the transfer.json that `pho transfer` writes."""
    view = JobView(service.jobs.get(job_id, visible_to=caller.visible_to))
    if not view.document.is_transfer:
        raise view.conflict(
            "not_a_transfer",
            "The job is a search. POST :transfer measures its configuration on other models, as a "
            "job of its own.",
        )
    spec = view.transfer
    document = TransferFile(
        source=spec.source,
        configuration=spec.configuration,
        targets=[TransferTarget.model_validate(result) for result in view.transfers],
    )
    return json_file(document.model_dump(mode="json"))
