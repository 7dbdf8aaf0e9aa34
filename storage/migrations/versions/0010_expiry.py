"""
Keys that expire. Those that there are do not.
"""

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column(
        "keys", sa.Column("expires_at", sa.DateTime(timezone=True), nullable=True), schema="pho"
    )
