"""One open session: which blocks use it, who may use it now, its transaction, and how it ends."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from types import FrameType
from typing import Protocol

from greenlet import getcurrent
from sqlalchemy import Connection
from sqlalchemy.exc import PendingRollbackError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession
from sqlalchemy.orm import Session

from sessionwire._database.begin_hooks import BeginHooks
from sessionwire._database.completion import finish_commit, finish_rollback
from sessionwire._database.failed_statements import failures
from sessionwire._database.options import Terms
from sessionwire._error_reports import cut_off, lost_after
from sessionwire.errors import (
    ConcurrentSessionError,
    IncompatibleTransactionError,
    NoSessionError,
    OwnershipError,
    ScopeError,
    UnexpectedRollbackError,
)
from sessionwire.settings import DatabaseSettings

from .context import Block, innermost_open_frame, current_scope, innermost_block, open_blocks, running_loop, scopes_here
from .generators import is_at_yield, iterated_generator
from .hooks import run_hooks
from .transaction import Hook, Transaction


class Owner(Protocol):
    """What scopes, and those who open them, need of a manager."""

    begin_hooks: BeginHooks

    @property
    def settings(self) -> DatabaseSettings: ...

    @property
    def is_sqlite(self) -> bool: ...

    @property
    def in_use(self) -> frozenset[Scope | AsyncConnection]:
        """The scopes and connections that are open now."""
        ...

    @property
    def reads_in_transactions(self) -> bool:
        """Whether what only reads cannot go without a transaction here."""
        ...

    @property
    def engine_for_reference(self) -> AsyncEngine:
        """The engine, also of one that is not open yet. Raises `NotInitializedError` where no settings are known."""
        ...

    def open_scope(self, terms: Terms) -> Scope:
        """A new scope with a session of its own. Raises `NotInitializedError`, `OwnershipError`."""
        ...

    def forget(self, scope: Scope, /) -> None:
        """The scope has ended, and given back its connection."""
        ...

    def end_connection(self, connection: Connection) -> None:
        """Give it up, and with it what a task left running on it."""
        ...


def refuse_second_writer(owner: Owner) -> None:
    """Raises `IncompatibleTransactionError` on SQLite inside a transaction that writes, which would never let go."""
    if owner.is_sqlite and any(scope.is_writer for scope in scopes_here(owner)):
        raise second_writer()


def second_writer() -> IncompatibleTransactionError:
    return IncompatibleTransactionError(
        "SQLite has one writer at a time, and the transaction around this block is it: join it, take "
        "Propagation.NESTED, or do it after its end, with on_commit(), or in a task with detached()"
    )


def entered_twice() -> ScopeError:
    return ScopeError("a block is entered once: call transaction() or session() anew for each")


def require_scope(owner: Owner) -> Scope:
    """The innermost open scope. Raises `NoSessionError` where there is none."""
    scope = current_scope(owner)
    if scope is None:
        raise _no_session(owner)
    return scope


def _no_session(owner: Owner) -> NoSessionError:
    block = innermost_block.get()
    while block is not None and block.aborted is not owner:
        block = block.outer
    if block is not None:
        return NoSessionError("the session that was open here is gone: close() of the manager has rolled it back")
    if any(isinstance(unit, Scope) and unit.task is not None and unit.task.done() for unit in owner.in_use):
        return NoSessionError(
            "no session is found here, though one is open: its block was entered in another task, as "
            "asyncio.wait_for() does before Python 3.12. Write 'async with asyncio.timeout(…):' around it instead"
        )
    mix_up = "one of another database is, was the right one injected? " if any(open_blocks()) else ""
    error = NoSessionError(
        f"no session is open here: {mix_up}wrap the call in transaction(), @transactional or session()"
    )
    error.add_note(
        "What outlives the block around it opens session() inside itself: the generator of a streamed body, a "
        "background task. A request's transaction ends when its response begins."
    )
    return error


class Scope:
    """An open session, and the blocks that use it, the outermost first."""

    def __init__(self, owner: Owner, session: AsyncSession, terms: Terms) -> None:
        self.owner = owner
        self.session = session
        self.terms = terms
        self.task = asyncio.current_task()
        self.loop = asyncio.get_running_loop()
        self.process = os.getpid()
        self.blocks: list[Block] = []
        self.transaction: Transaction | None = None
        self.connection: Connection | None = None  # of the transaction, once it has begun
        self.last_error: Exception | None = None  # of an operation
        self.written = False  # since the last commit or rollback
        self.is_bare = False  # of session(): its commits are the caller's
        self.due_hooks: list[Hook] = []  # of its commits, to be called once no operation is running
        self.work = 0  # counts writes, and blocks that joined and may have written
        self.generator: FrameType | None = None  # which opened it inside another block, and is iterated over
        self.cut_off = False  # by the manager's close(): the connection is gone
        self._operation: object = None  # the greenlet of the one that is running
        self._idle: asyncio.Future[None] | None = None

    # Blocks

    def enter(self) -> Block:
        """Open a block, inside which this scope is the current one. Raises `ConcurrentSessionError`."""
        self.check_caller()
        block = Block(self, innermost_open_frame())
        if block.outer is not None and not self.blocks:
            self.generator = iterated_generator()
        self.blocks.append(block)
        innermost_block.set(block)
        return block

    def leave(self, block: Block, *, with_inner: bool = False) -> None:
        """End a block, and with it those inside where they cannot do without it.

        With its outermost one the scope ends: nobody finds it any more, nobody may use its session.
        """
        if block in self.blocks:
            position = self.blocks.index(block)
            until = len(self.blocks) if with_inner or position == 0 else position + 1
            for ended in self.blocks[position:until]:
                ended.scope = None
            del self.blocks[position:until]
            if not self.blocks:
                self.generator = None
        if innermost_block.get() is block:
            innermost_block.set(innermost_open_frame())

    def end(self) -> None:
        """End all blocks."""
        if self.blocks:
            self.leave(self.blocks[0])

    def cut(self) -> None:
        """End it from outside: nothing of it commits any more."""
        self.cut_off = True
        for block in self.blocks:
            block.aborted = self.owner
        self.end()

    def check_loop(self) -> bool:
        """Whether the running code may use it; else it is of a closed event loop or another process, and ends here.

        Raises `OwnershipError` in another event loop, as in that of a thread that has inherited a block.
        """
        loop = running_loop()
        if loop is self.loop:
            return True
        if loop is None or not self._is_abandoned:
            raise _elsewhere()
        self.cut()
        return False

    def leave_elsewhere(self, error: BaseException | None) -> bool:
        """Whether a block ends where its session may not be touched. Raises `OwnershipError` if it ends well there.

        In another event loop it stays open.
        """
        loop = running_loop()
        if loop is self.loop:
            return False
        if self._is_abandoned:
            self.cut()
            self.owner.forget(self)
        elif loop is None:
            return False
        if error is None:
            raise _elsewhere()
        return True

    @property
    def _is_abandoned(self) -> bool:
        return self.loop.is_closed() or self.process != os.getpid()

    def check_caller(self) -> None:
        """With one block open, any task that has the session may use it; else only code inside the innermost one."""
        if len(self.blocks) > 1 and all(block is not self.blocks[-1] for block, _ in open_blocks()):
            raise _concurrent("a block that joined it in another task is still open")

    @property
    def is_iterated_here(self) -> bool:
        """Whether the running code is a loop over the generator that opened this scope, in a transaction of its own."""
        others = scopes_here(self.owner) - {self}
        return (
            self.generator is not None
            and is_at_yield(self.generator)
            and any(scope.transaction is not None for scope in others)
        )

    # Operations: the session serves one at a time

    def start(self, operation: object) -> bool:
        """Whether this is a new operation, to be ended with `finish()`, and not a call within the running one.

        Raises `NoSessionError` where the scope has ended, `ConcurrentSessionError`, `OwnershipError`.
        """
        if self._operation is operation:
            return False
        self.check_loop()
        if not self.blocks:
            raise NoSessionError(
                "the scope of this session has ended: it was cut off by close()"
                if self.cut_off
                else "the scope of this session has ended: use the session inside its block, or inject a CurrentSession"
            )
        if self._operation is not None:
            raise _concurrent("another operation is running on it")
        self.check_caller()
        self._operation = operation
        return True

    def finish(self) -> None:
        self._operation = None
        if self._idle is not None:
            self._idle.set_result(None)
            self._idle = None

    @property
    def is_operating(self) -> bool:
        """Whether an operation is running."""
        return self._operation is not None

    async def run(self, function: Callable[[Session], None]) -> None:
        """Run a method of SQLAlchemy's own session as the one operation, after that which a task left running.

        Cancelled while it waits for that one, it ends it together with the connection.
        """
        while self._operation is not None:
            self._idle = self._idle or asyncio.get_running_loop().create_future()
            try:
                await asyncio.shield(self._idle)
            except asyncio.CancelledError:
                if self.connection is not None:
                    self.owner.end_connection(self.connection)
        self._operation = function

        def operate(session: Session) -> None:
            self._operation = getcurrent()  # what it does in turn, as the flush before a commit, is part of it
            function(session)

        try:
            await self.session.run_sync(operate)
        finally:
            self.finish()

    # Ends

    @property
    def failures(self) -> list[BaseException]:
        """The statements that failed in the transaction, and were not undone by a savepoint."""
        return failures(self.connection)

    @property
    def failure(self) -> BaseException | None:
        """The first of them, or the flush that failed and has rolled back already."""
        if self.failures:
            return self.failures[0]
        return None if self.session.is_active else self.last_error

    @property
    def is_writer(self) -> bool:
        """Whether it is in a transaction that writes, which on SQLite excludes all others."""
        begun = self.transaction is not None and not self.terms.read_only
        return begun or (self.written and not self.terms.autocommit)

    @property
    def has_begun(self) -> bool:
        """Whether its transaction has begun in the database."""
        return self.connection is not None and self.connection.in_transaction()

    def note_write(self) -> None:
        self.written = True
        self.work += 1

    @property
    def pending(self) -> bool:
        """Whether the session holds changes that no flush has sent."""
        session = self.session.sync_session
        return bool(session.new or session.deleted or any(map(session.is_modified, session.dirty)))

    async def flush(self) -> None:
        """Send what is pending; what is dirty without a change too, which a commit would flush."""
        session = self.session.sync_session
        if session.new or session.dirty or session.deleted:
            await self.session.flush()

    async def commit(self) -> None:
        """Send the COMMIT and wait for its answer, also while cancelled. What was pending has been flushed before.

        Raises `UnexpectedRollbackError`, `CommitOutcomeUnknownError`, and SQLAlchemy's errors.
        """
        if self.cut_off:
            raise cut_off()
        if self._operation is not None:
            raise _concurrent("the block ended while another task still had an operation running on it")
        if not self.session.in_transaction():
            if self.transaction is not None and self.transaction.has_begun:
                raise UnexpectedRollbackError("the transaction was ended in its block, past the session: not kept")
            return
        try:
            read_only = self.terms.read_only and not self.written
            await finish_commit(self.run(Session.commit), self.owner.settings.commit_timeout, read_only=read_only)
        except PendingRollbackError as error:
            raise lost_after(self.last_error or error) from None
        self.written = False

    async def roll_back(self, error: BaseException | None) -> None:
        """Undo what was not committed, after the `error` of the block. A failure costs the connection, no more."""
        self.written = False
        if self.session.in_transaction():
            await self._undo(Session.rollback, error)

    async def close(self, error: BaseException | None) -> None:
        """Roll back what was not committed, and give the connection back.

        Where nothing was undone, what was loaded can still be read; else it is as before, for another attempt.
        """
        self.end()
        undone = self.written and not self.terms.autocommit
        try:
            if self.session.in_transaction():
                await self._undo(Session.rollback if undone else Session.close, error)
        finally:
            Session.close(self.session.sync_session)
            self.owner.forget(self)
            del self.session  # which knows its scope: one that is done with is freed without the garbage collector

    def take_due_hooks(self) -> list[Hook]:
        """Return those that a commit has made due, once."""
        due, self.due_hooks = self.due_hooks, []
        return due

    async def run_due_hooks(self) -> None:
        """Call them as from outside this scope, as those of `transaction()` are. Raises the first of their errors."""
        around = innermost_block.get()
        innermost_block.set(self.blocks[0].outer if self.blocks else None)
        try:
            failure = await run_hooks(self.take_due_hooks(), None)
        finally:
            innermost_block.set(around)
        if failure is not None:
            raise failure

    async def _undo(self, undo: Callable[[Session], None], error: BaseException | None) -> None:
        def undo_or_give_up(session: Session) -> None:
            try:
                (Session.invalidate if self.cut_off else undo)(session)
            except BaseException:
                Session.invalidate(session)
                raise

        await finish_rollback(self.run(undo_or_give_up), self.owner.settings.rollback_timeout, error)


def _elsewhere() -> OwnershipError:
    return OwnershipError(
        "the session of the block around this belongs to another event loop or process: use it only there, as with "
        "asyncio.run_coroutine_threadsafe() from a thread, or make a manager for each"
    )


def refuse_write_of_loop() -> IncompatibleTransactionError:
    """Make the error of a write that would leave the transaction around it, unseen by the code that writes."""
    return IncompatibleTransactionError(
        "an async generator that this code iterates over has opened a session of its own, so this write would go "
        "there and not to the transaction around the loop: fetch all items before you write, use the session that "
        "transaction() gave you, or write in transaction(Propagation.REQUIRES_NEW)"
    )


def _concurrent(reason: str) -> ConcurrentSessionError:
    return ConcurrentSessionError(
        f"a session serves one operation at a time: {reason}; in a task of its own, work in session() or in "
        "transaction(Propagation.REQUIRES_NEW), or start it with transaction.detached()"
    )
