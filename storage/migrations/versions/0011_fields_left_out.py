"""
Documents without the fields that the document of a job and the seal of its inputs no longer have.
"""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None


def upgrade() -> None:
    for table, columns in (("jobs", ("spec",)), ("stages", ("params", "result"))):
        stored = sa.table(
            table,
            sa.column("id"),
            *(sa.column(c, sa.JSON(none_as_null=True)) for c in columns),
            schema="pho",
        )
        for row in op.get_bind().execute(sa.select(stored)).mappings().all():
            now = {name: _left_out(row[name]) for name in columns}
            if any(now[name] != row[name] for name in columns):
                op.execute(sa.update(stored).where(stored.c.id == row["id"]).values(now))


def _left_out(document: Any) -> Any:
    gone = {
        "": ("preset_meaning", "preset_meanings"),
        "calibration": ("stop",),
        "warm_start": ("compare_cold",),
        "inputs": ("documents", "weights_scheme"),
    }
    if not isinstance(document, dict):
        return document
    now = {name: value for name, value in document.items() if name not in gone[""]}
    for part, names in gone.items():
        if isinstance(now.get(part), dict):
            now[part] = {name: value for name, value in now[part].items() if name not in names}
    return {**now, "preset": "best"} if now.get("preset") == "best-reconstructed" else now
