"""
Documents without the fields that are gone, and with finalists under their name.
"""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None


def upgrade() -> None:
    for table, columns in (
        ("jobs", ("spec", "best")),
        ("stages", ("params", "result")),
        ("configurations", ("document",)),
    ):
        stored = sa.table(
            table,
            sa.column("id"),
            *(sa.column(c, sa.JSON(none_as_null=True)) for c in columns),
            schema="pho",
        )
        for row in op.get_bind().execute(sa.select(stored)).mappings().all():
            now = {name: _named(_left_out(row[name])) for name in columns}
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


def _named(document: Any) -> Any:
    """What was called candidates in a confirmation and in a configuration is finalists."""
    if isinstance(document, list):
        return [_named(each) for each in document]
    if not isinstance(document, dict):
        return document
    now = {name: _named(value) for name, value in document.items()}
    if isinstance(now.get("confirm"), dict):
        now["confirm"] = _renamed(now["confirm"])
    return _renamed(now) if now.get("format") == "pho-configuration" else now


def _renamed(document: dict[str, Any]) -> dict[str, Any]:
    return {"finalists" if n == "candidates" else n: value for n, value in document.items()}
