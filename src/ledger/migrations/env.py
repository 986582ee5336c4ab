"""Alembic runs this file: `manager.migrate()` does, and the command `alembic`."""

from ledger.container import Container
from sessionwire.alembic import run_migrations

run_migrations(Container())
