"""The blocks that users enter: what each does about the current transaction, and how it ends."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Callable
from dataclasses import replace
from enum import Enum, auto
from types import TracebackType
from typing import TYPE_CHECKING, cast

from sqlalchemy.ext.asyncio import AsyncSession, AsyncSessionTransaction
from sqlalchemy.orm import SessionTransaction

from sessionwire._database.begin_hooks import WITHOUT_HOOKS
from sessionwire._database.completion import finish_rollback
from sessionwire._database.driver_errors import origin
from sessionwire._database.options import Terms
from sessionwire._error_reports import cut_off, lost_after
from sessionwire.errors import (
    CommitOutcomeUnknownError,
    ConcurrentSessionError,
    IncompatibleTransactionError,
    TransactionForbiddenError,
    TransactionRequiredError,
    TransactionTimeoutError,
    UncommittedChangesWarning,
    UnexpectedRollbackError,
)

from .context import current_scope
from .definition import Plan, Propagation
from .generators import is_left_early, is_told_otherwise, left_early
from .hooks import run_hooks
from .scope import Owner, Scope, entered_twice, refuse_second_writer, refuse_write_of_loop
from .transaction import Hook, Level, Transaction


class EnteredAsync:
    """What is entered with `async with`, and nothing before."""

    if not TYPE_CHECKING:  # to which it has no such methods

        def __enter__(self):
            raise TypeError("a block of sessionwire is entered with `async with`, not with `with`")

        def __exit__(self, *_):
            """Let Python call the one above."""

        def __getattr__(self, name):
            if name.startswith("_"):
                raise AttributeError(name)
            raise AttributeError(
                f"{name!r} was looked for in a block that is not entered: write `async with …() as session:`, and use "
                "that session inside it"
            )


class SessionBlock(EnteredAsync):
    """`async with manager.session()`: a session that commits nothing by itself."""

    def __init__(self, owner: Owner) -> None:
        self._owner = owner
        self._was_entered = False

    async def __aenter__(self) -> AsyncSession:
        if self._was_entered:
            raise entered_twice()
        self._was_entered = True
        self._scope = self._owner.open_scope(Terms())
        self._scope.is_bare = True
        self._block = self._scope.enter()
        return self._scope.session

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        scope = self._scope
        if scope.leave_elsewhere(error):
            return
        lost = (error is None or is_left_early(error)) and (scope.written or scope.pending)
        failure = left_early() if lost and error is not None else None
        if failure is not None and is_told_otherwise(failure):
            failure = None
        scope.leave(self._block)
        await scope.close(failure or error)
        if failure is not None:
            raise failure
        if lost and error is None:
            warnings.warn(
                "a session() block ended with changes that are now lost: call commit() or rollback() in it, "
                "or use transaction(), which commits at its end",
                UncommittedChangesWarning,
                stacklevel=2,
            )


class _Act(Enum):
    JOIN = auto()
    BEGIN = auto()
    SAVEPOINT = auto()
    GO_WITHOUT = auto()
    REFUSE = auto()


# what each mode does where a transaction is current, and where none is
_ACTS = {
    Propagation.REQUIRED: (_Act.JOIN, _Act.BEGIN),
    Propagation.REQUIRES_NEW: (_Act.BEGIN, _Act.BEGIN),
    Propagation.NESTED: (_Act.SAVEPOINT, _Act.BEGIN),
    Propagation.MANDATORY: (_Act.JOIN, _Act.REFUSE),
    Propagation.SUPPORTS: (_Act.JOIN, _Act.GO_WITHOUT),
    Propagation.NOT_SUPPORTED: (_Act.GO_WITHOUT, _Act.GO_WITHOUT),
    Propagation.NEVER: (_Act.REFUSE, _Act.GO_WITHOUT),
}
_ALONE = (Propagation.REQUIRES_NEW, Propagation.NOT_SUPPORTED)  # never in a session that is there already


class TransactionBlock(EnteredAsync):
    """`async with transaction(…)`."""

    def __init__(self, owner: Owner, plan: Plan) -> None:
        self._owner = owner
        self._propagation = plan.propagation
        self._terms = plan.terms
        self._timeout = plan.timeout
        self._deadline: asyncio.Timeout | None = None
        self._was_entered = False
        self._level: Level | None = None  # what a failure of this block dooms
        self._savepoint: AsyncSessionTransaction | None = None
        self.is_repeated_after: Callable[[BaseException | None], bool] = lambda failure: False
        self.put_off: list[Hook] = []  # which are due, unless what is repeated begins

    # Begin

    async def __aenter__(self) -> AsyncSession:
        if self._was_entered:
            raise entered_twice()
        self._was_entered = True
        while (current := current_scope(self._owner)) is not None and not current.check_loop():
            pass
        inside = current is not None and current.transaction is not None
        self._act = _ACTS[self._propagation][0 if inside else 1]
        self._scope, self._opened = self._choose(current)
        self._block = self._scope.enter()
        if not self._opened and self._act is not _Act.SAVEPOINT and not self._terms.read_only:
            self._scope.work += 1
        self._work_before = self._scope.work
        if self._act is _Act.BEGIN:
            self._scope.transaction = Transaction(self._block)
            self._scope.transaction.has_begun = self._scope.session.in_transaction()
        if self._scope.transaction is not None:
            self._level = self._scope.transaction.level
        if self._timeout is not None:
            self._deadline = await asyncio.timeout(self._timeout).__aenter__()
        if self._act is _Act.SAVEPOINT:
            try:
                await self._set_savepoint()
            except BaseException as error:
                await self.__aexit__(type(error), error, None)
                raise
        return self._scope.session

    def _choose(self, current: Scope | None) -> tuple[Scope, bool]:
        """The scope to work in, and whether it is a new one. What is refused here dooms nothing."""
        if self._act is _Act.REFUSE:
            if self._propagation is Propagation.NEVER:
                raise TransactionForbiddenError("Propagation.NEVER: a transaction is current; end it before this call")
            raise TransactionRequiredError("Propagation.MANDATORY: wrap the call in transaction() or @transactional")
        if current is not None and self._propagation not in _ALONE:
            if current.generator is not None and not self._terms.read_only and current.is_iterated_here:
                raise refuse_write_of_loop()
            if current.terms.read_only and not self._terms.read_only:
                raise IncompatibleTransactionError(
                    "this block may write, and the one around it is read-only: make the outer call transactional"
                )
            if self._fits(current):
                self._check_terms(current.terms)
                return current, False
        return self._owner.open_scope(self._terms_of_new()), True

    def _fits(self, current: Scope) -> bool:
        """Whether this block works in the session that is there."""
        if current.transaction is not None:
            return True
        if self._act is _Act.BEGIN:
            return not current.terms.autocommit and not current.terms.read_only
        return not current.terms.read_only or current.task is asyncio.current_task()

    def _check_terms(self, given: Terms) -> None:
        asked = self._terms
        for what, value, there in (
            ("isolation", asked.isolation, given.isolation),
            ("execution_options", dict(asked.execution_options), dict(given.execution_options)),
        ):
            if value and value != there:
                raise IncompatibleTransactionError(
                    f"this block asks for {what}={value!r}, and the one around it has {there or 'the default'!r}: ask "
                    "for it in the outermost transaction(), or take Propagation.REQUIRES_NEW"
                )

    def _terms_of_new(self) -> Terms:
        terms = self._terms
        if terms.autocommit and terms.read_only and self._owner.reads_in_transactions:
            return replace(terms, autocommit=False)
        if terms.autocommit and self._owner.begin_hooks and WITHOUT_HOOKS not in dict(terms.execution_options):
            return replace(terms, hooked=True)
        if terms.writes:
            refuse_second_writer(self._owner)
        return terms

    async def _set_savepoint(self) -> None:
        transaction = self._scope.transaction
        assert transaction is not None
        failed_before = len(self._scope.failures)
        self._savepoint = await self._scope.session.begin_nested()
        self._level = transaction.level = Level(self._block, transaction.level, failed_before)

    # End

    def set_rollback_only(self) -> None:
        """What `TransactionManager.set_rollback_only()` asks for in this very block."""
        if self._level is not None:
            self._level.set_rollback_only(self._block)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._scope.leave_elsewhere(error):
            return
        failure = error
        loses_work = True
        if failure is None:
            try:
                await self._check_and_flush()
            except BaseException as found:
                failure = found
        elif is_left_early(error):
            loses_work = self._loses_work()
            lost = left_early(self._level.doomed_by if self._level is not None else None)
            if loses_work and not is_told_otherwise(lost):
                failure = lost
        failure = await self._at_deadline(failure)
        if self._act is _Act.BEGIN:
            failure = await self._end_transaction(failure)
        elif self._savepoint is not None and self._level is not None and not self._level.has_ended:
            failure = await self._end_savepoint(self._savepoint, self._level, failure)
        elif self._opened:
            await self._scope.close(failure)
        else:  # it had joined, or is a savepoint that ended with the one around it
            self._scope.leave(self._block)
            if failure is not None and self._level is not None and loses_work:
                self._level.doom(failure)
        if failure is not None and failure is not error:
            raise failure

    def _loses_work(self) -> bool:
        """Whether a rollback would undo something that was done in this block, and nobody else tells of it."""
        scope = self._scope
        if self._act is _Act.GO_WITHOUT:
            return self._opened and scope.pending
        ended_with_outer = self._block.scope is None and not scope.cut_off
        return not ended_with_outer and (scope.work != self._work_before or scope.pending)

    async def _check_and_flush(self) -> None:
        """What must hold for the block to end well."""
        scope, level = self._scope, self._level
        if scope.cut_off:
            raise cut_off()
        if self._block.scope is None:
            raise UnexpectedRollbackError("the transaction ended before this block, which had joined it: rolled back")
        if self._act is _Act.JOIN or (self._act is _Act.GO_WITHOUT and not self._opened):
            return
        if scope.blocks[-1] is not self._block:
            reason = "a block inside this one, which had joined it, was still open: end it first"
            raise lost_after(ConcurrentSessionError(reason))
        if level is None:
            await scope.flush()
            return
        if level.rollback_only:
            return
        if level.doomed_by is not None:
            raise lost_after(level.doomed_by)
        if not scope.session.is_active and scope.last_error is not None:
            raise lost_after(scope.last_error)  # a flush failed, and has rolled back
        await scope.flush()
        if failed := scope.failures[level.failed_before :]:
            raise lost_after(failed[0])

    async def _at_deadline(self, failure: BaseException | None) -> BaseException | None:
        if self._deadline is None:
            return failure
        when = self._deadline.when()
        late = failure is None and when is not None and when <= asyncio.get_running_loop().time()
        try:
            await self._deadline.__aexit__(type(failure) if failure else None, failure, None)
        except TimeoutError:
            late = True
        if late or (self._deadline.expired() and not isinstance(failure, asyncio.CancelledError)):
            timeout = TransactionTimeoutError(f"the block was not done within {self._timeout:g} s: rolled back")
            timeout.__cause__ = failure
            return timeout
        return failure

    async def _end_savepoint(
        self, savepoint: AsyncSessionTransaction, level: Level, failure: BaseException | None
    ) -> BaseException | None:
        scope = self._scope
        assert level.outer is not None
        assert scope.transaction is not None
        try:
            if failure is None and not level.rollback_only:
                await savepoint.commit()
                scope.work += not self._terms.read_only
            else:
                level.undo()
                scope.work = self._work_before
                undo = scope.run(lambda _: cast(SessionTransaction, savepoint.sync_transaction).rollback())
                if trouble := await finish_rollback(undo, self._owner.settings.rollback_timeout, failure):
                    level.outer.doom(trouble)
        except BaseException as refused:
            level.undo()
            level.outer.doom(refused)  # SQLAlchemy cannot roll back to a savepoint whose end has failed
            failure = refused
        finally:
            scope.transaction.end(level)
            scope.leave(self._block, with_inner=True)
        return failure

    async def _end_transaction(self, failure: BaseException | None) -> BaseException | None:
        scope = self._scope
        transaction = scope.transaction
        assert transaction is not None
        reason = origin(failure, scope.failure)
        transaction.is_ending = True
        scope.leave(self._block, with_inner=True)
        outcome = failure  # of the transaction, where a cancellation may come on top
        if failure is None and not transaction.root.rollback_only:
            try:
                await scope.commit()
            except BaseException as refused:
                failure = reason = refused
                outcome = refused.__cause__ if isinstance(refused, asyncio.CancelledError) else refused
        if outcome is not None or transaction.root.rollback_only:
            transaction.root.undo()
        scope.transaction = None
        try:
            if self._opened:
                await scope.close(failure)
            elif transaction.root.undone:
                await scope.roll_back(failure)
        except asyncio.CancelledError as cancellation:
            failure = reason = cancellation
        if isinstance(outcome, CommitOutcomeUnknownError):
            return failure
        if self.is_repeated_after(reason):
            self.put_off = transaction.hooks()
            return failure
        return await run_hooks([*scope.take_due_hooks(), *transaction.hooks()], failure)
