"""
The tables of a service, and those of its queue, procrastinate 3.10's, in the first schema of the
search path.

A later procrastinate comes with SQL files of its own: run those that are newer than 3.10 in a new
revision, and raise the range in pyproject.toml with it.
"""

from alembic import op
from procrastinate.schema import SchemaManager

revision = "0012"  # those before it were never released
down_revision = None
branch_labels = None
depends_on = None

_TABLES = """
CREATE TABLE pho.keys (
    id uuid CONSTRAINT pk_keys PRIMARY KEY,
    name text NOT NULL,
    prefix text NOT NULL,
    sha256 bytea NOT NULL CONSTRAINT uq_keys_sha256 UNIQUE,
    sees_all boolean NOT NULL,
    scrape_only boolean NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    revoked_at timestamptz,
    expires_at timestamptz,
    quota bigint,
    quota_span interval
);
CREATE TABLE pho.work (
    id bigint GENERATED ALWAYS AS IDENTITY CONSTRAINT pk_work PRIMARY KEY,
    key_id uuid NOT NULL CONSTRAINT fk_work_key_id REFERENCES pho.keys ON DELETE CASCADE,
    job_id uuid NOT NULL,
    amount bigint NOT NULL,
    planned_at timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX ix_work_key_id_planned_at ON pho.work (key_id, planned_at);
CREATE TABLE pho.sessions (
    sha256 bytea CONSTRAINT pk_sessions PRIMARY KEY,
    key_id uuid NOT NULL CONSTRAINT fk_sessions_key_id REFERENCES pho.keys ON DELETE CASCADE,
    expires_at timestamptz NOT NULL
);
CREATE TABLE pho.jobs (
    id uuid CONSTRAINT pk_jobs PRIMARY KEY,
    number bigint GENERATED ALWAYS AS IDENTITY CONSTRAINT uq_jobs_number UNIQUE,
    owner_id uuid CONSTRAINT fk_jobs_owner_id REFERENCES pho.keys,
    name text NOT NULL,
    spec json NOT NULL,
    state text NOT NULL,
    stage text,
    priority integer NOT NULL,
    trials integer NOT NULL,
    max_attempts integer NOT NULL,
    error json,
    best json,
    warnings json,
    models text[] NOT NULL DEFAULT '{}',
    patterns text[] NOT NULL DEFAULT '{}',
    perplexity double precision,
    rise double precision,
    gain double precision,
    idempotency_key text,
    fingerprint bytea NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    started_at timestamptz,
    finished_at timestamptz,
    served_at timestamptz
);
CREATE UNIQUE INDEX uq_jobs_idempotency ON pho.jobs
    (coalesce(owner_id, '00000000-0000-0000-0000-000000000000'::uuid), idempotency_key);
CREATE INDEX ix_jobs_state ON pho.jobs (state);
CREATE INDEX ix_jobs_owner_id_number ON pho.jobs (owner_id, number);
CREATE INDEX ix_jobs_models ON pho.jobs USING gin (models);
CREATE INDEX ix_jobs_patterns ON pho.jobs USING gin (patterns);
CREATE TABLE pho.workers (
    id uuid CONSTRAINT pk_workers PRIMARY KEY,
    number bigint NOT NULL CONSTRAINT uq_workers_number UNIQUE CONSTRAINT fk_workers_number
        REFERENCES procrastinate.procrastinate_workers ON DELETE CASCADE,
    name text NOT NULL,
    device text NOT NULL,
    stages json NOT NULL,
    started_at timestamptz NOT NULL DEFAULT now(),
    store text,
    drain text,
    memory_used bigint,
    memory_total bigint
);
CREATE TABLE pho.service (
    id integer CONSTRAINT pk_service PRIMARY KEY,
    store text NOT NULL
);
CREATE TABLE pho.stages (
    id bigint GENERATED ALWAYS AS IDENTITY CONSTRAINT pk_stages PRIMARY KEY,
    job_id uuid NOT NULL CONSTRAINT fk_stages_job_id REFERENCES pho.jobs ON DELETE CASCADE,
    kind text NOT NULL,
    number integer NOT NULL,
    state text NOT NULL,
    attempt integer NOT NULL DEFAULT 0,
    failures integer NOT NULL DEFAULT 0,
    queue_id bigint,
    worker_id uuid,
    params json,
    done integer NOT NULL DEFAULT 0,
    elapsed_s double precision NOT NULL DEFAULT 0,
    best_value double precision,
    step json,
    result json,
    started_at timestamptz,
    finished_at timestamptz,
    begun_at timestamptz,
    worked_s double precision NOT NULL DEFAULT 0,
    CONSTRAINT uq_stages_job_id_kind_number UNIQUE (job_id, kind, number)
);
CREATE TABLE pho.tallies (
    kind text,
    outcome text,
    up_to_s double precision,
    count bigint NOT NULL,
    seconds double precision NOT NULL,
    CONSTRAINT pk_tallies PRIMARY KEY (kind, outcome, up_to_s)
);
CREATE TABLE pho.events (
    id bigint GENERATED ALWAYS AS IDENTITY CONSTRAINT pk_events PRIMARY KEY,
    job_id uuid NOT NULL CONSTRAINT fk_events_job_id REFERENCES pho.jobs ON DELETE CASCADE,
    kind text NOT NULL,
    data json NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX ix_events_job_id_id ON pho.events (job_id, id);
CREATE TABLE pho.configurations (
    id uuid CONSTRAINT pk_configurations PRIMARY KEY,
    number bigint GENERATED ALWAYS AS IDENTITY CONSTRAINT uq_configurations_number UNIQUE,
    owner_id uuid CONSTRAINT fk_configurations_owner_id REFERENCES pho.keys,
    job_id uuid,
    sha256 bytea NOT NULL,
    document json NOT NULL,
    transfers json NOT NULL,
    pattern text,
    facts json,
    created_at timestamptz NOT NULL DEFAULT now()
);
CREATE UNIQUE INDEX uq_configurations_owner_sha256 ON pho.configurations
    (coalesce(owner_id, '00000000-0000-0000-0000-000000000000'::uuid), sha256);
CREATE TABLE pho.notifications (
    id uuid CONSTRAINT pk_notifications PRIMARY KEY,
    job_id uuid NOT NULL,
    url text NOT NULL,
    document json NOT NULL,
    attempts integer NOT NULL DEFAULT 0,
    due_at timestamptz NOT NULL DEFAULT now(),
    ended_at timestamptz,
    error text,
    created_at timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX ix_notifications_due_at ON pho.notifications (due_at) WHERE ended_at IS NULL;
"""


def upgrade() -> None:
    driver = op.get_bind().connection.driver_connection
    assert driver is not None
    driver.execute(SchemaManager.get_schema())
    driver.execute(_TABLES)
