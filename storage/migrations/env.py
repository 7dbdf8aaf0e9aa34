"""Run by Alembic: migrates the schema ``pho`` on the connection that it is given."""

from alembic import context

from storage.tables import SCHEMA, metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    version_table="alembic_version",
    version_table_schema=SCHEMA,  # Optuna has a table of this name too
)
with context.begin_transaction():
    context.run_migrations()
