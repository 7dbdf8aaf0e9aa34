"""
Jobs and their stages: everything that the API and the workers do to them.

Each method is one transaction. Whoever changes a job locks its row first and
its stages' rows after it, so that no two wait for each other, and the events
of a job become visible in the order of their ids.
"""

import hashlib
import json
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from optuna.storages import RDBStorage
from sqlalchemy import (
    Connection,
    Row,
    Select,
    and_,
    delete,
    func,
    insert,
    select,
    update,
)
from sqlalchemy.dialects.postgresql import insert as pg_insert

from storage.configurations import keep, keep_transfer
from storage.database import Database
from storage.queue import enqueue, take_out
from storage.states import VERBS, JobState, StageKind, StageState, settled
from storage.studies import written_on
from storage.tables import events, jobs, stages, workers


class NoSuchJob(LookupError):
    """No job has this id, or it belongs to another key."""


class StateConflict(Exception):
    """A job is in a state in which this cannot be done."""

    def __init__(self, verb: str, state: JobState, reason: str = "") -> None:
        super().__init__(f"a job that is {state} cannot be {_PAST[verb]}. {reason}".strip())
        self.state = state


class IdempotencyKeyReused(Exception):
    """An idempotency key came with another document than the first time."""


class TooManyJobs(Exception):
    """
    An owner has as many jobs as are allowed.

    Attributes:
        which: Those that are not over, those of them that go before others, or all that are over.
    """

    def __init__(self, which: Literal["unfinished", "urgent", "finished"]) -> None:
        super().__init__(which)
        self.which = which


class TooManyTrials(Exception):
    """An extension is beyond what a job may have."""


class LostClaim(Exception):
    """A stage was given to another worker meanwhile, or its job was deleted."""


_LONGEST_MESSAGE = 5000  # characters of an error; those of libraries may hold whole files
_PAST = {
    "cancel": "cancelled", "pause": "paused", "resume": "resumed", "extend": "extended",
    "delete": "deleted",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Stage:
    """
    A piece of a job that one worker does.

    Attributes:
        number: Island of a search, trial of a perplexity, else 0.
        attempt: How often it was begun; only the latest attempt may write.
        failures: Attempts that failed or whose worker died.
        params: What to do.
        done: Finished trials.
        elapsed_s: Seconds of work, of all attempts, up to the last progress.
        best_value: Of the objective, so far.
        result: What it gave.
    """

    id: int
    job_id: uuid.UUID
    kind: StageKind
    number: int
    state: StageState
    attempt: int
    failures: int
    worker_id: uuid.UUID | None
    params: dict[str, Any] | None
    done: int
    elapsed_s: float
    best_value: float | None
    result: dict[str, Any] | None
    started_at: datetime | None
    finished_at: datetime | None

    @property
    def part_of(self) -> int | None:
        """The number of the stage of this kind that this one is a part of, if it is one."""
        return (self.params or {}).get("part_of")


@dataclass(frozen=True, kw_only=True)
class Job:
    """
    A search that somebody asked for.

    Attributes:
        number: Counts up; newer jobs have higher ones.
        owner_id: The key that it was submitted with.
        name: Of its studies, too.
        spec: The document, as it was submitted, with the defaults.
        stage: What is being done, or was done last.
        trials: Of each island.
        max_attempts: Of each stage.
        error: Why it failed: type, message, stage and what else is known.
        best: The configuration.
        stages: In the order in which they were made.
    """

    id: uuid.UUID
    number: int
    owner_id: uuid.UUID | None
    name: str
    spec: dict[str, Any]
    state: JobState
    stage: StageKind | None
    priority: int
    trials: int
    max_attempts: int
    error: dict[str, Any] | None
    best: dict[str, Any] | None
    warnings: list[str] | None
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    stages: list[Stage]

    def of_kind(self, kind: StageKind) -> list[Stage]:
        """The stages of one kind, without their parts, by number."""
        return self._sorted(s for s in self.stages if s.kind is kind and s.part_of is None)

    def parts(self, kind: StageKind, number: int | None = None) -> list[Stage]:
        """The parts of the stage of a kind with this number, or of all of the kind, by number."""
        parts = (s for s in self.stages if s.kind is kind and s.part_of is not None)
        return self._sorted(s for s in parts if number in (None, s.part_of))

    @staticmethod
    def _sorted(found: Iterable[Stage]) -> list[Stage]:
        return sorted(found, key=lambda stage: stage.number)


@dataclass(frozen=True, kw_only=True)
class NewStage:
    """
    A stage to be made.

    Attributes:
        lock: Stages with the same lock run one after the other, of all jobs.
    """

    kind: StageKind
    number: int = 0
    params: Mapping[str, Any] | None = None
    lock: str | None = None


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A worker's right to work on a stage, until somebody else gets it."""

    job: Job
    stage: Stage

    @property
    def attempt(self) -> int:
        """The fencing token of every write."""
        return self.stage.attempt


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened to a job. Ids count up."""

    id: int
    kind: str
    data: dict[str, Any]
    created_at: datetime


@dataclass(frozen=True, kw_only=True)
class WorkerRecord:
    """A worker that reported lately, and what it is doing."""

    id: uuid.UUID
    name: str
    device: str
    stages: list[str]
    started_at: datetime
    heartbeat_at: datetime
    job_id: uuid.UUID | None
    stage: StageKind | None


class JobStore:
    """
    All jobs of a database.

    Args:
        database: Migrated.
    """

    def __init__(self, database: Database) -> None:
        self.database = database

    # ------------------------------------------------------------------ for the API

    def submit(
        self,
        spec: Mapping[str, Any],
        *,
        name: str,
        first: NewStage,
        more: Sequence[NewStage] = (),
        priority: int = 0,
        trials: int,
        max_attempts: int,
        asked: Mapping[str, Any] | None = None,
        owner_id: uuid.UUID | None = None,
        idempotency_key: str | None = None,
        max_unfinished: int = 1000,
        max_urgent: int | None = None,
        max_finished: int | None = None,
    ) -> tuple[Job, bool]:
        """
        Store a job and put its first stage, or stages, into the queue.

        Args:
            spec: The document, as the workers read it.
            name: Of the studies, before a part of the id.
            first: The first stage.
            more: Others that can be begun at once.
            priority: Higher goes first.
            trials: Of each island.
            max_attempts: Of each stage.
            asked: The document as it came, if that is another one.
            owner_id: The key that it came with.
            idempotency_key: The same one makes one job, if ``asked`` is the same, too.
            max_unfinished: Jobs of the owner.

        Returns:
            The job, and whether it is new: with an idempotency key that was
            used before, it is the job of that time.

        Raises:
            IdempotencyKeyReused: That time it was another document.
            TooManyJobs: The owner has ``max_unfinished`` jobs that are not over, ``max_urgent`` of
                them with a priority above 0 as this one, or ``max_finished`` jobs that are over.
        """
        document = json.dumps(spec if asked is None else asked, sort_keys=True)
        fingerprint = hashlib.sha256(document.encode()).digest()
        mine = jobs.c.owner_id == owner_id  # IS NULL for None
        job_id = uuid.uuid4()
        values = {
            "id": job_id,
            "owner_id": owner_id,
            "name": f"{name} {job_id.hex[:12]}",
            "spec": dict(spec),
            "state": JobState.QUEUED,
            "priority": priority,
            "trials": trials,
            "max_attempts": max_attempts,
            "idempotency_key": idempotency_key,
            "fingerprint": fingerprint,
        }
        with self.database.transaction() as connection:
            new = pg_insert(jobs).values(values).on_conflict_do_nothing().returning(jobs.c.id)
            while connection.execute(new).first() is None:
                earlier = connection.execute(
                    select(jobs.c.id, jobs.c.fingerprint).where(
                        jobs.c.idempotency_key == idempotency_key, mine
                    )
                ).first()
                if earlier is None:  # deleted just now, so that its key is free
                    continue
                if bytes(earlier.fingerprint) != fingerprint:
                    raise IdempotencyKeyReused
                with suppress(NoSuchJob):
                    return _job(connection, earlier.id), False
            # One submission of an owner after the other, so that none slips past the limit.
            own = func.hashtext(f"pho submissions of {owner_id}")
            connection.execute(select(func.pg_advisory_xact_lock(own)))
            goes_on = jobs.c.state.in_([s for s in JobState if not s.is_over])
            total = func.count()
            urgent_ones = and_(goes_on, jobs.c.priority > 0)
            counts = select(total, total.filter(goes_on), total.filter(urgent_ones))
            every, unfinished, urgent = connection.execute(
                counts.select_from(jobs).where(mine)
            ).one()
            if unfinished > max_unfinished:
                raise TooManyJobs("unfinished")
            if priority > 0 and max_urgent is not None and urgent > max_urgent:
                raise TooManyJobs("urgent")
            if max_finished is not None and every - unfinished >= max_finished:
                raise TooManyJobs("finished")
            _event(connection, job_id, "state", {"state": JobState.QUEUED})
            job = _job(connection, job_id)
            self._add(connection, job, [first, *more])
            return _job(connection, job_id), True

    def get(self, job_id: uuid.UUID, *, visible_to: uuid.UUID | None = None) -> Job:
        """
        A job with its stages.

        Args:
            job_id: Which.
            visible_to: Only if this key submitted it; None sees all.

        Raises:
            NoSuchJob: It is not there, or not visible.
        """
        with self.database.transaction() as connection:
            return _job(connection, job_id, visible_to=visible_to)

    def page(
        self,
        *,
        visible_to: uuid.UUID | None = None,
        states: Sequence[JobState] = (),
        before: int | None = None,
        limit: int = 50,
    ) -> list[Job]:
        """Jobs, newest first: those with a number below ``before``, at most ``limit``."""
        query = select(jobs).order_by(jobs.c.number.desc()).limit(limit)
        if visible_to is not None:
            query = query.where(jobs.c.owner_id == visible_to)
        if states:
            query = query.where(jobs.c.state.in_(states))
        if before is not None:
            query = query.where(jobs.c.number < before)
        with self.database.transaction() as connection:
            return _jobs(connection, query)

    def ask(
        self,
        job_id: uuid.UUID,
        verb: str,
        *,
        visible_to: uuid.UUID | None = None,
        trials: int = 0,
        max_trials: int | None = None,
    ) -> Job:
        """
        Cancel, pause, resume or extend a job.

        What it is already, it may be asked to be again.

        Args:
            job_id: Which.
            verb: A key of :data:`storage.states.VERBS`.
            visible_to: Only if this key submitted it; None sees all.
            trials: How many more each island gets; only for ``extend``.
            max_trials: That an island may have in the end.

        Raises:
            NoSuchJob: It is not there, or not visible.
            StateConflict: It is in a state in which this cannot be done.
            TooManyTrials: It would have more than ``max_trials``.
        """
        with self.database.transaction() as connection:
            job = _job(connection, job_id, visible_to=visible_to, lock=True)
            state = VERBS[verb].get(job.state)
            if state is None:
                raise StateConflict(verb, job.state)
            if verb == "extend":
                if max_trials is not None and job.trials + trials > max_trials:
                    raise TooManyTrials(
                        f"{job.trials} trials and {trials} more are above {max_trials}, the most "
                        "of a job"
                    )
                self._extend(connection, job, trials)
                job = _job(connection, job_id)
            busy = any(s.state is StageState.RUNNING for s in job.stages)
            if busy and state is JobState.QUEUED:
                state = JobState.RUNNING  # resumed before a worker put it down
            _set_state(connection, job, settled(state, busy=busy))
            if state.may_work and not job.state.may_work:
                self._take_up(connection, job)
            return _job(connection, job_id)

    @contextmanager
    def deleting(self, job_id: uuid.UUID, *, visible_to: uuid.UUID | None = None) -> Iterator[Job]:
        """
        Forget a job that is over or paused, after what the caller deletes of it elsewhere.

        If that fails, the job stays; a second deletion waits for the first.

        Raises:
            NoSuchJob: It is not there, or not visible.
            StateConflict: It may still work.
        """
        with self.database.transaction() as connection:
            job = _job(connection, job_id, visible_to=visible_to, lock=True)
            if job.state not in VERBS["delete"]:
                raise StateConflict("delete", job.state, "Cancel it first.")
            yield job
            connection.execute(delete(jobs).where(jobs.c.id == job.id))

    def over_for(self, days: float, limit: int = 100) -> list[uuid.UUID]:
        """Some jobs of all owners that have been over for so many days, the oldest first."""
        query = (
            select(jobs.c.id)
            .where(
                jobs.c.state.in_([s for s in JobState if s.is_over]),
                jobs.c.finished_at < func.now() - _seconds(days * 86_400),
            )
            .order_by(jobs.c.finished_at)
            .limit(limit)
        )
        with self.database.transaction() as connection:
            return [*connection.execute(query).scalars()]

    def events(self, job_id: uuid.UUID, *, after: int = 0, limit: int = 500) -> list[Event]:
        """What happened to a job after the event with this id, oldest first."""
        query = (
            select(events)
            .where(events.c.job_id == job_id, events.c.id > after)
            .order_by(events.c.id)
            .limit(limit)
        )
        with self.database.transaction() as connection:
            return [
                Event(id=row.id, kind=row.kind, data=row.data, created_at=row.created_at)
                for row in connection.execute(query)
            ]

    def workers(self, *, alive_s: float) -> list[WorkerRecord]:
        """The workers that reported in the last ``alive_s`` seconds, oldest first."""
        running = and_(stages.c.worker_id == workers.c.id, stages.c.state == StageState.RUNNING)
        query = (
            select(workers, stages.c.job_id, stages.c.kind)
            .outerjoin(stages, running)
            .where(workers.c.heartbeat_at > func.now() - _seconds(alive_s))
            .order_by(workers.c.started_at, workers.c.id, stages.c.id)
        )
        with self.database.transaction() as connection:
            # Of a stage that it lost and one that it has, the latter.
            found = {
                row.id: WorkerRecord(
                    id=row.id,
                    name=row.name,
                    device=row.device,
                    stages=row.stages,
                    started_at=row.started_at,
                    heartbeat_at=row.heartbeat_at,
                    job_id=row.job_id,
                    stage=StageKind(row.kind) if row.kind else None,
                )
                for row in connection.execute(query)
            }
        return [*found.values()]

    def counts(self) -> tuple[dict[JobState, int], dict[tuple[StageKind, StageState], int]]:
        """How many jobs are in each state, and how many stages of jobs that may work."""
        with self.database.transaction() as connection:
            by_state = connection.execute(select(jobs.c.state, func.count()).group_by(jobs.c.state))
            by_stage = connection.execute(
                select(stages.c.kind, stages.c.state, func.count())
                .join(jobs, jobs.c.id == stages.c.job_id)
                .where(jobs.c.state.in_([s for s in JobState if s.may_work]))
                .group_by(stages.c.kind, stages.c.state)
            )
            return (
                {JobState(state): count for state, count in by_state},
                {(StageKind(kind), StageState(state)): n for kind, state, n in by_stage},
            )

    # -------------------------------------------------------------- for the workers

    def claim(self, stage_id: int, queue_id: int, worker_id: uuid.UUID) -> Claim | None:
        """
        Take a stage that the queue gave out.

        Returns:
            The right to work on it; None if there is nothing to do: the job
            may not work now, or another entry of the queue stands for the stage.
        """
        with self.database.transaction() as connection:
            row = connection.execute(select(stages.c.job_id).where(stages.c.id == stage_id)).first()
            if row is None:
                return None
            try:
                job = _job(connection, row.job_id, lock=True)
            except NoSuchJob:  # deleted since
                return None
            stage = _stage_row(connection, stage_id, lock=True)
            if stage is None or stage.queue_id != queue_id:
                return None
            if stage.state not in (StageState.WAITING, StageState.RUNNING):
                return None
            failures = stage.failures + (stage.state == StageState.RUNNING)  # its worker died
            if not job.state.may_work:
                self._put_down(connection, job, stage_id, failures)
                return None
            if failures >= job.max_attempts:
                error = {
                    "type": "WorkerLost",
                    "message": f"{failures} workers died while they worked on it: killed, out of "
                    "memory, or cut off from the database. Give them more memory, then resume.",
                    "stage": stage.kind,
                }
                _update_stage(connection, stage_id, state=StageState.FAILED, failures=failures)
                _set_state(connection, job, JobState.FAILED, error=error)
                return None
            _update_stage(
                connection,
                stage_id,
                state=StageState.RUNNING,
                attempt=stage.attempt + 1,
                failures=failures,
                worker_id=worker_id,
                started_at=func.coalesce(stages.c.started_at, func.now()),
            )
            kind = StageKind(stage.kind)
            connection.execute(
                update(jobs)
                .where(jobs.c.id == job.id)
                .values(stage=kind, started_at=func.coalesce(jobs.c.started_at, func.now()))
            )
            if job.stage is not kind:
                _event(connection, job.id, "stage", {"stage": kind})
            _set_state(connection, job, JobState.RUNNING)
            job = _job(connection, job.id)
            (taken,) = (s for s in job.stages if s.id == stage_id)
            return Claim(job=job, stage=taken)

    def give_again(self, queue_id: int, *, alive_s: float) -> bool:
        """
        Put the stage of a dead worker's entry into the queue anew.

        The old entry stands for nothing then: if the worker was only frozen,
        what it does to its entry when it wakes harms nobody.

        Args:
            queue_id: The entry.
            alive_s: A worker that reported in so many seconds lives, and keeps its stage: it was
                cut off from the queue, and works on.

        Returns:
            Whether the old entry stands for nothing.
        """
        with self.database.transaction() as connection:
            mine = stages.c.queue_id == queue_id
            row = connection.execute(select(stages.c.id, stages.c.job_id).where(mine)).first()
            if row is None:
                return True
            try:
                job = _job(connection, row.job_id, lock=True)
            except NoSuchJob:
                return True
            stage = _stage_row(connection, row.id, lock=True)
            if (
                stage is None
                or stage.queue_id != queue_id
                or stage.state not in (StageState.WAITING, StageState.RUNNING)
            ):
                return True
            if stage.state == StageState.RUNNING and _reports(connection, stage.worker_id, alive_s):
                return False
            if job.state.may_work:
                lock = (stage.params or {})["lock"]
                self._enqueue(connection, job, stage.id, StageKind(stage.kind), lock)
            else:
                failures = stage.failures + (stage.state == StageState.RUNNING)
                self._put_down(connection, job, stage.id, failures)
            return True

    @contextmanager
    def fence(self, claim: Claim, storage: RDBStorage | None = None) -> Iterator[None]:
        """
        Hold off everybody else from a stage while its worker writes.

        What Optuna writes meanwhile is in one transaction with the check of the
        claim: whole or not at all, and never by a worker that has lost its stage,
        even one that was frozen or cut off in the midst of it.

        Args:
            claim: Of the stage.
            storage: That Optuna writes to.

        Raises:
            LostClaim: The stage is another worker's.
        """
        with self.database.transaction() as connection:
            _require(connection, claim)
            with nullcontext() if storage is None else written_on(storage, connection):
                yield

    def watch(self, claim: Claim) -> JobState:
        """
        The state of the job now.

        Raises:
            LostClaim: The stage is another worker's.
        """
        query = (
            select(jobs.c.state)
            .join(stages, stages.c.job_id == jobs.c.id)
            .where(stages.c.id == claim.stage.id, stages.c.attempt == claim.attempt)
        )
        with self.database.transaction() as connection:
            row = connection.execute(query).first()
        if row is None:
            raise LostClaim
        return JobState(row.state)

    def progress(
        self, claim: Claim, *, done: int, elapsed_s: float, best_value: float | None
    ) -> JobState:
        """
        Note how far a stage is, and give the state of the job.

        Raises:
            LostClaim: The stage is another worker's.
        """
        with self.database.transaction() as connection:
            job = self._claimed(connection, claim)
            _update_stage(
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
            _event(connection, job.id, "progress", data)
            return job.state

    def complete(
        self,
        claim: Claim,
        result: Mapping[str, Any],
        *,
        add: Sequence[NewStage] = (),
        then: Sequence[NewStage] = (),
        trials: int | None = None,
        spec: Mapping[str, Any] | None = None,
    ) -> bool:
        """
        Store what a stage gave, and make the stages that follow.

        Args:
            claim: Of the stage.
            result: What it gave, as JSON values.
            add: Stages that follow at once; those that exist already stay as they are.
            then: Stages that follow if nothing of the job is left to do.
            trials: That a search has brought its study to.
            spec: The job's document from now on, if nothing of the job is left to do.

        Returns:
            False, and nothing is stored, if the job was extended beyond ``trials``.

        Raises:
            LostClaim: The stage is another worker's.
        """
        with self.database.transaction() as connection:
            job = self._claimed(connection, claim)
            if trials is not None and trials < job.trials:
                return False
            _finish_stage(connection, claim.stage.id, StageState.DONE, result)
            self._add(connection, job, add)
            if not _unfinished(connection, job.id):
                self._add(connection, job, then)
                if spec is not None:
                    connection.execute(
                        update(jobs).where(jobs.c.id == job.id).values(spec=dict(spec))
                    )
            self._settle(connection, job)
            return True

    def share(
        self,
        claim: Claim,
        parts: Sequence[NewStage] = (),
        *,
        params: Mapping[str, Any] | None = None,
    ) -> None:
        """
        Put a stage down until its parts are done; then it is given out again.

        Args:
            claim: Of the stage.
            parts: Stages of its kind, with its number as ``part_of`` in their ``params``; those
                that exist already stay as they are.
            params: What to keep with the stage itself, besides.

        Raises:
            LostClaim: The stage is another worker's.
        """
        with self.database.transaction() as connection:
            job = self._claimed(connection, claim)
            if params is not None:
                kept = {**(claim.stage.params or {}), **params}
                _update_stage(connection, claim.stage.id, params=kept)
            self._add(connection, job, parts)
            self._put_down(connection, job, claim.stage.id, claim.stage.failures)
            self._give_out_whole(connection, job.id, claim.stage.kind, claim.stage.number)

    def complete_part(self, claim: Claim, result: Mapping[str, Any]) -> None:
        """
        Store what a part of a stage gave; after the last one, the stage itself is given out.

        Raises:
            LostClaim: The part is another worker's.
        """
        whole = claim.stage.part_of
        assert whole is not None
        with self.database.transaction() as connection:
            job = self._claimed(connection, claim)
            _finish_stage(connection, claim.stage.id, StageState.DONE, result)
            self._settle(connection, job)
            done = self._give_out_whole(connection, job.id, claim.stage.kind, whole)
            data = {"stage": claim.stage.kind, "number": whole, "done": done, "best_value": None}
            _event(connection, job.id, "progress", data)

    def _give_out_whole(
        self, connection: Connection, job_id: uuid.UUID, kind: StageKind, number: int
    ) -> int:
        """Put a stage into the queue whose parts are all done; how many are."""
        job = _job(connection, job_id)
        parts = job.parts(kind, number)
        done = sum(part.state is StageState.DONE for part in parts)
        (whole,) = (s for s in job.of_kind(kind) if s.number == number)
        if done == len(parts) and whole.state is StageState.WAITING and job.state.may_work:
            self._enqueue(connection, job, whole.id, kind, (whole.params or {})["lock"])
        return done

    def succeed(
        self,
        claim: Claim,
        *,
        best: Mapping[str, Any],
        warnings: Sequence[str],
        result: Mapping[str, Any],
    ) -> None:
        """
        Store the configuration that a job was for, in the library too, and what else its last
        stage gave. A job that was cancelled meanwhile is cancelled, without a configuration.

        Raises:
            LostClaim: The stage is another worker's.
        """
        with self.database.transaction() as connection:
            job = self._claimed(connection, claim)
            _finish_stage(connection, claim.stage.id, StageState.DONE, result)
            if job.state is JobState.CANCELLING:
                self._settle(connection, job)
                return
            connection.execute(
                update(jobs)
                .where(jobs.c.id == job.id)
                .values(best=dict(best), warnings=[*warnings])
            )
            keep(connection, best, owner_id=job.owner_id, job_id=job.id)
            _set_state(connection, job, JobState.SUCCEEDED)

    def transferred(
        self,
        claim: Claim,
        result: Mapping[str, Any],
        *,
        configuration: Mapping[str, Any],
        own: Mapping[str, Any] | None,
        check: Callable[[Job], None] = lambda _: None,
    ) -> None:
        """
        Store what a configuration was worth on a model, in the library too; the last one ends
        the job, as cancelled if it was cancelled meanwhile.

        Args:
            claim: Of the stage.
            result: What was measured; with an ``error``, nothing was.
            configuration: What was transferred.
            own: The model's own best, if it was searched for.
            check: Called with the job, which nobody else can change meanwhile, before anything is
                stored; may refuse by raising.

        Raises:
            LostClaim: The stage is another worker's.
        """
        with self.database.transaction() as connection:
            job = self._claimed(connection, claim)
            check(job)
            _finish_stage(connection, claim.stage.id, StageState.DONE, result)
            data = {"stage": claim.stage.kind, "number": claim.stage.number, "done": 1}
            _event(connection, job.id, "progress", {**data, "best_value": None})
            if "error" not in result:
                kept = {name: value for name, value in result.items() if name != "own"}
                keep_transfer(connection, configuration, kept, owner_id=job.owner_id)
            if own is not None:
                keep(connection, own, owner_id=job.owner_id, job_id=job.id)
            if job.state is JobState.CANCELLING or _unfinished(connection, job.id):
                self._settle(connection, job)
            else:
                _set_state(connection, job, JobState.SUCCEEDED)

    def fail(self, claim: Claim, error: Mapping[str, Any], *, retry: bool) -> bool:
        """
        Note that an attempt failed.

        Args:
            claim: Of the stage.
            error: ``type``, ``message`` and what else is known.
            retry: Whether another attempt may help.

        Returns:
            Whether the queue should give the stage out again. Otherwise the job
            has failed, and keeps the error.

        Raises:
            LostClaim: The stage is another worker's.
        """
        with self.database.transaction() as connection:
            job = self._claimed(connection, claim)
            failures = claim.stage.failures + 1
            message = str(error.get("message"))[:_LONGEST_MESSAGE]
            described = {
                **error, "message": message, "stage": claim.stage.kind, "attempts": failures,
            }  # fmt: skip
            if retry and failures < job.max_attempts:
                _event(connection, job.id, "retry", described)
                self._put_down(connection, job, claim.stage.id, failures)
                return job.state.may_work
            _update_stage(
                connection, claim.stage.id, state=StageState.FAILED, failures=failures,
                worker_id=None,
            )  # fmt: skip
            if job.state.may_work:
                _set_state(connection, job, JobState.FAILED, error=described)
            else:
                connection.execute(update(jobs).where(jobs.c.id == job.id).values(error=described))
                self._settle(connection, job)
            return False

    def hand_back(self, claim: Claim) -> bool:
        """
        Put a stage down unfinished.

        Returns:
            Whether the queue should give it out again: the job may still work.

        Raises:
            LostClaim: The stage is another worker's.
        """
        with self.database.transaction() as connection:
            job = self._claimed(connection, claim)
            self._put_down(connection, job, claim.stage.id, claim.stage.failures)
            return job.state.may_work

    def give_up(self, claim: Claim) -> None:
        """
        Put a stage down for a worker that cannot stop to work on it, and so ends.

        Its entry is taken out of the queue, and a new one put in if the job may still work.

        Raises:
            LostClaim: The stage is another worker's.
        """
        with self.database.transaction() as connection:
            job = self._claimed(connection, claim)
            row = _stage_row(connection, claim.stage.id)
            assert row is not None  # the claim holds
            if row.queue_id is not None:
                take_out(connection, row.queue_id)
            self._put_down(connection, job, claim.stage.id, claim.stage.failures)
            if job.state.may_work:
                lock = (claim.stage.params or {})["lock"]
                self._enqueue(connection, job, claim.stage.id, claim.stage.kind, lock)

    def enter_worker(
        self, worker_id: uuid.UUID, *, name: str, device: str, kinds: Sequence[StageKind]
    ) -> None:
        """Note that a worker is there, or is there still."""
        values = {"id": worker_id, "name": name, "device": device, "stages": [*kinds]}
        with self.database.transaction() as connection:
            connection.execute(
                pg_insert(workers)
                .values(values)
                .on_conflict_do_update(
                    index_elements=[workers.c.id], set_={"heartbeat_at": func.now()}
                )
            )
            connection.execute(
                delete(workers).where(workers.c.heartbeat_at < func.now() - _seconds(24 * 3600))
            )

    def remove_worker(self, worker_id: uuid.UUID) -> None:
        """Note that a worker has gone in order."""
        with self.database.transaction() as connection:
            connection.execute(delete(workers).where(workers.c.id == worker_id))

    # ---------------------------------------------------------------------- inside

    def _claimed(self, connection: Connection, claim: Claim) -> Job:
        """The job, locked, if the claim still holds."""
        try:
            job = _job(connection, claim.job.id, lock=True)
        except NoSuchJob:
            raise LostClaim from None
        _require(connection, claim)
        return job

    def _add(self, connection: Connection, job: Job, new: Sequence[NewStage]) -> None:
        for stage in new:
            inserted = connection.execute(
                pg_insert(stages)
                .values(
                    job_id=job.id,
                    kind=stage.kind,
                    number=stage.number,
                    state=StageState.WAITING,
                    params={**(stage.params or {}), "lock": stage.lock},
                )
                .on_conflict_do_nothing()
                .returning(stages.c.id)
            ).first()
            if inserted is not None and job.state.may_work:
                self._enqueue(connection, job, inserted.id, stage.kind, stage.lock)

    def _enqueue(
        self, connection: Connection, job: Job, stage_id: int, kind: StageKind, lock: str | None
    ) -> None:
        queue_id = enqueue(connection, stage_id, kind, priority=job.priority, lock=lock)
        _update_stage(connection, stage_id, queue_id=queue_id)

    def _put_down(self, connection: Connection, job: Job, stage_id: int, failures: int) -> None:
        _update_stage(
            connection, stage_id, state=StageState.WAITING, failures=failures, worker_id=None
        )
        self._settle(connection, job)

    def _settle(self, connection: Connection, job: Job) -> None:
        running = connection.execute(
            select(func.count())
            .select_from(stages)
            .where(stages.c.job_id == job.id, stages.c.state == StageState.RUNNING)
        ).scalar_one()
        _set_state(connection, job, settled(job.state, busy=running > 0))

    def _take_up(self, connection: Connection, job: Job) -> None:
        """Put everything that a job has left to do into the queue."""
        connection.execute(update(jobs).where(jobs.c.id == job.id).values(error=None))
        for stage in job.stages:
            if stage.state in (StageState.WAITING, StageState.FAILED):
                _update_stage(connection, stage.id, state=StageState.WAITING, failures=0)
                self._enqueue(connection, job, stage.id, stage.kind, (stage.params or {})["lock"])

    def _extend(self, connection: Connection, job: Job, trials: int) -> None:
        """More trials for each island; what follows the searches is done again."""
        if job.state is not JobState.SUCCEEDED and any(_is_late(s) for s in job.stages):
            raise StateConflict(
                "extend",
                job.state,
                f"Its search is over and it is at {job.stage}: wait until it has succeeded, or "
                "resume it first.",
            )
        total = job.trials + trials
        connection.execute(
            update(jobs)
            .where(jobs.c.id == job.id)
            .values(trials=total, spec={**job.spec, "trials": total})
        )
        again = [StageKind.CONFIRM, StageKind.FINISH]
        connection.execute(
            delete(stages).where(stages.c.job_id == job.id, stages.c.kind.in_(again))
        )
        # Islands that are done already, too, if others are not.
        connection.execute(
            update(stages)
            .where(
                stages.c.job_id == job.id,
                stages.c.kind == StageKind.SEARCH,
                stages.c.state == StageState.DONE,
            )
            .values(state=StageState.WAITING, finished_at=None)
        )
        if job.state in (JobState.QUEUED, JobState.RUNNING):
            for stage in job.of_kind(StageKind.SEARCH):
                if stage.state is StageState.DONE:
                    self._enqueue(connection, job, stage.id, stage.kind, None)


def _is_late(stage: Stage) -> bool:
    """Whether a stage that follows the searches has begun."""
    if stage.kind is StageKind.CONFIRM:
        return stage.attempt > 0 or stage.state is not StageState.WAITING
    if stage.kind is StageKind.PERPLEXITY:
        return stage.state is not StageState.DONE  # those that are done may be of a shorter search
    return stage.kind is StageKind.FINISH


def _reports(connection: Connection, worker_id: uuid.UUID | None, alive_s: float) -> bool:
    """Whether a worker did in the last seconds."""
    recent = workers.c.heartbeat_at > func.now() - _seconds(alive_s)
    found = connection.execute(select(workers.c.id).where(workers.c.id == worker_id, recent))
    return found.first() is not None


def _seconds(count: float) -> Any:
    return func.make_interval(0, 0, 0, 0, 0, 0, count)


def _job(
    connection: Connection,
    job_id: uuid.UUID,
    *,
    visible_to: uuid.UUID | None = None,
    lock: bool = False,
) -> Job:
    query = select(jobs).where(jobs.c.id == job_id)
    if visible_to is not None:
        query = query.where(jobs.c.owner_id == visible_to)
    found = _jobs(connection, query.with_for_update() if lock else query)
    if not found:
        raise NoSuchJob(str(job_id))
    return found[0]


def _jobs(connection: Connection, query: Select[Any]) -> list[Job]:
    rows = connection.execute(query).all()
    of_job: dict[uuid.UUID, list[Stage]] = {row.id: [] for row in rows}
    for row in connection.execute(
        select(stages).where(stages.c.job_id.in_(of_job)).order_by(stages.c.id)
    ):
        of_job[row.job_id].append(_stage(row))
    return [
        Job(
            id=row.id,
            number=row.number,
            owner_id=row.owner_id,
            name=row.name,
            spec=row.spec,
            state=JobState(row.state),
            stage=StageKind(row.stage) if row.stage else None,
            priority=row.priority,
            trials=row.trials,
            max_attempts=row.max_attempts,
            error=row.error,
            best=row.best,
            warnings=row.warnings,
            created_at=row.created_at,
            started_at=row.started_at,
            finished_at=row.finished_at,
            stages=of_job[row.id],
        )
        for row in rows
    ]


def _stage(row: Row[Any]) -> Stage:
    return Stage(
        id=row.id,
        job_id=row.job_id,
        kind=StageKind(row.kind),
        number=row.number,
        state=StageState(row.state),
        attempt=row.attempt,
        failures=row.failures,
        worker_id=row.worker_id,
        params=row.params,
        done=row.done,
        elapsed_s=row.elapsed_s,
        best_value=row.best_value,
        result=row.result,
        started_at=row.started_at,
        finished_at=row.finished_at,
    )


def _stage_row(connection: Connection, stage_id: int, *, lock: bool = False) -> Row[Any] | None:
    query = select(stages).where(stages.c.id == stage_id)
    return connection.execute(query.with_for_update() if lock else query).first()


def _require(connection: Connection, claim: Claim) -> None:
    """Lock the stage's row; raise LostClaim unless the claim still holds."""
    row = _stage_row(connection, claim.stage.id, lock=True)
    if row is None or row.attempt != claim.attempt or row.state != StageState.RUNNING:
        raise LostClaim


def _update_stage(connection: Connection, stage_id: int, **values: Any) -> None:
    connection.execute(update(stages).where(stages.c.id == stage_id).values(**values))


def _finish_stage(
    connection: Connection, stage_id: int, state: StageState, result: Mapping[str, Any]
) -> None:
    _update_stage(
        connection, stage_id, state=state, result=dict(result), worker_id=None,
        finished_at=func.now(),
    )  # fmt: skip


def _unfinished(connection: Connection, job_id: uuid.UUID) -> bool:
    count = connection.execute(
        select(func.count())
        .select_from(stages)
        .where(stages.c.job_id == job_id, stages.c.state != StageState.DONE)
    ).scalar_one()
    return bool(count)


def _set_state(
    connection: Connection,
    job: Job,
    state: JobState,
    *,
    error: Mapping[str, Any] | None = None,
) -> None:
    """Write a job's state and its event, if it is another one than before."""
    if state is job.state:
        return
    values: dict[str, Any] = {"state": state}
    values["finished_at"] = func.now() if state.is_over else None
    if error is not None:
        values["error"] = dict(error)
    connection.execute(update(jobs).where(jobs.c.id == job.id).values(values))
    data: dict[str, Any] = {"state": state}
    if error is not None:
        data["error"] = dict(error)
    _event(connection, job.id, "state", data)


def _event(connection: Connection, job_id: uuid.UUID, kind: str, data: Mapping[str, Any]) -> None:
    connection.execute(insert(events).values(job_id=job_id, kind=kind, data=dict(data)))
