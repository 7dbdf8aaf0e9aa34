"""
A worker: takes stages out of the queue, one at a time, until it is told to stop.
"""

import asyncio
import functools
import logging
import os
import signal
import tempfile
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import procrastinate
import procrastinate.exceptions
import psycopg_pool
import torch
from procrastinate import BaseRetryStrategy, JobContext, RetryDecision
from procrastinate.jobs import Job as QueueEntry
from tenacity import (
    AsyncRetrying,
    RetryCallState,
    Retrying,
    retry_if_exception_type,
    sleep_using_event,
    stop_after_delay,
    stop_any,
    stop_when_event_set,
)
from tenacity.wait import wait_exponential

from pho_service.errors import (
    DeviceLost,
    InvalidInput,
    OutOfMemory,
    OutputError,
    PhoError,
    told_to,
)
from pho_service.host.access import Access
from pho_service.host.artifacts import PrunedStore, store_url
from pho_service.host.logs import about, span
from pho_service.host.machine import let_go_of_memory
from pho_service.host.settings import Settings
from pho_service.pruning.hardware import cards_memory, gpus
from pho_service.spec.job_options import entry
from storage.claims import LOST_FOR_S, Registration, worker_name
from storage.database import Database, taking_turns
from storage.jobs import JobStore
from storage.queue import TASK, EnteredWorker
from storage.records import Claim, Drain, JobRecord, LostClaim, StageKind
from storage.studies import DatabaseGone, StorageError
from workers.conductor import Conductor
from workers.inputs import BundleStore, WorkerInputs
from workers.process import ALL, own_folder, start_anew, take_device
from workers.watch import PATIENCE_S, HandBack, Hold, TurnOver, Turns

logger = logging.getLogger(__name__)

_BEAT_S = 2.0  # at most, between two signs of life
_GIVE_UP_AFTER_S = 600.0  # a stage whose database is away
_LAST_S = 3.0  # for the report of a worker that ends by force
_LONG_S = 10.0  # a stage after which memory is let go of
_LOST_DEVICES = 10  # attempts of a stage; from then on it counts as its own fault


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
    # ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``all``: see :func:`take_device`.
    device: str = "auto"
    kinds: tuple[StageKind, ...] = tuple(StageKind)  # Stages that this worker does
    exit_when_idle_s: float = 0.0  # End after so long without a stage; 0 for never
    parent: int = 0  # Stop when this process is no longer our parent; 0 for never

    def arguments(self, device: torch.device) -> list[str]:
        """Return the arguments of ``python -m workers`` for a process that replaces this one."""
        # One that had a GPU does not go on without.
        name = "cuda" if self.device == "auto" and device.type == "cuda" else self.device
        return [
            "--device", name, "--stages", ",".join(self.kinds), "--parent", str(self.parent),
            "--exit-when-idle", str(self.exit_when_idle_s),
        ]  # fmt: skip


def run_worker(database_url: str, settings: Settings, options: WorkerOptions) -> None:
    """Work until SIGTERM or SIGINT, or until it is drained or idle for too long."""
    # Where this process can do no more, because its GPU failed or it cannot put down a stage, a new
    # one takes its place: see :func:`start_anew`.
    idle_limit_s = max(10.0, settings.stalled_after_s)
    if settings.liveness_file is not None:
        settings = settings.model_copy(update={"liveness_file": _touched(settings.liveness_file)})
    database = Database(database_url, pool=4, idle_limit_s=idle_limit_s)
    try:
        with take_device(options.device) as device, own_folder() as folder:
            access = Access.of(settings)  # before the folder changes
            bundles = BundleStore(
                store_url(settings),
                settings.cache_dir.expanduser().resolve(),
                functools.partial(taking_turns, database),
            )
            pruned = PrunedStore.of(settings)
            os.chdir(folder)  # so that no name of a job is by chance a file's here
            inputs = WorkerInputs(access, bundles, pruned, device, spread=options.device == ALL)
            worker = _Worker(database, settings, options, inputs)
            try:
                asyncio.run(worker.run())
            finally:
                os.chdir("/")
    finally:
        database.close()
    if worker.device_lost and not worker.draining:
        start_anew(options.arguments(device))


class _Worker:
    def __init__(
        self, database: Database, settings: Settings, options: WorkerOptions, inputs: WorkerInputs
    ) -> None:
        self._id = uuid.uuid4()
        self._database = database
        self._settings = settings
        self._options = options
        self._store = JobStore(database)
        self._stopping = threading.Event()
        self._stop: Callable[[], object] = self._stopping.set  # and what else, once it runs
        self._hold = Hold(self._store, worker_name(os.getpid()), self._hide)
        self._ended = threading.Event()
        self.device_lost = False  # a new process should take this one's place
        self.draining = False  # no new process should
        self._entered = False  # once the tables are there
        self._left = False  # no report may come behind the last one
        self._reporting = threading.Lock()
        self._store_seen: str | None = None  # id of the artifact store; None: not looked for yet
        self._store_expected: str | None = None  # that of the API; None: there was no API yet
        self._heal_after = 0.0  # when those who live have had the time to say so after an outage
        self._inputs = inputs
        self._turns = Turns(seconds=settings.turn_s, kinds=options.kinds)
        self._conductor = Conductor(self._store, inputs, self._stopping, self._turns)

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(_say_what_was_lost)
        working = asyncio.create_task(self._work_through_outages())
        self._stop = functools.partial(loop.call_soon_threadsafe, self._stop_once, working)
        beating = asyncio.create_task(self._beat(working))
        touching = asyncio.create_task(self._show_life())
        threading.Thread(target=self._heal, daemon=True).start()

        # The loop's own handlers would be gone before the process is: a late SIGTERM would kill it.
        _on_signals(lambda *_: self._stop())
        try:
            await working
        except asyncio.CancelledError:
            logger.info("stopped")
        finally:
            _on_signals(signal.SIG_IGN)
            beating.cancel()
            touching.cancel()
            await asyncio.to_thread(self._leave)
            self._ended.set()

    def _stop_once(self, working: "asyncio.Task[None]") -> None:
        if not self._stopping.is_set():
            self._stopping.set()
            if not self.draining:  # told again, procrastinate would forget the stage in hand
                working.cancel()
            threading.Thread(target=self._see_to_the_end, daemon=True).start()

    def _see_to_the_end(self) -> None:
        """End the process by force if a stage does not let it end."""
        if self._ended.wait(PATIENCE_S):
            return
        last = threading.Timer(_LAST_S, os._exit, [0])  # whatever the database does
        last.daemon = True
        last.start()
        self._hold.give_up()
        self._leave()
        os._exit(0)

    def _leave(self) -> None:
        try:
            with self._reporting:
                self._left = True
                if self._entered:
                    self._store.remove_worker(self._id)
        except StorageError:
            logger.warning("the database is away: the worker's entry stays until it is stale")

    async def _work_through_outages(self) -> None:
        """Take entries out of the queue; wait while the database or the artifact store is away."""
        outage = (DatabaseGone, OutputError, procrastinate.exceptions.ConnectorException)
        async for attempt in AsyncRetrying(
            retry=retry_if_exception_type(outage),
            wait=wait_exponential(multiplier=0.2, max=5),
            before_sleep=_say_why,
        ):
            with attempt:
                if self.draining or self._stopping.is_set():  # the outage came meanwhile
                    return
                await asyncio.to_thread(self._database.check_migrated)
                await self._work()
                if not self._stopping.is_set():
                    raise DatabaseGone("the queue's listener was cut off")

    async def _work(self) -> None:
        connector = procrastinate.PsycopgConnector(
            conninfo=self._database.conninfo, min_size=1, max_size=4, timeout=10
        )
        app = procrastinate.App(connector=connector)

        @app.task(name=TASK, pass_context=True, retry=_WhenAsked(self._settings.retry_after_s))
        def run_stage(context: JobContext, stage_id: int) -> None:
            assert context.job.id is not None
            self._run_stage(stage_id, context.job.id)

        try:
            await app.open_async()
        except psycopg_pool.PoolTimeout as error:
            await connector.close_async()
            raise DatabaseGone(str(error)) from error
        try:
            number = await asyncio.to_thread(self._enter_anew)
            if number is None:
                return
            app.job_manager = EnteredWorker(app, number)
            logger.info("working on %s", ", ".join(self._options.kinds))
            await app.run_worker_async(
                queues=[*self._options.kinds],
                concurrency=1,
                fetch_job_polling_interval=2.0,
                update_heartbeat_interval=self._settings.heartbeat_s,
                stalled_worker_timeout=LOST_FOR_S,
                delete_jobs="successful",
                install_signal_handlers=False,
            )
        finally:
            await app.close_async()

    def _heal(self) -> None:
        """Now and then, put stages of dead workers into the queue again, whatever we work on."""
        # Not by an entry of the queue: workers that are all busy would not take it, and searches
        # give way to nothing but what is in the queue.
        alive_s = self._settings.stalled_after_s
        while not self._ended.wait(max(0.3, min(30.0, alive_s / 3))):
            if not self._entered or time.monotonic() < self._heal_after:
                continue
            try:
                for entry in self._store.stalled(alive_s):
                    self._give_again(entry, alive_s)
            except StorageError as error:
                logger.warning("stages of dead workers wait: %s", error)
                self._heal_after = time.monotonic() + alive_s

    def _give_again(self, entry: int, alive_s: float) -> None:
        """Put one into the queue again; what is wrong with it keeps no other from coming again."""
        try:
            if self._store.give_again(entry, alive_s=alive_s):
                logger.warning("stage of a dead worker comes again", extra={"entry": entry})
        except StorageError as error:
            logger.warning("entry %d does not come again yet: %s", entry, error)

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
            "worker": worker_name(os.getpid()),
        }
        with about(**fields), span(claim.stage.kind.value, **fields), told_to(entry):
            try:
                self._run_claimed(claim)
            finally:
                self._next_turn(claim.job)

    def _next_turn(self, job: JobRecord) -> None:
        """Let other keys in, if there is nothing more to do of a job, or its turn is over."""
        over = self._turns.is_over
        try:
            self._store.next_turn(self._options.kinds, job, over=over)
        except StorageError as error:
            logger.warning("no other key was let in: %s", error)
        if over:
            self._turns.renew()

    def _run_claimed(self, claim: Claim) -> None:
        with self._hold.of(claim):
            logger.info("%s of job %s begins", claim.stage.kind, claim.job.id)
            began = time.monotonic()
            report, after_s = self._attempt(claim)
            if report is not None or time.monotonic() - began > _LONG_S:
                let_go_of_memory()  # after the error, which holds on to what was computed
            comes_again = report is not None and self._when_possible(report)
        if comes_again:
            raise Again(after_s)

    def _attempt(self, claim: Claim) -> tuple[Callable[[], bool] | None, float]:
        """Do a stage; how to report that it is not done, and after how long it may come again."""
        after_s = self._settings.retry_after_s
        try:
            self._conductor.run(claim)
        except LostClaim:
            logger.warning("%s of job %s is another worker's now", claim.stage.kind, claim.job.id)
            return None, 0.0
        except TurnOver:
            logger.info("%s of job %s waits for its next turn", claim.stage.kind, claim.job.id)
            return functools.partial(self._store.end_turn, claim), 0.0
        except (HandBack, DatabaseGone):
            return functools.partial(self._store.hand_back, claim), 0.0
        except DeviceLost as error:
            logger.exception("%s of job %s lost its device", claim.stage.kind, claim.job.id)
            self.device_lost = True
            self._stop()
            if claim.attempt < _LOST_DEVICES:  # no fault of the job
                return functools.partial(self._store.hand_back, claim), after_s
            return self._failure(claim, error, retry=True), after_s
        except PhoError as error:
            logger.warning("%s of job %s failed: %s", claim.stage.kind, claim.job.id, error)
            if isinstance(error, OutOfMemory):
                self._inputs.clear()
            return self._failure(claim, error, retry=False), 0.0
        except Exception as error:
            logger.exception("%s of job %s failed", claim.stage.kind, claim.job.id)
            self._inputs.clear()
            return self._failure(claim, error, retry=True), after_s
        logger.info("%s of job %s done", claim.stage.kind, claim.job.id)
        return None, 0.0

    def _failure(self, claim: Claim, error: Exception, *, retry: bool) -> Callable[[], bool]:
        """Return the report that a stage failed."""
        return functools.partial(
            self._store.fail, claim, self._described(error, claim), retry=retry
        )

    def _hide(self, message: str) -> str:
        """A message without where things lie on this machine."""
        places = {
            store_url(self._settings): "artifact store",
            str(self._settings.cache_dir.expanduser().resolve()): "cache",
            tempfile.gettempdir(): "temporary folder",
        }
        return self._inputs.access.hide_places(message, places)

    def _described(self, error: Exception, claim: Claim) -> dict[str, Any]:
        """An error as the job's owner is told of it."""
        details = {
            "layer": getattr(error, "layer", None),
            "candidate": getattr(error, "candidate", None)
            or (claim.stage.params or {}).get("candidate"),
        }
        return {
            "type": type(error).__name__,
            "message": self._hide(str(error)) or type(error).__name__,
            **{name: value for name, value in details.items() if value is not None},
        }

    def _when_possible(self, report: Callable[[], bool]) -> bool:
        """What a report says: now, or when the database is back, unless the worker stops."""
        retrying = Retrying(
            retry=retry_if_exception_type(DatabaseGone),
            wait=wait_exponential(multiplier=0.2, max=5),
            stop=stop_any(stop_after_delay(_GIVE_UP_AFTER_S), stop_when_event_set(self._stopping)),
            sleep=sleep_using_event(self._stopping),
            reraise=True,
        )
        try:
            return retrying(report)
        except LostClaim:
            return False
        except DatabaseGone:
            if not self._stopping.is_set():
                raise
            logger.warning("the database is away: the stage comes again when it is back")
            return True  # the database may be back before the queue hears that this entry is done

    def _enter_anew(self) -> int | None:
        """Enter the registry as another worker, and give its number; None once this one leaves."""
        # What this one has left undone in an outage is not its work now.
        if self._entered:
            self._heal_after = time.monotonic() + self._settings.stalled_after_s
        with self._reporting:
            self._store.remove_worker(self._id)
            self._id = uuid.uuid4()
        registration = self._enter()
        self._entered = True
        if self._store_expected not in (None, self._store_seen):
            raise OutputError(
                f"PHO_ARTIFACTS={store_url(self._settings)} is not the artifact store that the API "
                f"sees: its file store-id says {self._store_seen or 'nothing'}, that of the API's "
                f"{self._store_expected}. Give both the same folder, volume or URL. No stage is "
                "taken until then."
            )
        self._store.next_turn(self._options.kinds)  # or the oldest job has all new workers
        self._hold.idle_since = time.monotonic()
        return None if registration is None else registration.number

    def _enter(self) -> Registration | None:
        with self._reporting:
            if self._left:
                return None
            registration = self._store.enter_worker(
                self._id,
                name=worker_name(os.getpid()),
                device=_device_name(self._inputs.device, spread=self._inputs.spread),
                kinds=self._options.kinds,
                store=self._store_seen,
                memory=cards_memory(gpus() if self._inputs.spread else [self._inputs.device]),
            )
        self._store_expected = registration.store
        if self._store_expected not in (None, self._store_seen):
            try:
                self._store_seen = self._inputs.pruned.id()  # told with the next report
            except OutputError as error:
                self._store_seen = ""
                logger.warning("%s", error)
        return registration

    async def _show_life(self) -> None:
        """Touch the file of the probes, as long as the loop of events turns."""
        file = self._settings.liveness_file
        while file is not None:
            file.touch()
            await asyncio.sleep(_BEAT_S)

    def _drain(self, working: "asyncio.Task[None]", why: str) -> None:
        """End once the stage in hand, if there is one, is done."""
        if not (self.draining or self._stopping.is_set()):
            logger.info("%s: no more stages are taken, and this worker ends", why)
            self.draining = True
            working.cancel()

    async def _beat(self, working: "asyncio.Task[None]") -> None:
        """Say now and then that we live; end with our parent, without work, or when drained."""
        idle_limit_s = self._options.exit_when_idle_s
        while True:
            await asyncio.sleep(min(self._settings.heartbeat_s, _BEAT_S))
            since = self._hold.idle_since
            if idle_limit_s and since and time.monotonic() - since > idle_limit_s:
                self._drain(working, f"no stage came for {idle_limit_s:g} s")
            if self._options.parent and os.getppid() != self._options.parent:
                logger.warning("the process that started this worker has gone: stopping")
                self._stop()
                return
            try:
                registration = await asyncio.to_thread(self._enter) if self._entered else None
                if registration is not None and registration.drain is not None:
                    self._drain(working, "drained")
                    if registration.drain is Drain.NOW:
                        self._stop()
                stuck = await asyncio.to_thread(self._hold.is_stuck)
            except StorageError as error:
                logger.warning("no heartbeat: %s", error)
                continue
            if stuck and not self._stopping.is_set():
                await asyncio.to_thread(self._hold.give_up)
                await asyncio.to_thread(self._leave)
                if self.draining:
                    os._exit(0)
                start_anew(self._options.arguments(self._inputs.device))


def _touched(file: Path) -> Path:
    """A file that can be touched from every folder."""
    try:
        file = file.expanduser().resolve()
        file.touch()
    except OSError as error:
        raise InvalidInput(
            f"PHO_LIVENESS_FILE={file} cannot be written: {error.strerror or error}. Give a file "
            "in a folder that this worker may write to."
        ) from error
    return file


def _on_signals(handler: Callable[[int, FrameType | None], object] | signal.Handlers) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handler)


def _say_why(state: RetryCallState) -> None:
    assert state.outcome is not None
    logger.warning("waiting: %s", state.outcome.exception())


def _say_what_was_lost(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    error = context.get("exception")
    if isinstance(error, procrastinate.exceptions.ConnectorException):  # not ours now, or an outage
        reason = str(error.__cause__).partition("\n")[0]
        logger.warning("the queue did not hear how a stage ended: %s", reason)
    else:
        loop.default_exception_handler(context)


def _device_name(device: torch.device, *, spread: bool) -> str:
    if device.type == "cuda":
        card = f"{device} ({torch.cuda.get_device_name(device)})"
        return f"{torch.cuda.device_count()} GPUs from {card}" if spread else card
    return str(device)
