"""
For those who look after the service: workers, health, metrics, old jobs, webhooks.
"""

import asyncio
import json
import logging
from collections.abc import Iterator
from contextlib import suppress
from urllib.parse import urlsplit
from uuid import UUID

from anyio import CapacityLimiter
from anyio.to_thread import run_sync
from fastapi import APIRouter, Response
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric

from pho_service.api.answers import Health, Worker, WorkerList
from pho_service.api.artifacts import remove_files
from pho_service.api.jobs import forget
from pho_service.api.problems import documented, problem, sentence
from pho_service.api.service import Caller, CallerParam, Service, ServiceParam
from pho_service.errors import InvalidInput, OutputError
from pho_service.host.webhooks import NotDelivered, send
from storage.jobs import Notification, clear_queue, end, pruned_for, put_off, take
from storage.records import (
    Drain,
    JobState,
    NoSuchJob,
    StageKind,
    StageState,
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
    found = []
    records = service.jobs.workers(alive_s=service.settings.stalled_after_s)
    for number, record in enumerate(records, start=1):
        worker = _shown(service, record)
        if not caller.sees_all:
            worker.name = f"worker {number}"
            if worker.job_id is not None and not _visible(service, worker.job_id, caller):
                worker.job_id = worker.stage = None
        found.append(worker)
    return WorkerList(workers=found)


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
        return _needs_all("Workers serve")
    how = Drain.NOW if now else Drain.FINISH
    record = service.jobs.drain(worker_id, how, alive_s=service.settings.stalled_after_s)
    if record is None:
        said = "No worker with this id has reported lately. GET /v1/workers lists those that have."
        return problem(404, "no_such_worker", said)
    return _shown(service, record)


def _needs_all(who: str) -> Response:
    return problem(
        403,
        "not_for_this_key",
        f"{who} the jobs of all keys, but this key sees its own jobs alone. "
        "`pho keys create --all-jobs` makes one that sees all.",
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
    responses={503: documented()[503]},
)
async def readyz(service: ServiceParam) -> Health:
    """
    Check that the service can work: its database answers in a second, and workers see its store.

    `warnings` says if some see another artifact store. They take no stages; if all do, it is 503.
    """
    own, stores = await service.probe.check()
    if isinstance(service.store, OutputError):
        raise service.store
    others = sum(map(service.sees_other, stores))
    if others == 0 and not service.sees_other(own):
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


@router.get(
    "/metrics",
    response_class=Response,
    responses={
        200: {"description": "Prometheus' text format", "content": {"text/plain": {"schema": {
            "type": "string"}}}},
        **documented(),
    },
)  # fmt: skip
def metrics(service: ServiceParam, caller: CallerParam) -> Response:
    """Count the jobs of all keys, stages and workers, for Prometheus with a key that sees all."""
    if not caller.sees_all:
        return _needs_all("The metrics count")
    registry = CollectorRegistry()
    registry.register(_Counts(service))
    return Response(generate_latest(registry), media_type="text/plain; version=0.0.4")


class _Counts:
    """Counts at the moment of asking: any number of front ends tell the same."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> Iterator[Metric]:
        by_state, by_stage = self._service.jobs.counts()
        jobs = GaugeMetricFamily("pho_jobs", "Jobs by state.", labels=["state"])
        for state in JobState:
            jobs.add_metric([state.value], by_state.get(state, 0))
        yield jobs
        stages = GaugeMetricFamily(
            "pho_stages", "Stages of jobs that may work, by kind and state.",
            labels=["kind", "state"],
        )  # fmt: skip
        for kind in StageKind:
            for stage_state in (StageState.WAITING, StageState.RUNNING):
                count = by_stage.get((kind, stage_state), 0)
                stages.add_metric([kind.value, stage_state.value], count)
        yield stages
        alive = self._service.jobs.workers(alive_s=self._service.settings.stalled_after_s)
        workers = GaugeMetricFamily("pho_workers", "Workers by state.", labels=["state"])
        busy = sum(w.job_id is not None for w in alive)
        workers.add_metric(["busy"], busy)
        workers.add_metric(["idle"], len(alive) - busy)
        yield workers


# What the service deletes by itself: jobs and library entries that are older than the settings
# keep.
EVERY_S = 3600.0
STORE_EVERY_S = 10.0
QUEUE_DAYS = 7.0  # of entries of the queue that are over


async def keep_store_noted(service: Service) -> None:
    """Find out which artifact store the API sees, as soon as the store can be used."""
    while True:
        try:
            return await run_sync(service.note_store, abandon_on_cancel=True)
        except (StorageError, OutputError) as error:
            logger.warning("the artifact store is not known yet: %s", error)
        await asyncio.sleep(STORE_EVERY_S)


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
    while jobs_days and (found := service.jobs.over_for(jobs_days)):
        for job_id in found:
            try:
                forget(service, job_id)
                deleted += 1
            except (NoSuchJob, StateConflict):  # another process was faster, or it was resumed
                continue
    days = service.settings.keep_configurations_days
    entries = service.configurations.delete_older(days) if days else 0
    clear_queue(service.database, QUEUE_DAYS)
    if deleted or entries or removed:
        logger.info(
            "deleted %d jobs, %d library entries and %d pruned models of old age",
            deleted, entries, removed,
        )  # fmt: skip


# Who tells those who asked that their jobs have ended: some tasks of each front end, in turns.
NOTIFY_EVERY_S = 2.0  # how often a task looks when there is nothing to send
AT_ONCE = 4  # of one front end; a host that is slow holds up one of them, as each has one at a time


async def keep_telling(service: Service) -> None:
    """Send what is due, until this is cancelled; what is cut off then is sent again later."""
    limiter = CapacityLimiter(1)
    while service.webhooks.secret is not None and service.webhooks.hosts:
        try:
            told = await run_sync(tell_next, service, abandon_on_cancel=True, limiter=limiter)
        except StorageError as error:
            logger.warning("who asked to be told must wait: %s", error)
            told = False
        if not told:
            await asyncio.sleep(NOTIFY_EVERY_S)


def tell_next(service: Service) -> bool:
    """Send the message that is due for longest, of the hosts that none is being sent to."""
    with service.choosing:
        due = take(service.database, but_to=[*service.receivers])
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
        end(service.database, due, error=str(error))
    except NotDelivered as error:
        again = put_off(service.database, due, error=str(error))
        logger.warning(
            "a webhook was not delivered, and is %s: %s",
            "tried again" if again else "given up", error, extra=fields,
        )  # fmt: skip
    else:
        logger.info("a webhook was delivered", extra=fields)
        end(service.database, due)
