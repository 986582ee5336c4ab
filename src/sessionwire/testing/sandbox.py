"""A sandbox: all that is done to a database happens on one connection, in one transaction that is rolled back.

The code under test has connections and transactions as ever: each of its transactions is a savepoint of the one, and
they take turns. One begins inside another only where its code runs inside that one's block.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from copy import copy
from functools import partial
from typing import Any, TypeVar, cast

from dependency_injector import containers
from sqlalchemy import AsyncAdaptedQueuePool, Connection, Engine, Pool, event, text
from sqlalchemy.ext.asyncio import AsyncEngine

from sessionwire._core.context import current_scope, enclosing_scopes
from sessionwire._database.begin_hooks import WITHOUT_HOOKS
from sessionwire._database.completion import close_or_invalidate, finish_rollback
from sessionwire._database.driver_errors import install_disconnect_listener
from sessionwire._database.engines import DatabaseEngines
from sessionwire._database.failed_statements import install_failure_listeners
from sessionwire._database.options import CONNECTION_OPTIONS, ConnectionOptions
from sessionwire._database.runtime import Database, database_of
from sessionwire._database.savepoints import install_cancellation_listener
from sessionwire._shield import run_shielded
from sessionwire.errors import SandboxError
from sessionwire.manager import DatabaseSessionManager

from ._borrowers import PARTY, Party, party_of
from ._interruptible import Interruptible
from ._leaks import GRACE, Watch
from ._shared_connection import SharedConnection
from .managers import managers_of

D = TypeVar("D", bound=DatabaseSessionManager | containers.Container)


@asynccontextmanager
async def sandbox(database: D, *, check_deferred: bool = False, patience: float = 5.0) -> AsyncGenerator[D]:
    """Within the block, all that runs on this manager, or on those of this container, is undone at its end.

    Commits, rollbacks, retries, hooks and every kind of scope mean what they mean elsewhere. Concurrent tasks take
    turns: from the first statement of its transaction to its end, a task has the connection. One that waits for a
    transaction in which nothing happens for `patience` seconds, or which cannot end before the one that waits, raises
    `SandboxError`, and where that is raised in a task that nobody awaits, it ends the block. Deferred constraints
    are checked at the commit if `check_deferred` is set, else never.

    Raises `SandboxError` at the end where a scope, a connection or a task was left open, and says where.
    """
    async with AsyncExitStack() as stack:
        for manager in managers_of(database):
            await stack.enter_async_context(_sandbox(manager, check_deferred, patience))
        yield database


@asynccontextmanager
async def _sandbox(manager: DatabaseSessionManager, check_deferred: bool, patience: float) -> AsyncGenerator[None]:
    if current_scope(database_of(manager)) is not None:
        raise SandboxError("a session is open around the sandbox, and what joins it would be kept: open it inside")
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(_opened(manager))
        timeout = manager.settings.rollback_timeout
        options = {CONNECTION_OPTIONS: ConnectionOptions(write_intent=True), WITHOUT_HOOKS: True}
        connection = await stack.enter_async_context(manager.engine.execution_options(**options).connect())
        await connection.execute(text("SELECT 1"))  # which begins, where a begin() waits for the first statement
        raw: Any = await connection.get_raw_connection()
        shared = SharedConnection(
            raw.dbapi_connection,
            connection.dialect,
            database_of(manager).begin_hooks,
            check_deferred=check_deferred,
            patience=patience,
        )
        watch = Watch(manager)
        database = database_of(manager)
        error: BaseException | None = None
        with database.substitute_engines(lambda real: SandboxEngines(database, real, shared, watch)):
            try:
                with Interruptible():
                    yield
            except BaseException as raised:
                error = raised
            left: list[str] = []
            try:
                try:
                    tidied = _tidy(watch, shared, asyncio.current_task(), timeout, left)
                    await run_shielded(tidied, GRACE + 3 * timeout)
                except TimeoutError:
                    left.append("what was left open did not end in time")
                finally:
                    shared.close()
                    await finish_rollback(close_or_invalidate(connection), timeout, error)
            except BaseException as trouble:  # a cancellation
                trouble.__cause__ = trouble.__cause__ or error
                error = trouble
            if error is not None:
                for each in left:
                    error.add_note(each)
                raise error
            if left:
                raise SandboxError("\n".join(left))


@asynccontextmanager
async def _opened(manager: DatabaseSessionManager) -> AsyncGenerator[None]:
    """Open it where it is not, and leave it as it was."""
    if manager.is_open:
        yield
        return
    settings = manager.settings if manager.is_initialized else None
    try:
        async with manager:
            yield
    finally:
        if settings is not None and not manager.is_initialized:
            manager.init(settings)


async def _tidy(
    watch: Watch, shared: SharedConnection, caller: asyncio.Task[Any] | None, timeout: float, left: list[str]
) -> None:
    """End what was begun in the sandbox and goes on. Adds to `left` where it was."""
    left += await watch.end_tasks(caller, shared.outlasting, timeout)
    left += watch.end_blocks()
    shared.end_all()
    await shared.ended()


class SandboxEngines(DatabaseEngines):
    """What the manager has for its engines: one that makes connections of nothing but turns."""

    def __init__(self, database: Database, real: DatabaseEngines, shared: SharedConnection, watch: Watch) -> None:
        self.server = None  # it is not ours to stop
        self.is_retired = False
        self._database = database
        self._shared = shared
        self.dialect: Any = real.dialect if isinstance(real, SandboxEngines) else real.primary.dialect
        self.primary = AsyncEngine(self._engine(real.primary.sync_engine))
        watch.over(self.primary.pool)
        for pool in real.pools:
            shared.guard(pool)

    def engine_for(self, options: ConnectionOptions) -> AsyncEngine:
        ours = {CONNECTION_OPTIONS: options, PARTY: self._party()}
        return self.primary.execution_options(**{**options.copy_execution_options(), **ours})

    def _engine(self, real: Engine) -> Engine:
        shared = self._shared
        dialect: Any = copy(self.dialect)
        for name in ("do_execute", "do_executemany", "do_execute_no_params"):
            setattr(dialect, name, partial(shared.do_execute, getattr(dialect, name)))
        for name in ("do_begin", "do_commit", "do_rollback"):
            setattr(dialect, name, getattr(shared, name))
        for name in ("set_isolation_level", "set_readonly", "set_deferrable"):
            setattr(dialect, name, _ignore)  # the one transaction has begun
        dialect.do_close = dialect.do_terminate = shared.end
        pool = self._database.settings.pool
        engine = Engine(
            AsyncAdaptedQueuePool(
                cast(Any, shared.connect),
                pool_size=pool.size,
                max_overflow=pool.max_overflow,
                timeout=pool.timeout,
                use_lifo=True,
                dialect=dialect,
            ),
            dialect,
            real.url,
        )
        event.listen(engine, "begin", self._begins)
        event.listen(engine, "checkout", shared.taken)
        install_disconnect_listener(engine)
        self._database.begin_hooks.install_listeners(engine)
        install_failure_listeners(engine)
        install_cancellation_listener(engine)
        return engine

    def _begins(self, connection: Connection) -> None:
        virtual: Any = connection.connection.dbapi_connection
        options = connection.get_execution_options()
        virtual.terms = options.get(CONNECTION_OPTIONS) or ConnectionOptions(
            autocommit=options.get("isolation_level") == "AUTOCOMMIT",
            read_only=options.get("postgresql_readonly", False),
        )
        virtual.party = options.get(PARTY) or self._party()

    def _party(self) -> Party:
        return Party(frozenset(party_of(scope) for scope in enclosing_scopes(self._database)))

    @property
    def pools(self) -> list[Pool]:
        return [self.primary.pool]

    def abort(self, dbapi_connection: Any) -> None:
        self._shared.end(dbapi_connection)

    def abandon(self, *, is_forked: bool) -> None:
        raise SandboxError("a sandbox lives and ends in the event loop and process in which it began")

    async def abort_all(self) -> None:
        self._shared.end_all()
        await self._shared.ended()

    async def dispose(self) -> None:
        await self.primary.dispose()
        await self._shared.ended()


def _ignore(*_: object) -> None: ...
