"""The engines of a manager in a sandbox, where all connections share one."""

from __future__ import annotations

import asyncio
from copy import copy
from functools import partial
from typing import Any, cast

from sqlalchemy import Connection, Engine, event
from sqlalchemy.ext.asyncio import AsyncEngine

from sessionwire._core.context import enclosing_scopes
from sessionwire._database.call_sites import line_of, running_line
from sessionwire._database.connection_pool import ConnectionPool
from sessionwire._database.driver_errors import install_disconnect_listener
from sessionwire._database.engines import DatabaseEngines
from sessionwire._database.failed_statements import install_failure_listener
from sessionwire._database.holders import Holders
from sessionwire._database.options import CONNECTION_OPTIONS, ConnectionOptions
from sessionwire._database.runtime import Database
from sessionwire._database.savepoints import install_cancellation_listener
from sessionwire._database.slow_statements import watch_statements
from sessionwire.errors import SandboxError

from ._leaks import LeakDetector
from ._shared_connection import SharedConnection


class SandboxEngines(DatabaseEngines):
    """One engine, whose connections take turns on the shared connection."""

    def __init__(
        self,
        database: Database,
        real: DatabaseEngines,
        shared: SharedConnection,
        detector: LeakDetector,
    ) -> None:
        self.server = None  # closing the manager must not stop the server
        self.is_closed = False
        self.cleanup_tasks = shared.cleanup_tasks
        self.units, self.totals = real.units, real.totals
        self._database = database
        self._settings = database.settings
        self._shared = shared
        self.dialect: Any = (
            real.dialect if isinstance(real, SandboxEngines) else real.primary.dialect
        )
        self.primary = AsyncEngine(self._build_sandbox_engine(real.primary.sync_engine))
        warn_after = database.settings.pool.warn_held_after
        self.holders = Holders(self.units, self.totals, warn_after, _last_statement)
        self.pool.watch(self.holders, self.totals)
        self.tell_observer()
        self.is_sqlite = self.dialect.name == "sqlite"
        self.sends_ahead = self.sets_up_transactions = False
        self.refuses_writes_in_autocommit = True
        detector.watch_pool(self.primary.pool)
        shared.block_checkouts(real.primary.pool)

    def engine_for(self, options: ConnectionOptions) -> AsyncEngine:
        return self.primary.execution_options(
            **{**options.copy_execution_options(), CONNECTION_OPTIONS: options}
        )

    def _build_sandbox_engine(self, real: Engine) -> Engine:
        shared = self._shared
        dialect: Any = copy(self.dialect)
        dialect.__dict__.pop("dispatch", None)  # The copy's listeners are its own.
        for name in ("do_execute", "do_executemany", "do_execute_no_params"):
            setattr(dialect, name, partial(shared.do_execute, getattr(dialect, name)))
        for name in ("do_begin", "do_commit", "do_rollback"):
            setattr(dialect, name, getattr(shared, name))
        # the transaction that all share has begun, so they can no longer be set
        for name in ("set_isolation_level", "set_readonly", "set_deferrable"):
            setattr(dialect, name, _do_nothing)
        dialect.do_ping = _do_nothing  # It would have to wait for its turn.
        dialect.do_close = dialect.do_terminate = shared.abort
        settings = self._database.settings.pool
        pool = ConnectionPool(
            cast(Any, shared.connect),
            pool_size=settings.size,
            max_overflow=settings.max_overflow,
            timeout=settings.timeout,
            use_lifo=True,
            dialect=dialect,
        )
        engine = Engine(
            pool,
            dialect,
            real.url,
            hide_parameters=real.hide_parameters,
            execution_options=real.get_execution_options(),
        )
        event.listen(engine, "begin", self._on_begin)
        event.listen(engine, "checkout", shared.on_checkout)
        event.listen(engine, "checkin", shared.on_checkin)
        install_disconnect_listener(engine)
        self._database.begin_hooks.watch(engine)
        install_failure_listener(engine)
        install_cancellation_listener(engine)
        watch_statements(engine, self._database.settings, self.totals)
        return engine

    def _on_begin(self, connection: Connection) -> None:
        virtual: Any = connection.connection.dbapi_connection
        options = connection.get_execution_options()
        virtual.options = options.get(CONNECTION_OPTIONS) or ConnectionOptions(
            autocommit=options.get("isolation_level") == "AUTOCOMMIT",
            read_only=options.get("postgresql_readonly", False),
        )
        unit = virtual.unit = self.holders.unit_of(virtual)
        virtual.enclosing = enclosing_scopes(self._database)
        virtual.task = asyncio.current_task() if unit is None else unit.task
        virtual.line = running_line() if unit is None else line_of(unit.call_site)

    def set_up(self, *_: object, **__: object) -> None:
        """Leave it to `_on_begin()`."""

    def abort(self, dbapi_connection: Any) -> None:
        self._shared.abort(dbapi_connection)

    def abandon(self, *, is_forked: bool) -> None:
        raise SandboxError("a sandbox must begin and end in one event loop of one process")

    async def abort_all(self) -> None:
        self._shared.abort_all()
        await self._shared.wait_for_cleanup()

    async def dispose(self) -> None:
        self.holders.stop()
        await self.primary.dispose()
        await self._shared.wait_for_cleanup()


def _last_statement(virtual: Any) -> str | None:
    return cast("str | None", virtual.last_statement)


def _do_nothing(*_: object) -> None: ...
