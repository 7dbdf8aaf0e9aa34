"""
Texts that were uploaded, and labels of jobs.
"""

from alembic import op

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None

_STATEMENTS = """
CREATE TABLE pho.texts (
    number bigint GENERATED ALWAYS AS IDENTITY CONSTRAINT pk_texts PRIMARY KEY,
    owner_id uuid CONSTRAINT fk_texts_owner_id REFERENCES pho.keys,
    id text NOT NULL,
    name text NOT NULL,
    bytes bigint NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    used_at timestamptz NOT NULL DEFAULT now()
);
CREATE UNIQUE INDEX uq_texts_owner_id ON pho.texts
    (coalesce(owner_id, '00000000-0000-0000-0000-000000000000'::uuid), id);
CREATE INDEX ix_texts_id ON pho.texts (id);
ALTER TABLE pho.jobs ADD COLUMN labels text[] NOT NULL DEFAULT '{}';
CREATE INDEX ix_jobs_labels ON pho.jobs USING gin (labels);
"""


def upgrade() -> None:
    driver = op.get_bind().connection.driver_connection
    assert driver is not None
    driver.execute(_STATEMENTS)
