"""
The library: a table of configurations, with those of all jobs that have one.
"""

import hashlib
import json
import uuid

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import insert

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    table = op.create_table(
        "configurations",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("number", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("owner_id", sa.Uuid(), nullable=True),
        sa.Column("job_id", sa.Uuid(), nullable=True),
        sa.Column("sha256", sa.LargeBinary(), nullable=False),
        sa.Column("document", sa.JSON(), nullable=False),
        sa.Column("transfers", sa.JSON(), nullable=False),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
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
    jobs = sa.text(
        "SELECT id, owner_id, best, finished_at, created_at FROM pho.jobs "
        "WHERE best IS NOT NULL ORDER BY number"
    )
    for job in op.get_bind().execute(jobs).all():
        op.get_bind().execute(
            insert(table)
            .values(
                id=uuid.uuid4(),
                owner_id=job.owner_id,
                job_id=job.id,
                sha256=hashlib.sha256(json.dumps(job.best, sort_keys=True).encode()).digest(),
                document=job.best,
                transfers=[],
                created_at=job.finished_at or job.created_at,
            )
            .on_conflict_do_nothing()  # the same search twice has the same result
        )
