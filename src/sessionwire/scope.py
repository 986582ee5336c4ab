"""One open session: which blocks use it, who may use it now, and how it ends.

A context variable holds the innermost block that the running code is in. It is never reset by token: a block that has
ended is passed over by whoever looks, so that blocks may end in any order, and elsewhere than they began.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from contextvars import ContextVar
from typing import Any, Protocol, TypeVar

from sqlalchemy.exc import PendingRollbackError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from .errors import CommitOutcomeUnknownError, ConcurrentSessionError, NoSessionError, UnexpectedRollbackError
from .settings import DatabaseSettings

T = TypeVar("T")
logger = logging.getLogger("sessionwire")


class Owner(Protocol):
    """What scopes, and those who open them, need of a manager."""

    @property
    def settings(self) -> DatabaseSettings: ...

    def open_scope(self, *, writes: bool) -> Scope:
        """A new scope with a session of its own. Raises `NotInitializedError`, `OwnershipError`."""
        ...

    def forget_scope(self, scope: Scope) -> None:
        """The scope has ended, and given back its connection."""
        ...


class Block:
    """One `async with`, as the contexts inside it remember it; `scope` is None once it has ended."""

    __slots__ = ("outer", "scope")

    def __init__(self, scope: Scope, outer: Block | None) -> None:
        self.scope: Scope | None = scope
        self.outer = outer


_innermost: ContextVar[Block | None] = ContextVar("sessionwire_innermost_block", default=None)


def _open_block() -> Block | None:
    block = _innermost.get()
    while block is not None and block.scope is None:
        block = block.outer
    return block


def current_scope(owner: Owner) -> Scope | None:
    """The innermost open scope of this manager in this context."""
    block = _innermost.get()
    while block is not None:
        if block.scope is not None and block.scope.owner is owner:
            return block.scope
        block = block.outer
    return None


def scopes_here(owner: Owner) -> list[Scope]:
    """All open scopes of this manager in this context, the innermost first."""
    scopes: list[Scope] = []
    block = _innermost.get()
    while block is not None:
        if block.scope is not None and block.scope.owner is owner:
            scopes.append(block.scope)
        block = block.outer
    return scopes


def require_scope(owner: Owner) -> Scope:
    """The same; raises `NoSessionError` where there is none."""
    scope = current_scope(owner)
    if scope is None:
        mix_up = "one of another database is, was the right one injected? " if _open_block() else ""
        raise NoSessionError(
            f"no session is open here: {mix_up}wrap the call in transaction(), @transactional or session()"
        )
    return scope


class Transaction:
    """The transaction of a scope, from the block that began it to that block's end."""

    def __init__(self) -> None:
        self.doomed_by: BaseException | None = None

    def doom(self, reason: BaseException) -> None:
        """Make it rollback-only. The first reason stays."""
        self.doomed_by = self.doomed_by or reason


class Scope:
    """An open session, and the blocks that use it, the outermost first."""

    def __init__(self, owner: Owner, session: AsyncSession) -> None:
        self.owner = owner
        self.session = session
        self.blocks: list[Block] = []
        self.transaction: Transaction | None = None
        self.written = False  # since the last commit or rollback
        self.cut_off = False  # by the manager's close(): the connection is gone
        self._operation: object = None  # the greenlet of the one that is running
        self._idle: asyncio.Future[None] | None = None

    # Blocks

    def enter(self) -> Block:
        """Open a block, inside which this scope is the current one. Raises `ConcurrentSessionError`."""
        self._check_caller()
        block = Block(self, _open_block())
        self.blocks.append(block)
        _innermost.set(block)
        return block

    def leave(self, block: Block) -> None:
        """End a block. With its outermost one the scope ends, and is nobody's current one any more."""
        if self.blocks and block is self.blocks[0]:
            self.end()
        elif block in self.blocks:
            self.blocks.remove(block)
            block.scope = None
        if _innermost.get() is block:
            _innermost.set(_open_block())

    def end(self) -> None:
        """End all blocks: nobody finds this scope any more, nobody may use its session."""
        for block in self.blocks:
            block.scope = None
        self.blocks.clear()

    def _check_caller(self) -> None:
        """With one block open, any task that has the session may use it; else only code inside the innermost one."""
        if len(self.blocks) < 2:
            return
        block = _innermost.get()
        while block is not None:
            if block is self.blocks[-1]:
                return
            block = block.outer
        raise _concurrent("a block that joined it in another task is still open")

    # Operations: the session serves one at a time

    def start(self, operation: object) -> bool:
        """Whether this is a new operation, to be ended with `finish()`, and not a call within the running one.

        Raises `NoSessionError` where the scope has ended, and `ConcurrentSessionError`.
        """
        if self._operation is operation:
            return False
        if not self.blocks:
            raise NoSessionError(
                "the scope of this session has ended: it was cut off by close()"
                if self.cut_off
                else "the scope of this session has ended: use the session inside its block, or inject a CurrentSession"
            )
        if self._operation is not None:
            raise _concurrent("another operation is running on it")
        self._check_caller()
        self._operation = operation
        return True

    def finish(self) -> None:
        self._operation = None
        if self._idle is not None:
            self._idle.set_result(None)
            self._idle = None

    async def _run(self, function: Callable[[Session], None]) -> None:
        """Run a method of SQLAlchemy's own session as the one operation, after that which a task left running."""
        while self._operation is not None:
            self._idle = self._idle or asyncio.get_running_loop().create_future()
            await asyncio.shield(self._idle)
        self._operation = function
        try:
            await self.session.run_sync(function)
        finally:
            self.finish()

    # Ends

    @property
    def pending(self) -> bool:
        """Whether the session holds changes that no flush has sent."""
        session = self.session.sync_session
        return bool(session.new or session.deleted or any(map(session.is_modified, session.dirty)))

    async def commit(self) -> None:
        """Send the COMMIT and wait for its answer, also while cancelled. What was pending has been flushed before.

        Raises `UnexpectedRollbackError`, `CommitOutcomeUnknownError`, and SQLAlchemy's errors.
        """
        if self.cut_off:
            raise UnexpectedRollbackError("the manager was closed before this block ended: all was rolled back")
        if self._operation is not None:
            raise _concurrent("the block ended while another task still had an operation running on it")
        if not self.session.in_transaction():
            return
        try:
            await finish_commit(self._run(Session.commit), self.owner.settings.commit_timeout)
        except PendingRollbackError as error:
            raise UnexpectedRollbackError(
                "a flush had failed in this block, and its error was caught: all was rolled back"
            ) from error
        self.written = False

    async def roll_back(self, error: BaseException | None) -> None:
        """Undo what was not committed, after the `error` of the block. A failure costs the connection, no more."""
        self.written = False
        if self.session.in_transaction():
            await self._undo(Session.rollback, error)

    async def close(self, error: BaseException | None) -> None:
        """Roll back what was not committed, and give the connection back. What was loaded can still be read."""
        self.end()
        try:
            if self.session.in_transaction():
                await self._undo(Session.close, error)
        finally:
            Session.close(self.session.sync_session)
            self.owner.forget_scope(self)

    async def _undo(self, undo: Callable[[Session], None], error: BaseException | None) -> None:
        def undo_or_give_up(session: Session) -> None:
            try:
                (Session.invalidate if self.cut_off else undo)(session)
            except BaseException:
                Session.invalidate(session)
                raise

        await finish_rollback(self._run(undo_or_give_up), self.owner.settings.rollback_timeout, error)


def _concurrent(reason: str) -> ConcurrentSessionError:
    return ConcurrentSessionError(
        f"a session serves one operation at a time: {reason}; in a task of its own, work in a session() of its own"
    )


async def to_the_end(work: Coroutine[Any, Any, T], timeout: float) -> T:
    """Do the work in a task of its own and wait for it, whatever is cancelled meanwhile; then let that go on.

    Work that takes longer than `timeout` seconds is cancelled. Raises `TimeoutError`, and what the work raises; as the
    cause of a `CancelledError` where there is one.
    """
    task = asyncio.ensure_future(work)
    overdue = asyncio.get_running_loop().call_later(timeout, task.cancel)
    cancellation: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait((task,))
        except asyncio.CancelledError as error:
            cancellation = error
    overdue.cancel()
    failure = TimeoutError(f"no answer within {timeout:g} s") if task.cancelled() else task.exception()
    if cancellation is not None:
        raise cancellation from failure
    if failure is not None:
        raise failure
    return task.result()


async def finish_commit(work: Coroutine[Any, Any, None], timeout: float) -> None:
    """The same for a commit. Raises `CommitOutcomeUnknownError` where no answer comes in time."""
    try:
        await to_the_end(work, timeout)
    except TimeoutError as error:
        raise CommitOutcomeUnknownError(
            "the commit was sent, and no answer came in time: look in the database before trying again"
        ) from error


async def finish_rollback(work: Coroutine[Any, Any, None], timeout: float, error: BaseException | None) -> None:
    """The same for a rollback after `error`. What fails here is a note on that: the server undoes all the same."""
    try:
        await to_the_end(work, timeout)
    except asyncio.CancelledError as cancellation:
        raise cancellation from error
    except Exception as trouble:
        note = f"the rollback failed, and its connection was given up: {type(trouble).__name__}: {trouble}"
        logger.warning(note)
        if error is not None:
            error.add_note(note)
