"""One database at runtime: its settings, engines, event loop and open units."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from time import monotonic
from typing import Any, Self

from sqlalchemy import Connection, make_url
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from sessionwire._config.url import whereabouts
from sessionwire._log_events import BLOCK_CUT_OFF, DRAIN_BEGINS, SLOW_BLOCK
from sessionwire._shield import run_shielded
from sessionwire.credentials import CredentialsFunction
from sessionwire.embedded import run_in_thread
from sessionwire.errors import (
    AlreadyInitializedError,
    ConfigurationError,
    ConnectionFailedError,
    NotInitializedError,
    OwnershipError,
)
from sessionwire.health import Health
from sessionwire.settings import DatabaseSettings
from sessionwire.status import PoolStatus, Status

from .begin_hooks import BeginHooks
from .call_sites import CallSite, line_of
from .connect_hooks import ConnectHooks
from .credential_source import CredentialsError
from .engine_options import EngineOptions
from .engines import DatabaseEngines
from .holders import Unit
from .observer import Observer
from .options import CALL_SITE, CONNECTION_OPTIONS, WITHOUT_HOOKS, ConnectionOptions
from .poolers import remedy_for
from .totals import Totals
from .transaction_settings import SettingsSource, TransactionSettings
from .waiting import Waiting

NOT_INITIALIZED_HINT = (
    "call init(url) or await open() first, or start the container with Lifespan; "
    "after close() open it anew"
)
NOT_OPENED = "the manager was not opened: call open(), or start the container with Lifespan"


class Database:
    """The engines of one manager, and the units that are open on them.

    It belongs to the event loop and process in which it is first used, until it or that
    loop is closed.
    """

    session_class: type[AsyncSession] = AsyncSession
    new_session: Callable[[AsyncEngine], AsyncSession]
    observer: Observer | None = None
    # Raises `ConfigurationError` if no such session can be made.
    check_session: Callable[[AsyncEngine], None] | None = None

    def __init__(
        self,
        settings: DatabaseSettings | None,
        session_settings: SettingsSource | None = None,
        credentials: CredentialsFunction | None = None,
        options: EngineOptions | None = None,
    ) -> None:
        self._transaction_settings = TransactionSettings(session_settings)
        self.begin_hooks = BeginHooks(self._transaction_settings)
        self.connect_hooks = ConnectHooks()
        self.is_open = False  # the database has answered
        self.why_not_open = NOT_OPENED  # a sentence for `health()`
        # None until they are given; the properties below raise then.
        self.constructor_settings = self.given_settings = settings
        self.current_engines: DatabaseEngines | None = None
        self.totals = Totals()
        self.slow_block: float | None = None  # seconds, of the settings
        self._open_units: set[Unit] = set()
        self.make_engines: Callable[[DatabaseSettings], DatabaseEngines] = partial(
            DatabaseEngines,
            begin_hooks=self.begin_hooks,
            connect_hooks=self.connect_hooks,
            units=self._open_units,
            totals=self.totals,
            credentials=credentials,
            options=options or EngineOptions(),
        )
        self._is_closing = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._unit_released: asyncio.Event | None = None

    def __deepcopy__(self, memo: object) -> Self:
        """Return the database itself: containers copy the arguments of providers."""
        return self

    # State

    @property
    def settings(self) -> DatabaseSettings:
        """The settings of `init()`, or of the constructor.

        Raises `NotInitializedError` if there are none.
        """
        if self.given_settings is None:
            raise NotInitializedError(NOT_INITIALIZED_HINT)
        return self.given_settings

    @property
    def is_initialized(self) -> bool:
        return self.current_engines is not None

    @property
    def engines(self) -> DatabaseEngines:
        """Raises `NotInitializedError`."""
        if self.current_engines is None:
            raise NotInitializedError(NOT_INITIALIZED_HINT)
        return self.current_engines

    @property
    def engine(self) -> AsyncEngine:
        """The engine for users. Raises `NotInitializedError`."""
        if self._is_abandoned:
            self._abandon()
        return self.engines.primary

    @property
    def engine_for_reference(self) -> AsyncEngine:
        """The engine, even before `init()`: for code that asks for the dialect."""
        return (self.current_engines or self.make_engines(self.settings)).primary

    @property
    def is_sqlite(self) -> bool:
        return self.engines.is_sqlite

    def sets_up_transactions(self, options: ConnectionOptions) -> bool:
        """Tell whether a statement needs a transaction that is set up before it.

        Hooks need one, and so do settings, unless they are sent ahead of the statement.
        """
        has_settings = (
            bool(options.settings)
            or self._transaction_settings.source is not None
            or self.engines.sets_up_transactions
        )
        needs_transaction = bool(self.begin_hooks) or (
            has_settings and not (self.engines.sends_ahead or self.is_sqlite)
        )
        return needs_transaction and WITHOUT_HOOKS not in dict(options.execution_options)

    def set_up_transaction(
        self, connection: Connection, options: ConnectionOptions, call_site: CallSite | None
    ) -> None:
        """Give a transaction that has begun its settings, and run the hooks.

        If that fails, the connection is invalidated: nothing may be sent without them.
        """
        engines = self.engines
        attributes = connection.__dict__
        attributes[CONNECTION_OPTIONS], attributes[CALL_SITE] = options, call_site
        try:
            settings: Mapping[str, str] = {}
            has_settings = self._transaction_settings.source is not None or options.settings
            if has_settings and not options.transaction_per_statement:
                settings = self._transaction_settings.ask(options)
            engines.set_up(connection, options, settings=settings)
            if settings and not (options.autocommit and engines.sends_ahead):
                self._transaction_settings.apply(connection, settings)
            if self.begin_hooks and not options.autocommit:
                self.begin_hooks.run_if_due(connection)
        except BaseException:
            connection.invalidate()
            raise

    @property
    def open_units(self) -> frozenset[Unit]:
        return frozenset(self._open_units)

    @property
    def cleanup_tasks(self) -> frozenset[asyncio.Future[Any]]:
        """The background tasks that close aborted connections."""
        return (
            frozenset()
            if self.current_engines is None
            else frozenset(self.current_engines.cleanup_tasks)
        )

    @property
    def name(self) -> str:
        """Where it is, for messages. No password is in it."""
        return whereabouts(make_url(self.settings.url))

    def status(self) -> Status:
        """Return what is open, who holds the connections, and the totals. Does no I/O."""
        if self._is_abandoned:
            self._abandon()
        engines, totals = self.current_engines, self.totals
        return Status(
            name="" if self.given_settings is None else self.name,
            is_open=self.is_open,
            is_closing=self._is_closing,
            open_scopes=len(self._open_units),
            pool=PoolStatus() if engines is None else engines.pool.status_now(),
            transactions=totals.transactions,
            retries=dict(totals.retries),
            connections=totals.connections,
            holders=() if engines is None else engines.holders.list_all(),
            blocks=() if engines is None else engines.list_blocks(),
            slow_statements=tuple(totals.slow_statements),
        )

    def find_defect(self) -> Health | None:
        """Tell why it can't serve, as far as that is known without asking the server."""
        if self._is_abandoned:
            self._abandon()
        if self._loop is not None and self._loop is not running_loop():
            reason = "the manager belongs to another event loop, which is still open"
            return Health(is_live=False, is_ready=False, reason=reason)
        if self._is_closing:
            count = len(self._open_units)
            reason = f"the manager is closing, and waits for {count} open block(s)"
        elif not self.is_open:
            reason = self.why_not_open
        else:
            return None
        return Health(is_live=True, is_ready=False, reason=reason)

    def observe(self, observer: Observer | None) -> None:
        """Tell an observer what happens from now on, or nobody."""
        self.observer = self.totals.observer = observer
        if self.current_engines is not None:
            self.current_engines.tell_observer()

    # Opening and closing

    def init(self, settings: DatabaseSettings) -> None:
        """Create the engines.

        Does no I/O. Raises `ConfigurationError`, `AlreadyInitializedError`.
        """
        if self._is_abandoned:
            self._abandon()
            self.current_engines = None
        if self.current_engines is not None:
            raise AlreadyInitializedError(
                "close() it first, or make another manager for another database"
            )
        engines = self.make_engines(settings)
        if self.check_session is not None:
            self.check_session(engines.primary)
        self.given_settings, self.current_engines = settings, engines
        self.slow_block = settings.slow_block

    async def open(self) -> None:
        """Check that the database answers. Leaves nothing open if it does not.

        Raises:
            ConnectionFailedError: It did not answer within `connect_timeout`.
            NotInitializedError: There are no settings.
        """
        if self.current_engines is None and self.given_settings is None:
            raise NotInitializedError("give it settings, or call init(url) before open()")
        self.check_loop()
        async with self._lifecycle_lock:
            if self.is_open:
                return
            created_here = self.current_engines is None
            if created_here:
                self.init(self.constructor_settings or self.settings)
            engines = self.engines
            self.why_not_open = "the manager is being opened"
            try:
                await self._check_connection(engines)
                self.is_open = True
            except BaseException as error:
                self.why_not_open = f"open() has failed: {str(error) or type(error).__name__}"
                await self._dispose(engines, reset=created_here)
                raise

    async def close(self, *, enclosing: Collection[Unit]) -> None:
        """Refuse new units, wait for open ones, abort the rest, dispose the engines.

        Args:
            enclosing: The units that enclose this call. They cannot end before it, so
                it does not wait for them.
        """
        self.check_loop()
        engines = self.engines
        async with self._lifecycle_lock:
            if engines is not self.current_engines:
                return  # another task has closed it meanwhile
            self._is_closing = True
            self.why_not_open = "the manager was closed"
            try:
                await self._drain(self._open_units.difference(enclosing))
            finally:
                for block in engines.list_blocks():
                    BLOCK_CUT_OFF.log(block=block, **asdict(block))
                engines.refuse_checkouts()
                for unit in self._open_units:
                    unit.abort()
                await self._dispose(engines, reset=True)

    async def _check_connection(self, engines: DatabaseEngines) -> None:
        if engines.server:
            await run_in_thread(engines.server.start)
        waiting = Waiting(self.settings)
        while True:
            timeout = waiting.timeout
            try:
                return await self._connect_once(engines, timeout)
            except ConfigurationError:
                raise
            except Exception as error:
                failure = f"{self.name}: {explain(error, timeout)}"
                if not waiting.goes_on(error):
                    after = f"; waited {waiting.waited:.1f} s for it" if waiting.has_waited else ""
                    raise ConnectionFailedError(f"could not open {failure}{after}") from error
            self.why_not_open = f"the manager waits for the database: {failure}"
            await waiting.pause(failure)

    async def _connect_once(self, engines: DatabaseEngines, timeout: float) -> None:
        engine = engines.primary.execution_options(**{WITHOUT_HOOKS: True})
        async with asyncio.timeout(timeout), engine.connect() as connection:
            await engines.check_connection(connection)

    async def _drain(self, units: set[Unit]) -> None:
        """Wait for the units, up to `drain_timeout`."""
        timeout = self.settings.drain_timeout
        if units:
            DRAIN_BEGINS.log(blocks=len(units), timeout=timeout)
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                while units & self._open_units:
                    self._unit_released = asyncio.Event()
                    await self._unit_released.wait()

    async def _dispose(self, engines: DatabaseEngines, *, reset: bool) -> None:
        """Close all connections, even those in use.

        Connections that do not close in time are abandoned.
        """
        timeout = self.settings.rollback_timeout
        try:
            if self._open_units or engines.holders:
                with suppress(TimeoutError):
                    await run_shielded(engines.abort_all(), timeout)
            with suppress(TimeoutError):
                await run_shielded(engines.dispose(), timeout)
        finally:
            if reset:
                self.current_engines = None
                self.is_open = self._is_closing = False
                self._open_units.clear()
            if not self._open_units:
                self._loop = None  # nothing is left that is bound to it
            if engines.server:
                await run_in_thread(engines.server.stop)

    # Units

    def admit(self, *, is_enclosed: bool) -> DatabaseEngines:
        """Return the engines for one more unit in this event loop.

        Args:
            is_enclosed: The unit begins inside another one, which a closing database
                still serves.

        Raises:
            NotInitializedError: The database is not initialized, or is closing.
            OwnershipError: It belongs to another event loop or process.
        """
        self.check_loop()
        engines = self.engines
        if self._is_closing and not is_enclosed:
            raise NotInitializedError("the manager is closing and accepts no new sessions")
        return engines

    def add(self, unit: Unit) -> None:
        self._open_units.add(unit)

    def release(self, unit: Unit) -> None:
        """Forget a unit that has ended and released its connection."""
        self._open_units.discard(unit)
        if self.slow_block is not None:
            self._log_if_slow(unit, self.slow_block)
        if self._unit_released is not None:
            self._unit_released.set()

    def _log_if_slow(self, unit: Unit, limit: float) -> None:
        duration = monotonic() - unit.opened_at
        if duration > limit:
            SLOW_BLOCK.log(duration=duration, call_site=line_of(unit.call_site))

    def has_unit_of_finished_task(self) -> bool:
        return any(unit.task is not None and unit.task.done() for unit in self._open_units)

    def abort_connection(self, connection: Connection) -> None:
        """Close it in the background, and cancel the statement that a task left running on it."""
        self.engines.abort(connection.connection.dbapi_connection)

    # Ownership

    def check_loop(self) -> None:
        """Let the running event loop own the database if no open loop owns it.

        Raises:
            OwnershipError: Another loop or process owns it.
        """
        loop = running_loop()
        if self._loop is not None and self._loop is loop:
            return
        with _ownership_lock:
            if self._is_abandoned and loop is not None:
                self._abandon()
            if self._loop is not None:
                raise self.ownership_error()
            self._loop, self._process, self._lifecycle_lock = loop, os.getpid(), asyncio.Lock()

    @property
    def _is_abandoned(self) -> bool:
        """Whether its loop is closed, or this process was forked since.

        Nobody can use or close the open units then.
        """
        return self._loop is not None and (self._loop.is_closed() or self._process != os.getpid())

    def _abandon(self) -> None:
        """Drop what belongs to that loop or process, without a word to the server."""
        is_forked = self._process != os.getpid()
        if self.current_engines is not None:
            self.current_engines.abandon(is_forked=is_forked)
        for unit in self._open_units:
            unit.abort()
        if self._is_closing:  # and will not get further
            self.current_engines = None
        self._open_units.clear()
        self.is_open = self._is_closing = False
        self.why_not_open = (
            "the manager was opened in the process that this one was forked from"
            if is_forked
            else "the manager was opened in an event loop that is closed"
        ) + ": call open() in this one"
        self._unit_released = self._loop = None

    def ownership_error(self) -> OwnershipError:
        is_forked = self._process != os.getpid()
        error = OwnershipError(
            "this manager belongs to "
            + (
                "the process that this one was forked from"
                if is_forked
                else "another event loop, which is still open"
            )
            + ": its connections cannot be shared. close() it there first, "
            "or make a manager for each"
        )
        if not is_forked:
            error.add_note(
                "In an async test, send requests with "
                "httpx.AsyncClient(transport=ASGITransport(app)): a TestClient runs the "
                "application in another event loop."
            )
        return error


def explain(error: BaseException, timeout: float) -> str:
    """Return the first cause of an attempt that failed."""
    if isinstance(error, TimeoutError):
        return f"TimeoutError: no answer within {timeout:.3g} s"
    while error.__cause__ is not None and not isinstance(error, CredentialsError):
        error = error.__cause__
    remedy = remedy_for(error)
    said = " ".join(str(error).split())  # psycopg's has several lines.
    return f"{type(error).__name__}: {said}{remedy and f'; {remedy}'}"


_ownership_lock = threading.Lock()  # two threads may take a database for their loops at once


# Returns None if there is none, as for a coroutine that goes on in a forked process.
running_loop: Callable[[], asyncio.AbstractEventLoop | None] = asyncio._get_running_loop  # pyright: ignore[reportPrivateUsage]


def database_of(manager: object) -> Database:
    """Return the internal database of a `DatabaseSessionManager` or a `TransactionManager`."""
    database: Database = vars(manager)["_database"]
    return database
