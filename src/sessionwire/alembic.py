"""Alembic on the database of a container: an `env.py` calls `run_migrations()`.

```python
# migrations/env.py
from sessionwire.alembic import run_migrations

from shop import Container

run_migrations(Container())
```

So the URL, the pool and the driver are those of the program, and its loggers stay on.
"""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from logging.config import fileConfig
from typing import Any, cast

from dependency_injector import containers
from sqlalchemy import make_url

from ._database.runtime import database_of, running_loop
from ._managers import managers_of
from ._migrations import scripts
from ._migrations.locks import migration_lock
from ._migrations.upgrade import check_direct, connection_for_migrations, explained
from .errors import ConfigurationError, SessionwireError
from .manager import DatabaseSessionManager

context, CommandError = scripts.context, scripts.CommandError
LOCK_TIMEOUT = 5.0


def run_migrations(
    database: DatabaseSessionManager[Any] | containers.Container,
    *,
    lock_timeout: float | None = LOCK_TIMEOUT,
    **options: Any,
) -> None:
    """Run what Alembic asks for, on the database of a container or a manager.

    It is for an `env.py`. Under the command `alembic` it opens the database and closes
    it at the end, and commands that change it wait for other processes that do so.
    Under `manager.migrate()` it works on the connection of that manager.

    On SQLite, foreign keys are off while migrations run, so that a batch may rebuild a
    table, and are checked before each commit.

    Args:
        database: The container, if it has one database; its `DatabaseContainer`; or the
            manager.
        lock_timeout: Seconds that a statement may wait for a lock of another
            transaction, on PostgreSQL, under the command; None: for as long as it takes.
        **options: Arguments for Alembic's `context.configure()`, such as
            `compare_server_default=True` or `include_object=…`.

    Raises:
        ConfigurationError: The container has no database, or several; or an event loop
            is running, in which `await manager.migrate()` does this.
    """
    given: scripts.Given | None = context.config.attributes.get(scripts.GIVEN)
    if given is not None:
        given.run(options)
        return
    _configure_logging()
    try:
        manager = _only_manager(database)
        if context.is_offline_mode():
            _write_sql(manager, options)
            return
        if running_loop() is not None:
            raise ConfigurationError(
                "an event loop is running here: write await manager.migrate(), or call Alembic's "
                "command in a thread: await asyncio.to_thread(command.upgrade, config, 'head')"
            )
        asyncio.run(_run(manager, lock_timeout, options))
    except SessionwireError as error:
        # Alembic prints its own errors in one line.
        raise CommandError(str(error)) from error


def _configure_logging() -> None:
    """Configure logging as alembic.ini says, and leave the loggers on that are there."""
    if context.config.file_config.has_section("loggers"):
        fileConfig(cast(str, context.config.config_file_name), disable_existing_loggers=False)


def _only_manager(database: Any) -> DatabaseSessionManager[Any]:
    managers = managers_of(database)
    if len(managers) > 1:
        raise ConfigurationError(
            "this container has several databases: give the DatabaseContainer of one of them, such "
            "as run_migrations(container.db), and each a directory of migrations of its own"
        )
    return managers[0]


def _write_sql(manager: DatabaseSessionManager[Any], options: dict[str, Any]) -> None:
    settings = database_of(manager).settings
    backend = make_url(settings.url).get_backend_name()
    defaults: dict[str, Any] = {
        **scripts.defaults(backend, manager.metadata),
        "dialect_name": "postgresql" if backend == "embedded" else backend,
        "literal_binds": True,
        "dialect_opts": {"paramstyle": "named"},
    }
    context.configure(**{**defaults, **options})
    with context.begin_transaction():
        context.run_migrations()


async def _run(
    manager: DatabaseSessionManager[Any], lock_timeout: float | None, options: dict[str, Any]
) -> None:
    database = database_of(manager)
    check_direct(database.settings)
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(manager)
        connection = await stack.enter_async_context(connection_for_migrations(database))
        await connection.run_sync(scripts.configure, manager.metadata, options)
        if scripts.changes_database():
            await stack.enter_async_context(migration_lock(connection, lock_timeout))
        with explained(lock_timeout):
            await connection.run_sync(lambda _: scripts.run())
