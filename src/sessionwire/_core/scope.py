"""One session: a block opens and closes it, one operation at a time uses it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from time import monotonic
from types import FrameType
from typing import Any

from greenlet import getcurrent
from sqlalchemy import Connection
from sqlalchemy.exc import PendingRollbackError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from sqlalchemy.util import greenlet_spawn

from sessionwire._database.call_sites import CallSite
from sessionwire._database.completion import finish_commit, finish_rollback
from sessionwire._database.failed_statements import failures_of
from sessionwire._database.observer import Observer, observed_on
from sessionwire._database.options import ConnectionOptions
from sessionwire._database.runtime import Database, running_loop
from sessionwire._error_reports import closed_while_open_error, unexpected_rollback
from sessionwire.errors import NoSessionError, UnexpectedRollbackError

from .context import (
    Frame,
    current_frame,
    enclosing_frames,
    enclosing_scopes,
    innermost_open_frame,
)
from .generators import is_at_yield, iterated_generator
from .hooks import run_hooks
from .transaction import Hook, Transaction
from .usage_errors import concurrent_use_error, other_loop_error


class Scope:
    """An open session with the frames of the blocks that use it, the outermost first."""

    # Many may wait for a connection at once, and slots take less memory.
    __slots__ = (
        "_loop",
        "_operation_finished",
        "_process",
        "call_site",
        "change_count",
        "database",
        "due_hooks",
        "frames",
        "generator",
        "has_uncommitted_writes",
        "is_aborted",
        "is_bare",
        "is_uncounted",
        "last_operation_error",
        "opened_at",
        "operation",
        "options",
        "session",
        "task",
        "transaction",
        "transaction_connection",
    )

    def __init__(
        self,
        database: Database,
        session: AsyncSession,
        options: ConnectionOptions,
        call_site: CallSite | None,
    ) -> None:
        self.database = database
        self.session = session
        self.options = options
        self.call_site = call_site  # of the block that opened it
        self.opened_at = monotonic()
        self._loop = asyncio.get_running_loop()
        self.task = asyncio.current_task(self._loop)
        self.frames: list[Frame] = []
        self.transaction: Transaction | None = None  # the innermost: a savepoint, if one is open
        self.transaction_connection: Connection | None = None  # once the transaction has begun
        self.last_operation_error: Exception | None = None
        self.has_uncommitted_writes = False
        self.is_bare = False  # opened by session(), whose commits are the caller's
        self.is_uncounted = False  # It is bare, and the end of its transaction will be counted.
        # Of such a commit, to be called once no operation is running.
        self.due_hooks: tuple[Hook, ...] = ()
        self.change_count = 0  # of writes, and of joined blocks that may have written
        # The generator that opened this scope inside another block, and is iterated over.
        self.generator: FrameType | None = None
        self.is_aborted = False
        self._process = os.getpid()
        self.operation: object = None  # the greenlet of the running operation
        self._operation_finished: asyncio.Future[None] | None = None

    # Opening and closing

    @classmethod
    def open(
        cls,
        database: Database,
        options: ConnectionOptions,
        enclosing: Scope | None,
        call_site: CallSite | None,
    ) -> Scope:
        """Open a scope with a session of its own.

        Args:
            database: The database.
            options: The options of its connection.
            enclosing: The scope around it, which a closing database still serves.
            call_site: Where its block was opened.

        Raises:
            NotInitializedError: The database is not initialized, or is closing.
            OwnershipError: It belongs to another event loop or process.
        """
        engines = database.admit(is_enclosed=enclosing is not None)
        session = database.new_session(engines.engine_for(options))
        scope = cls(database, session, options, call_site)
        guarded_session: Any = session.sync_session
        guarded_session.scope = scope
        database.add(scope)
        return scope

    async def close(self, error: BaseException | None) -> None:
        """Roll back what was not committed, and release the connection.

        If nothing is rolled back, loaded objects stay readable. Otherwise they return
        to their previous state, so that a retry can use them.

        Args:
            error: The error of the block.
        """
        self.end_frames()
        rolls_back = self.has_uncommitted_writes and not self.options.autocommit
        is_closed = False
        try:
            if self.session.sync_session.in_transaction() and not self._releases_at_once:
                await self._roll_back_with(Session.rollback if rolls_back else Session.close, error)
                is_closed = not rolls_back
        finally:
            if not is_closed:
                Session.close(self.session.sync_session)
            self.database.release(self)
            if self.is_bare and self.database.observer is not None:
                self.tell_end(None)
            del self.session  # break the cycle between session and scope, so both are freed at once

    @property
    def _releases_at_once(self) -> bool:
        """Whether its session can be closed without waiting for anything."""
        return (
            self.options.autocommit
            and self.operation is None
            and not self.is_aborted
            and not self.session.sync_session.in_nested_transaction()
            and self.database.engines.releases_at_once(self.options)
        )

    def abort(self) -> None:
        """End it from outside: nothing of it commits any more."""
        self.is_aborted = True
        for frame in self.frames:
            frame.aborted_by = self.database
        self.end_frames()

    # Frames

    def push_frame(self) -> Frame:
        """Begin a block, inside which this scope is the current one.

        Raises `ConcurrentSessionError`.
        """
        if len(self.frames) > 1:
            self.require_innermost_frame()
        frame = Frame(self, innermost_open_frame())
        if frame.parent is not None and not self.frames:
            self.generator = iterated_generator()
        self.frames.append(frame)
        current_frame.set(frame)
        return frame

    def pop_frame(self, frame: Frame, *, including_nested: bool = False) -> None:
        """End a block; with `including_nested`, also the blocks inside it.

        Ending the outermost block ends the scope: it is no longer found, and its
        session refuses use.
        """
        if frame in self.frames:
            position = self.frames.index(frame)
            until = len(self.frames) if including_nested or position == 0 else position + 1
            for ended in self.frames[position:until]:
                ended.scope = None
            del self.frames[position:until]
            if not self.frames:
                self.generator = None
        if current_frame.get() is frame:
            current_frame.set(frame.parent)  # which is skipped if it has ended

    def end_frames(self) -> None:
        if self.frames:
            self.pop_frame(self.frames[0])

    def require_innermost_frame(self) -> None:
        """Check that the running code is inside the innermost block.

        If one block is open, any task may use the session; if several are, only code
        inside the innermost one.
        """
        if len(self.frames) > 1 and all(
            frame is not self.frames[-1] for frame, _ in enclosing_frames()
        ):
            raise concurrent_use_error("a block that joined it in another task is still open")

    @property
    def is_iterated_here(self) -> bool:
        """Whether running code in another transaction steps this scope's generator."""
        others = enclosing_scopes(self.database) - {self}
        return (
            self.generator is not None
            and is_at_yield(self.generator)
            and any(scope.transaction is not None for scope in others)
        )

    # The event loop

    def check_loop(self) -> bool:
        """Tell whether the running code may use the session.

        If its event loop is closed, or this is another process, the scope ends here.

        Raises:
            OwnershipError: Another event loop is running, as in a thread that has
                inherited a block.
        """
        loop = running_loop()
        if loop is self._loop:
            return True
        if loop is None or not self._is_abandoned:
            raise other_loop_error()
        self.abort()
        return False

    def ends_elsewhere(self, error: BaseException | None) -> bool:
        """Tell whether a block ends in a foreign event loop or process.

        Neither may touch its session. In another event loop the scope stays open.

        Args:
            error: The error of the block.

        Raises:
            OwnershipError: The block ended there without an error.
        """
        loop = running_loop()
        if loop is self._loop:
            return False
        if self._is_abandoned:
            self.abort()
            self.database.release(self)
        elif loop is None:
            return False
        if error is None:
            raise other_loop_error()
        return True

    @property
    def _is_abandoned(self) -> bool:
        return self._loop.is_closed() or self._process != os.getpid()

    # Operations: the session serves one at a time

    def begin_operation(self, operation: object) -> None:
        """Claim the session, until `end_operation()`.

        Raises:
            NoSessionError: The scope has ended.
            ConcurrentSessionError: Another operation is running, or a joined block is
                open in another task.
            OwnershipError: The session belongs to another event loop or process.
        """
        if running_loop() is not self._loop:
            self.check_loop()
        if not self.frames:
            raise NoSessionError(
                "the scope of this session has ended: it was cut off by close()"
                if self.is_aborted
                else "the scope of this session has ended: use the session inside its block, "
                "or inject a CurrentSession"
            )
        if self.operation is not None:
            raise concurrent_use_error("another operation is running on it")
        if len(self.frames) > 1:
            self.require_innermost_frame()
        self.operation = operation

    def end_operation(self) -> None:
        self.operation = None
        if self._operation_finished is not None:
            self._operation_finished.set_result(None)
            self._operation_finished = None

    async def run_exclusively(self, function: Callable[[Session], None]) -> None:
        """Run a `Session` method after any operation that another task left running.

        If cancelled while waiting, abort that operation together with its connection.
        """
        while self.operation is not None:
            self._operation_finished = (
                self._operation_finished or asyncio.get_running_loop().create_future()
            )
            try:
                await asyncio.shield(self._operation_finished)
            except asyncio.CancelledError:
                if self.transaction_connection is not None:
                    self.database.abort_connection(self.transaction_connection)
        self.operation = function

        def run_operation(session: Session) -> None:
            # Nested calls, such as the flush before a commit, belong to the operation.
            self.operation = getcurrent()
            function(session)

        try:
            await greenlet_spawn(run_operation, self.session.sync_session)
        finally:
            self.end_operation()

    def is_connecting(self, task: asyncio.Task[Any] | None, greenlet: object) -> bool:
        """Whether its operation takes a connection in this greenlet."""
        return self.operation is greenlet

    # State of the transaction

    @property
    def failure_count(self) -> int:
        """How many statements have failed, except in savepoints that were rolled back."""
        return len(self._failures)

    def failure_since(self, count: int) -> BaseException | None:
        """Return the first failure after so many, or the flush that has rolled back."""
        failures = self._failures
        if len(failures) > count:
            return failures[count]
        return None if self.session.sync_session.is_active else self.last_operation_error

    @property
    def _failures(self) -> Sequence[BaseException]:
        connection = self.transaction_connection
        return () if connection is None else failures_of(connection)

    @property
    def holds_write_lock(self) -> bool:
        """Whether its transaction writes, which on SQLite excludes all others."""
        writes_by_intent = self.transaction is not None and not self.options.read_only
        return writes_by_intent or (self.has_uncommitted_writes and not self.options.autocommit)

    @property
    def has_begun(self) -> bool:
        """Whether its transaction has begun in the database."""
        return (
            self.transaction_connection is not None and self.transaction_connection.in_transaction()
        )

    @property
    def has_pending_changes(self) -> bool:
        """Whether the session holds changes that no flush has sent."""
        session = self.session.sync_session
        return bool(session.new or session.deleted or any(map(session.is_modified, session.dirty)))

    def record_write(self) -> None:
        self.has_uncommitted_writes = True
        self.change_count += 1

    # Ends of the transaction

    async def flush(self) -> None:
        """Flush.

        Objects marked dirty but unchanged count too, because a commit would flush them.
        """
        session: Any = self.session.sync_session
        if not session._is_clean():  # It is cheaper than `new`, `dirty` and `deleted`.
            await self.session.flush()

    async def commit(self) -> None:
        """Send the COMMIT and wait for its answer, even if cancelled.

        The caller has flushed before.

        Raises:
            UnexpectedRollbackError: A failure had made the transaction roll back.
            CommitOutcomeUnknownError: The answer was lost.
        """
        if self.is_aborted:
            raise closed_while_open_error()
        if self.operation is not None:
            raise concurrent_use_error(
                "the block ended while another task still had an operation running on it"
            )
        if not self.session.sync_session.in_transaction():
            if self.transaction is not None and self.transaction.has_begun:
                raise UnexpectedRollbackError(
                    "the transaction was ended inside the block without going through the "
                    "session; its changes were not kept"
                )
            return
        work = self.run_exclusively(Session.commit)
        read_only = self.options.read_only and not self.has_uncommitted_writes
        try:
            await finish_commit(work, self.database.settings.commit_timeout, read_only=read_only)
        except PendingRollbackError as error:
            cause = self.last_operation_error or error
            raise unexpected_rollback(cause) from cause

    async def roll_back(self, error: BaseException | None) -> None:
        """Roll back after the block's `error`.

        If the rollback fails, the connection is discarded.
        """
        self.has_uncommitted_writes = False
        if self.session.sync_session.in_transaction():
            await self._roll_back_with(Session.rollback, error)

    async def _roll_back_with(
        self, method: Callable[[Session], None], error: BaseException | None
    ) -> None:
        def roll_back_or_invalidate(session: Session) -> None:
            try:
                (Session.invalidate if self.is_aborted else method)(session)
            except BaseException:
                Session.invalidate(session)
                raise

        work = self.run_exclusively(roll_back_or_invalidate)
        await finish_rollback(work, self.database.settings.rollback_timeout, error)

    def count_end(self, failure: BaseException | None, *, rolls_back: bool = False) -> None:
        """Count the end of a bare session's transaction once, see `Totals.count_end()`."""
        if self.is_uncounted and self.transaction is None:
            self.is_uncounted = False
            outcome = self.database.totals.count_end(failure, rolls_back=rolls_back)
            if self.database.observer is not None:
                self.tell_end(outcome, failure)

    # What an observer is told

    def tell_connection(self, observer: Observer, connection: Connection) -> None:
        """Tell it that a connection serves this scope from now on."""
        outermost = self.transaction
        while outermost is not None and outermost.parent is not None:
            outermost = outermost.parent
        observed = None if outermost is None else outermost.observed
        if self.is_bare and outermost is None:  # Its transaction has no block of its own.
            observed = observer.begin(self.call_site, self.options, is_block=False)
        observer.connect(connection, observed, self.call_site)

    def tell_end(self, outcome: str | None, failure: BaseException | None = None) -> None:
        """Tell it that the transaction of a bare session has ended."""
        observed = observed_on(self.transaction_connection)
        if self.is_bare and observed is not None:
            observed.end(outcome, failure)

    def end_savepoints(self, *, inside: Transaction) -> None:
        """End the open savepoints of a transaction: it is the innermost again."""
        while self.transaction is not None and self.transaction is not inside:
            self.transaction.has_ended = True
            self.transaction = self.transaction.parent

    # Hooks of a bare session

    def take_due_hooks(self) -> tuple[Hook, ...]:
        """Return those that a commit has made due, once."""
        due, self.due_hooks = self.due_hooks, ()
        return due

    async def run_due_hooks(self) -> None:
        """Call them as from outside this scope, like those of `transaction()`.

        Raises the first of their errors.
        """
        enclosing = current_frame.get()
        current_frame.set(self.frames[0].parent if self.frames else None)
        try:
            failure = await run_hooks(self.take_due_hooks(), None)
        finally:
            current_frame.set(enclosing)
        if failure is not None:
            raise failure
