"""
Library entries: their pattern and what rankings read of them, beside the documents.
"""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("configurations", sa.Column("pattern", sa.Text(), nullable=True), schema="pho")
    op.add_column("configurations", sa.Column("facts", sa.JSON(), nullable=True), schema="pho")
    op.execute("UPDATE pho.configurations SET pattern = document ->> 'pattern'")
