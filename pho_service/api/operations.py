"""
For those who look after the service: workers, health, old jobs, webhooks.
"""

import asyncio
import json
import logging
from contextlib import suppress
from urllib.parse import urlsplit
from uuid import UUID

from anyio import CapacityLimiter, move_on_after
from anyio.to_thread import run_sync
from fastapi import APIRouter, Request, Response

from pho_service.api import texts
from pho_service.api.answers import Health, Worker, WorkerList
from pho_service.api.artifacts import remove_files
from pho_service.api.jobs import forget
from pho_service.api.problems import documented, problem, sentence
from pho_service.api.service import Caller, CallerParam, Service, ServiceParam
from pho_service.errors import InvalidInput, OutputError
from pho_service.host.webhooks import NotDelivered, send
from pho_service.spec.document import format_bytes, sizes_told
from storage.jobs import pruned_for
from storage.notifications import (
    Notification,
    end_notification,
    postpone_notification,
    take_notification,
)
from storage.records import (
    Drain,
    NoSuchJob,
    StateConflict,
    WorkerRecord,
)
from storage.studies import StorageError

logger = logging.getLogger(__name__)


router = APIRouter(tags=["operations"])


@router.get("/v1/workers", response_model=WorkerList, responses=documented())
def workers(service: ServiceParam, caller: CallerParam) -> WorkerList:
    """
    List the workers that reported recently, with what they are doing.

    A key that sees its own jobs alone is told of the others' neither machine nor work.
    """
    reported = []
    records = service.jobs.workers(alive_s=service.settings.stalled_after_s)
    for number, record in enumerate(records, start=1):
        worker = _shown(service, record)
        if not caller.sees_all:
            worker.name = f"worker {number}"
            if worker.job_id is not None and not _visible(service, worker.job_id, caller):
                worker.job_id = worker.stage = None
        reported.append(worker)
    return WorkerList(workers=reported)


def _shown(service: Service, record: WorkerRecord) -> Worker:
    worker = Worker.model_validate(record, from_attributes=True)
    return worker.model_copy(update={"other_store": service.sees_other(record.store)})


@router.post(
    "/v1/workers/{worker_id:uuid}:drain",
    status_code=202,
    response_model=Worker,
    responses=documented(404, 422),
)
def drain(
    worker_id: UUID, service: ServiceParam, caller: CallerParam, now: bool = False
) -> Worker | Response:
    """
    Have a worker take no more stages, and end once the one that it has in hand is done.

    With `now` it hands that stage back instead, and another worker goes on with it. It takes a key
    that sees all jobs. A process that starts its workers again, such as a Deployment of Kubernetes,
    starts another one.
    """
    if not caller.sees_all:
        return needs_all("Workers serve")
    how = Drain.NOW if now else Drain.FINISH
    record = service.jobs.drain(worker_id, how, alive_s=service.settings.stalled_after_s)
    if record is None:
        said = "No worker with this id has reported lately. GET /v1/workers lists those that have."
        return problem(404, "no_such_worker", said)
    return _shown(service, record)


def needs_all(who: str, other: str = "") -> Response:
    return problem(
        403,
        "not_for_this_key",
        f"{who} the jobs of all keys, but this key sees its own jobs alone. "
        f"`pho keys create NAME --all-jobs` makes one that sees all{other and ', and '}{other}.",
    )


def _visible(service: Service, job_id: UUID, caller: Caller) -> bool:
    try:
        service.jobs.get(job_id, visible_to=caller.visible_to)
    except NoSuchJob:
        return False
    return True


@router.get("/healthz", response_model=Health)
async def healthz() -> Health:
    """Check that the process is alive."""
    return Health(status="ok")


@router.get(
    "/readyz",
    response_model=Health,
    response_model_exclude_defaults=True,
    responses=documented(422),
)
async def readyz(
    request: Request, service: ServiceParam, verbose: str | None = None
) -> Health | Response:
    """
    Check that the service can work: its database answers in a second, and workers see its store.

    `warnings` says if some see another artifact store. They take no stages; if all do, it is 503.
    With `?verbose`, which takes a key that sees all jobs, `details` has the sizes of the database
    and of the artifact store, and which tables have many dead rows.
    """
    if verbose is None:
        return await _ready(service)
    caller = getattr(request.state, "caller", None)
    if caller is None or not caller.sees_all:
        return needs_all("The sizes count")
    health = await _ready(service)
    return health.model_copy(update={"details": await run_sync(_sizes, service)})


def _sizes(service: Service) -> list[str]:
    (version, size), tables = service.database.server(), service.database.tables()
    return [
        f"PostgreSQL {version.split()[0]}, {format_bytes(size)}",
        *(f"dead rows: {table}" for table in tables),
        f"artifact store: {sizes_told(service.stored) or 'not measured yet'}",
    ]


async def _ready(service: Service) -> Health:
    api_store, stores = await service.probe.check()
    if isinstance(service.store, OutputError):
        raise service.store
    with move_on_after(FULL_S):  # a store that is away does not answer
        free = await run_sync(service.pruned.free, abandon_on_cancel=True, limiter=service.looking)
        if free is not None and free < FULL:
            raise OutputError(
                f"the artifact store is full: {format_bytes(free)} are free. Jobs fail until there "
                "is room; resume them then."
            )
    others = sum(map(service.sees_other, stores))
    if others == 0 and not service.sees_other(api_store):
        return Health(status="ok")
    who = f"{others} of {len(stores)} workers see" if others else "another process of the API sees"
    said = (
        f"{who} another artifact store than this process of the API. Give the API and all workers "
        "the same PHO_ARTIFACTS; in containers, mount the same volume there. Then start them "
        "again. `pho workers` shows which workers it is."
    )
    if others < len(stores):
        return Health(status="ok", warnings=[sentence(said)])
    raise OutputError(said)


# What the service deletes by itself: jobs and library entries that are older than the settings
# keep.
EVERY_S = 3600.0
FULL, FULL_S = 2**20, 0.3  # bytes that are free in a store that is full; patience with its disk
STORE_EVERY_S = 10.0
MEASURED_EVERY_S = 600.0  # the artifact store, all of whose files are looked at
QUEUE_DAYS = 7.0  # of entries of the queue that are over


async def keep_store_noted(service: Service) -> None:
    """Find out which artifact store the API sees, as soon as the store can be used."""
    while True:
        try:
            return await run_sync(service.note_store, abandon_on_cancel=True)
        except (StorageError, OutputError) as error:
            logger.warning("the artifact store is not known yet: %s", error)
        await asyncio.sleep(STORE_EVERY_S)


async def keep_store_measured(service: Service) -> None:
    """Measure the artifact store now and then, until this is cancelled."""
    while True:
        try:
            service.stored = await run_sync(lambda: service.pruned.sizes(), abandon_on_cancel=True)
        except OutputError as error:
            service.stored = {}
            logger.warning("%s", error)
        await asyncio.sleep(MEASURED_EVERY_S)


async def keep_up(service: Service) -> None:
    """Delete what is too old, now and every hour, until this is cancelled."""
    while True:
        try:
            await run_sync(sweep, service, abandon_on_cancel=True)
        except (StorageError, OutputError) as error:
            logger.warning("what is too old stays for now: %s", error)
        await asyncio.sleep(EVERY_S)


def sweep(service: Service) -> None:
    """Delete what is older than the settings keep. Several at once do no harm."""
    pruned_days = service.settings.keep_pruned_days
    removed = 0
    while pruned_days and (old := pruned_for(service.database, pruned_days)):
        for job_id in old:
            with suppress(NoSuchJob):  # deleted since
                remove_files(service, job_id)
                removed += 1
    jobs_days = service.settings.keep_jobs_days
    deleted = 0
    while jobs_days and (old_jobs := service.jobs.over_for(jobs_days)):
        for job_id in old_jobs:
            try:
                forget(service, job_id)
                deleted += 1
            except (NoSuchJob, StateConflict):  # another process was faster, or it was resumed
                continue
    days = service.settings.keep_configurations_days
    entries = service.configurations.delete_older(days) if days else 0
    service.jobs.clear_queue(QUEUE_DAYS)
    unused = texts.sweep(service, pruned_days)
    if deleted or entries or removed or unused:
        logger.info(
            "deleted %d jobs, %d library entries, %d pruned models and %d texts of old age",
            deleted, entries, removed, unused,
        )  # fmt: skip


# Who tells those who asked that their jobs have ended: some tasks of each front end, in turns.
NOTIFY_EVERY_S = 2.0  # how often a task looks when there is nothing to send
AT_ONCE = 4  # of one front end; a host that is slow holds up one of them, as each has one at a time


async def keep_telling(service: Service) -> None:
    """Send what is due, until this is cancelled; what is cut off then is sent again later."""
    limiter = CapacityLimiter(1)
    while service.webhooks.secret is not None and service.webhooks.hosts:
        try:
            was_sent = await run_sync(tell_next, service, abandon_on_cancel=True, limiter=limiter)
        except StorageError as error:
            logger.warning("who asked to be told must wait: %s", error)
            was_sent = False
        if not was_sent:
            await asyncio.sleep(NOTIFY_EVERY_S)


def tell_next(service: Service) -> bool:
    """Send the message that is due for longest, of the hosts that none is being sent to."""
    with service.choosing:
        due = take_notification(service.database, but_to=[*service.receivers])
        if due is None:
            return False
        host = urlsplit(due.url).netloc.lower()
        service.receivers.add(host)
    try:
        _tell(service, due)
    finally:
        service.receivers.discard(host)
    return True


def _tell(service: Service, due: Notification) -> None:
    body = json.dumps({"id": str(due.id), **due.document}).encode()
    fields = {"job": due.document["job_id"], "notification": str(due.id)}
    try:
        send(service.webhooks, due.url, str(due.id), body)
    except InvalidInput as error:  # the rules have changed since, or its name's address
        logger.warning("a webhook may not be sent: %s", error, extra=fields)
        end_notification(service.database, due, error=str(error))
    except NotDelivered as error:
        again = postpone_notification(service.database, due, error=str(error))
        logger.warning(
            "a webhook was not delivered, and is %s: %s",
            "tried again" if again else "given up", error, extra=fields,
        )  # fmt: skip
    else:
        logger.info("a webhook was delivered", extra=fields)
        end_notification(service.database, due)
