"""The schema's history (Alembic). `migrations.run` applies it."""
