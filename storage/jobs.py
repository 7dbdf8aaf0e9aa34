"""
The store of jobs: what the API does to them and to their pruned models.
"""

import hashlib
import json
import uuid
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

from optuna.storages import RDBStorage
from sqlalchemy import ColumnElement, Connection, and_, delete, func, select, text, update
from sqlalchemy.dialects.postgresql import insert as pg_insert

from storage.claims import OutcomeStore
from storage.database import Database
from storage.keys import NO_WORK, Work, charge, refund
from storage.records import (
    PATTERN,
    VERBS,
    Drain,
    EventRecord,
    IdempotencyKeyReused,
    JobRecord,
    JobState,
    NewStage,
    NoSuchJob,
    Outcome,
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
    EVERYTHING,
    LOG,
    NEWEST,
    Facets,
    JobFilter,
    Sort,
    add_event,
    add_stages,
    columns_of,
    enqueue_again,
    enqueue_stage,
    find_job,
    find_jobs,
    interval,
    ordered,
    read_facets,
    set_state,
    update_stage,
)
from storage.studies import written_on
from storage.tables import events, jobs, notifications, service, stages, tallies, workers


@dataclass(frozen=True, kw_only=True)
class Tally:
    """How many attempts have ended alike."""

    kind: StageKind
    outcome: Outcome
    up_to_s: float  # of DURATIONS_S: the least that their stages have not worked longer than
    count: int
    seconds: float  # that their stages have worked, in all


class JobStore(OutcomeStore):
    """All jobs of a database."""

    # A worker needs the half that is a :class:`~storage.claims.OutcomeStore`.

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
        work: Work = NO_WORK,
        asked: Mapping[str, Any] | None = None,
        owner_id: uuid.UUID | None = None,
        idempotency_key: str | None = None,
        max_unfinished: int = 1000,
        max_urgent: int | None = None,
        max_finished: int | None = None,
    ) -> tuple[JobRecord, bool]:
        """Store a job and put its first stage, or stages, into the queue."""
        document = json.dumps(spec if asked is None else asked, sort_keys=True)
        fingerprint = hashlib.sha256(document.encode()).digest()
        mine = jobs.c.owner_id == owner_id  # IS NULL for None
        job_id = uuid.uuid4()
        values = {
            "id": job_id,
            "owner_id": owner_id,
            "name": f"{name} {job_id.hex[:12]}",
            "spec": dict(spec),
            **columns_of(spec),
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
                    return find_job(connection, earlier.id), False
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
            if owner_id is not None:
                charge(connection, owner_id, job_id, work)
            add_event(connection, job_id, "state", {"state": JobState.QUEUED})
            job = find_job(connection, job_id)
            add_stages(connection, job, [first, *more])
            return find_job(connection, job_id), True

    def get(self, job_id: uuid.UUID, *, visible_to: uuid.UUID | None = None) -> JobRecord:
        with self.database.transaction() as connection:
            return find_job(connection, job_id, visible_to=visible_to)

    def page(
        self,
        which: JobFilter = EVERYTHING,
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
                *which.conditions(),
                *older,
                visible_to=which.visible_to,
                order=ordered(sort),
                skip=skip,
                limit=limit,
            )

    def facets(self, which: JobFilter, *, limit: int = 12) -> Facets:
        """How many jobs of a list there are by state, and by the most frequent models, patterns."""
        with self.database.transaction() as connection:
            return read_facets(connection, which, limit=limit)

    def ask(
        self,
        job_id: uuid.UUID,
        verb: str,
        *,
        visible_to: uuid.UUID | None = None,
        trials: int = 0,
        max_trials: int | None = None,
        work: Work = NO_WORK,
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
                    charge(connection, job.owner_id, job.id, work)
                _extend(connection, job, trials)
                job = find_job(connection, job_id)
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
        which = (events.c.id > after, events.c.kind != LOG)
        return self._events(job_id, *which, order=events.c.id, limit=limit)

    def history(self, job_id: uuid.UUID, *, limit: int) -> list[EventRecord]:
        """The last events of a job, newest first, without logs and what tells how far it is."""
        which = events.c.kind.not_in(["progress", LOG])
        return self._events(job_id, which, order=events.c.id.desc(), limit=limit)

    def logs(self, job_id: uuid.UUID, *, limit: int) -> list[EventRecord]:
        """The last lines that workers have logged of a job's stages, oldest first: see ``log``."""
        which = events.c.kind == LOG
        return self._events(job_id, which, order=events.c.id.desc(), limit=limit)[::-1]

    def _events(
        self, job_id: uuid.UUID, *which: ColumnElement[bool], order: ColumnElement[int], limit: int
    ) -> list[EventRecord]:
        columns = select(events.c.id, events.c.kind, events.c.data, events.c.created_at)
        query = columns.where(events.c.job_id == job_id, *which).order_by(order).limit(limit)
        with self.database.transaction() as connection:
            return [EventRecord(**row._mapping) for row in connection.execute(query)]

    def workers(self, *, alive_s: float) -> list[WorkerRecord]:
        """The workers that reported in the last ``alive_s`` seconds, oldest first."""
        running = and_(stages.c.worker_id == workers.c.id, stages.c.state == StageState.RUNNING)
        query = (
            select(workers, stages.c.job_id, stages.c.kind.label("stage"))
            .outerjoin(stages, running)
            .where(workers.c.heartbeat_at > func.now() - interval(alive_s))
            .order_by(workers.c.started_at, workers.c.id, stages.c.id)
        )
        with self.database.transaction() as connection:
            # Of a stage that it lost and one that it has, the latter.
            rows = connection.execute(query)
            found = {row.id: WorkerRecord(**row._mapping) for row in rows}
        return [*found.values()]

    def drain(self, worker_id: uuid.UUID, how: Drain, *, alive_s: float) -> WorkerRecord | None:
        """Ask a worker to take no more stages and to end; None if it does not report."""
        with self.database.transaction() as connection:
            connection.execute(update(workers).where(workers.c.id == worker_id).values(drain=how))
        return next((w for w in self.workers(alive_s=alive_s) if w.id == worker_id), None)

    def stores(self, alive_s: float) -> tuple[str | None, list[str | None]]:
        """Ids of the artifact stores that the API and the workers that reported lately see."""
        with self.database.transaction() as connection:
            own = connection.scalar(select(service.c.store))
            alive = workers.c.heartbeat_at > func.now() - interval(alive_s)
            return own, [*connection.execute(select(workers.c.store).where(alive)).scalars()]

    def set_artifact_store(self, store: str) -> None:
        """Note which artifact store the API sees."""
        new = pg_insert(service).values(id=1, store=store)
        again = new.on_conflict_do_update(index_elements=[service.c.id], set_={"store": store})
        with self.database.transaction() as connection:
            connection.execute(again)

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
        # Since it was last put into the queue, or came back there for another attempt.
        query = text(
            "SELECT entry.queue_name, extract(epoch FROM now() - min((SELECT max(event.at)"
            " FROM procrastinate_events event WHERE event.job_id = entry.id)))::float8"
            " FROM procrastinate_jobs entry JOIN pho.stages ON stages.queue_id = entry.id"
            " JOIN pho.jobs ON jobs.id = stages.job_id"
            " WHERE entry.status = 'todo' AND jobs.state = ANY(:states) GROUP BY 1"
        )
        states = [state for state in JobState if state.may_work]
        with self.database.transaction() as connection:
            rows = connection.execute(query, {"states": states})
            return {StageKind(kind): seconds or 0.0 for kind, seconds in rows}

    def tallies(self) -> list[Tally]:
        """What came of all attempts that have ended."""
        with self.database.transaction() as connection:
            return [Tally(**row._mapping) for row in connection.execute(select(tallies))]

    def lost_workers(self, *, alive_s: float) -> int:
        """How many workers have ended in the last day without a word."""
        silent = workers.c.heartbeat_at <= func.now() - interval(alive_s)
        with self.database.transaction() as connection:
            return connection.execute(select(func.count()).where(silent)).scalar_one()


def _take_up(connection: Connection, job: JobRecord) -> None:
    """Put everything that a job has left to do into the queue."""
    connection.execute(update(jobs).where(jobs.c.id == job.id).values(error=None))
    for stage in job.stages:
        if stage.state in (StageState.WAITING, StageState.FAILED):
            update_stage(connection, stage.id, state=StageState.WAITING, failures=0)
            enqueue_again(connection, job, stage)


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
    again = [StageKind.CONFIRM, StageKind.FINISH, StageKind.TASKS, StageKind.PRUNE]
    connection.execute(delete(stages).where(stages.c.job_id == job.id, stages.c.kind.in_(again)))
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
                enqueue_stage(connection, job, stage.id, stage.kind, None)


def _is_late(stage: Stage) -> bool:
    """Whether a stage that follows the searches has begun."""
    if stage.kind is StageKind.CONFIRM:
        return stage.attempt > 0 or stage.state is not StageState.WAITING
    if stage.kind is StageKind.PERPLEXITY:
        return stage.state is not StageState.DONE  # those that are done may be of a shorter search
    return stage.kind is StageKind.FINISH


# The pruned models of jobs, as the API asks for them: which are wanted, and which are old.
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
    found = job.best
    if pattern is not None:
        results = (s.result or {} for s in job.of_kind(StageKind.POINT) if s.about == pattern)
        found = next(results, {}).get("configuration")
    if found is None:
        raise LookupError(f"the job has no configuration for {pattern or 'its pattern'}")
    return found


def ask_to_prune(
    database: Database,
    job_id: uuid.UUID,
    *,
    visible_to: uuid.UUID | None = None,
    pattern: str | None = None,
    work: Work = NO_WORK,
) -> JobRecord:
    """Have the pruned model of a job written, if it is not there or on its way already."""
    with database.transaction() as connection:
        job = find_job(connection, job_id, visible_to=visible_to, lock=True)
        stage = job.pruning
        ended = job.state in (JobState.FAILED, JobState.CANCELLING, JobState.CANCELLED)
        mine = stage is not None and stage.about == pattern
        if stage and mine and not ended and REMOVED not in (stage.result or {}):
            return job
        if job.state is not JobState.SUCCEEDED:
            raise StateConflict("prune", job.state, _WAY_OUT.get(job.state, _LATER))
        if job.owner_id is not None:
            charge(connection, job.owner_id, job.id, work)
        pruning = (stages.c.job_id == job.id, stages.c.kind == StageKind.PRUNE)
        connection.execute(delete(stages).where(*pruning))
        set_state(connection, job, JobState.QUEUED)
        params = None if pattern is None else {PATTERN: pattern}
        new = NewStage(kind=StageKind.PRUNE, params=params)
        add_stages(connection, find_job(connection, job_id), [new])
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


def clear_queue(database: Database, days: float) -> int:
    """Remove entries of the queue that have been over for so many days; tell how many."""
    query = text(
        "DELETE FROM procrastinate_jobs entry WHERE status NOT IN ('todo', 'doing')"
        " AND NOT EXISTS (SELECT FROM procrastinate_events event WHERE event.job_id = entry.id"
        "  AND event.at > now() - make_interval(secs => :seconds))"
    )
    with database.transaction() as connection:
        return connection.execute(query, {"seconds": days * 86_400}).rowcount


# Messages that a job has ended: kept until they are delivered, or given up.
LEASE_S = 120.0  # longer than an attempt takes, with all its requests
KEEP_S = 30 * 86_400.0  # what was delivered, or given up
GIVE_UP_AFTER = 12  # attempts; the last is 17 hours after the first


@dataclass(frozen=True, kw_only=True)
class Notification:
    """A message to be sent."""

    id: uuid.UUID  # The same in every attempt
    url: str  # Where to
    document: dict[str, Any]  # JSON values
    attempts: int  # How many were made, this one included


def take(database: Database, *, but_to: Collection[str] = ()) -> Notification | None:
    """The message that is due for longest, for :data:`LEASE_S`; None if none is."""
    host = func.lower(func.substring(notifications.c.url, "^[a-z]+://([^/?#]*)"))
    due = (
        select(notifications.c.id)
        .where(
            notifications.c.ended_at.is_(None),
            notifications.c.due_at <= func.now(),
            host.not_in(but_to),
        )
        .order_by(notifications.c.due_at)
        .limit(1)
        .with_for_update(skip_locked=True)
    )
    taken = (
        update(notifications)
        .where(notifications.c.id.in_(due.scalar_subquery()))
        .values(attempts=notifications.c.attempts + 1, due_at=func.now() + interval(LEASE_S))
        .returning(
            notifications.c.id,
            notifications.c.url,
            notifications.c.document,
            notifications.c.attempts,
        )
    )
    with database.transaction() as connection:
        row = connection.execute(taken).first()
    return None if row is None else Notification(**row._mapping)


def end(database: Database, taken: Notification, *, error: str | None = None) -> None:
    """Note that a message was delivered, or, with an error, that it never will be."""
    _change(database, taken, ended_at=func.now(), error=error)
    old = notifications.c.ended_at < func.now() - interval(KEEP_S)
    with database.transaction() as connection:
        connection.execute(delete(notifications).where(old))


def put_off(database: Database, taken: Notification, *, error: str) -> bool:
    """Note that a message could not be delivered."""
    if taken.attempts >= GIVE_UP_AFTER:
        end(database, taken, error=error)
        return False
    wait_s = 30.0 * 2 ** (taken.attempts - 1)
    _change(database, taken, due_at=func.now() + interval(wait_s), error=error)
    return True


def _change(database: Database, taken: Notification, **values: Any) -> None:
    mine = notifications.c.id == taken.id
    with database.transaction() as connection:
        connection.execute(update(notifications).where(mine).values(values))
