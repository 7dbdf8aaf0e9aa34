"""
The store of jobs: what the API does to them and to their pruned models.
"""

import hashlib
import json
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any, Literal

from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial
from sqlalchemy import ColumnElement, Connection, and_, delete, func, select, update
from sqlalchemy.dialects.postgresql import insert as pg_insert

from storage.claims import LOST_FOR_S, ClaimStore
from storage.database import Database
from storage.keys import charge, recharge, refund
from storage.listing import (
    EVERYTHING,
    NEWEST,
    Facets,
    JobFilter,
    Sort,
    columns_of,
    ordered,
    read_facets,
)
from storage.queue import clear_ended, waited_s
from storage.records import (
    PATTERN,
    VERBS,
    AttemptEnd,
    Drain,
    EventRecord,
    IdempotencyKeyReused,
    JobRecord,
    JobState,
    NewStage,
    NoSuchJob,
    Stage,
    StageKind,
    StageState,
    StateConflict,
    TooManyJobs,
    TooManyTrials,
    WorkerRecord,
    settled,
)
from storage.rows import (
    LOG,
    add_event,
    add_stages,
    enqueue_stage,
    find_job,
    find_jobs,
    set_state,
    update_stage,
)
from storage.studies import begin_study, study_name, written_on
from storage.tables import events, interval, jobs, queue_workers, service, stages, tallies, workers


@dataclass(frozen=True, kw_only=True)
class Heritage:
    """Trials that the studies of a fork begin with."""

    trials: Sequence[FrozenTrial]  # That have values
    direction: Literal["minimize", "maximize"]
    islands: int  # Each has a study
    records: Mapping[str, Any]  # Of each study
    sentence: str  # For whoever submits the job


@dataclass(frozen=True, kw_only=True)
class NewJob:
    """A job to be submitted."""

    spec: Mapping[str, Any]  # The document, with the defaults
    name: str
    stages: Sequence[NewStage]  # That wait at once
    trials: int  # Of each island
    max_attempts: int  # Of each stage
    priority: int = 0
    tokens: int = 0  # That models are run over
    request: Mapping[str, Any] | None = None  # The document as it came, if that is another one
    idempotency_key: str | None = None
    heritage: Heritage | None = None  # Of a fork

    @property
    def fingerprint(self) -> bytes:
        """SHA-256 of what was submitted."""
        document = json.dumps(self.spec if self.request is None else self.request, sort_keys=True)
        return hashlib.sha256(document.encode()).digest()


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How many jobs an owner may have; None: as many as one likes."""

    unfinished: int = 1000
    urgent: int | None = None  # Unfinished ones with a priority above 0
    finished: int | None = None


DEFAULT_LIMITS = Limits()


@dataclass(frozen=True, kw_only=True)
class Tally:
    """How many attempts have ended alike."""

    kind: StageKind
    outcome: AttemptEnd
    up_to_s: float  # of DURATIONS_S: the least that their stages have not worked longer than
    count: int
    seconds: float  # that their stages have worked, in all


class JobStore(ClaimStore):
    """All jobs of a database."""

    def submit(
        self, new: NewJob, *, owner_id: uuid.UUID | None = None, limits: Limits = DEFAULT_LIMITS
    ) -> tuple[JobRecord, bool]:
        """Store a job and put its first stages into the queue; or find it, not new, by its key."""
        job_id = uuid.uuid4()
        name = f"{new.name} {job_id.hex[:12]}"
        values = {
            "id": job_id,
            "owner_id": owner_id,
            "name": name,
            "spec": dict(new.spec),
            **columns_of(new.spec),
            "state": JobState.QUEUED,
            "priority": new.priority,
            "trials": new.trials,
            "max_attempts": new.max_attempts,
            "idempotency_key": new.idempotency_key,
            "fingerprint": new.fingerprint,
            "warnings": None if new.heritage is None else [new.heritage.sentence],
        }
        insert = pg_insert(jobs).values(values).on_conflict_do_nothing().returning(jobs.c.id)
        with self.database.transaction() as connection:
            while connection.execute(insert).first() is None:
                earlier_job = _same_key(connection, new, owner_id)
                if earlier_job is not None:  # else it was deleted just now, and its key is free
                    return earlier_job, False
            _check_limits(connection, new, owner_id, limits)
            if owner_id is not None:
                charge(connection, owner_id, job_id, new.tokens)
            add_event(connection, job_id, "state", {"state": JobState.QUEUED})
            add_stages(connection, find_job(connection, job_id), new.stages)
            if (heritage := new.heritage) is not None:
                for island in range(heritage.islands):
                    begin_study(
                        connection, study_name(name, island), heritage.trials,
                        direction=heritage.direction, records=heritage.records,
                    )  # fmt: skip
            return find_job(connection, job_id), True

    def get(self, job_id: uuid.UUID, *, visible_to: uuid.UUID | None = None) -> JobRecord:
        with self.database.transaction() as connection:
            return find_job(connection, job_id, visible_to=visible_to)

    def page(
        self,
        job_filter: JobFilter = EVERYTHING,
        *,
        sort: Sort = NEWEST,
        before: int | None = None,
        skip: int = 0,
        limit: int = 50,
    ) -> list[JobRecord]:
        older = [] if before is None else [jobs.c.number < before]
        with self.database.transaction() as connection:
            return find_jobs(
                connection,
                *job_filter.conditions(),
                *older,
                visible_to=job_filter.visible_to,
                order=ordered(sort),
                skip=skip,
                limit=limit,
            )

    def facets(self, job_filter: JobFilter, *, limit: int = 12) -> Facets:
        """How many jobs of a list there are by state, and by the most frequent models, patterns."""
        with self.database.transaction() as connection:
            return read_facets(connection, job_filter, limit=limit)

    def ask(
        self,
        job_id: uuid.UUID,
        verb: str,
        *,
        visible_to: uuid.UUID | None = None,
        trials: int = 0,
        max_trials: int | None = None,
        tokens: int = 0,
    ) -> JobRecord:
        """Cancel, pause, resume or extend a job."""
        # What it is already, it may be asked to be again.
        with self.database.transaction() as connection:
            job = find_job(connection, job_id, visible_to=visible_to, lock=True)
            state = VERBS[verb].get(job.state)
            if state is None:
                raise StateConflict(verb, job.state)
            if verb == "extend":
                if max_trials is not None and job.trials + trials > max_trials:
                    raise TooManyTrials(
                        f"{job.trials} trials and {trials} more are above {max_trials}, the most "
                        "of a job"
                    )
                if job.owner_id is not None:
                    charge(connection, job.owner_id, job.id, tokens)
                _extend(connection, job, trials)
                job = find_job(connection, job_id)
            if verb == "resume" and tokens and job.owner_id is not None:
                recharge(connection, job.owner_id, job.id, tokens)
            if verb == "cancel" and not any(s.attempt for s in job.stages):
                refund(connection, job.id)
            busy = any(s.state is StageState.RUNNING for s in job.stages)
            if busy and state is JobState.QUEUED:
                state = JobState.RUNNING  # resumed before a worker put it down
            set_state(connection, job, settled(state, busy=busy))
            if state.may_work and not job.state.may_work:
                _take_up(connection, job)
            return find_job(connection, job_id)

    @contextmanager
    def deleting(
        self,
        job_id: uuid.UUID,
        storage: RDBStorage | None = None,
        *,
        visible_to: uuid.UUID | None = None,
    ) -> Iterator[JobRecord]:
        """Forget a job that is over or paused, after what the caller deletes of it elsewhere."""
        # If that fails, the job stays; a second deletion waits for the first. Studies that are
        # deleted in ``storage`` meanwhile go with the job or stay with it: one that is paused and
        # has lost its trials could be resumed.
        with self.database.transaction() as connection:
            job = find_job(connection, job_id, visible_to=visible_to, lock=True)
            if job.state not in VERBS["delete"]:
                raise StateConflict("delete", job.state, "Cancel it first.")
            with nullcontext() if storage is None else written_on(storage, connection):
                yield job
            connection.execute(delete(jobs).where(jobs.c.id == job.id))

    def over_for(self, days: float, limit: int = 100) -> list[uuid.UUID]:
        """Some jobs of all owners that have been over for so many days, the oldest first."""
        query = (
            select(jobs.c.id)
            .where(
                jobs.c.state.in_([s for s in JobState if s.is_over]),
                jobs.c.finished_at < func.now() - interval(days * 86_400),
            )
            .order_by(jobs.c.finished_at)
            .limit(limit)
        )
        with self.database.transaction() as connection:
            return [*connection.execute(query).scalars()]

    def events(self, job_id: uuid.UUID, *, after: int = 0, limit: int = 500) -> list[EventRecord]:
        """What happened to a job after the event with this id, oldest first; without logs."""
        conditions = (events.c.id > after, events.c.kind != LOG)
        return self._events(job_id, *conditions, order=events.c.id, limit=limit)

    def history(self, job_id: uuid.UUID, *, limit: int) -> list[EventRecord]:
        """The last events of a job, newest first, without logs and what tells how far it is."""
        condition = events.c.kind.not_in(["progress", LOG])
        return self._events(job_id, condition, order=events.c.id.desc(), limit=limit)

    def logs(self, job_id: uuid.UUID, *, limit: int) -> list[EventRecord]:
        """The last lines that workers have logged of a job's stages, oldest first: see ``log``."""
        condition = events.c.kind == LOG
        return self._events(job_id, condition, order=events.c.id.desc(), limit=limit)[::-1]

    def _events(
        self,
        job_id: uuid.UUID,
        *conditions: ColumnElement[bool],
        order: ColumnElement[int],
        limit: int,
    ) -> list[EventRecord]:
        query = select(events.c.id, events.c.kind, events.c.data, events.c.created_at)
        query = query.where(events.c.job_id == job_id, *conditions).order_by(order).limit(limit)
        with self.database.transaction() as connection:
            return [EventRecord(**row._mapping) for row in connection.execute(query)]

    def workers(self, *, alive_s: float) -> list[WorkerRecord]:
        """The workers that reported in the last ``alive_s`` seconds, oldest first."""
        running = and_(stages.c.worker_id == workers.c.id, stages.c.state == StageState.RUNNING)
        query = (
            select(
                *(column for column in workers.c if column is not workers.c.number),
                queue_workers.c.last_heartbeat.label("heartbeat_at"),
                stages.c.job_id,
                stages.c.kind.label("stage"),
            )
            .select_from(workers)
            .join(queue_workers)
            .outerjoin(stages, running)
            .where(_reported(alive_s))
            .order_by(workers.c.started_at, workers.c.id, stages.c.id)
        )
        with self.database.transaction() as connection:
            # Of a stage that it lost and one that it has, the latter.
            rows = connection.execute(query)
            records = {row.id: WorkerRecord(**row._mapping) for row in rows}
        return [*records.values()]

    def manned(self, *, alive_s: float) -> bool:
        """Whether any worker reported in the last ``alive_s`` seconds."""
        query = select(workers.c.id).join(queue_workers).where(_reported(alive_s)).limit(1)
        with self.database.transaction() as connection:
            return connection.execute(query).first() is not None

    def drain(self, worker_id: uuid.UUID, how: Drain, *, alive_s: float) -> WorkerRecord | None:
        """Ask a worker to take no more stages and to end; None if it does not report."""
        with self.database.transaction() as connection:
            connection.execute(update(workers).where(workers.c.id == worker_id).values(drain=how))
        return next((w for w in self.workers(alive_s=alive_s) if w.id == worker_id), None)

    def stores(self, alive_s: float) -> tuple[str | None, list[str | None]]:
        """Ids of the artifact stores that the API and the workers that reported lately see."""
        query = select(workers.c.store).join(queue_workers).where(_reported(alive_s))
        with self.database.transaction() as connection:
            api_store = connection.scalar(select(service.c.store))
            return api_store, [*connection.execute(query).scalars()]

    def set_artifact_store(self, store: str) -> None:
        """Note which artifact store the API sees."""
        insert = pg_insert(service).values(id=1, store=store)
        upsert = insert.on_conflict_do_update(index_elements=[service.c.id], set_={"store": store})
        with self.database.transaction() as connection:
            connection.execute(upsert)

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
                {row[0]: row[1] for row in by_state},
                {(kind, state): count for kind, state, count in by_stage},
            )

    def oldest_waiting(self) -> dict[StageKind, float]:
        """For how many seconds the first of the stages that wait has waited, by kind."""
        with self.database.transaction() as connection:
            return waited_s(connection)

    def clear_queue(self, days: float) -> int:
        """Remove entries of the queue that have been over for so many days; tell how many."""
        with self.database.transaction() as connection:
            return clear_ended(connection, days)

    def tallies(self) -> list[Tally]:
        """What came of all attempts that have ended."""
        with self.database.transaction() as connection:
            return [Tally(**row._mapping) for row in connection.execute(select(tallies))]

    def lost_workers(self, *, alive_s: float) -> int:
        """How many workers have ended in the last day without a word."""
        lost = (~_reported(alive_s), _reported(LOST_FOR_S))
        query = select(func.count()).select_from(workers).join(queue_workers).where(*lost)
        with self.database.transaction() as connection:
            return connection.execute(query).scalar_one()


def _reported(seconds: float) -> ColumnElement[bool]:
    """That a worker did in the last seconds."""
    since: ColumnElement[Any] = func.now() - interval(seconds)
    return since < queue_workers.c.last_heartbeat


def _same_key(connection: Connection, new: NewJob, owner_id: uuid.UUID | None) -> JobRecord | None:
    """The job of an earlier submission with the same idempotency key, if it is there still."""
    row = connection.execute(
        select(jobs.c.id, jobs.c.fingerprint).where(
            jobs.c.idempotency_key == new.idempotency_key,
            jobs.c.owner_id == owner_id,  # IS NULL for None
        )
    ).first()
    if row is None:
        return None
    if bytes(row.fingerprint) != new.fingerprint:
        raise IdempotencyKeyReused
    with suppress(NoSuchJob):
        return find_job(connection, row.id)
    return None


def _check_limits(
    connection: Connection, new: NewJob, owner_id: uuid.UUID | None, limits: Limits
) -> None:
    """Raise TooManyJobs if an owner's new job, which is stored already, is one too many."""
    # One submission of an owner after the other, so that none slips past the limit.
    turn = func.hashtext(f"pho submissions of {owner_id}")
    connection.execute(select(func.pg_advisory_xact_lock(turn)))
    is_open = jobs.c.state.in_([s for s in JobState if not s.is_over])
    is_urgent = and_(is_open, jobs.c.priority > 0)
    number = func.count()
    counts = select(number, number.filter(is_open), number.filter(is_urgent)).select_from(jobs)
    total, unfinished, urgent = connection.execute(counts.where(jobs.c.owner_id == owner_id)).one()
    if unfinished > limits.unfinished:
        raise TooManyJobs("unfinished")
    if new.priority > 0 and limits.urgent is not None and urgent > limits.urgent:
        raise TooManyJobs("urgent")
    if limits.finished is not None and total - unfinished >= limits.finished:
        raise TooManyJobs("finished")


def _take_up(connection: Connection, job: JobRecord) -> None:
    """Put everything that a job has left to do into the queue."""
    connection.execute(update(jobs).where(jobs.c.id == job.id).values(error=None))
    for stage in job.stages:
        if stage.state in (StageState.WAITING, StageState.FAILED):
            update_stage(connection, stage.id, state=StageState.WAITING, failures=0)
            enqueue_stage(connection, job, stage)


def _extend(connection: Connection, job: JobRecord, trials: int) -> None:
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
    later = [StageKind.CONFIRM, StageKind.FINISH, StageKind.TASKS, StageKind.PRUNE]
    connection.execute(delete(stages).where(stages.c.job_id == job.id, stages.c.kind.in_(later)))
    # Islands that are done already, too, if others are not.
    connection.execute(
        update(stages)
        .where(
            stages.c.job_id == job.id,
            stages.c.kind == StageKind.SEARCH,
            stages.c.state == StageState.DONE,
        )
        .values(state=StageState.WAITING, finished_at=None, worked_s=0.0)
    )
    if job.state in (JobState.QUEUED, JobState.RUNNING):
        for stage in job.of_kind(StageKind.SEARCH):
            if stage.state is StageState.DONE:
                enqueue_stage(connection, job, stage)


def _is_late(stage: Stage) -> bool:
    """Whether a stage that follows the searches has begun."""
    if stage.kind is StageKind.CONFIRM:
        return stage.attempt > 0 or stage.state is not StageState.WAITING
    if stage.kind is StageKind.PERPLEXITY:
        return stage.state is not StageState.DONE  # those that are done may be of a shorter search
    return stage.kind is StageKind.FINISH


REMOVED = "removed"  # in the stage's result: when the files were deleted, if they were

_LATER = "Wait until it has succeeded; `prune` in a job's document prunes as soon as that."
_WAY_OUT = {
    JobState.FAILED: "Its error says why; resume it first.",
    JobState.PAUSED: "Resume it, and wait until it has succeeded.",
    JobState.CANCELLING: "Submit it again.",
    JobState.CANCELLED: "Submit it again.",
}


def chosen(job: JobRecord, pattern: str | None) -> dict[str, Any]:
    """The configuration that a job has found; of several patterns, that of one."""
    configuration = job.best
    if pattern is not None:
        results = (s.result or {} for s in job.of_kind(StageKind.POINT) if s.about == pattern)
        configuration = next(results, {}).get("configuration")
    if configuration is None:
        raise LookupError(f"the job has no configuration for {pattern or 'its pattern'}")
    return configuration


def ask_to_prune(
    database: Database,
    job_id: uuid.UUID,
    *,
    visible_to: uuid.UUID | None = None,
    pattern: str | None = None,
    tokens: int = 0,
) -> JobRecord:
    """Have the pruned model of a job written, if it is not there or on its way already."""
    with database.transaction() as connection:
        job = find_job(connection, job_id, visible_to=visible_to, lock=True)
        stage = job.pruning
        is_lost = job.state in (JobState.FAILED, JobState.CANCELLING, JobState.CANCELLED)
        is_same = stage is not None and stage.about == pattern
        if stage and is_same and not is_lost and REMOVED not in (stage.result or {}):
            return job
        if job.state is not JobState.SUCCEEDED:
            raise StateConflict("prune", job.state, _WAY_OUT.get(job.state, _LATER))
        if job.owner_id is not None:
            charge(connection, job.owner_id, job.id, tokens)
        earlier = (stages.c.job_id == job.id, stages.c.kind == StageKind.PRUNE)
        connection.execute(delete(stages).where(*earlier))
        set_state(connection, job, JobState.QUEUED)
        params = None if pattern is None else {PATTERN: pattern}
        pruning = NewStage(kind=StageKind.PRUNE, params=params)
        add_stages(connection, find_job(connection, job_id), [pruning])
        return find_job(connection, job_id)


def note_removed(database: Database, job_id: uuid.UUID, when: str) -> None:
    """Note that the files of a job's pruned model are deleted."""
    with database.transaction() as connection:
        stage = find_job(connection, job_id, lock=True).pruning
        if stage is not None and stage.result is not None:
            update_stage(connection, stage.id, result={**stage.result, REMOVED: when})


def pruned_for(database: Database, days: float, limit: int = 100) -> list[uuid.UUID]:
    """Some jobs that are over, and whose pruned model has been there for so many days."""
    query = (
        select(jobs.c.id)
        .join(stages, stages.c.job_id == jobs.c.id)
        .where(
            jobs.c.state.in_([s for s in JobState if s.is_over]),
            stages.c.kind == StageKind.PRUNE,
            stages.c.state == StageState.DONE,
            stages.c.finished_at < func.now() - interval(days * 86_400),
            stages.c.result[REMOVED].as_string().is_(None),
        )
        .order_by(stages.c.finished_at)
        .limit(limit)
    )
    with database.transaction() as connection:
        return [*connection.execute(query).scalars()]
