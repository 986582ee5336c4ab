"""Migrations: Alembic on the engine of a manager, one process at a time."""
