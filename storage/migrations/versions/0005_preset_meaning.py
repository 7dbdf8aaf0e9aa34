"""
Jobs of before: what their presets meant then, which the next versions change.
"""

import json
from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    connection = op.get_bind()
    change = sa.text("UPDATE pho.jobs SET spec = CAST(:spec AS json) WHERE id = :id")
    for job in connection.execute(sa.text("SELECT id, spec FROM pho.jobs")).all():
        if "pattern" in job.spec and "preset_meaning" not in job.spec:  # a transfer has none
            spec = {**job.spec, "preset_meaning": _meaning(job.spec)}
            connection.execute(change, {"id": job.id, "spec": json.dumps(spec)})


def _meaning(spec: dict[str, Any]) -> dict[str, Any]:
    """What the preset of a job meant, in full."""
    name, pattern = spec.get("preset") or "score", spec["pattern"]
    grouped = ":" in pattern
    scope = spec.get("scope") or ("row" if grouped else "layer")
    further = name in ("crepe-plus", "best")
    spread = further and not grouped and scope != "global"
    bounds: dict[str, Any] = {"gradient_exponent": [0.0, 0.0]} if name == "crepe" else {}
    return {
        "of": f"{name} at {pattern}, scope {scope}",
        "steps": {
            "allocation": {
                "method": "fisher" if spread else "uniform",
                "unit": "linear",
                "spread": 0.2,
                "outlier_ratio": 5.0,
            },
            "permutation": "score" if further and grouped else "none",
            "repruning": "swaps" if further else "none",
            "update": "least-squares" if name == "best" else "none",
        },
        "search_space": {"allocation_spread": [0.05, 0.4]} if spread else bounds,
    }
