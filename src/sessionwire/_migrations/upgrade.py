"""Bring a database to a revision, once, no matter how many processes start at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from typing import Any, cast

from sqlalchemy import URL, MetaData
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from sessionwire._config.url import DatabaseURL
from sessionwire._database.driver_errors import sqlstate
from sessionwire._database.options import CONNECTION_OPTIONS, WITHOUT_HOOKS, ConnectionOptions
from sessionwire._database.runtime import Database
from sessionwire._log_events import DATABASE_AHEAD
from sessionwire._shield import run_shielded
from sessionwire.errors import ConfigurationError, MigrationError, MigrationsPendingError
from sessionwire.settings import DatabaseSettings
from sessionwire.status import MigrationState

from .locks import migration_lock
from .scripts import Scripts, alone_in_process

LOCK_NOT_AVAILABLE = "55P03"  # an SQLSTATE
ALREADY_THERE = "42P07"  # duplicate_table, an SQLSTATE


async def migrate(
    database: Database,
    scripts: Scripts,
    revision: str,
    *,
    lock_timeout: float | None,
    timeout: float | None,
) -> MigrationState:
    """Upgrade if the database is behind. Return how far it was."""
    check_direct(database.settings)
    limit = asyncio.timeout(timeout)
    try:
        async with limit:
            return await _migrate(database, scripts, revision, lock_timeout)
    except TimeoutError as error:
        if not limit.expired():
            raise
        raise MigrationError(
            f"{database.name}: the migrations were not done within {timeout:g} s, the wait for "
            "other processes included; what had not ended was rolled back: allow a longer timeout, "
            "or see what holds the migration up"
        ) from error


async def _migrate(
    database: Database, scripts: Scripts, revision: str, lock_timeout: float | None
) -> MigrationState:
    state = await look(database, scripts, revision)
    if state.is_behind:
        async with (
            connection_for_migrations(database) as connection,
            migration_lock(connection, lock_timeout),
        ):
            with explained(lock_timeout):
                async with alone_in_process():
                    state = await connection.run_sync(scripts.upgrade, revision)
    _warn_if_ahead(database, state)
    return state


async def require(database: Database, scripts: Scripts) -> None:
    """Raise `MigrationsPendingError` if the database is behind this build."""
    state = await look(database, scripts)
    _warn_if_ahead(database, state)
    if state.is_behind:
        raise MigrationsPendingError(
            f"{database.name} is behind this build: it lacks {', '.join(state.pending)} of its "
            "migrations; run `alembic upgrade head` or `await manager.migrate()`, or write "
            'Lifespan(container, migrations="upgrade")'
        )


async def look(database: Database, scripts: Scripts, revision: str = "heads") -> MigrationState:
    """Return how far the database is from a revision, without a lock."""
    engine = database.admit(is_enclosed=False).primary.execution_options(**{WITHOUT_HOOKS: True})
    async with engine.connect() as connection, alone_in_process():
        return await connection.run_sync(scripts.look, revision)


def check_direct(settings: DatabaseSettings) -> None:
    """Ask for the way past a pooler: a lock and `SET` belong to a session of the server.

    Raises:
        ConfigurationError: There is a transaction pooler, and no `migrations_url`.
    """
    if settings.pooler == "transaction" and settings.migrations_url is None:
        raise ConfigurationError(
            "migrations_url: pooler: transaction is set, and migrations need a session of the "
            "server: write migrations_url: postgresql://host beside url, with the host and port of "
            "the server itself"
        )


@asynccontextmanager
async def connection_for_migrations(database: Database) -> AsyncGenerator[AsyncConnection]:
    """Open a connection, and close it at the end, with all that was set on it."""
    async with _engine_for_migrations(database) as engine:
        options = {WITHOUT_HOOKS: True}
        if engine.dialect.name == "sqlite":
            options[CONNECTION_OPTIONS] = cast(Any, ConnectionOptions(write_intent=True))
        connection = await engine.execution_options(**options).connect()
        try:
            yield connection
        finally:
            await run_shielded(_discard(connection), database.settings.rollback_timeout)


async def _discard(connection: AsyncConnection) -> None:
    if not connection.invalidated:
        await connection.invalidate()
    await connection.close()


@asynccontextmanager
async def _engine_for_migrations(database: Database) -> AsyncGenerator[AsyncEngine]:
    settings = database.settings
    if settings.migrations_url is None:
        yield database.admit(is_enclosed=False).primary
        return
    url, own = cast(URL, settings.migrations_url), cast(URL, settings.url)
    make_engines: Callable[..., Any] = database.make_engines
    changes: dict[str, Any] = {"url": DatabaseURL._make(url), "pooler": None}
    if url.password is not None or url.username != own.username:
        make_engines = partial(make_engines, credentials=None)
        changes["password_file"] = None
    engines = make_engines(settings.model_copy(update=changes))
    try:
        yield engines.primary
    finally:
        await run_shielded(engines.dispose(), settings.rollback_timeout)


@contextmanager
def explained(lock_timeout: float | None) -> Generator[None]:
    """Note on an error what to do about it. A cancellation stays one, whatever it led to."""
    task = asyncio.current_task()
    assert task is not None
    cancellations = task.cancelling()
    try:
        yield
    except Exception as error:
        if task.cancelling() > cancellations:
            # Alembic's clean-up has failed on the connection that the cancellation had closed.
            raise asyncio.CancelledError from error
        if sqlstate(error) == LOCK_NOT_AVAILABLE:
            error.add_note(
                f"the statement waited {lock_timeout or 0:g} s for a lock that another transaction "
                "holds, and would have made all others on this table wait for it; nothing of this "
                "transaction was kept: migrate again when that transaction has ended, or allow a "
                "longer lock_timeout"
            )
        elif sqlstate(error) == ALREADY_THERE or "already exists" in str(error):
            error.add_note(
                "if the tables were made without migrations, such as by create_all(), tell Alembic "
                "which revision they are at: alembic stamp REVISION"
            )
        raise


def _warn_if_ahead(database: Database, state: MigrationState) -> None:
    if state.is_ahead:
        DATABASE_AHEAD.log(
            database=database.name,
            unknown=", ".join(state.unknown),
            heads=", ".join(state.heads),
        )


def scripts_of(location: object, metadata: MetaData) -> Scripts:
    """Return the migrations of a manager.

    Raises:
        ConfigurationError: It has none.
    """
    if location is None:
        raise ConfigurationError(
            "migrations: the manager has none: write DatabaseSessionManager(migrations="
            "'shop:migrations') or DatabaseContainer.nested(migrations='shop:migrations')"
        )
    return Scripts(cast(str, location), metadata)
