"""
State that all operations of the API share: the stores, the settings, and what bounds their work.
"""

import asyncio
import threading
import time
from collections import Counter as Counts
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Annotated, ParamSpec, TypeVar
from uuid import UUID

from anyio import CapacityLimiter
from anyio.to_thread import run_sync
from fastapi import Depends, Request
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
)
from starlette.types import Scope

from pho_service.api.answers import NO_WORKER
from pho_service.errors import InvalidInput, ModelError, OutputError
from pho_service.host.access import Access
from pho_service.host.artifacts import PrunedStore, TextFiles
from pho_service.host.machine import install_command
from pho_service.host.settings import Settings
from pho_service.host.webhooks import WebhookRules
from pho_service.planning.costs import CARDS, Machine, named_machine
from pho_service.planning.plan import RECOVER, Plan, obstacles, plan_job
from pho_service.planning.shapes import place_at_hand, read_shapes
from pho_service.planning.stage_memory import Peak, answers_bytes
from pho_service.spec.fields import FieldError, JobLimits
from pho_service.spec.job import JobSpec
from storage.claims import worker_name
from storage.configurations import ConfigurationStore
from storage.database import Database
from storage.jobs import JobStore
from storage.keys import Key, KeyStore, SessionStore
from storage.records import RESTING, JobRecord, StageKind, StageState, WorkerRecord
from storage.studies import DatabaseGone
from storage.texts import TextStore

USUAL_RATE = 5000  # tokens/s that a recovery is planned for where nothing is known of its model
# Requests that take seconds of a core: a few at a time, so that the others are answered meanwhile.
AT_ONCE = 2

_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")

P = ParamSpec("P")
T = TypeVar("T")
Stores = tuple[str | None, list[str | None]]


class Heavy:
    """Threads for what takes long; who comes when all are busy waits without holding one."""

    def __init__(self) -> None:
        self._threads = CapacityLimiter(AT_ONCE)

    async def run(self, work: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """What ``work`` gives, done in one of the threads."""
        return await run_sync(partial(work, *args, **kwargs), limiter=self._threads)


class Answers:
    """The requests that this process has answered: by route, never by path."""

    # So that nobody can make more of them, who asks for what is not there is counted as one.

    def __init__(self, registry: CollectorRegistry) -> None:
        disable_created_metrics()  # of each number, when it was begun
        ProcessCollector(registry=registry)
        self._count = Counter(
            "pho_http_requests", "Requests answered, by route, method and class of status.",
            ["route", "method", "status"], registry=registry,
        )  # fmt: skip
        self._seconds = Histogram(
            "pho_http_request_seconds", "Seconds until an answer began.", ["route"],
            buckets=(0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30), registry=registry,
        )  # fmt: skip

    def add(self, scope: Scope, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "other")
        method = scope["method"] if scope["method"] in _METHODS else "other"
        self._count.labels(route, method, f"{status // 100}xx").inc()
        self._seconds.labels(route).observe(seconds)


LOCAL_START_S = 60.0  # that a worker of this machine may take to start
ANSWER_S = 0.8  # for who asks whether all is well, and takes a second for a no


class Probe:
    """Asks a database in a thread and on a connection of its own, one question at a time."""

    # However many requests wait for the threads and connections of the others, and however long a
    # server that is frozen does not answer, who asks gets to know within a second.

    def __init__(self, database: Database, *, alive_s: float) -> None:
        url = database.url.render_as_string(hide_password=False)
        self._jobs = JobStore(Database(url, pool=1))
        self._alive_s = alive_s
        self._asked: Future[Stores] | None = None

    async def check(self) -> Stores:
        """What :meth:`JobStore.stores` tells."""
        if self._asked is None or self._asked.done():
            self._asked = Future()
            # A daemon: the process need not wait for a server that is frozen.
            threading.Thread(target=self._ask, args=(self._asked,), daemon=True).start()
        answer = asyncio.wrap_future(self._asked)
        try:
            return await asyncio.wait_for(asyncio.shield(answer), ANSWER_S)
        except TimeoutError:
            answer.add_done_callback(lambda done: done.cancelled() or done.exception())  # heard
            raise DatabaseGone(f"the database has not answered for {ANSWER_S:g} s") from None

    def close(self) -> None:
        self._jobs.database.close()

    def _ask(self, answer: "Future[Stores]") -> None:
        try:
            answer.set_result(self._jobs.stores(self._alive_s))
        except BaseException as error:
            answer.set_exception(error)


@dataclass(frozen=True, kw_only=True)
class Caller:
    """Caller of an operation."""

    key_id: UUID | None  # The key; None where none is needed
    sees_all: bool  # Whether other keys' jobs are visible
    key_prefix: str | None = None  # How it begins, for the log
    # SHA-256 of the token of a browser's login, which stands for the key.
    session: bytes | None = None
    scrape_only: bool = False  # Whether the key reads the metrics, and nothing else

    @classmethod
    def of(cls, key: Key, *, session: bytes | None = None) -> "Caller":
        return cls(
            key_id=key.id, sees_all=key.sees_all, key_prefix=key.prefix, session=session,
            scrape_only=key.scrape_only,
        )  # fmt: skip

    @property
    def visible_to(self) -> UUID | None:
        """In the sense of :class:`JobStore`: None sees all."""
        return None if self.sees_all else self.key_id


class Service:
    def __init__(self, database: Database, settings: Settings, *, keys_needed: bool) -> None:
        self.database = database
        self.settings = settings
        self.keys_needed = keys_needed
        self.jobs = JobStore(database)
        self.texts = TextStore(database)
        self.uploading: Counts[UUID | None] = Counts()  # Uploads that come in, by key
        self.configurations = ConfigurationStore(database)
        self.keys = KeyStore(database)
        self.sessions = SessionStore(database)
        self.access = Access.of(settings)
        self.limits = JobLimits.of(settings)
        self.webhooks = WebhookRules.of(settings)
        self.receivers: set[str] = set()  # Hosts that a webhook is being sent to
        self.choosing = threading.Lock()  # Held while the next webhook is chosen
        self.probe = Probe(database, alive_s=settings.stalled_after_s)
        self.store: str | OutputError | None = None  # its id, or why it is away; None: unknown
        self.stored: dict[str, int] = {}  # Bytes of the artifact store, as last measured
        self.registry = CollectorRegistry()  # What this process counts, for Prometheus
        self.answers = Answers(self.registry)
        self._began = time.monotonic()
        self.heavy = Heavy()
        self.planning = Heavy()  # which waits for the hub, too
        self.looking = CapacityLimiter(1)  # at the disk of the artifact store

    @property
    def text_files(self) -> TextFiles:
        """The files of uploaded texts."""
        assert self.access.texts is not None  # as of any settings
        return self.access.texts

    @cached_property
    def pruned(self) -> PrunedStore:
        """The pruned models, which need no store that can be used until one is asked for."""
        try:
            return PrunedStore.of(self.settings)
        except InvalidInput as error:
            raise OutputError(str(error)) from error

    def sees_other(self, store: str | None) -> bool:
        """Tell whether who sees this artifact store sees another one than this process."""
        return isinstance(self.store, str) and store is not None and store != self.store

    def note_store(self) -> None:
        """Find out which artifact store this process sees, so that workers can compare theirs."""
        try:
            self.store = self.pruned.id(new=True)
        except OutputError as error:
            self.store = error
            raise
        self.jobs.set_artifact_store(self.store)

    def manned(self) -> bool:
        """Whether a worker is connected, or this process has just started one of its own."""
        starting = self.settings.workers and time.monotonic() - self._began < LOCAL_START_S
        return bool(starting) or self.jobs.manned(alive_s=self.settings.stalled_after_s)

    def notes(self, job: JobRecord) -> list[str]:
        """What a job has left out, and what it waits for that nobody gives at present."""
        rest = [stage for stage in job.of_kind(StageKind.FINISH) if stage.number == RESTING]
        reasons = [stage.result["left_out"] for stage in rest if stage.result]
        left_out = [f"The pruned model is not recovered: {why}." for why in reasons if why]
        return [*left_out, *self._waits(job)]

    def _waits(self, job: JobRecord) -> list[str]:
        if job.state.may_work and not self.manned():
            return [NO_WORKER]
        if not job.spec.get("tasks") or job.state.is_over:
            return []
        measuring = job.of_kind(StageKind.TASKS)
        if measuring and not any(stage.state is StageState.WAITING for stage in measuring):
            return []
        if any(StageKind.TASKS in worker.stages for worker in self._alive):
            return []
        return [
            "No worker of this service measures tasks at present: they wait for one that has the "
            f"extra eval ({install_command('eval')})."
        ]

    def plan(self, spec: JobSpec, machine: Machine, place: str | None = None) -> Plan:
        """The plan of a job, by the files at a place of this machine, or wherever they are."""
        path = place or self.access.model(spec.model)
        try:
            shapes = read_shapes(spec.model, revision=spec.revision, path=path)
            plan = plan_job(spec, shapes, machine)
        except (InvalidInput, ModelError) as error:
            raise FieldError("/model", str(error)) from error
        if spec.prune:
            return plan
        searched = tuple(stage for stage in plan.stages if stage.kind is not StageKind.PRUNE)
        return replace(plan, stages=searched)

    def check_size(self, spec: JobSpec) -> int:
        """See that a job keeps to the limits, and that its recovery has room; count its tokens."""
        tokens = spec.check_size(self.limits, timed=self.timed_tokens(spec))
        if spec.recovery is None:
            return tokens
        plan, machine = self._recovery_plan(spec), named_machine("H100")
        peak = Peak(disk=answers_bytes(spec.recovery.tokens or 0))
        host = worker_name(0).rpartition(":")[0]
        hosts = {(w.name.rpartition(":")[0], w.device) for w in self._alive}
        if plan is not None and hosts == {(host, "cpu")}:  # all that they have is here
            stage = next(stage for stage in plan.stages if stage.title == RECOVER)
            machine, peak = plan.machine, replace(stage.peak, disk=peak.disk)
        for lacking in obstacles({RECOVER: peak}, machine, self.pruned.free()):
            given = "minutes" if spec.recovery.tokens is None else "tokens"
            raise FieldError(
                f"/recovery/{given}",
                f"{lacking}. Give fewer tokens, shorter windows, or train less: lora or norms.",
                code="job_too_large",
            )
        return tokens

    def timed_tokens(self, spec: JobSpec) -> int:
        """Tokens that the minutes of a recovery are planned for; as many as usual if unknown."""
        settings = spec.recovery_settings(share=1)  # the most that it can be
        if settings is None or settings.tokens is not None:
            return 0
        plan = self._recovery_plan(spec)
        if plan is None:
            return int(settings.time_s * USUAL_RATE)
        return plan.costs.recovered_tokens(settings)

    def _recovery_plan(self, spec: JobSpec) -> Plan | None:
        """The plan of a job on a worker, if the files of its model are on this machine."""
        devices = [worker.device for worker in self._alive]
        card = next((name for name in CARDS if any(name in each for each in devices)), "H100")
        machine = named_machine("cpu" if {*devices} == {"cpu"} else card)
        try:
            place = place_at_hand(self.access.model(spec.model), spec.revision)
            return None if place is None else self.plan(spec, machine, str(place))
        except ValueError:  # whoever loads the model says what is wrong with it
            return None

    @property
    def _alive(self) -> list[WorkerRecord]:
        return self.jobs.workers(alive_s=self.settings.stalled_after_s)

    def close(self) -> None:
        self.probe.close()
        self.database.close()

    def lets_in(self, caller: Caller) -> bool:
        """Tell whether a caller who was let in would be let in now."""
        if caller.session is not None:
            return self.sessions.find(caller.session) is not None
        if caller.key_id is not None:
            return self.keys.is_open(caller.key_id)
        return not (self.keys_needed or self.keys.exist())


# Not in a thread: those are for what waits for the database, and may all be busy.
async def _service(request: Request) -> Service:
    service = request.app.state.service
    assert isinstance(service, Service)
    return service


async def _caller(request: Request) -> Caller:
    caller = request.state.caller
    assert isinstance(caller, Caller)
    return caller


ServiceParam = Annotated[Service, Depends(_service)]
CallerParam = Annotated[Caller, Depends(_caller)]
