"""`DatabaseSessionManager`: the engine, the pool and the open scopes of one database, from open to close."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager, suppress
from functools import partial
from types import TracebackType
from typing import Any, Self, cast

from sqlalchemy import URL, Connection, Engine, MetaData, event, make_url, text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession

from ._config.url import whereabouts
from ._core.blocks import SessionBlock
from ._core.context import current_scope, running_loop, scopes_here
from ._core.generators import is_left_early, is_told_otherwise, left_early
from ._core.guarded_session import ScopedSession, writes
from ._core.scope import Scope, refuse_second_writer
from ._database.begin_hooks import WITHOUT_HOOKS, BeginHooks
from ._database.completion import finish_commit, finish_rollback
from ._database.engines import Engines
from ._database.failed_statements import failures
from ._database.options import Terms
from ._error_reports import cut_off, lost_after, name_cause
from ._shield import to_the_end
from .base import Base
from .errors import AlreadyInitializedError, ConnectionFailedError, NotInitializedError, OwnershipError
from .settings import DatabaseSettings, settings_of
from .transaction import TransactionManager

SCHEMA_LOCK = int.from_bytes(b"sessionw")  # the key of the advisory lock, 8315179226536832631
SERVER_TIMEOUT = 120.0  # seconds for an embedded server to start or stop


class DatabaseSessionManager:
    """One database: makes its engine, hands out sessions and transactions, and ends cleanly.

    The constructor does no I/O. `settings` are what `open()` opens with; `metadata` (default: `Base.metadata`) holds
    the tables of `create_all()`. A manager belongs to the event loop and process in which it is first used, until it
    or that loop is closed; elsewhere it raises `OwnershipError`. In a forked process it begins anew.
    """

    def __init__(
        self, settings: DatabaseSettings | str | URL | None = None, *, metadata: MetaData | None = None
    ) -> None:
        self.metadata = Base.metadata if metadata is None else metadata
        self.transaction = TransactionManager(self)
        self.begin_hooks = BeginHooks()
        self._given = None if settings is None else settings_of(settings)
        self._settings = self._given
        self._engines: Engines | None = None
        self._make_engines: Callable[[DatabaseSettings], Engines] = partial(Engines, begin_hooks=self.begin_hooks)
        self._proven = False  # that the database answers
        self._closing = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._open: set[Scope | AsyncConnection] = set()  # the latter of connect()
        self._drained: asyncio.Event | None = None

    def __copy__(self) -> Self:
        """Return the manager itself: a second one on the same database would not find the open scopes of the first."""
        return self

    def __deepcopy__(self, memo: object) -> Self:
        """Return the manager itself: containers copy the arguments of their providers."""
        return self

    # Opening and closing

    def init(self, host: str | URL | DatabaseSettings) -> None:
        """Make the engine and what makes sessions; no I/O. Raises `ConfigurationError`, `AlreadyInitializedError`."""
        if self._is_abandoned:
            self._abandon()
            self._engines = None
        if self._engines is not None:
            raise AlreadyInitializedError("close() it first, or make another manager for another database")
        self._settings = settings_of(host)
        self._engines = self._make_engines(self._settings)

    async def open(self) -> None:
        """Make sure that the database answers, within `connect_timeout` seconds.

        Raises `ConnectionFailedError` and leaves nothing open then; `NotInitializedError` where no settings are known.
        """
        if self._engines is None and self._settings is None:
            raise NotInitializedError("give it settings, or call init(url) before open()")
        self._check_loop()
        async with self._turn:
            if self._proven:
                return
            made_here = self._engines is None
            if made_here:
                self.init(self._given or self.settings)
            engines = self._initialized()
            try:
                await self._prove(engines)
                self._proven = True
            finally:
                if not self._proven:
                    await self._dispose(engines, forget=made_here)

    async def close(self) -> None:
        """Refuse new scopes, wait `drain_timeout` seconds for the open ones, cut off the rest, dispose the engine."""
        self._check_loop()
        engines = self._initialized()
        async with self._turn:
            if engines is not self._engines:
                return  # closed by another task meanwhile
            self._closing = True
            try:
                await self._drain()
            finally:
                engines.is_retired = True
                for left in self._open:
                    if isinstance(left, Scope):
                        left.cut()
                await self._dispose(engines, forget=True)

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._engines is not None:
            await self.close()

    async def _prove(self, engines: Engines) -> None:
        timeout = self.settings.connect_timeout
        if engines.server:
            await to_the_end(asyncio.to_thread(engines.server.start), SERVER_TIMEOUT)
        engine = engines.primary.execution_options(**{WITHOUT_HOOKS: True})
        try:
            async with asyncio.timeout(timeout), engine.connect() as connection:
                await connection.execute(text("SELECT 1"))
        except Exception as error:
            reason: BaseException = error
            while reason.__cause__ is not None:
                reason = reason.__cause__
            why = f"no answer within {timeout:g} s" if isinstance(error, TimeoutError) else str(reason)
            raise ConnectionFailedError(
                f"could not open {whereabouts(make_url(self.settings.url))}: {type(reason).__name__}: {why}"
            ) from error

    async def _drain(self) -> None:
        """Wait for the open scopes; not for those around this very call, which cannot end before it."""
        awaited = self._open - scopes_here(self)
        deadline = asyncio.get_running_loop().time() + self.settings.drain_timeout
        with suppress(TimeoutError):
            async with asyncio.timeout_at(deadline):
                while awaited & self._open:
                    self._drained = asyncio.Event()
                    await self._drained.wait()

    async def _dispose(self, engines: Engines, *, forget: bool) -> None:
        """Close all connections, those in use too; one that does not close in time is left to itself."""
        timeout = self.settings.rollback_timeout
        try:
            if self._open:
                with suppress(TimeoutError):
                    await to_the_end(engines.terminate(), timeout)
            with suppress(TimeoutError):
                await to_the_end(engines.dispose(), timeout)
        finally:
            if forget:
                self._engines = None
                self._proven = self._closing = False
                self._open = set()
            if not self._open:
                self._loop = None  # nothing is left that is bound to it
            if engines.server:
                await to_the_end(asyncio.to_thread(engines.server.stop), SERVER_TIMEOUT)

    # Use

    def session(self) -> AbstractAsyncContextManager[AsyncSession]:
        """A new `AsyncSession`, the current one inside the block. It commits nothing by itself.

        It is rolled back and closed at the block's end. Changes that were neither committed nor rolled back raise an
        `UncommittedChangesWarning`.
        """
        return SessionBlock(self)

    @asynccontextmanager
    async def connect(self) -> AsyncGenerator[AsyncConnection]:
        """An `AsyncConnection` in a transaction, which commits when the block ends well, and else rolls back."""
        engines = self._admit()
        refuse_second_writer(self)
        loop = self._loop
        pending = engines.on(Terms(writes=True)).connect()
        self._open.add(pending)
        error: BaseException | None = None
        written = False

        def note_write(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
            nonlocal written
            written = written or writes(statement)

        try:
            connection = await pending
            try:
                if engines.is_retired:
                    await connection.invalidate()  # it came out of a pool that nobody disposes any more
                    raise NotInitializedError("it was closed while connect() waited for a connection")
                transaction = await connection.begin()
                await connection.run_sync(self.begin_hooks.run_due)
                event.listen(connection.sync_connection, "after_cursor_execute", note_write)
                yield connection
                if running_loop() is not loop:
                    raise self._owned_elsewhere()
                if engines.is_retired:
                    raise cut_off()
                if failed := failures(connection.sync_connection):
                    raise lost_after(failed[0])
                await finish_commit(transaction.commit(), self.settings.commit_timeout)
            except GeneratorExit as left:
                error = left
                lost = left_early()
                if not (written and is_left_early(left)) or is_told_otherwise(lost):
                    raise
                error = lost
                raise lost from None
            except BaseException as raised:
                error = raised
                name_cause(raised, failures(connection.sync_connection))
                raise
            finally:
                if running_loop() is loop:  # else it is not this process's, or its loop is closed
                    await finish_rollback(give_back(connection), self.settings.rollback_timeout, error)
        finally:
            self.forget(pending)

    async def create_all(self, connection: AsyncConnection) -> None:
        """Create the missing tables of `metadata`.

        On PostgreSQL, processes that start at once take turns: an advisory lock is held until the transaction ends.
        """
        await _lock_schema(connection)
        await connection.run_sync(self.metadata.create_all)

    async def drop_all(self, connection: AsyncConnection) -> None:
        """Drop the tables of `metadata`, one process at a time like `create_all()`."""
        await _lock_schema(connection)
        await connection.run_sync(self.metadata.drop_all)

    @property
    def engine(self) -> AsyncEngine:
        """The `AsyncEngine` of the primary. Raises `NotInitializedError`."""
        if self._is_abandoned:
            self._abandon()
        return self._initialized().primary

    @property
    def is_initialized(self) -> bool:
        """Whether `init()` or `open()` was called, and `close()` was not since."""
        return self._engines is not None

    @property
    def is_open(self) -> bool:
        """Whether `open()` has found that the database answers, and `close()` was not called since."""
        return self._proven

    # For tests

    def owns(self, engine: Engine) -> bool:
        """Whether it leads to this manager's database, for those who listen to SQLAlchemy's events."""
        return self._engines is not None and self._engines.owns(engine)

    @contextmanager
    def opening_with(self, settings: DatabaseSettings) -> Generator[None]:
        """Let it open with these settings instead of its own."""
        own = self._given, self._settings
        self._given = self._settings = settings
        try:
            yield
        finally:
            self._given, self._settings = own

    @contextmanager
    def replaced_engines(self, make: Callable[[Engines], Engines]) -> Generator[None]:
        """Let the open manager work on what `make` gives for its engines, also after a `close()` and an `init()`."""
        real, make_real, settings = self._initialized(), self._make_engines, self._settings

        def make_anew(settings: DatabaseSettings) -> Engines:
            nonlocal real
            if real.is_retired:
                real = make_real(settings)
            return make(real)

        self._make_engines, self._engines = make_anew, make(real)
        try:
            yield
        finally:
            self._make_engines = make_real
            if not real.is_retired:
                self._engines, self._settings, self._proven = real, settings, True

    @property
    def in_use(self) -> frozenset[Scope | AsyncConnection]:
        """The scopes and connections that are open now."""
        return frozenset(self._open)

    @property
    def endings(self) -> frozenset[asyncio.Future[Any]]:
        """What it stops and undoes in the background."""
        return frozenset() if self._engines is None else frozenset(self._engines.endings)

    # For scopes: what `scope.Owner` asks for

    @property
    def settings(self) -> DatabaseSettings:
        """What it was initialized with. Raises `NotInitializedError`."""
        if self._settings is None:
            raise NotInitializedError(REMEDY)
        return self._settings

    @property
    def is_sqlite(self) -> bool:
        return self._initialized().is_sqlite

    @property
    def reads_in_transactions(self) -> bool:
        # what must hold at the begin of each transaction must hold for reads too
        return bool(self.begin_hooks) or not self.settings.read_only_connections

    @property
    def engine_for_reference(self) -> AsyncEngine:
        return (self._engines or Engines(self.settings)).primary

    def open_scope(self, terms: Terms) -> Scope:
        engine = self._admit().on(terms)
        session = AsyncSession(engine, sync_session_class=ScopedSession, expire_on_commit=False)
        scope = Scope(self, session, terms)
        cast(ScopedSession, session.sync_session).scope = scope
        self._open.add(scope)
        return scope

    def forget(self, left: Scope | AsyncConnection, /) -> None:
        self._open.discard(left)
        if self._drained is not None:
            self._drained.set()

    def end_connection(self, connection: Connection) -> None:
        self._initialized().end(connection.connection.dbapi_connection)

    def _admit(self) -> Engines:
        """The engines, for one more scope or connection here and now."""
        self._check_loop()
        engines = self._initialized()
        if self._closing and current_scope(self) is None:
            raise NotInitializedError("it is being closed: only what is open already is still served")
        return engines

    def _initialized(self) -> Engines:
        if self._engines is None:
            raise NotInitializedError(REMEDY)
        return self._engines

    # Ownership

    def _check_loop(self) -> None:
        """Let the first loop to use it own it; another one, once that is closed, or in a forked process."""
        loop = running_loop()
        if self._loop is not None and self._loop is loop:
            return
        with _taking:
            if self._is_abandoned and loop is not None:
                self._abandon()
            if self._loop is not None:
                raise self._owned_elsewhere()
            self._loop, self._process, self._turn = loop, os.getpid(), asyncio.Lock()

    @property
    def _is_abandoned(self) -> bool:
        """Whether nobody can use or close what it has open: its loop is closed, or this process was forked since."""
        return self._loop is not None and (self._loop.is_closed() or self._process != os.getpid())

    def _abandon(self) -> None:
        """Drop what is left of that loop, or is the other process's: without a word to the server from here."""
        if self._engines is not None:
            self._engines.abandon(is_forked=self._process != os.getpid())
        for left in self._open:
            if isinstance(left, Scope):
                left.cut()
        if self._closing:  # and will not get further
            self._engines = None
        self._open = set()
        self._proven = self._closing = False
        self._drained = self._loop = None

    def _owned_elsewhere(self) -> OwnershipError:
        is_forked = self._process != os.getpid()
        error = OwnershipError(
            "this manager belongs to "
            + ("the process that this one was forked from" if is_forked else "another event loop, which is still open")
            + ": its connections cannot be shared. close() it there first, or make a manager for each"
        )
        if not is_forked:
            error.add_note(
                "In an async test, send requests with httpx.AsyncClient(transport=ASGITransport(app)): a TestClient "
                "runs the application in another event loop."
            )
        return error


_taking = threading.Lock()  # by two threads whose loops are to own one manager
REMEDY = "call init(url) or await open() first, or start the container with Lifespan; after close() open it anew"


async def _lock_schema(connection: AsyncConnection) -> None:
    if connection.dialect.name == "postgresql":
        await connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": SCHEMA_LOCK})


async def give_back(connection: AsyncConnection) -> None:
    """Close, which rolls back what was not committed."""
    try:
        await connection.close()
    except BaseException:
        await connection.invalidate()
        raise


sessionmanager = DatabaseSessionManager()
