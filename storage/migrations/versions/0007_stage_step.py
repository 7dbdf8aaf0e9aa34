"""
What a running stage is at: a title, and how many of its steps are done.
"""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("stages", sa.Column("step", sa.JSON(), nullable=True), schema="pho")
