"""
The rows of jobs and stages: locked, read, listed, and put into the queue.
"""

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime
from typing import Any, Literal, get_args

from procrastinate import App, SyncPsycopgConnector
from sqlalchemy import (
    ColumnElement,
    Connection,
    Float,
    Row,
    Text,
    case,
    cast,
    extract,
    func,
    insert,
    or_,
    select,
    text,
    update,
)
from sqlalchemy.dialects.postgresql import insert as pg_insert

from storage.records import (
    DURATIONS_S,
    Claim,
    JobRecord,
    JobState,
    LostClaim,
    NewStage,
    NoSuchJob,
    Outcome,
    Stage,
    StageKind,
    StageState,
    settled,
)
from storage.tables import events, jobs, notifications, stages, tallies

# The queue: one procrastinate task, ``run_stage``, which carries the number of a stage.
TASK = "run_stage"

Where = Literal["by rank", "first", "behind"]  # among those of a priority; behind all that wait
_PLACES = len(StageKind) + 1  # of each priority: one for each rank, and one that is before all

# Never opened: entries are written on the connection of the caller's transaction.
_app = App(connector=SyncPsycopgConnector())


def enqueue(
    connection: Connection,
    stage_id: int,
    kind: StageKind,
    *,
    priority: int,
    lock: str | None,
    where: Where = "by rank",
) -> int:
    """Put a stage into the queue, in the caller's transaction."""
    lowest = priority * _PLACES
    place = lowest + (_PLACES - 1 if where == "first" else kind.rank)
    if where == "behind":
        query = text(
            "SELECT min(priority) FROM procrastinate_jobs"
            " WHERE status = 'todo' AND priority BETWEEN :lowest AND :place"
        )
        last = connection.scalar(query, {"lowest": lowest, "place": place})
        place = place if last is None else last
    task = _app.configure_task(
        TASK,
        queue=kind.value,
        priority=place,
        lock=lock,
        connection=connection.connection.driver_connection,
    )
    return int(task.defer(stage_id=stage_id))


# Entries that a worker could take now.
_WAITING = (
    "SELECT entry.id, entry.priority AS place, (jobs.priority + 1) * :places - 1 AS top,"
    " stages.id AS stage, jobs.id AS job, coalesce(jobs.owner_id::text, '') AS whose,"
    " jobs.priority, jobs.served_at"
    " FROM procrastinate_jobs entry"
    " JOIN pho.stages ON stages.queue_id = entry.id"
    " JOIN pho.jobs ON jobs.id = stages.job_id"
    " WHERE entry.status = 'todo' AND entry.queue_name = ANY(:kinds) AND jobs.state = ANY(:states)"
    " AND (entry.scheduled_at IS NULL OR entry.scheduled_at <= now())"
    " AND NOT EXISTS (SELECT FROM procrastinate_jobs other"
    "  WHERE other.lock = entry.lock AND other.status = 'doing')"
)


def waits(
    connection: Connection, kinds: Sequence[StageKind], job: JobRecord, *, another: bool
) -> bool:
    """Whether a job waits for a worker; or another one, of its priority or a higher one, does."""
    which = "job <> :job AND priority >= :priority" if another else "job = :job"
    query = text(f"SELECT EXISTS (SELECT FROM ({_WAITING}) AS waiting WHERE {which})")  # noqa: S608 - ours
    more = {"priority": job.priority} if another else {}
    return bool(connection.execute(query, {**_given(kinds), "job": job.id, **more}).scalar_one())


def _given(kinds: Sequence[StageKind]) -> dict[str, Any]:
    states = [state for state in JobState if state.may_work]
    return {"kinds": [*kinds], "states": states, "places": _PLACES}


def give_way(
    connection: Connection, kinds: Sequence[StageKind], job: JobRecord | None, *, over: bool
) -> None:
    """
    Let in the key that no worker has served for longest, the job's own last; if the job's turn is
    over, of its other jobs the one for which this holds.
    """
    # The oldest entry would always be one of the same keys. Those that are let in are taken in this
    # order, and none twice before it is taken: workers may die before they take what they let in.
    query = text(
        "WITH let_in AS (SELECT *,"  # noqa: S608 - all of it is ours
        "  bool_or(place = top) OVER (PARTITION BY whose, priority) AS already"
        f" FROM ({_WAITING}) AS waiting WHERE job IS DISTINCT FROM CAST(:job AS uuid)),"
        " served AS (SELECT coalesce(owner_id::text, '') AS whose, max(served_at) AS at"
        "  FROM pho.jobs GROUP BY 1)"
        " SELECT id, stage, job FROM let_in JOIN served USING (whose) WHERE NOT already"
        " ORDER BY priority DESC, whose = CAST(:own AS text), at NULLS FIRST,"
        " CASE WHEN :over THEN served_at END NULLS FIRST, place DESC, id LIMIT 1"
    )
    own = None if job is None else str(job.owner_id or "")
    values = {"job": None if job is None else job.id, "own": own, "over": over}
    first = connection.execute(query, {**_given(kinds), **values}).first()
    stage = None if first is None else lock_stage(connection, first.stage)
    if stage is None or first is None or stage.queue_id != first.id:
        return
    if take_out_waiting(connection, first.id):
        enqueue_again(connection, find_job(connection, first.job), stage, "first")


def take_out(connection: Connection, queue_id: int) -> None:
    """Take an entry out of the queue, in the caller's transaction, whoever has it."""
    connection.execute(text("DELETE FROM procrastinate_jobs WHERE id = :id"), {"id": queue_id})


def take_out_waiting(connection: Connection, queue_id: int | None) -> bool:
    """Take an entry out of the queue, in the caller's transaction, if no worker has it."""
    query = text("DELETE FROM procrastinate_jobs WHERE id = :id AND status = 'todo' RETURNING id")
    return connection.execute(query, {"id": queue_id}).first() is not None


_JOB = [jobs.c[field.name] for field in fields(JobRecord) if field.name != "stages"]
_STAGE = [stages.c[field.name] for field in fields(Stage)]


def find_job(
    connection: Connection,
    job_id: uuid.UUID,
    *,
    visible_to: uuid.UUID | None = None,
    lock: bool = False,
) -> JobRecord:
    found = find_jobs(connection, jobs.c.id == job_id, visible_to=visible_to, lock=lock)
    if not found:
        raise NoSuchJob(str(job_id))
    return found[0]


def find_jobs(
    connection: Connection,
    *which: Any,
    visible_to: uuid.UUID | None = None,
    order: Sequence[Any] = (jobs.c.number.desc(),),
    skip: int = 0,
    limit: int | None = None,
    lock: bool = False,
) -> list[JobRecord]:
    """Jobs with their stages, newest first or in another order, of all keys or of one."""
    query = select(*_JOB).where(*which).order_by(*order).offset(skip).limit(limit)
    if visible_to is not None:
        query = query.where(jobs.c.owner_id == visible_to)
    rows = connection.execute(query.with_for_update() if lock else query).all()
    of_job: dict[uuid.UUID, list[Stage]] = {row.id: [] for row in rows}
    own = select(*_STAGE).where(stages.c.job_id.in_(of_job)).order_by(stages.c.id)
    for row in connection.execute(own):
        of_job[row.job_id].append(Stage(**row._mapping))
    return [JobRecord(**row._mapping, stages=of_job[row.id]) for row in rows]


def lock_stage(connection: Connection, stage_id: int) -> Row[Any] | None:
    """A stage's row with its entry in the queue, locked."""
    query = select(stages).where(stages.c.id == stage_id)
    return connection.execute(query.with_for_update()).first()


def check_claim(connection: Connection, claim: Claim) -> None:
    """Lock the stage's row; raise LostClaim unless the claim still holds."""
    row = lock_stage(connection, claim.stage.id)
    if row is None or row.attempt != claim.attempt or row.state is not StageState.RUNNING:
        raise LostClaim


def add_stages(connection: Connection, job: JobRecord, new: Sequence[NewStage]) -> None:
    """Make stages, and put them into the queue if the job may work; those that exist stay."""
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
            enqueue_stage(connection, job, inserted.id, stage.kind, stage.lock)


def enqueue_stage(
    connection: Connection,
    job: JobRecord,
    stage_id: int,
    kind: StageKind,
    lock: str | None,
    where: Where = "by rank",
) -> None:
    """Put a stage into the queue; an entry that it had before stands for nothing."""
    queue_id = enqueue(connection, stage_id, kind, priority=job.priority, lock=lock, where=where)
    update_stage(connection, stage_id, queue_id=queue_id)


def enqueue_again(
    connection: Connection, job: JobRecord, stage: Stage | Row[Any], where: Where = "by rank"
) -> None:
    """Put a stage that was in the queue into it again, with the lock that it had."""
    lock = (stage.params or {})["lock"]
    enqueue_stage(connection, job, stage.id, stage.kind, lock, where)


def update_stage(connection: Connection, stage_id: int, **values: Any) -> None:
    connection.execute(update(stages).where(stages.c.id == stage_id).values(**values))


def set_state(
    connection: Connection,
    job: JobRecord,
    state: JobState,
    *,
    error: Mapping[str, Any] | None = None,
    told: Mapping[str, Any] | None = None,
) -> None:
    """Write a job's state and its event, with what is told, if it is another one than before."""
    if state is job.state:
        return
    more = {} if error is None else {"error": dict(error)}
    finished = func.now() if state.is_over else None
    connection.execute(
        update(jobs).where(jobs.c.id == job.id).values(state=state, finished_at=finished, **more)
    )
    add_event(connection, job.id, "state", {"state": state, **more, **(told or {})})
    if state.is_over and job.spec.get("notify"):
        _add_notification(connection, job, state, error)


def _add_notification(
    connection: Connection, job: JobRecord, state: JobState, error: Mapping[str, Any] | None
) -> None:
    """Store a message that a job has ended, for who asked for it."""
    document = {
        "type": "job.ended",
        "job_id": str(job.id),
        "name": job.name,
        "state": state,
        "error": error and {key: error[key] for key in ("type", "message") if key in error},
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    connection.execute(
        insert(notifications).values(
            id=uuid.uuid4(), job_id=job.id, url=job.spec["notify"], document=document
        )
    )


def settle(connection: Connection, job: JobRecord) -> None:
    """Write a job's state as it is once no worker is busy with it, if none is."""
    running = connection.execute(
        select(func.count())
        .select_from(stages)
        .where(stages.c.job_id == job.id, stages.c.state == StageState.RUNNING)
    ).scalar_one()
    set_state(connection, job, settled(job.state, busy=running > 0))


LOG = "log"  # kind of an event: lines that a worker has logged


def add_event(
    connection: Connection, job_id: uuid.UUID, kind: str, data: Mapping[str, Any]
) -> None:
    """Tell those who follow a job what happened to it."""
    connection.execute(insert(events).values(job_id=job_id, kind=kind, data=dict(data)))


def claimed_job(connection: Connection, claim: Claim) -> JobRecord:
    """The job, locked, if the claim still holds."""
    try:
        job = find_job(connection, claim.job.id, lock=True)
    except NoSuchJob:
        raise LostClaim from None
    check_claim(connection, claim)
    return job


def end_attempt(connection: Connection, stage_id: int, outcome: Outcome) -> None:
    """Count how the attempt that a worker has in hand ends, if one has; call it late."""
    # Many workers count in the same rows, each of which is locked to the end of the transaction.
    took = cast(extract("epoch", func.now() - stages.c.begun_at), Float)
    worked = 0.0 if outcome is Outcome.LOST else took  # since when it did not is not known
    ended = connection.execute(
        update(stages)
        .where(stages.c.id == stage_id, stages.c.begun_at.is_not(None))
        .values(worked_s=stages.c.worked_s + worked, begun_at=None)
        .returning(stages.c.kind, stages.c.worked_s)
    ).first()
    if ended is None:
        return
    up_to_s = next(limit for limit in DURATIONS_S if ended.worked_s <= limit)
    one = pg_insert(tallies).values(
        kind=ended.kind, outcome=outcome, up_to_s=up_to_s, count=1, seconds=ended.worked_s
    )
    more = {name: tallies.c[name] + one.excluded[name] for name in ("count", "seconds")}
    connection.execute(one.on_conflict_do_update(index_elements=[*tallies.primary_key], set_=more))


def put_down(connection: Connection, job: JobRecord, stage_id: int, failures: int) -> None:
    """Nobody works on the stage now; the queue may give it out again."""
    end_attempt(connection, stage_id, Outcome.HANDED_BACK)
    update_stage(connection, stage_id, state=StageState.WAITING, failures=failures, worker_id=None)
    settle(connection, job)


def interval(seconds: float) -> Any:
    """So many seconds, in SQL."""
    return func.make_interval(0, 0, 0, 0, 0, 0, seconds)


# The list of jobs: which of them, in what order, and how many there are of each kind.
Sort = Literal[
    "created", "-created", "name", "-name", "model", "-model", "pattern", "-pattern",
    "state", "-state", "perplexity", "-perplexity", "rise", "-rise", "gain", "-gain",
]  # fmt: skip
SORTS: tuple[Sort, ...] = get_args(Sort)
NEWEST: Sort = "-created"
TARGET = "target"  # stands for the pattern of a job that looks for one

_RANKS = {state.value: rank for rank, state in enumerate(JobState)}
_VALUES: dict[str, ColumnElement[Any]] = {
    "created": jobs.c.number,
    "name": func.lower(jobs.c.name),
    "model": func.lower(jobs.c.models[1]),
    "pattern": jobs.c.patterns[1],
    "state": case(_RANKS, value=cast(jobs.c.state, Text)),
    "perplexity": jobs.c.perplexity,
    "rise": jobs.c.rise,
    "gain": jobs.c.gain,
}


@dataclass(frozen=True, kw_only=True)
class JobFilter:
    """Which jobs are listed: those for which everything holds that is given."""

    # The key that submitted them; None sees the jobs of all keys.
    visible_to: uuid.UUID | None = None
    states: Sequence[JobState] = ()  # They are in one of these
    models: Sequence[str] = ()  # They are for one of these models, among others or alone
    # They have one of these patterns, or :data:`TARGET` and look for one.
    patterns: Sequence[str] = ()
    name: str | None = None  # It is in their name, in capitals or not, or their id begins with it
    id_begins: str | None = None  # Their id begins so, in lower case and without hyphens

    def conditions(self) -> list[ColumnElement[bool]]:
        found: list[ColumnElement[bool]] = []
        if self.states:
            found.append(jobs.c.state.in_([*self.states]))
        if self.models:
            found.append(jobs.c.models.overlap(_storable(self.models)))
        if self.patterns:
            found.append(jobs.c.patterns.overlap(_storable(self.patterns)))
        digits = func.replace(cast(jobs.c.id, Text), "-", "")
        if self.name:
            (name,) = _storable([self.name])
            begins = name.replace("-", "").lower()
            named = jobs.c.name.icontains(name, autoescape=True)
            found.append(
                or_(named, digits.startswith(begins, autoescape=True)) if begins else named
            )
        if self.id_begins is not None:
            found.append(digits.startswith(self.id_begins, autoescape=True))
        return found


EVERYTHING = JobFilter()


@dataclass(frozen=True, kw_only=True)
class Facets:
    """How many jobs have each state, model and pattern, each counted without its own filter."""

    states: Mapping[JobState, int]  # All that occur
    models: Sequence[tuple[str, int]]  # Those that are filtered by first, then the most frequent
    patterns: Sequence[tuple[str, int]]  # The same


def ordered(sort: Sort) -> list[ColumnElement[Any]]:
    """The order of a list in SQL. Jobs without the value come last, and equal ones newest first."""
    value = _VALUES[sort.removeprefix("-")]
    first = value.desc() if sort.startswith("-") else value.asc()
    return [first.nulls_last(), jobs.c.number.desc()]


def read_facets(connection: Connection, which: JobFilter, *, limit: int) -> Facets:
    """Count the jobs of a list."""

    def count(value: Any, without: JobFilter, chosen: Sequence[str] = ()) -> list[tuple[Any, int]]:
        query = select(value.label("value")).where(*without.conditions())
        if which.visible_to is not None:
            query = query.where(jobs.c.owner_id == which.visible_to)
        each = query.subquery().c.value
        number = func.count()
        first = each.in_(_storable(chosen)).desc()
        counts = select(each, number).group_by(each).order_by(first, number.desc(), each)
        return [(row[0], row[1]) for row in connection.execute(counts.limit(limit))]

    return Facets(
        states=dict(count(jobs.c.state, replace(which, states=()))),
        models=count(func.unnest(jobs.c.models), replace(which, models=()), which.models),
        patterns=count(func.unnest(jobs.c.patterns), replace(which, patterns=()), which.patterns),
    )


def columns_of(spec: Mapping[str, Any]) -> dict[str, list[str]]:
    models = spec.get("models") or [spec.get("model"), *(spec.get("more_models") or ())]
    asked = spec.get("configuration") or spec
    patterns = asked.get("patterns") or [TARGET if asked.get("target") else asked.get("pattern")]
    return {
        "models": _storable([str(model) for model in models if model]),
        "patterns": _storable([str(pattern) for pattern in patterns if pattern]),
    }


def found_columns(best: Mapping[str, Any] | None) -> dict[str, float | None]:
    """What a job is listed by once it has a configuration."""
    best = best or {}
    measured = best.get("perplexities") or {}
    pruned = measured.get("pruned") or (best.get("confirmation") or {}).get("perplexity")
    dense, ria = measured.get("dense"), measured.get("ria")
    return {
        "perplexity": pruned,
        "rise": pruned / dense - 1 if pruned and dense else None,
        "gain": 1 - pruned / ria if pruned and ria else None,
    }


def _storable(texts: Sequence[str]) -> list[str]:
    """Texts as PostgreSQL takes them: it knows no U+0000."""
    return [text.replace("\0", "\N{REPLACEMENT CHARACTER}") for text in texts]
