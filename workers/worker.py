"""
A worker: takes stages out of the queue, one at a time, until it is told to stop.
"""

import asyncio
import functools
import logging
import os
import platform
import signal
import tempfile
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any

import procrastinate
import procrastinate.exceptions
import psycopg_pool
import torch
from procrastinate import BaseRetryStrategy, JobContext, RetryDecision
from procrastinate.jobs import Job as QueueEntry
from procrastinate.jobs import Status
from tenacity import (
    AsyncRetrying,
    RetryCallState,
    Retrying,
    retry_if_exception_type,
    stop_after_delay,
)
from tenacity.wait import wait_exponential

from pho_service.access import Access
from pho_service.errors import PhoError
from pho_service.logs import about
from pho_service.settings import Settings
from pho_service.tracing import span
from storage.database import Database
from storage.jobs import Claim, JobStore, LostClaim
from storage.queue import TASK
from storage.states import StageKind
from storage.studies import DatabaseGone, StorageError
from workers.bundles import BundleStore
from workers.devices import take_device
from workers.inputs import Inputs
from workers.stages import Stages
from workers.watch import HandBack

logger = logging.getLogger(__name__)

UPKEEP = "upkeep"  # a queue beside those of the stages
_FIRST = 1_000_000  # before every stage
_GIVE_UP_AFTER_S = 600.0  # a stage whose database is away


class Again(Exception):
    """The queue should give a stage out again, after a while."""

    def __init__(self, after_s: float) -> None:
        super().__init__(after_s)
        self.after_s = after_s


class _WhenAsked(BaseRetryStrategy):
    """Entries come again if a stage asks for it, or could not even say what went wrong."""

    def __init__(self, after_s: float) -> None:
        self._after_s = after_s

    def get_retry_decision(self, *, exception: BaseException, job: QueueEntry) -> RetryDecision:
        del job
        after_s = exception.after_s if isinstance(exception, Again) else self._after_s
        return RetryDecision(retry_in={"milliseconds": round(after_s * 1000)})


@dataclass(frozen=True, kw_only=True)
class WorkerOptions:
    """
    Attributes:
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        kinds: Stages that this worker does.
        parent: Stop when this process is not our parent any more; 0 for never.
    """

    device: str = "auto"
    kinds: tuple[StageKind, ...] = tuple(StageKind)
    parent: int = 0


def run_worker(database_url: str, settings: Settings, options: WorkerOptions) -> None:
    """
    Work until SIGTERM or SIGINT.

    Raises:
        StorageError: The database cannot be used at all.
        InvalidInput: The device or a setting is wrong.
    """
    idle_limit_s = max(10.0, settings.stalled_after_s)
    database = Database(database_url, pool=4, idle_limit_s=idle_limit_s)
    try:
        with (
            take_device(options.device) as device,
            tempfile.TemporaryDirectory(prefix="pho-worker-") as folder,
        ):
            access = Access.of(settings)  # before the folder changes
            artifacts = settings.artifacts or str(settings.data_dir.expanduser() / "artifacts")
            bundles = BundleStore(artifacts, settings.cache_dir.expanduser().resolve())
            os.chdir(folder)  # so that no name of a job is by chance a file's here
            worker = _Worker(database, settings, options, Inputs(access, bundles, device))
            try:
                asyncio.run(worker.run())
            finally:
                os.chdir("/")
    finally:
        database.close()


class _Worker:
    def __init__(
        self, database: Database, settings: Settings, options: WorkerOptions, inputs: Inputs
    ) -> None:
        self._id = uuid.uuid4()
        self._database = database
        self._settings = settings
        self._options = options
        self._store = JobStore(database)
        self._stopping = threading.Event()
        self._entered = False  # once the tables are there
        self._inputs = inputs
        self._stages = Stages(self._store, inputs, self._stopping)

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        working = asyncio.create_task(self._work_through_outages())
        beating = asyncio.create_task(self._beat(working))

        # The loop's own handlers would be gone before the process is: a late SIGTERM would kill it.
        _on_signals(lambda *_: loop.call_soon_threadsafe(self._stop, working))
        try:
            await working
        except asyncio.CancelledError:
            logger.info("stopped")
        finally:
            _on_signals(signal.SIG_IGN)
            beating.cancel()
            try:
                if self._entered:
                    self._store.remove_worker(self._id)
            except StorageError:
                logger.warning("the database is away: the worker's entry stays until it is stale")

    def _stop(self, working: "asyncio.Task[None]") -> None:
        """Once: told again, procrastinate would forget the stage that is being handed back."""
        if not self._stopping.is_set():
            self._stopping.set()
            working.cancel()

    async def _work_through_outages(self) -> None:
        """Take entries out of the queue; when the database goes, wait for it to come back."""
        outage = (DatabaseGone, procrastinate.exceptions.ConnectorException)
        async for attempt in AsyncRetrying(
            retry=retry_if_exception_type(outage),
            wait=wait_exponential(multiplier=0.2, max=5),
            before_sleep=_say_why,
        ):
            with attempt:
                await asyncio.to_thread(self._database.check_migrated)
                await self._work()
                if not self._stopping.is_set():
                    raise DatabaseGone("the queue's listener was cut off")

    async def _work(self) -> None:
        connector = procrastinate.PsycopgConnector(
            conninfo=self._database.conninfo, min_size=1, max_size=4, timeout=10
        )
        app = procrastinate.App(connector=connector)
        self._add_tasks(app)
        try:
            await app.open_async()
        except psycopg_pool.PoolTimeout as error:
            await connector.close_async()
            raise DatabaseGone(str(error)) from error
        try:
            await asyncio.to_thread(self._enter_anew)
            logger.info("working on %s", ", ".join(self._options.kinds))
            await app.run_worker_async(
                queues=[*self._options.kinds, UPKEEP],
                concurrency=1,
                fetch_job_polling_interval=2.0,
                update_heartbeat_interval=self._settings.heartbeat_s,
                stalled_worker_timeout=self._settings.stalled_after_s,
                delete_jobs="successful",
                install_signal_handlers=False,
            )
        finally:
            await app.close_async()

    def _add_tasks(self, app: procrastinate.App) -> None:
        stalled_after_s = self._settings.stalled_after_s
        give_again = functools.partial(self._store.give_again, alive_s=stalled_after_s)
        # After an outage, those who live must be able to say so first.
        patient_until = time.monotonic() + (stalled_after_s if self._entered else 0.0)

        @app.task(name=TASK, pass_context=True, retry=_WhenAsked(self._settings.retry_after_s))
        def run_stage(context: JobContext, stage_id: int) -> None:
            assert context.job.id is not None
            self._run_stage(stage_id, context.job.id)

        # procrastinate's recipe, but with new entries: by themselves those of dead workers do not
        # come back, and the old ones are finished by a worker that was only frozen.
        every_s = max(1, min(30, round(stalled_after_s / 3)))

        @app.periodic(cron=f"* * * * * */{every_s}")
        @app.task(name="retry_stalled", queue=UPKEEP, queueing_lock=UPKEEP, priority=_FIRST)
        async def retry_stalled(timestamp: int) -> None:
            del timestamp
            if time.monotonic() < patient_until:
                return
            for entry in await app.job_manager.get_stalled_jobs(
                seconds_since_heartbeat=stalled_after_s
            ):
                assert entry.id is not None
                if not await asyncio.to_thread(give_again, entry.id):
                    continue  # its worker lives, and reports to us if not to the queue
                logger.warning("stage of a dead worker comes again", extra={"entry": entry.id})
                try:
                    await app.job_manager.finish_job(entry, Status.FAILED, delete_job=True)
                except procrastinate.exceptions.ConnectorException as error:
                    # Another worker was faster; after an outage, the entry is found again.
                    logger.info(
                        "entry %d was not taken out: %s", entry.id, error.__cause__ or error
                    )

    def _run_stage(self, stage_id: int, queue_id: int) -> None:
        """Do what an entry of the queue stands for."""
        claim = self._store.claim(stage_id, queue_id, self._id)
        if claim is None:
            return
        fields: dict[str, str | int] = {
            "job": str(claim.job.id),
            "stage": claim.stage.kind.value,
            "number": claim.stage.number,
            "attempt": claim.attempt,
            "worker": _name(),
        }
        with about(**fields), span(claim.stage.kind.value, **fields):
            self._run_claimed(claim)

    def _run_claimed(self, claim: Claim) -> None:
        logger.info("%s of job %s begins", claim.stage.kind, claim.job.id)
        after_s = 0.0
        try:
            self._stages.run(claim)
        except LostClaim:
            logger.warning("%s of job %s is another worker's now", claim.stage.kind, claim.job.id)
            return
        except (HandBack, DatabaseGone):
            report = functools.partial(self._store.hand_back, claim)
        except PhoError as error:
            logger.warning("%s of job %s failed: %s", claim.stage.kind, claim.job.id, error)
            described = _described(error, claim)
            report = functools.partial(self._store.fail, claim, described, retry=False)
        except Exception as error:
            logger.exception("%s of job %s failed", claim.stage.kind, claim.job.id)
            self._inputs.clear()
            after_s = self._settings.retry_after_s
            described = _described(error, claim)
            report = functools.partial(self._store.fail, claim, described, retry=True)
        else:
            logger.info("%s of job %s done", claim.stage.kind, claim.job.id)
            return
        if self._when_possible(report):
            raise Again(after_s)

    def _when_possible(self, report: Callable[[], bool]) -> bool:
        """What a report says: now, or when the database is back."""
        retrying = Retrying(
            retry=retry_if_exception_type(DatabaseGone),
            wait=wait_exponential(multiplier=0.2, max=5),
            stop=stop_after_delay(_GIVE_UP_AFTER_S),
            reraise=True,
        )
        try:
            return retrying(report)
        except LostClaim:
            return False

    def _enter_anew(self) -> None:
        """As another worker: what this one has left undone in an outage is not its work now."""
        self._store.remove_worker(self._id)
        self._id = uuid.uuid4()
        self._enter()
        self._entered = True

    def _enter(self) -> None:
        self._store.enter_worker(
            self._id,
            name=_name(),
            device=_device_name(self._inputs.device),
            kinds=self._options.kinds,
        )

    async def _beat(self, working: "asyncio.Task[None]") -> None:
        """Say now and then that we live; stop with our parent, if we are to."""
        while True:
            await asyncio.sleep(min(self._settings.heartbeat_s, 2.0))
            if self._options.parent and os.getppid() != self._options.parent:
                logger.warning("the process that started this worker has gone: stopping")
                self._stop(working)
                return
            try:
                if self._entered:
                    await asyncio.to_thread(self._enter)
            except StorageError as error:
                logger.warning("no heartbeat: %s", error)


def _on_signals(handler: Callable[[int, FrameType | None], object] | signal.Handlers) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handler)


def _say_why(state: RetryCallState) -> None:
    assert state.outcome is not None
    logger.warning("waiting for the database: %s", state.outcome.exception())


def _name() -> str:
    """Of this worker, as `pho workers` lists it."""
    return f"{platform.node()}:{os.getpid()}"


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return str(device)


def _described(error: Exception, claim: Claim) -> dict[str, Any]:
    """What a job keeps of an error."""
    described: dict[str, Any] = {
        "type": type(error).__name__,
        "message": str(error) or type(error).__name__,
    }
    known = {
        "layer": getattr(error, "layer", None),
        "candidate": getattr(error, "candidate", None)
        or (claim.stage.params or {}).get("candidate"),
    }
    return {**described, **{name: value for name, value in known.items() if value is not None}}
