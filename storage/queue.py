"""
The queue: which stage a worker gets next. All that we say to procrastinate's tables.

It has one task, which carries the number of a stage. An entry of the queue stands for a stage only
while the stage's row names it, so that whatever else is left in the queue harms nobody.
"""

from collections.abc import Sequence
from typing import Any, Literal

from procrastinate import App, SyncPsycopgConnector
from procrastinate.manager import JobManager
from sqlalchemy import Connection, Row, text

from storage.records import JobRecord, JobState, StageKind, StageState

TASK = "run_stage"

Where = Literal["by rank", "first", "behind"]  # among those of a priority; behind all that wait
_PLACES = len(StageKind) + 1  # of each priority: one for each rank, and one that is before all

# Never opened: entries are written on the connection of the caller's transaction.
_app = App(connector=SyncPsycopgConnector())


class EnteredWorker(JobManager):
    """What procrastinate's loop asks for a worker that stands in the registry already."""

    # The registry is pho.workers with procrastinate_workers, a row each: see enter_worker.

    def __init__(self, app: App, number: int) -> None:
        super().__init__(app.connector)
        self._number = number

    async def register_worker(self) -> int:
        return self._number


def enqueue(
    connection: Connection,
    stage_id: int,
    kind: StageKind,
    *,
    priority: int,
    lock: str | None,
    where: Where = "by rank",
) -> int:
    """Put a stage into the queue, in the caller's transaction, and give the number of its entry."""
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


def take_out(connection: Connection, queue_id: int | None, *, waiting: bool = False) -> bool:
    """Take an entry out of the queue, whoever has it, or only if it is ``waiting`` for a worker."""
    delete = "DELETE FROM procrastinate_jobs WHERE id = :id"
    query = text(f"{delete} AND status = 'todo'" if waiting else delete)
    return connection.execute(query, {"id": queue_id}).rowcount > 0


def leave_queue(connection: Connection, job: JobRecord) -> None:
    """Take the stages of a job that nobody has begun out of the queue."""
    # One whose worker died is as it was: whoever takes its entry next puts it down.
    query = text(
        "DELETE FROM procrastinate_jobs entry USING pho.stages"
        " WHERE stages.queue_id = entry.id AND stages.job_id = :job AND entry.status = 'todo'"
        " AND stages.state = :waiting"
    )
    connection.execute(query, {"job": job.id, "waiting": StageState.WAITING})


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
    condition = "job <> :job AND priority >= :priority" if another else "job = :job"
    query = text(f"SELECT EXISTS (SELECT FROM ({_WAITING}) AS waiting WHERE {condition})")  # noqa: S608 - ours
    priority = {"priority": job.priority} if another else {}
    values = {**_parameters(kinds), "job": job.id, **priority}
    return bool(connection.execute(query, values).scalar_one())


def longest_unserved(
    connection: Connection, kinds: Sequence[StageKind], job: JobRecord | None, *, over: bool
) -> Row[Any] | None:
    """
    The waiting entry (``id``, ``stage``, ``job``) of the key that no worker has served for longest,
    the job's own last; if the job's turn is over, of its other jobs the one for which this holds.
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
        " ORDER BY priority DESC, whose = CAST(:owner AS text), at NULLS FIRST,"
        " CASE WHEN :over THEN served_at END NULLS FIRST, place DESC, id LIMIT 1"
    )
    job_id = None if job is None else job.id
    owner = None if job is None else str(job.owner_id or "")
    values = {**_parameters(kinds), "job": job_id, "owner": owner, "over": over}
    return connection.execute(query, values).first()


def _parameters(kinds: Sequence[StageKind]) -> dict[str, Any]:
    states = [state for state in JobState if state.may_work]
    return {"kinds": [*kinds], "states": states, "places": _PLACES}


# Entries that workers have in hand, each with its worker's row, if that is still there.
_TAKEN = (
    "SELECT entry.id FROM procrastinate_jobs entry"
    " LEFT JOIN procrastinate_workers worker ON worker.id = entry.worker_id"
    " WHERE entry.status = 'doing'"
)
_REPORTED = "coalesce(worker.last_heartbeat >= now() - make_interval(secs => :alive_s), false)"


def stalled_entries(connection: Connection, alive_s: float) -> list[int]:
    """Entries of workers that have gone, or did not report in the last seconds."""
    query = text(f"{_TAKEN} AND NOT {_REPORTED}")
    return [*connection.execute(query, {"alive_s": alive_s}).scalars()]


def in_hand(connection: Connection, queue_id: int, alive_s: float) -> bool:
    """Whether a worker that reported in the last seconds has an entry."""
    query = text(f"{_TAKEN} AND {_REPORTED} AND entry.id = :id")
    return connection.execute(query, {"alive_s": alive_s, "id": queue_id}).first() is not None


def waited_s(connection: Connection) -> dict[StageKind, float]:
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
    rows = connection.execute(query, {"states": states})
    return {StageKind(kind): seconds or 0.0 for kind, seconds in rows}


def clear_ended(connection: Connection, days: float) -> int:
    """Remove entries that have been over for so many days."""
    query = text(
        "DELETE FROM procrastinate_jobs entry WHERE status NOT IN ('todo', 'doing')"
        " AND NOT EXISTS (SELECT FROM procrastinate_events event WHERE event.job_id = entry.id"
        "  AND event.at > now() - make_interval(secs => :seconds))"
    )
    return connection.execute(query, {"seconds": days * 86_400}).rowcount
