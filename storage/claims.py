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
from sqlalchemy import Connection, delete, func, select, text, update
from sqlalchemy.dialects.postgresql import insert as pg_insert

from storage.configurations import keep, keep_transfer
from storage.database import Database
from storage.records import (
    Claim,
    Drain,
    JobRecord,
    JobState,
    LostClaim,
    NewStage,
    NoSuchJob,
    Outcome,
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
    enqueue_again,
    find_job,
    found_columns,
    give_way,
    interval,
    lock_stage,
    put_down,
    set_state,
    settle,
    take_out,
    take_out_waiting,
    update_stage,
    waits,
)
from storage.studies import written_on
from storage.tables import jobs, service, stages, workers

_LONGEST_MESSAGE = 5000  # characters of an error; those of libraries may hold whole files


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
            stage = lock_stage(connection, stage_id)
            if stage is None or stage.queue_id != queue_id:
                return None
            if stage.state not in (StageState.WAITING, StageState.RUNNING):
                return None
            failures = stage.failures + (stage.state is StageState.RUNNING)  # its worker died
            end_attempt(connection, stage_id, Outcome.LOST)
            if not job.state.may_work:
                put_down(connection, job, stage_id, failures)
                return None
            if failures >= job.max_attempts:
                error = {
                    "type": "WorkerLost",
                    "message": f"{failures} workers died while they worked on it: killed, out of "
                    "memory, or cut off from the database. Give them more memory, then resume.",
                    "stage": stage.kind,
                }
                update_stage(connection, stage_id, state=StageState.FAILED, failures=failures)
                set_state(connection, job, JobState.FAILED, error=error)
                return None
            update_stage(
                connection,
                stage_id,
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
                lost |= {"stage": stage.kind, "attempts": failures}
                add_event(connection, job.id, "retry", lost)
            if job.stage is not stage.kind or stage.attempt:
                again = {"attempt": stage.attempt + 1, "failures": failures}
                told = {"stage": stage.kind, **(again if stage.attempt else {})}
                add_event(connection, job.id, "stage", told)
            set_state(connection, job, JobState.RUNNING)
            job = find_job(connection, job.id)
            (taken,) = (s for s in job.stages if s.id == stage_id)
            return Claim(job=job, stage=taken)

    def stalled(self, alive_s: float) -> list[int]:
        """Entries that workers took which the queue has not heard of in the last seconds."""
        query = text(
            "SELECT entry.id FROM procrastinate_jobs entry"
            " LEFT JOIN procrastinate_workers worker ON worker.id = entry.worker_id"
            " WHERE entry.status = 'doing' AND (worker.id IS NULL"
            "  OR worker.last_heartbeat < now() - make_interval(secs => :alive_s))"
        )
        with self.database.transaction() as connection:
            return [*connection.execute(query, {"alive_s": alive_s}).scalars()]

    def give_again(self, queue_id: int, *, alive_s: float) -> bool:
        """Put the stage of a dead worker's entry into the queue again, as another entry."""
        # If the worker was only frozen, what it does to its entry when it wakes harms nobody.
        with self.database.transaction() as connection:
            mine = stages.c.queue_id == queue_id
            row = connection.execute(select(stages.c.id, stages.c.job_id).where(mine)).first()
            with suppress(NoSuchJob):
                if row is not None and not _given(connection, queue_id, row, alive_s):
                    return False
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
        mine = (stages.c.id == claim.stage.id, stages.c.attempt == claim.attempt)
        query = select(jobs.c.state).join(stages, stages.c.job_id == jobs.c.id).where(*mine)
        with self.database.transaction() as connection:
            state: JobState | None = connection.execute(query).scalar()
            if step is not None:
                connection.execute(update(stages).where(*mine).values(step=dict(step)))
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
                connection,
                claim.stage.id,
                done=done,
                elapsed_s=elapsed_s,
                best_value=best_value,
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
        there = select(jobs.c.id).where(jobs.c.id == claim.job.id)
        with self.database.transaction() as connection:
            if connection.execute(there.with_for_update(read=True, key_share=True)).scalar():
                add_event(connection, claim.job.id, LOG, data)

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
                end_attempt(connection, claim.stage.id, Outcome.RETRIED)
                put_down(connection, job, claim.stage.id, failures)
                return job.state.may_work
            update_stage(
                connection, claim.stage.id, state=StageState.FAILED, failures=failures,
                worker_id=None,
            )  # fmt: skip
            end_attempt(connection, claim.stage.id, Outcome.FAILED)
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
                told = {"stage": claim.stage.kind, "why": "stopped"}
                add_event(connection, job.id, "put_down", told)
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
            if job is None or over or not waits(connection, kinds, job, another=False):
                give_way(connection, kinds, job, over=over)

    def end_turn(self, claim: Claim) -> bool:
        """Put a stage down unfinished, behind whatever waits by now; others of its kind, too."""
        with self.database.transaction() as connection:
            job = claimed_job(connection, claim)
            told = {"stage": claim.stage.kind, "why": "turn"}
            add_event(connection, job.id, "put_down", told)
            put_down(connection, job, claim.stage.id, claim.stage.failures)
            for stage in find_job(connection, job.id).stages if job.state.may_work else ():
                if stage.state is not StageState.WAITING or stage.kind is not claim.stage.kind:
                    continue
                row = lock_stage(connection, stage.id)
                assert row is not None  # its job is locked
                if stage.id == claim.stage.id or take_out_waiting(connection, row.queue_id):
                    enqueue_again(connection, job, stage, "behind")
            return False

    def give_up(self, claim: Claim) -> None:
        """Put a stage down for a worker that cannot stop to work on it, and so ends."""
        # Its entry is taken out of the queue, and a new one put in if the job may still work.
        with self.database.transaction() as connection:
            job = claimed_job(connection, claim)
            row = lock_stage(connection, claim.stage.id)
            assert row is not None  # the claim holds
            if row.queue_id is not None:
                take_out(connection, row.queue_id)
            put_down(connection, job, claim.stage.id, claim.stage.failures)
            if job.state.may_work:
                enqueue_again(connection, job, claim.stage)

    def enter_worker(
        self,
        worker_id: uuid.UUID,
        *,
        name: str,
        device: str,
        kinds: Sequence[StageKind],
        store: str | None = None,
        memory: tuple[int, int] | None = None,
    ) -> tuple[Drain | None, str | None]:
        """Note that a worker is there; tell how it should end, and which store the API sees."""
        used, total = memory or (None, None)
        report = {"store": store, "memory_used": used, "memory_total": total}
        values = {"name": name, "device": device, "stages": [*kinds], **report}
        with self.database.transaction() as connection:
            row = connection.execute(
                pg_insert(workers)
                .values(id=worker_id, **values)
                .on_conflict_do_update(
                    index_elements=[workers.c.id],
                    set_={"heartbeat_at": func.now(), **report},
                )
                .returning(workers.c.drain, select(service.c.store).scalar_subquery())
            ).one()
            connection.execute(
                delete(workers).where(workers.c.heartbeat_at < func.now() - interval(24 * 3600))
            )
        return row[0], row[1]

    def remove_worker(self, worker_id: uuid.UUID) -> None:
        """Note that a worker has gone in order."""
        with self.database.transaction() as connection:
            connection.execute(delete(workers).where(workers.c.id == worker_id))

    def forget_worker(self, name: str) -> None:
        """Note that the process of a worker of this name has ended, in order or not."""
        with self.database.transaction() as connection:
            connection.execute(delete(workers).where(workers.c.name == name))


def worker_name(process: int) -> str:
    return f"{platform.node()}:{process}"


def _given(connection: Connection, queue_id: int, row: Any, alive_s: float) -> bool:
    """Put a stage into the queue again, unless its entry stands for nothing or its worker lives."""
    job = find_job(connection, row.job_id, lock=True)
    stage = lock_stage(connection, row.id)
    unfinished = (StageState.WAITING, StageState.RUNNING)
    if stage is None or stage.queue_id != queue_id or stage.state not in unfinished:
        return True
    if stage.state is StageState.RUNNING and _reports(connection, stage.worker_id, alive_s):
        return False
    if job.state.may_work:
        enqueue_again(connection, job, stage, "first")  # or it would wait behind all others
    else:
        end_attempt(connection, stage.id, Outcome.LOST)
        put_down(connection, job, stage.id, stage.failures + (stage.state is StageState.RUNNING))
    return True


def _reports(connection: Connection, worker_id: uuid.UUID | None, alive_s: float) -> bool:
    """Whether a worker did in the last seconds."""
    recent = workers.c.heartbeat_at > func.now() - interval(alive_s)
    found = connection.execute(select(workers.c.id).where(workers.c.id == worker_id, recent))
    return found.first() is not None


# How a stage ends: with a result, and what follows from it.
@dataclass(frozen=True, kw_only=True)
class Found:
    """The result of a job."""

    # The configuration; None of a job that has one for each of its patterns.
    best: Mapping[str, Any] | None
    warnings: Sequence[str] = ()  # What must be said of it


@dataclass(frozen=True)
class Entry:
    """A configuration for the library; or, with ``transfer``, what it was worth on a model."""

    configuration: Mapping[str, Any]
    transfer: Mapping[str, Any] | None = None


class OutcomeStore(ClaimStore):
    """The stages of a database, as a worker ends them."""

    def complete(
        self,
        claim: Claim,
        result: Mapping[str, Any],
        *,
        then: Sequence[NewStage] = (),
        ended: bool = False,
        found: Found | None = None,
        library: Sequence[Entry] = (),
        spec: Mapping[str, Any] | None = None,
        seen: JobRecord | None = None,
    ) -> bool:
        """Store what a stage gave, and what follows."""
        with self.database.transaction() as connection:
            job = claimed_job(connection, claim)
            if seen is not None and _moved(seen, job):
                return False
            cancelled = job.state is JobState.CANCELLING
            update_stage(
                connection, claim.stage.id, state=StageState.DONE, result=dict(result),
                worker_id=None, finished_at=func.now(),
            )  # fmt: skip
            for entry in library:
                if entry.transfer is None:
                    keep(connection, entry.configuration, owner_id=job.owner_id, job_id=job.id)
                else:
                    keep_transfer(
                        connection, entry.configuration, entry.transfer, owner_id=job.owner_id
                    )
            if found is not None and not cancelled:
                _keep_found(connection, job, found)
            _tell(connection, job, claim)
            left = _has_unfinished(connection, job.id)
            if not left:
                add_stages(connection, job, then)
                if spec is not None:
                    connection.execute(
                        update(jobs).where(jobs.c.id == job.id).values(spec=dict(spec))
                    )
            if ended and not left and not cancelled:
                best = job.best if found is None else found.best
                set_state(connection, job, JobState.SUCCEEDED, told=_good(best))
            else:
                settle(connection, job)
            end_attempt(connection, claim.stage.id, Outcome.DONE)
            return True


def _moved(seen: JobRecord, job: JobRecord) -> bool:
    """Whether a job has more to do, or has done more, than when it was seen."""
    done, now = (
        {stage.id for stage in each.stages if stage.state is StageState.DONE}
        for each in (seen, job)
    )
    return seen.trials != job.trials or done != now


def _keep_found(connection: Connection, job: JobRecord, found: Found) -> None:
    connection.execute(
        update(jobs)
        .where(jobs.c.id == job.id)
        .values(
            best=found.best and dict(found.best),
            warnings=[*found.warnings],
            **found_columns(found.best),
        )
    )
    if found.best is not None:
        keep(connection, found.best, owner_id=job.owner_id, job_id=job.id)


def _tell(connection: Connection, job: JobRecord, claim: Claim) -> None:
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


def _good(best: Mapping[str, Any] | None) -> dict[str, Any]:
    """How good a result is, where that was measured, for those who follow the job."""
    measured = (best or {}).get("perplexities")
    return {} if measured is None else {"perplexities": measured}


def _has_unfinished(connection: Connection, job_id: uuid.UUID) -> bool:
    mine = select(stages.c.id).where(stages.c.job_id == job_id)
    return connection.execute(mine.where(stages.c.state != StageState.DONE)).first() is not None
