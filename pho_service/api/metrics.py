"""
``/metrics``: what Prometheus reads.
"""

import platform
from collections.abc import Iterable, Iterator
from importlib.metadata import version

from fastapi import APIRouter, Response
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.utils import floatToGoString

from pho_service.api.guard import METRICS
from pho_service.api.operations import needs_all
from pho_service.api.problems import documented_file
from pho_service.api.service import CallerParam, Service, ServiceParam
from storage.records import DURATIONS_S, AttemptEnd, JobState, StageKind, StageState

router = APIRouter(tags=["operations"])


@router.get(
    METRICS,
    response_class=Response,
    responses=documented_file(
        "Prometheus' text format", kind="text/plain", schema={"type": "string"}
    ),
)
def metrics(service: ServiceParam, caller: CallerParam) -> Response:
    """
    Count jobs, stages, workers and requests for Prometheus.

    It takes a key that sees all jobs, or one that reads the metrics alone.
    """
    if not (caller.sees_all or caller.scrape_only):
        return needs_all("The metrics count", "with `--scrape-only` one that reads /metrics alone")
    registry = CollectorRegistry()
    registry.register(_Stored(service))
    text = generate_latest(registry) + generate_latest(service.registry)
    return Response(text, media_type="text/plain; version=0.0.4")


class _Stored:
    """What the database knows, of which all front ends tell the same, and what this one uses."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> Iterator[Metric]:
        store, database = self._service.jobs, self._service.database
        by_state, by_stage = store.counts()
        yield _gauge(
            "pho_jobs", "Jobs by state.", ["state"],
            (((state,), by_state.get(state, 0)) for state in JobState),
        )  # fmt: skip
        places = [(k, s) for k in StageKind for s in (StageState.WAITING, StageState.RUNNING)]
        yield _gauge(
            "pho_stages", "Stages of jobs that may work, by kind and state.", ["kind", "state"],
            ((place, by_stage.get(place, 0)) for place in places),
        )  # fmt: skip
        oldest = store.oldest_waiting()
        yield _gauge(
            "pho_oldest_waiting_seconds", "For how long the first stage of a kind has waited.",
            ["kind"], (((kind,), oldest.get(kind, 0.0)) for kind in StageKind),
        )  # fmt: skip
        alive_s = self._service.settings.stalled_after_s
        alive = store.workers(alive_s=alive_s)
        busy, lost = sum(w.job_id is not None for w in alive), store.lost_workers(alive_s=alive_s)
        yield _gauge(
            "pho_workers", "Workers by state; lost are those that fell silent in the last day.",
            ["state"], ((("busy",), busy), (("idle",), len(alive) - busy), (("lost",), lost)),
        )  # fmt: skip
        memory = [(w, w.memory_used, w.memory_total) for w in alive]
        yield _gauge(
            "pho_gpu_memory_bytes", "Memory of the GPUs of each worker, used by whomever or free.",
            ["worker", "device", "state"],
            (
                ((w.name, w.device, state), size)
                for w, used, total in memory if used is not None and total is not None
                for state, size in (("used", used), ("free", total - used))
            ),
        )  # fmt: skip
        yield from self._attempts()
        used, most = database.pool()
        yield _gauge(
            "pho_database_connections", "Connections of this process to the database.", ["state"],
            ((("in_use",), used), (("free",), most - used)),
        )  # fmt: skip
        yield GaugeMetricFamily(
            "pho_database_waiting", "Requests that wait for one of them.", value=database.waiting
        )
        postgresql, size = database.server()
        yield GaugeMetricFamily("pho_database_bytes", "Size of the database.", value=size)
        stored = dict(self._service.stored)
        free = stored.pop("free", None)
        yield _gauge(
            "pho_artifact_store_bytes", "Files of the artifact store, measured every ten minutes.",
            ["content"], (((content,), size) for content, size in stored.items()),
        )  # fmt: skip
        if free is not None:
            yield GaugeMetricFamily(
                "pho_artifact_store_free_bytes", "Free space where the store is.", value=free
            )
        versions = (version("pho-service"), platform.python_version(), postgresql.split()[0])
        yield _gauge(
            "pho_build_info", "Versions, in labels; always 1.", ["version", "python", "postgresql"],
            ((versions, 1),),
        )  # fmt: skip

    def _attempts(self) -> Iterator[Metric]:
        tallies = self._service.jobs.tallies()
        attempts = CounterMetricFamily(
            "pho_attempts", "Attempts of stages that have ended, by outcome.",
            labels=["kind", "outcome"],
        )  # fmt: skip
        durations = HistogramMetricFamily(
            "pho_stage_seconds", "Seconds that stages which are done were worked on.",
            labels=["kind"],
        )  # fmt: skip
        for kind in StageKind:
            for outcome in AttemptEnd:
                alike = [t.count for t in tallies if (t.kind, t.outcome) == (kind, outcome)]
                attempts.add_metric([kind, outcome], sum(alike))
            done = [t for t in tallies if (t.kind, t.outcome) == (kind, AttemptEnd.DONE)]
            buckets = [
                (floatToGoString(limit), sum(t.count for t in done if t.up_to_s <= limit))
                for limit in DURATIONS_S
            ]
            durations.add_metric([kind], buckets, sum_value=sum(t.seconds for t in done))
        yield attempts
        yield durations


def _gauge(
    name: str, what: str, labels: list[str], values: Iterable[tuple[tuple[str, ...], float]]
) -> GaugeMetricFamily:
    gauge = GaugeMetricFamily(name, what, labels=labels)
    for label_values, value in values:
        gauge.add_metric(label_values, value)
    return gauge
