"""
The workers' half of the store of jobs: taking stages, and storing what they gave.
"""

import platform
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

from optuna.storages import RDBStorage
from sqlalchemy import ColumnElement, Connection, Row, delete, func, select, update
from sqlalchemy.dialects.postgresql import insert as pg_insert

from storage.configurations import keep, keep_transfer
from storage.database import Database
from storage.keys import refund
from storage.listing import best_columns, columns_of
from storage.queue import in_hand, longest_unserved, stalled_entries, take_out, waits
from storage.records import (
    AttemptEnd,
    Claim,
    Drain,
    JobRecord,
    JobState,
    LostClaim,
    NewStage,
    NoSuchJob,
    StageKind,
    StageState,
)
from storage.rows import (
    LOG,
    add_event,
    add_stages,
    check_claim,
    claimed_job,
    end_attempt,
    enqueue_stage,
    find_job,
    lock_stage,
    put_down,
    set_state,
    settle,
    update_stage,
)
from storage.studies import written_on
from storage.tables import jobs, queue_workers, service, stages, workers

_LONGEST_MESSAGE = 5000  # characters of an error; those of libraries may hold whole files
LOST_FOR_S = 24 * 3600.0  # that a worker which does not report any more is remembered


@dataclass(frozen=True, kw_only=True)
class Registration:
    """A worker's place in the registry, and what it is told with each report."""

    number: int  # In procrastinate's part of the registry
    drain: Drain | None  # How it should end; None: it should not
    store: str | None  # Id of the artifact store that the API sees


@dataclass(frozen=True, kw_only=True)
class JobResult:
    """The result of a job."""

    # The configuration; None of a job that has one for each of its patterns.
    best: Mapping[str, Any] | None
    warnings: Sequence[str] = ()  # What must be said of it


@dataclass(frozen=True)
class LibraryAddition:
    """A configuration for the library; or, with ``transfer``, what it was worth on a model."""

    configuration: Mapping[str, Any]
    transfer: Mapping[str, Any] | None = None


class ClaimStore:
    """The stages of a database, as a worker sees them."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def claim(self, stage_id: int, queue_id: int, worker_id: uuid.UUID) -> Claim | None:
        """Take a stage that the queue gave out."""
        with self.database.transaction() as connection:
            row = connection.execute(select(stages.c.job_id).where(stages.c.id == stage_id)).first()
            if row is None:
                return None
            try:
                job = find_job(connection, row.job_id, lock=True)
            except NoSuchJob:  # deleted since
                return None
            stage = _open_stage(connection, stage_id, queue_id)
            if stage is None:
                return None
            failures = stage.failures + (stage.state is StageState.RUNNING)  # its worker died
            end_attempt(connection, stage_id, AttemptEnd.LOST)
            if not job.state.may_work:
                put_down(connection, job, stage_id, failures)
                return None
            if failures >= job.max_attempts:
                _fail_for_lost_workers(connection, job, stage, failures)
                return None
            _begin_attempt(connection, job, stage, failures, worker_id)
            job = find_job(connection, job.id)
            return Claim(job=job, stage=next(s for s in job.stages if s.id == stage_id))

    def stalled(self, alive_s: float) -> list[int]:
        """Entries of workers that have gone, or did not report in the last seconds."""
        with self.database.transaction() as connection:
            return stalled_entries(connection, alive_s)

    def give_again(self, queue_id: int, *, alive_s: float) -> bool:
        """Put a dead worker's stage into the queue again, unless the worker lives after all."""
        # If the worker was only frozen, what it does to its entry when it wakes harms nobody.
        with self.database.transaction() as connection:
            query = select(stages.c.id, stages.c.job_id).where(stages.c.queue_id == queue_id)
            row, job, stage = connection.execute(query).first(), None, None
            if row is not None:
                with suppress(NoSuchJob):
                    job = find_job(connection, row.job_id, lock=True)
                    stage = _open_stage(connection, row.id, queue_id)
            if in_hand(connection, queue_id, alive_s):  # as of now, when it writes no more
                return False
            if job is not None and stage is not None:
                _requeue(connection, job, stage)
            take_out(connection, queue_id)
            return True

    @contextmanager
    def fence(self, claim: Claim, storage: RDBStorage | None = None) -> Iterator[None]:
        """Hold off everybody else from a stage while its worker writes."""
        # What Optuna writes meanwhile is in one transaction with the check of the claim: whole or
        # not at all, and never by a worker that has lost its stage, even one that was frozen or cut
        # off in the midst of it.
        with self.database.transaction() as connection:
            check_claim(connection, claim)
            with nullcontext() if storage is None else written_on(storage, connection):
                yield

    def watch(self, claim: Claim, step: Mapping[str, Any] | None = None) -> JobState:
        attempt = (stages.c.id == claim.stage.id, stages.c.attempt == claim.attempt)
        query = select(jobs.c.state).join(stages, stages.c.job_id == jobs.c.id).where(*attempt)
        with self.database.transaction() as connection:
            state: JobState | None = connection.execute(query).scalar()
            if step is not None:
                connection.execute(update(stages).where(*attempt).values(step=dict(step)))
        if state is None:
            raise LostClaim
        return state

    def progress(
        self, claim: Claim, *, done: int, elapsed_s: float, best_value: float | None
    ) -> JobState:
        """Note how far a stage is, and give the state of the job."""
        with self.database.transaction() as connection:
            job = claimed_job(connection, claim)
            update_stage(
                connection, claim.stage.id, done=done, elapsed_s=elapsed_s, best_value=best_value
            )
            data = {
                "stage": claim.stage.kind,
                "number": claim.stage.number,
                "done": done,
                "best_value": best_value,
            }
            add_event(connection, job.id, "progress", data)
            return job.state

    def log(self, claim: Claim, lines: Sequence[str], *, worker: str) -> None:
        """Keep lines that a worker has logged of a stage, also of one that is another's by now."""
        data = {
            "stage": claim.stage.kind,
            "number": claim.stage.number,
            "attempt": claim.attempt,
            "worker": worker,
            "lines": [*lines],
        }
        query = select(jobs.c.id).where(jobs.c.id == claim.job.id)
        with self.database.transaction() as connection:
            if connection.scalar(query.with_for_update(read=True, key_share=True)):
                add_event(connection, claim.job.id, LOG, data)

    def complete(
        self,
        claim: Claim,
        result: Mapping[str, Any],
        *,
        then: Sequence[NewStage] = (),
        ended: bool = False,
        job_result: JobResult | None = None,
        library: Sequence[LibraryAddition] = (),
        spec: Mapping[str, Any] | None = None,
        seen: JobRecord | None = None,
    ) -> bool:
        """Store what a stage gave, and what follows."""
        with self.database.transaction() as connection:
            job = claimed_job(connection, claim)
            if seen is not None and _has_moved(seen, job):
                return False
            cancelled = job.state is JobState.CANCELLING
            update_stage(
                connection, claim.stage.id, state=StageState.DONE, result=dict(result),
                worker_id=None, finished_at=func.now(),
            )  # fmt: skip
            for addition in library:
                if addition.transfer is None:
                    keep(connection, addition.configuration, owner_id=job.owner_id, job_id=job.id)
                else:
                    keep_transfer(
                        connection, addition.configuration, addition.transfer, owner_id=job.owner_id
                    )
            if job_result is not None and not cancelled:
                _keep_result(connection, job, job_result)
            _tell_part_done(connection, job, claim)
            unfinished = _has_unfinished(connection, job.id)
            if not unfinished:
                add_stages(connection, job, then)
                if spec is not None:
                    connection.execute(
                        update(jobs).where(jobs.c.id == job.id).values(spec=dict(spec))
                    )
            if ended and not unfinished and not cancelled:
                best = job.best if job_result is None else job_result.best
                set_state(connection, job, JobState.SUCCEEDED, details=_quality(best))
            else:
                settle(connection, job)
            end_attempt(connection, claim.stage.id, AttemptEnd.DONE)
            return True

    def fail(self, claim: Claim, error: Mapping[str, Any], *, retry: bool) -> bool:
        with self.database.transaction() as connection:
            job = claimed_job(connection, claim)
            failures = claim.stage.failures + 1
            message = str(error.get("message"))[:_LONGEST_MESSAGE]
            described = {
                **error, "message": message, "stage": claim.stage.kind, "attempts": failures,
            }  # fmt: skip
            if retry and failures < job.max_attempts:
                add_event(connection, job.id, "retry", described)
                end_attempt(connection, claim.stage.id, AttemptEnd.RETRIED)
                put_down(connection, job, claim.stage.id, failures)
                return job.state.may_work
            update_stage(
                connection, claim.stage.id, state=StageState.FAILED, failures=failures,
                worker_id=None,
            )  # fmt: skip
            end_attempt(connection, claim.stage.id, AttemptEnd.FAILED)
            _give_back(connection, job)
            if job.state.may_work:
                set_state(connection, job, JobState.FAILED, error=described)
            else:
                connection.execute(update(jobs).where(jobs.c.id == job.id).values(error=described))
                settle(connection, job)
            return False

    def hand_back(self, claim: Claim) -> bool:
        """Put a stage down unfinished."""
        with self.database.transaction() as connection:
            job = claimed_job(connection, claim)
            if job.state.may_work:
                _tell_put_down(connection, claim, "stopped")
            put_down(connection, job, claim.stage.id, claim.stage.failures)
            return job.state.may_work

    def another_waits(self, claim: Claim, kinds: Sequence[StageKind]) -> bool:
        """Whether another job, of this priority or a higher one, waits for a worker of kinds."""
        with self.database.transaction() as connection:
            return waits(connection, kinds, claim.job, another=True)

    def next_turn(
        self, kinds: Sequence[StageKind], job: JobRecord | None = None, *, over: bool = False
    ) -> None:
        """Let other keys in, unless a stage of a worker's job waits whose turn is not over."""
        with self.database.transaction() as connection:
            if job is not None and not over and waits(connection, kinds, job, another=False):
                return
            entry = longest_unserved(connection, kinds, job, over=over)
            if entry is None:
                return
            stage = lock_stage(connection, entry.stage)
            if stage is None or stage.queue_id != entry.id:
                return
            if take_out(connection, entry.id, waiting=True):
                enqueue_stage(connection, find_job(connection, entry.job), stage, "first")

    def end_turn(self, claim: Claim) -> bool:
        """Put a stage down unfinished, behind whatever waits by now; others of its kind, too."""
        with self.database.transaction() as connection:
            job = claimed_job(connection, claim)
            _tell_put_down(connection, claim, "turn")
            put_down(connection, job, claim.stage.id, claim.stage.failures)
            for stage in find_job(connection, job.id).stages if job.state.may_work else ():
                if stage.state is not StageState.WAITING or stage.kind is not claim.stage.kind:
                    continue
                row = lock_stage(connection, stage.id)
                assert row is not None  # its job is locked
                if stage.id == claim.stage.id or take_out(connection, row.queue_id, waiting=True):
                    enqueue_stage(connection, job, stage, "behind")
            return False

    def give_up(self, claim: Claim) -> None:
        """Put a stage down for a worker that cannot stop to work on it, and so ends."""
        # Its entry is taken out of the queue, and a new one put in if the job may still work.
        with self.database.transaction() as connection:
            job = claimed_job(connection, claim)
            row = lock_stage(connection, claim.stage.id)
            assert row is not None  # the claim holds
            take_out(connection, row.queue_id)
            put_down(connection, job, claim.stage.id, claim.stage.failures)
            if job.state.may_work:
                enqueue_stage(connection, job, claim.stage)

    def enter_worker(
        self,
        worker_id: uuid.UUID,
        *,
        name: str,
        device: str,
        kinds: Sequence[StageKind],
        store: str | None = None,
        memory: tuple[int, int] | None = None,
    ) -> Registration:
        """Note that a worker is there, which is its heartbeat."""
        # procrastinate's loop writes the heartbeat, too, but not while it waits for a last stage.
        used, total = memory or (None, None)
        report = {"store": store, "memory_used": used, "memory_total": total}
        values = {"name": name, "device": device, "stages": [*kinds], **report}
        row_number = select(workers.c.number).where(workers.c.id == worker_id).scalar_subquery()
        with self.database.transaction() as connection:
            number = connection.scalar(
                update(queue_workers)
                .where(queue_workers.c.id == row_number)
                .values(last_heartbeat=func.now())
                .returning(queue_workers.c.id)
            )
            if number is None:
                number = connection.scalar(select(func.procrastinate_register_worker_v1()))
            row = connection.execute(
                pg_insert(workers)
                .values(id=worker_id, number=number, **values)
                .on_conflict_do_update(index_elements=[workers.c.id], set_=report)
                .returning(workers.c.drain, select(service.c.store).scalar_subquery())
            ).one()
        return Registration(number=number, drain=row[0], store=row[1])

    def remove_worker(self, worker_id: uuid.UUID) -> None:
        """Note that a worker has gone in order."""
        self._unregister(workers.c.id == worker_id)

    def forget_worker(self, name: str) -> None:
        """Note that the process of a worker of this name has ended, in order or not."""
        self._unregister(workers.c.name == name)

    def _unregister(self, condition: ColumnElement[bool]) -> None:
        numbers = select(workers.c.number).where(condition)
        with self.database.transaction() as connection:
            connection.execute(delete(queue_workers).where(queue_workers.c.id.in_(numbers)))


def worker_name(process: int) -> str:
    return f"{platform.node()}:{process}"


def _open_stage(connection: Connection, stage_id: int, queue_id: int) -> Row[Any] | None:
    """A stage's row, locked; None if it has ended, or another entry of the queue stands for it."""
    stage = lock_stage(connection, stage_id)
    if stage is None or stage.queue_id != queue_id:
        return None
    return stage if stage.state in (StageState.WAITING, StageState.RUNNING) else None


def _fail_for_lost_workers(
    connection: Connection, job: JobRecord, stage: Row[Any], failures: int
) -> None:
    error = {
        "type": "WorkerLost",
        "message": f"{failures} workers died while they worked on it: killed, out of memory, or "
        "cut off from the database. Give them more memory, then resume.",
        "stage": stage.kind,
    }
    update_stage(connection, stage.id, state=StageState.FAILED, failures=failures)
    _give_back(connection, job)
    set_state(connection, job, JobState.FAILED, error=error)


def _give_back(connection: Connection, job: JobRecord) -> None:
    """Give back to a key what its job has not used that fails in its first stage."""
    if job.has_done:
        return
    # A step is told once a model runs; what an attempt before did is not known.
    begun = any(stage.step is not None or stage.attempt > 1 for stage in job.stages)
    how, models = job.spec.get("calibration") or {}, columns_of(job.spec)["models"]
    calibrated = len(models) * how.get("samples", 0) * how.get("context_length", 0)
    refund(connection, job.id, used=begun * calibrated)


def _begin_attempt(
    connection: Connection, job: JobRecord, stage: Row[Any], failures: int, worker_id: uuid.UUID
) -> None:
    update_stage(
        connection,
        stage.id,
        state=StageState.RUNNING,
        attempt=stage.attempt + 1,
        failures=failures,
        worker_id=worker_id,
        begun_at=func.now(),
        step=None,
        started_at=func.coalesce(stages.c.started_at, func.now()),
    )
    connection.execute(
        update(jobs)
        .where(jobs.c.id == job.id)
        .values(
            stage=stage.kind,
            started_at=func.coalesce(jobs.c.started_at, func.now()),
            served_at=func.now(),
        )
    )
    if stage.state is StageState.RUNNING:
        lost = {"type": "WorkerLost", "message": "its worker died, or was cut off"}
        add_event(connection, job.id, "retry", {**lost, "stage": stage.kind, "attempts": failures})
    if job.stage is not stage.kind or stage.attempt:
        counts = {"attempt": stage.attempt + 1, "failures": failures} if stage.attempt else {}
        add_event(connection, job.id, "stage", {"stage": stage.kind, **counts})
    set_state(connection, job, JobState.RUNNING)


def _requeue(connection: Connection, job: JobRecord, stage: Row[Any]) -> None:
    if job.state.may_work:
        enqueue_stage(connection, job, stage, "first")  # or it would wait behind all others
    else:
        end_attempt(connection, stage.id, AttemptEnd.LOST)
        put_down(connection, job, stage.id, stage.failures + (stage.state is StageState.RUNNING))


def _tell_put_down(connection: Connection, claim: Claim, reason: str) -> None:
    add_event(connection, claim.job.id, "put_down", {"stage": claim.stage.kind, "why": reason})


def _has_moved(seen: JobRecord, job: JobRecord) -> bool:
    """Whether a job has more to do, or has done more, than when it was seen."""
    done_before, done_now = (
        {stage.id for stage in record.stages if stage.state is StageState.DONE}
        for record in (seen, job)
    )
    return seen.trials != job.trials or done_before != done_now


def _keep_result(connection: Connection, job: JobRecord, result: JobResult) -> None:
    connection.execute(
        update(jobs)
        .where(jobs.c.id == job.id)
        .values(
            best=result.best and dict(result.best),
            warnings=[*result.warnings],
            **best_columns(result.best),
        )
    )
    if result.best is not None and "cut" not in result.best:  # which is of its own model alone
        keep(connection, result.best, owner_id=job.owner_id, job_id=job.id)


def _tell_part_done(connection: Connection, job: JobRecord, claim: Claim) -> None:
    """Say that a model of a transfer, or a part of a calibration, is done."""
    stage = claim.stage
    done, number = 1, stage.number
    if stage.part_of is not None:
        number = stage.part_of
        parts = (s for s in find_job(connection, job.id).shards if s.part_of == number)
        done = sum(part.state is StageState.DONE for part in parts)
    elif stage.kind is not StageKind.TRANSFER:
        return
    data = {"stage": stage.kind, "number": number, "done": done, "best_value": None}
    add_event(connection, job.id, "progress", data)


def _quality(best: Mapping[str, Any] | None) -> dict[str, Any]:
    """How good a result is, where that was measured, for those who follow the job."""
    best = best or {}
    measured = {name: best.get(name) for name in ("perplexities", "report")}
    return {name: value for name, value in measured.items() if value is not None}


def _has_unfinished(connection: Connection, job_id: uuid.UUID) -> bool:
    unfinished = (stages.c.job_id == job_id, stages.c.state != StageState.DONE)
    return connection.execute(select(stages.c.id).where(*unfinished)).first() is not None
