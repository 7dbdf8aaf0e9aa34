"""
For those who look after the service: workers, health, metrics.
"""

from collections.abc import Iterator
from uuid import UUID

from fastapi import APIRouter, Response
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric

from pho_service.api.answers import Health, Worker, WorkerList
from pho_service.api.problems import documented, problem
from pho_service.api.service import Caller, CallerParam, Service, ServiceParam
from storage.records import NoSuchJob
from storage.states import JobState, StageKind, StageState

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
        worker = Worker.model_validate(record, from_attributes=True)
        if not caller.sees_all:
            worker.name = f"worker {number}"
            if worker.job_id is not None and not _visible(service, worker.job_id, caller):
                worker.job_id = worker.stage = None
        found.append(worker)
    return WorkerList(workers=found)


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


@router.get("/readyz", response_model=Health, responses={503: documented()[503]})
async def readyz(service: ServiceParam) -> Health:
    """Check that the service can work: its database answers within a second."""
    await service.probe.check()
    return Health(status="ok")


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
        return problem(
            403,
            "not_for_this_key",
            "The metrics count the jobs of all keys, but this key sees its own jobs alone. "
            "`pho keys create --all-jobs` makes one that sees all.",
        )
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
