"""`DatabaseSessionManager`: one database, its sessions and its transactions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Self

from sqlalchemy import URL, MetaData, text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession

from ._core.connection_block import connection_block
from ._core.context import enclosing_scopes
from ._core.hooks import to_call
from ._core.session_block import SessionBlock
from ._core.session_classes import check_session, session_factory
from ._database.call_sites import calling_site
from ._database.engine_options import EngineOptions, checked
from ._database.health_check import check_health
from ._database.runtime import Database, database_of
from .base import Base
from .credentials import CredentialsFunction
from .health import Health
from .settings import DatabaseSettings, as_settings
from .status import MigrationState, Status
from .transaction import SessionT, TransactionManager

SCHEMA_LOCK = int.from_bytes(b"sessionw")  # the key of the advisory lock, 8315179226536832631


class DatabaseSessionManager(Generic[SessionT]):
    """Open one database, hand out sessions and transactions, and close cleanly.

    The constructor does no I/O. A manager belongs to the event loop and process in
    which it is first used, until it or that loop is closed; elsewhere it raises
    `OwnershipError`. In a forked process it begins anew.

    Args:
        settings: What `open()` opens with: settings, or a URL. `init()` gives them
            later.
        metadata: The tables of `create_all()`. Default: `Base.metadata`.
        migrations: The directory of the migrations that `migrate()` runs, or that of a
            package, such as `"shop:migrations"`.
        session_settings: Returns the server's settings for a transaction or a read,
            such as `{"app.tenant": "7"}`. It is asked at the begin of each block that
            does not join another one. PostgreSQL only.
        credentials: Returns the password of a new connection, or `Credentials`, for
            passwords that change. It may be async, and needs `pool.max_lifetime`.
        session_class: The class of its sessions: `AsyncSession`, or one derived from
            it. They keep the rules of their scope.
        session_options: Arguments for the constructor of that class, such as
            `{"autoflush": False}`.
        engine_options: Arguments for SQLAlchemy's `create_async_engine()`, such as
            `{"json_serializer": dumps}`. They take precedence over the setting `engine`.
        connect_args: Arguments for the driver's `connect()`, such as
            `{"command_timeout": 5}`. They take precedence over the setting `connect`.

    Raises:
        ConfigurationError: Settings or options can't work. The library needs some
            options itself; the message names the place for each of them.

    Example:
        ```python
        async with DatabaseSessionManager("sqlite:///shop.db") as manager:
            async with manager.transaction() as session:
                session.add(Order(item="tea"))
        ```
    """

    metadata: MetaData
    migrations: str | Path | None
    transaction: TransactionManager[SessionT]

    def __init__(
        self,
        settings: DatabaseSettings | str | URL | None = None,
        *,
        metadata: MetaData | None = None,
        migrations: str | Path | None = None,
        session_settings: Callable[[], Mapping[str, object]] | None = None,
        credentials: CredentialsFunction | None = None,
        session_class: type[SessionT] | None = None,
        session_options: Mapping[str, Any] | None = None,
        engine_options: Mapping[str, Any] | None = None,
        connect_args: Mapping[str, Any] | None = None,
    ) -> None:
        self._database = Database(
            None if settings is None else as_settings(settings),
            session_settings and to_call(session_settings, "session_settings"),
            credentials and to_call(credentials, "credentials"),
            EngineOptions.check(engine_options, connect_args),
        )
        self._choose_sessions(session_class or AsyncSession, session_options)
        self.metadata = Base.metadata if metadata is None else metadata
        self.migrations = migrations
        self.transaction = TransactionManager(self)

    def _choose_sessions(
        self, session_class: type[AsyncSession], options: Mapping[str, Any] | None
    ) -> None:
        database = self._database
        options = checked("session_options", dict, options)
        database.new_session = session_factory(session_class, options)
        database.session_class = session_class
        if options or session_class is not AsyncSession:
            database.check_session = partial(check_session, database.new_session)

    def __copy__(self) -> Self:
        """Return the manager itself: a copy would not find its open scopes."""
        return self

    def __deepcopy__(self, memo: object) -> Self:
        """Return the manager itself: containers copy the arguments of their providers."""
        return self

    # Opening and closing

    def init(self, host: str | URL | DatabaseSettings) -> None:
        """Create the engine. Does no I/O.

        Args:
            host: Settings, or a URL.

        Raises:
            ConfigurationError: They can't work.
            AlreadyInitializedError: It is initialized already; `close()` it first.
        """
        self._database.init(as_settings(host))

    async def open(self) -> None:
        """Check that the database answers, within `connect_timeout` seconds.

        Raises:
            ConnectionFailedError: It does not. Nothing is left open.
            NotInitializedError: There are no settings.
        """
        await self._database.open()

    async def close(self) -> None:
        """Close all connections.

        Refuse new scopes, wait `drain_timeout` seconds for the open ones, roll back the
        rest, and dispose the engine. It does not wait for scopes that enclose this
        call, because they cannot end before it.

        Raises:
            NotInitializedError: It is not initialized.
            OwnershipError: It belongs to another event loop or process.
        """
        await self._database.close(enclosing=enclosing_scopes(self._database))

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.is_initialized:
            await self.close()

    @property
    def settings(self) -> DatabaseSettings:
        """The settings that it was initialized with. Raises `NotInitializedError`."""
        return self._database.settings

    @property
    def engine(self) -> AsyncEngine:
        """The `AsyncEngine` of the primary. Raises `NotInitializedError`."""
        return self._database.engine

    @property
    def is_initialized(self) -> bool:
        """Whether `init()` or `open()` was called, and `close()` was not since."""
        return self._database.is_initialized

    @property
    def is_open(self) -> bool:
        """Whether `open()` has succeeded, and `close()` was not called since."""
        return self._database.is_open

    def status(self) -> Status:
        """Return what is open, who holds the connections, and totals.

        The totals count since the manager was made, also over `close()`. Before `init()`
        and after `close()` nothing is open. Does no I/O.
        """
        return self._database.status()

    async def health(self, timeout: float = 2.0) -> Health:
        """Find out whether the manager can serve: whether the server answers.

        It sends one message, on a connection of the pool, and nothing if the manager is
        not open. It raises no error of the database, and is no transaction.

        Args:
            timeout: Seconds for a connection to become free, and for the answer.
        """
        return await check_health(self._database, timeout)

    # Use

    def session(self) -> AbstractAsyncContextManager[SessionT]:
        """Open a new `AsyncSession`, which is the current one inside the block.

        It commits nothing by itself, and is rolled back and closed at the block's end.
        Changes that were neither committed nor rolled back raise an
        `UncommittedChangesWarning`.

        Example:
            ```python
            async with manager.session() as session:
                session.add(Order(item="tea"))
                await session.commit()
            ```
        """
        return SessionBlock(self._database, calling_site())

    def connect(self) -> AbstractAsyncContextManager[AsyncConnection]:
        """Open an `AsyncConnection` in a transaction.

        The transaction commits if the block ends well, and otherwise rolls back.
        Leaving the block raises `UnexpectedRollbackError` if a statement had failed and
        its error was caught, and `CommitOutcomeUnknownError`.
        """
        return connection_block(self._database, calling_site())

    # Tables

    async def migrate(
        self,
        revision: str = "heads",
        *,
        lock_timeout: float | None = 5.0,
        timeout: float | None = None,
    ) -> MigrationState:
        """Run the migrations that the database lacks, with Alembic.

        Processes that start at once take turns: one migrates, the others wait for it. A
        database that is up to date, or ahead of this build, stays as it is; the latter
        is logged as a warning. If it is cancelled, or its process killed, what had not
        ended is rolled back.

        Args:
            revision: The revision to reach. A database that is past it stays as it is.
            lock_timeout: Seconds that a statement may wait for a lock that another
                transaction holds, on PostgreSQL; meanwhile all other statements on that
                table wait behind it. None: for as long as it takes.
            timeout: Seconds for all of it, the wait for other processes included; None:
                for as long as it takes.

        Returns:
            How far the database was before. Its `pending` are what this call has run.

        Raises:
            MigrationError: Alembic refuses, foreign keys are broken on SQLite, or it was
                not done within `timeout`.
            ConfigurationError: There are no migrations, their `env.py` does not call
                `run_migrations()`, or `migrations_url` is missing beside `pooler`.
            ImportError: `sessionwire[alembic]` is not installed.
        """
        from ._migrations import upgrade  # Alembic is an extra.

        scripts = upgrade.scripts_of(self.migrations, self.metadata)
        return await upgrade.migrate(
            self._database, scripts, revision, lock_timeout=lock_timeout, timeout=timeout
        )

    async def migration_state(self) -> MigrationState:
        """Return which migrations the database has and lacks. Changes nothing.

        Raises:
            ConfigurationError: As `migrate()`.
            ImportError: `sessionwire[alembic]` is not installed.
        """
        from ._migrations import upgrade

        return await upgrade.look(
            self._database, upgrade.scripts_of(self.migrations, self.metadata)
        )

    async def create_all(self, connection: AsyncConnection) -> None:
        """Create the missing tables of `metadata`.

        On PostgreSQL, processes that start at once take turns: an advisory lock is held
        until the transaction ends.
        """
        await _lock_schema(connection)
        await connection.run_sync(self.metadata.create_all)

    async def drop_all(self, connection: AsyncConnection) -> None:
        """Drop the tables of `metadata`, one process at a time like `create_all()`."""
        await _lock_schema(connection)
        await connection.run_sync(self.metadata.drop_all)


async def require_migrations(manager: DatabaseSessionManager[Any]) -> None:
    """Raise `MigrationsPendingError` if the database is behind this build."""
    from ._migrations import upgrade

    scripts = upgrade.scripts_of(manager.migrations, manager.metadata)
    await upgrade.require(database_of(manager), scripts)


async def _lock_schema(connection: AsyncConnection) -> None:
    if connection.dialect.name == "postgresql":
        await connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": SCHEMA_LOCK})


sessionmanager = DatabaseSessionManager()
