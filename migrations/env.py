"""Alembic's entry: runs the migrations on the connection that `migrations.run` prepared."""

from alembic import context

connection = context.config.attributes["connection"]
context.configure(connection=connection, transaction_per_migration=False)
context.run_migrations()
