"""
The tables of a service, and those of its queue, procrastinate 3.10's, in the first schema of the
search path.

A later procrastinate comes with SQL files of its own: run those that are newer than 3.10 in a new
revision, and raise the range in pyproject.toml with it.
"""

import sqlalchemy as sa
from alembic import op
from procrastinate.schema import SchemaManager
from sqlalchemy.dialects.postgresql import ARRAY

revision = "0010"  # those before it were never released
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    time, now = sa.DateTime(timezone=True), sa.text("now()")
    op.create_table(
        "keys",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("prefix", sa.Text(), nullable=False),
        sa.Column("sha256", sa.LargeBinary(), nullable=False),
        sa.Column("sees_all", sa.Boolean(), nullable=False),
        sa.Column("scrape_only", sa.Boolean(), nullable=False),
        sa.Column("created_at", time, server_default=now, nullable=False),
        sa.Column("revoked_at", time, nullable=True),
        sa.Column("expires_at", time, nullable=True),
        sa.Column("quota", sa.BigInteger(), nullable=True),
        sa.Column("quota_unit", sa.Text(), nullable=True),
        sa.Column("quota_span", sa.Interval(), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_keys")),
        sa.UniqueConstraint("sha256", name=op.f("uq_keys_sha256")),
        schema="pho",
    )
    op.create_table(
        "work",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("key_id", sa.Uuid(), nullable=False),
        sa.Column("job_id", sa.Uuid(), nullable=False),
        sa.Column("amount", sa.BigInteger(), nullable=False),
        sa.Column("planned_at", time, server_default=now, nullable=False),
        sa.ForeignKeyConstraint(
            ["key_id"], ["pho.keys.id"], name=op.f("fk_work_key_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_work")),
        schema="pho",
    )
    op.create_index("ix_work_key_id_planned_at", "work", ["key_id", "planned_at"], schema="pho")
    op.create_table(
        "workers",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("device", sa.Text(), nullable=False),
        sa.Column("stages", sa.JSON(), nullable=False),
        sa.Column("started_at", time, server_default=now, nullable=False),
        sa.Column("heartbeat_at", time, server_default=now, nullable=False),
        sa.Column("store", sa.Text(), nullable=True),
        sa.Column("drain", sa.Text(), nullable=True),
        sa.Column("memory_used", sa.BigInteger(), nullable=True),
        sa.Column("memory_total", sa.BigInteger(), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_workers")),
        schema="pho",
    )
    op.create_table(
        "service",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("store", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_service")),
        schema="pho",
    )
    op.create_table(
        "jobs",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("number", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("owner_id", sa.Uuid(), nullable=True),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("spec", sa.JSON(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("stage", sa.Text(), nullable=True),
        sa.Column("priority", sa.Integer(), nullable=False),
        sa.Column("trials", sa.Integer(), nullable=False),
        sa.Column("max_attempts", sa.Integer(), nullable=False),
        sa.Column("error", sa.JSON(none_as_null=True), nullable=True),
        sa.Column("best", sa.JSON(none_as_null=True), nullable=True),
        sa.Column("warnings", sa.JSON(none_as_null=True), nullable=True),
        sa.Column("models", ARRAY(sa.Text()), server_default="{}", nullable=False),
        sa.Column("patterns", ARRAY(sa.Text()), server_default="{}", nullable=False),
        sa.Column("perplexity", sa.Float(), nullable=True),
        sa.Column("rise", sa.Float(), nullable=True),
        sa.Column("gain", sa.Float(), nullable=True),
        sa.Column("idempotency_key", sa.Text(), nullable=True),
        sa.Column("fingerprint", sa.LargeBinary(), nullable=False),
        sa.Column("created_at", time, server_default=now, nullable=False),
        sa.Column("started_at", time, nullable=True),
        sa.Column("finished_at", time, nullable=True),
        sa.Column("served_at", time, nullable=True),
        sa.ForeignKeyConstraint(["owner_id"], ["pho.keys.id"], name=op.f("fk_jobs_owner_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_jobs")),
        sa.UniqueConstraint("number", name=op.f("uq_jobs_number")),
        schema="pho",
    )
    op.create_index("ix_jobs_state", "jobs", ["state"], unique=False, schema="pho")
    op.create_index("ix_jobs_owner_id_number", "jobs", ["owner_id", "number"], schema="pho")
    for name in ("models", "patterns"):
        op.create_index(f"ix_jobs_{name}", "jobs", [name], schema="pho", postgresql_using="gin")
    op.create_index(
        "uq_jobs_idempotency",
        "jobs",
        [
            sa.literal_column("coalesce(owner_id, '00000000-0000-0000-0000-000000000000'::uuid)"),
            "idempotency_key",
        ],
        unique=True,
        schema="pho",
    )
    op.create_table(
        "events",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("job_id", sa.Uuid(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("data", sa.JSON(), nullable=False),
        sa.Column("created_at", time, server_default=now, nullable=False),
        sa.ForeignKeyConstraint(
            ["job_id"], ["pho.jobs.id"], name=op.f("fk_events_job_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_events")),
        schema="pho",
    )
    op.create_index("ix_events_job_id_id", "events", ["job_id", "id"], unique=False, schema="pho")
    op.create_table(
        "stages",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("job_id", sa.Uuid(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("attempt", sa.Integer(), server_default="0", nullable=False),
        sa.Column("failures", sa.Integer(), server_default="0", nullable=False),
        sa.Column("queue_id", sa.BigInteger(), nullable=True),
        sa.Column("worker_id", sa.Uuid(), nullable=True),
        sa.Column("params", sa.JSON(none_as_null=True), nullable=True),
        sa.Column("done", sa.Integer(), server_default="0", nullable=False),
        sa.Column("elapsed_s", sa.Float(), server_default="0", nullable=False),
        sa.Column("best_value", sa.Float(), nullable=True),
        sa.Column("step", sa.JSON(none_as_null=True), nullable=True),
        sa.Column("result", sa.JSON(none_as_null=True), nullable=True),
        sa.Column("started_at", time, nullable=True),
        sa.Column("finished_at", time, nullable=True),
        sa.Column("begun_at", time, nullable=True),
        sa.Column("worked_s", sa.Float(), server_default="0", nullable=False),
        sa.ForeignKeyConstraint(
            ["job_id"], ["pho.jobs.id"], name=op.f("fk_stages_job_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_stages")),
        sa.UniqueConstraint("job_id", "kind", "number", name=op.f("uq_stages_job_id_kind_number")),
        schema="pho",
    )
    op.create_table(
        "tallies",
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("outcome", sa.Text(), nullable=False),
        sa.Column("up_to_s", sa.Float(), nullable=False),
        sa.Column("count", sa.BigInteger(), nullable=False),
        sa.Column("seconds", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("kind", "outcome", "up_to_s", name=op.f("pk_tallies")),
        schema="pho",
    )
    op.create_table(
        "sessions",
        sa.Column("sha256", sa.LargeBinary(), nullable=False),
        sa.Column("key_id", sa.Uuid(), nullable=False),
        sa.Column("expires_at", time, nullable=False),
        sa.ForeignKeyConstraint(
            ["key_id"], ["pho.keys.id"], name=op.f("fk_sessions_key_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("sha256", name=op.f("pk_sessions")),
        schema="pho",
    )
    op.create_table(
        "configurations",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("number", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("owner_id", sa.Uuid(), nullable=True),
        sa.Column("job_id", sa.Uuid(), nullable=True),
        sa.Column("sha256", sa.LargeBinary(), nullable=False),
        sa.Column("document", sa.JSON(), nullable=False),
        sa.Column("transfers", sa.JSON(), nullable=False),
        sa.Column("pattern", sa.Text(), nullable=True),
        sa.Column("facts", sa.JSON(none_as_null=True), nullable=True),
        sa.Column("created_at", time, server_default=now, nullable=False),
        sa.ForeignKeyConstraint(
            ["owner_id"], ["pho.keys.id"], name=op.f("fk_configurations_owner_id")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_configurations")),
        sa.UniqueConstraint("number", name=op.f("uq_configurations_number")),
        schema="pho",
    )
    op.create_index(
        "uq_configurations_owner_sha256",
        "configurations",
        [
            sa.literal_column("coalesce(owner_id, '00000000-0000-0000-0000-000000000000'::uuid)"),
            "sha256",
        ],
        unique=True,
        schema="pho",
    )
    op.create_table(
        "notifications",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("job_id", sa.Uuid(), nullable=False),
        sa.Column("url", sa.Text(), nullable=False),
        sa.Column("document", sa.JSON(), nullable=False),
        sa.Column("attempts", sa.Integer(), server_default="0", nullable=False),
        sa.Column("due_at", time, server_default=now, nullable=False),
        sa.Column("ended_at", time, nullable=True),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("created_at", time, server_default=now, nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_notifications")),
        schema="pho",
    )
    op.create_index(
        op.f("ix_notifications_due_at"), "notifications", ["due_at"], schema="pho",
        postgresql_where=sa.text("ended_at IS NULL"),
    )  # fmt: skip
    driver = op.get_bind().connection.driver_connection
    assert driver is not None
    driver.execute(SchemaManager.get_schema())
