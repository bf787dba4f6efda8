"""What alembic runs: migrations always go through the caller's connection and transaction."""

from alembic import context

from tinsmith.store.tables import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    transactional_ddl=True,
    render_as_batch=True,
)
context.run_migrations()
