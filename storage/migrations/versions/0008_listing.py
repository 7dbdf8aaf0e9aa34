"""
What lists of jobs are filtered and sorted by, beside the documents that it is in.
"""

from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import ARRAY

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    for name in ("models", "patterns"):
        column: sa.Column[Any] = sa.Column(
            name, ARRAY(sa.Text()), nullable=False, server_default="{}"
        )
        op.add_column("jobs", column, schema="pho")
    for name in ("perplexity", "rise", "gain"):
        op.add_column("jobs", sa.Column(name, sa.Float(), nullable=True), schema="pho")
    connection = op.get_bind()
    change = sa.text(
        "UPDATE pho.jobs SET models = :models, patterns = :patterns, perplexity = :perplexity, "
        "rise = :rise, gain = :gain WHERE id = :id"
    )
    for job in connection.execute(sa.text("SELECT id, spec, best FROM pho.jobs")).all():
        values = {**_asked(job.spec), **_found(job.best or {})}
        connection.execute(change, {"id": job.id, **values})
    op.create_index("ix_jobs_owner_id_number", "jobs", ["owner_id", "number"], schema="pho")
    for name in ("models", "patterns"):
        op.create_index(f"ix_jobs_{name}", "jobs", [name], schema="pho", postgresql_using="gin")


def _asked(spec: dict[str, Any]) -> dict[str, list[str]]:
    models = spec.get("models") or [spec.get("model"), *(spec.get("more_models") or ())]
    asked = spec.get("configuration") or spec
    patterns = asked.get("patterns") or ["target" if asked.get("target") else asked.get("pattern")]
    return {"models": _texts(models), "patterns": _texts(patterns)}


def _found(best: dict[str, Any]) -> dict[str, float | None]:
    measured = best.get("perplexities") or {}
    pruned = measured.get("pruned") or (best.get("confirmation") or {}).get("perplexity")
    dense, ria = measured.get("dense"), measured.get("ria")
    return {
        "perplexity": pruned,
        "rise": pruned / dense - 1 if pruned and dense else None,
        "gain": 1 - pruned / ria if pruned and ria else None,
    }


def _texts(values: Any) -> list[str]:
    return [str(value).replace("\0", "\N{REPLACEMENT CHARACTER}") for value in values if value]
