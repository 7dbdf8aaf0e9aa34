"""
The tables of the schema ``pho``, and procrastinate's table of workers, which has a row for each of
ours. Optuna and procrastinate have schemas of their own.

Documents are JSON and not JSONB where the order of their keys must be kept: a
configuration comes out as it went in, byte for byte.
"""

from enum import StrEnum
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    DateTime,
    Float,
    ForeignKey,
    Identity,
    Index,
    Integer,
    Interval,
    LargeBinary,
    MetaData,
    Table,
    Text,
    TypeDecorator,
    UniqueConstraint,
    Uuid,
    func,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY

from storage.records import AttemptEnd, Drain, JobState, StageKind, StageState

SCHEMA = "pho"
READER = "pho_reader"  # the role that reads studies, and nothing else

metadata = MetaData(
    schema=SCHEMA,
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "pk": "pk_%(table_name)s",
    },
)


class _Word(TypeDecorator[StrEnum]):
    """A member of an enumeration, stored as its text."""

    impl = Text
    cache_ok = True

    def __init__(self, words: type[StrEnum]) -> None:
        super().__init__()
        self.words = words

    def process_result_value(self, value: str | None, dialect: Any) -> StrEnum | None:  # noqa: ARG002
        """The member; None for NULL."""
        return None if value is None else self.words(value)


_utc = DateTime(timezone=True)
_now = func.now()

keys = Table(
    "keys",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("name", Text, nullable=False),
    Column("prefix", Text, nullable=False),  # the first characters, to tell keys apart
    Column("sha256", LargeBinary, nullable=False, unique=True),
    Column("sees_all", Boolean, nullable=False),  # 1: jobs of every key, and the dashboard
    Column("scrape_only", Boolean, nullable=False),  # it reads the metrics, and nothing else
    Column("created_at", _utc, nullable=False, server_default=_now),
    Column("revoked_at", _utc),
    Column("expires_at", _utc),  # null: never
    Column("quota", BigInteger),  # tokens that its jobs may plan in the span; null: no quota
    Column("quota_span", Interval),
)

work = Table(  # what the jobs of keys with a quota were planned to take
    "work",
    metadata,
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    Column("key_id", Uuid, ForeignKey("pho.keys.id", ondelete="CASCADE"), nullable=False),
    Column("job_id", Uuid, nullable=False),  # no foreign key: a deleted job counts, too
    Column("amount", BigInteger, nullable=False),  # tokens
    Column("planned_at", _utc, nullable=False, server_default=_now),
    Index("ix_work_key_id_planned_at", "key_id", "planned_at"),
)

sessions = Table(  # logins of browsers
    "sessions",
    metadata,
    Column("sha256", LargeBinary, primary_key=True),  # of the cookie's token
    Column("key_id", Uuid, ForeignKey("pho.keys.id", ondelete="CASCADE"), nullable=False),
    Column("expires_at", _utc, nullable=False),
)

jobs = Table(
    "jobs",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("number", BigInteger, Identity(always=True), nullable=False, unique=True),
    Column("owner_id", Uuid, ForeignKey("pho.keys.id")),  # null: submitted without a key
    Column("name", Text, nullable=False),  # also of its studies
    Column("spec", JSON, nullable=False),
    Column("state", _Word(JobState), nullable=False),
    Column("stage", _Word(StageKind)),
    Column("priority", Integer, nullable=False),
    Column("trials", Integer, nullable=False),  # of each island; grows when a job is extended
    Column("max_attempts", Integer, nullable=False),  # of each stage
    Column("error", JSON(none_as_null=True)),
    Column("best", JSON(none_as_null=True)),  # the configuration
    Column("warnings", JSON(none_as_null=True)),
    # What lists are filtered and sorted by: see storage/rows.py.
    Column("models", ARRAY(Text), nullable=False, server_default="{}"),
    Column("patterns", ARRAY(Text), nullable=False, server_default="{}"),
    Column("labels", ARRAY(Text), nullable=False, server_default="{}"),  # NAME and NAME=VALUE
    Column("perplexity", Float),
    Column("rise", Float),  # share above the dense model's perplexity
    Column("gain", Float),  # share below RIA's
    Column("idempotency_key", Text),
    Column("fingerprint", LargeBinary, nullable=False),  # SHA-256 of what was submitted
    Column("created_at", _utc, nullable=False, server_default=_now),
    Column("started_at", _utc),
    Column("finished_at", _utc),
    Column("served_at", _utc),  # when a worker last took a stage of it
    Index(
        "uq_jobs_idempotency",
        text("coalesce(owner_id, '00000000-0000-0000-0000-000000000000'::uuid)"),
        "idempotency_key",
        unique=True,
    ),
    Index("ix_jobs_state", "state"),
    Index("ix_jobs_owner_id_number", "owner_id", "number"),
    Index("ix_jobs_models", "models", postgresql_using="gin"),
    Index("ix_jobs_patterns", "patterns", postgresql_using="gin"),
    Index("ix_jobs_labels", "labels", postgresql_using="gin"),
)

queue_workers = Table(  # procrastinate's: what it knows of a worker
    "procrastinate_workers",
    metadata,
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    Column("last_heartbeat", _utc, nullable=False, server_default=_now),
    schema="procrastinate",
)

workers = Table(  # the rest of each of those rows, which go together
    "workers",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column(
        "number", ForeignKey(queue_workers.c.id, ondelete="CASCADE"), nullable=False, unique=True
    ),
    Column("name", Text, nullable=False),
    Column("device", Text, nullable=False),
    Column("stages", JSON, nullable=False),
    Column("started_at", _utc, nullable=False, server_default=_now),
    Column("store", Text),  # id of the artifact store that it sees; "": one without; null: unknown
    Column("drain", _Word(Drain)),  # null: it takes stages
    Column("memory_used", BigInteger),  # bytes of its GPUs; null: it has none, or not used one yet
    Column("memory_total", BigInteger),
)

service = Table(  # one row
    "service",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("store", Text, nullable=False),  # id of the artifact store that the API sees
)

stages = Table(
    "stages",
    metadata,
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    Column("job_id", Uuid, ForeignKey("pho.jobs.id", ondelete="CASCADE"), nullable=False),
    Column("kind", _Word(StageKind), nullable=False),
    Column("number", Integer, nullable=False),  # island of a search, trial of a perplexity
    Column("state", _Word(StageState), nullable=False),
    Column("attempt", Integer, nullable=False, server_default="0"),  # fences every write
    Column("failures", Integer, nullable=False, server_default="0"),
    Column("queue_id", BigInteger),  # the only queue entry that may run it
    Column("worker_id", Uuid),
    Column("params", JSON(none_as_null=True)),  # what to do
    Column("done", Integer, nullable=False, server_default="0"),  # trials
    Column("elapsed_s", Float, nullable=False, server_default="0"),
    Column("best_value", Float),
    Column("step", JSON(none_as_null=True)),  # what it is at, while it runs
    Column("result", JSON(none_as_null=True)),
    Column("started_at", _utc),
    Column("finished_at", _utc),
    Column("begun_at", _utc),  # the attempt that a worker has in hand; null: none
    Column("worked_s", Float, nullable=False, server_default="0"),  # by attempts that have ended
    UniqueConstraint("job_id", "kind", "number"),
)

tallies = Table(  # of attempts that have ended, also of jobs that are deleted
    "tallies",
    metadata,
    Column("kind", _Word(StageKind), primary_key=True),
    Column("outcome", _Word(AttemptEnd), primary_key=True),
    Column("up_to_s", Float, primary_key=True),  # of DURATIONS_S: how long the stage has worked
    Column("count", BigInteger, nullable=False),
    Column("seconds", Float, nullable=False),  # how long their stages have worked, in all
)

events = Table(
    "events",
    metadata,
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    Column("job_id", Uuid, ForeignKey("pho.jobs.id", ondelete="CASCADE"), nullable=False),
    Column("kind", Text, nullable=False),
    Column("data", JSON, nullable=False),
    Column("created_at", _utc, nullable=False, server_default=_now),
    Index("ix_events_job_id_id", "job_id", "id"),
)

configurations = Table(
    "configurations",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("number", BigInteger, Identity(always=True), nullable=False, unique=True),
    Column("owner_id", Uuid, ForeignKey("pho.keys.id")),  # as that of a job
    Column("job_id", Uuid),  # no foreign key: an entry outlives its job
    Column("sha256", LargeBinary, nullable=False),  # of the document
    Column("document", JSON, nullable=False),
    Column("transfers", JSON, nullable=False),  # what it was worth on other models
    Column("pattern", Text),  # of the document
    Column("facts", JSON(none_as_null=True)),  # what a ranking reads of it; null: not read yet
    Column("created_at", _utc, nullable=False, server_default=_now),
    Index(
        "uq_configurations_owner_sha256",
        text("coalesce(owner_id, '00000000-0000-0000-0000-000000000000'::uuid)"),
        "sha256",
        unique=True,
    ),
)

texts = Table(  # that were uploaded; their files are in the artifact store
    "texts",
    metadata,
    Column("number", BigInteger, Identity(always=True), primary_key=True),
    Column("owner_id", Uuid, ForeignKey("pho.keys.id")),  # as that of a job
    Column("id", Text, nullable=False),  # of its content: several keys may have the same
    Column("name", Text, nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("created_at", _utc, nullable=False, server_default=_now),
    Column("used_at", _utc, nullable=False, server_default=_now),
    Index(
        "uq_texts_owner_id",
        text("coalesce(owner_id, '00000000-0000-0000-0000-000000000000'::uuid)"),
        "id",
        unique=True,
    ),
    Index("ix_texts_id", "id"),
)

notifications = Table(
    "notifications",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("job_id", Uuid, nullable=False),  # no foreign key: it is sent of a deleted job, too
    Column("url", Text, nullable=False),
    Column("document", JSON, nullable=False),
    Column("attempts", Integer, nullable=False, server_default="0"),
    Column("due_at", _utc, nullable=False, server_default=_now),
    Column("ended_at", _utc),  # delivered, or given up
    Column("error", Text),
    Column("created_at", _utc, nullable=False, server_default=_now),
    Index("ix_notifications_due_at", "due_at", postgresql_where=text("ended_at IS NULL")),
)


def interval(seconds: float) -> Any:
    """So many seconds, in SQL."""
    return func.make_interval(0, 0, 0, 0, 0, 0, seconds)
