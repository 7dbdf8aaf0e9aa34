"""
The queue: procrastinate 3.10's tables and functions, in the first schema of the search path.

A later procrastinate comes with SQL files of its own: run those that are newer
than 3.10 in a new revision, and raise the range in pyproject.toml with it.
"""

from alembic import op
from procrastinate.schema import SchemaManager

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    driver = op.get_bind().connection.driver_connection
    assert driver is not None
    driver.execute(SchemaManager.get_schema())
