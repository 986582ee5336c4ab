"""`transaction()`: what a block does about the current transaction, and how it ends."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import Any, cast

from sqlalchemy.ext.asyncio import (
    AsyncSessionTransaction,
)
from sqlalchemy.orm import SessionTransaction

from sessionwire._database.call_sites import CallSite
from sessionwire._database.completion import finish_rollback
from sessionwire._database.driver_errors import root_cause
from sessionwire._database.observer import ObservedTransaction, Observer
from sessionwire._database.options import ConnectionOptions
from sessionwire._database.runtime import Database
from sessionwire._error_reports import (
    chain_errors,
    closed_while_open_error,
    not_committed,
    unexpected_rollback,
)
from sessionwire.errors import (
    CommitOutcomeUnknownError,
    ConcurrentSessionError,
    IncompatibleTransactionError,
    TransactionForbiddenError,
    TransactionRequiredError,
    TransactionTimeoutError,
    UnexpectedRollbackError,
)

from .block import Block
from .context import (
    current_frame,
    current_scope,
    require_no_enclosing_transaction,
    require_no_enclosing_writer,
)
from .definition import Action, Propagation, TransactionDefinition
from .generators import early_end_error, is_left_early
from .hooks import call_hook, in_rounds, run_hooks
from .scope import Scope
from .session_hooks import take_hooks_before_commit
from .transaction import Hook, Transaction
from .usage_errors import already_entered_error, write_in_iteration_error

_ALWAYS_NEW_SESSION = (Propagation.REQUIRES_NEW, Propagation.NOT_SUPPORTED)


class TransactionBlock(Block):
    """`async with transaction(…)`.

    Args:
        database: The database of the transaction.
        definition: What the block asks for.
        call_site: Where it was opened.
        find_retry_reason: Tells why the caller repeats the block after an error, or
            None. Hooks of such an end are left in `postponed_hooks`.
        attempt: Which attempt of the caller it is, from 1 on.
    """

    # Many may wait for a connection at once, and slots take less memory.
    __slots__ = (
        "_action",
        "_attempt",
        "_changes_before",
        "_deadline",
        "_definition",
        "_find_retry_reason",
        "_frame",
        "_observed",
        "_opened_scope",
        "_options",
        "_savepoint",
        "_scope",
        "_transaction",
        "postponed_hooks",
        "retry_reason",
    )

    def __init__(
        self,
        database: Database,
        definition: TransactionDefinition,
        call_site: CallSite | None,
        *,
        find_retry_reason: Callable[[BaseException | None], str | None] | None = None,
        attempt: int = 1,
    ) -> None:
        super().__init__(database, call_site)
        self._definition = definition
        self._options = definition.options
        self._deadline: asyncio.Timeout | None = None
        self._transaction: Transaction | None = None  # rolls back if this block fails
        self._savepoint: AsyncSessionTransaction | None = None
        self._observed: ObservedTransaction | None = None  # begun here
        self._find_retry_reason = find_retry_reason
        self._attempt = attempt
        # Why the caller repeats the block; None if it does not.
        self.retry_reason: str | None = None
        self.postponed_hooks: Sequence[Hook] = ()  # due, unless the next attempt begins

    # Begin

    async def __aenter__(self) -> Any:  # the session, of the class that the user has chosen
        if self._was_entered:
            raise already_entered_error()
        self._was_entered = True
        while (current := current_scope(self._database)) is not None and not current.check_loop():
            pass
        is_inside = current is not None and current.transaction is not None
        definition = self._definition
        self._action = definition.action_inside if is_inside else definition.action_outside
        self._scope, self._opened_scope = self._select_scope(current)
        self._frame = self._scope.push_frame()
        if (
            not self._opened_scope
            and self._action is not Action.SAVEPOINT
            and not self._options.read_only
        ):
            self._scope.change_count += 1
        self._changes_before = self._scope.change_count
        if self._action is Action.BEGIN:
            self._scope.transaction = Transaction(self._frame)
            if definition.no_rollback_for:
                self._scope.transaction.no_rollback_for = definition.no_rollback_for
            if not self._opened_scope:
                self._scope.transaction.has_begun = self._scope.session.in_transaction()
        self._transaction = self._scope.transaction
        if self._database.observer is not None:
            self._tell_begin(self._database.observer)
        if definition.timeout is not None:
            self._deadline = await asyncio.timeout(definition.timeout).__aenter__()
        if self._action is Action.SAVEPOINT:
            try:
                await self._set_savepoint()
            except BaseException as error:
                await self.__aexit__(type(error), error, None)
                raise
        return self._scope.session

    def _select_scope(self, current: Scope | None) -> tuple[Scope, bool]:
        """Return the scope to use, and whether it is new.

        Errors raised here leave the enclosing transaction intact.
        """
        if self._definition.durable:
            require_no_enclosing_transaction(self._database)
        if self._action is Action.REJECT:
            if self._definition.propagation is Propagation.NEVER:
                raise TransactionForbiddenError(
                    "Propagation.NEVER: a transaction is current; end it before this call"
                )
            raise TransactionRequiredError(
                "Propagation.MANDATORY: wrap the call in transaction() or @transactional"
            )
        if current is not None and self._definition.propagation not in _ALWAYS_NEW_SESSION:
            if (
                current.generator is not None
                and not self._options.read_only
                and current.is_iterated_here
            ):
                raise write_in_iteration_error()
            if current.options.read_only and not self._options.read_only:
                raise IncompatibleTransactionError(
                    "this block may write, and the enclosing one is read-only: make the outer "
                    "call transactional"
                )
            if self._can_reuse(current):
                self._check_compatible(current.options)
                return current, False
        options = self._options_for_new_scope()
        return Scope.open(self._database, options, current, self._call_site), True

    def _can_reuse(self, current: Scope) -> bool:
        """Tell whether this block can use the current session."""
        if current.transaction is not None:
            return True
        if self._action is Action.BEGIN:
            return not current.options.autocommit and not current.options.read_only
        return not current.options.read_only or current.task is asyncio.current_task()

    def _check_compatible(self, existing: ConnectionOptions) -> None:
        requested = self._options
        for name, value, present in (
            ("isolation", requested.isolation, existing.isolation),
            (
                "execution_options",
                dict(requested.execution_options),
                dict(existing.execution_options),
            ),
            ("settings", dict(requested.settings), dict(existing.settings)),
        ):
            if value and value != present:
                raise IncompatibleTransactionError(
                    f"{name}={value!r} was requested, but the enclosing transaction has "
                    f"{present or 'the default'!r}: request it in the outermost transaction(), or "
                    "use Propagation.REQUIRES_NEW"
                )

    def _options_for_new_scope(self) -> ConnectionOptions:
        options = self._options
        if options.autocommit:
            sets_up = self._database.sets_up_transactions(options)
            if options.read_only:
                if not sets_up and self._database.engines.refuses_writes_in_autocommit:
                    return options
                return replace(options, autocommit=False)
            return replace(options, transaction_per_statement=True) if sets_up else options
        if options.write_intent:
            require_no_enclosing_writer(self._database)
        return options

    def _tell_begin(self, observer: Observer) -> None:
        """Tell an observer what this block begins or joins."""
        scope, transaction = self._scope, self._transaction
        propagation = self._definition.propagation.name
        if self._action in (Action.BEGIN, Action.SAVEPOINT):
            self._observed = observer.begin(
                self._call_site,
                self._options,
                propagation,
                attempt=self._attempt,
                is_savepoint=self._action is Action.SAVEPOINT,
            )
        if self._action is Action.BEGIN and transaction is not None:
            transaction.observed = self._observed
            if transaction.has_begun and scope.transaction_connection is not None:
                scope.tell_end(None)  # that of session(), which goes on as this one
                scope.tell_connection(observer, scope.transaction_connection)
        elif self._action is Action.JOIN and transaction and transaction.observed is not None:
            transaction.observed.join(self._call_site, propagation)

    async def _set_savepoint(self) -> None:
        failure_mark = self._scope.failure_count
        self._savepoint = await self._scope.session.begin_nested()
        self._transaction = Transaction(self._frame, self._scope.transaction, failure_mark)
        self._transaction.no_rollback_for = self._definition.no_rollback_for
        self._transaction.observed = self._observed
        self._scope.transaction = self._transaction

    # End

    def set_rollback_only(self) -> None:
        """Make this block's transaction roll back, even if another is innermost."""
        if self._transaction is not None:
            self._transaction.set_rollback_only(self._frame)

    def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> Any:  # a coroutine, whose type mypy and pyright call differently
        return self._end(error) if self._observed is None else self._end_observed(error)

    async def _end_observed(self, error: BaseException | None) -> None:
        assert self._observed is not None
        failure = error
        try:
            await self._end(error)
        except BaseException as raised:
            failure = raised
            raise
        finally:
            # That of a transaction is told already, unless its block ends elsewhere.
            is_kept = failure is None and self._transaction and not self._transaction.rolled_back
            self._observed.end("released" if is_kept else "rolled_back", failure)

    async def _end(self, error: BaseException | None) -> None:
        if self._scope.ends_elsewhere(error):
            return
        failure, transaction = error, self._transaction
        must_report = error is None or not is_left_early(error) or self._loses_work()
        kept: BaseException | None = None  # an error after which the block commits
        obstacle: BaseException | None = None
        rule = self._definition.no_rollback_for
        if error is not None and rule and isinstance(error, rule):
            kept = error
        if error is None or kept is not None:
            failure = None
            try:
                await self._prepare_commit()
                begun = transaction if self._action is Action.BEGIN else None
                if begun is not None and (begun.hooks_before_commit or self._scope.is_bare):
                    await self._call_hooks_before_commit(begun)
            except BaseException as found:
                obstacle, failure = found, not_committed(kept, found)
        elif must_report:
            cause = None if transaction is None else transaction.rollback_cause
            failure = early_end_error(error, cause) or error
        if self._deadline is not None:
            failure = await self._apply_deadline(self._deadline, failure)
        if self._action is Action.BEGIN:
            failure = await self._end_transaction(failure, error, kept, obstacle)
        elif self._savepoint is not None and transaction is not None and not transaction.has_ended:
            failure = await self._end_savepoint(self._savepoint, transaction, failure, kept)
        elif self._opened_scope:
            await self._scope.close(failure)
        else:  # it had joined, or is a savepoint that ended with the enclosing transaction
            self._scope.pop_frame(self._frame)
            if failure is not None and transaction is not None and must_report:
                is_kept_outside = isinstance(failure, transaction.no_rollback_for)
                if not (is_kept_outside and failure is error):
                    transaction.mark_rollback_only(failure)
        if failure is not None and failure is not error:
            raise failure

    def _loses_work(self) -> bool:
        """Tell whether only a new error would report that this block's work is lost."""
        scope = self._scope
        if self._action is Action.AUTOCOMMIT:
            return self._opened_scope and scope.has_pending_changes
        ended_with_outer_block = self._frame.scope is None and not scope.is_aborted
        return not ended_with_outer_block and (
            scope.change_count != self._changes_before or scope.has_pending_changes
        )

    async def _prepare_commit(self) -> None:
        """Check what must hold for the block to end well, and flush."""
        scope, transaction = self._scope, self._transaction
        if scope.is_aborted:
            raise closed_while_open_error()
        if self._frame.scope is None:
            raise UnexpectedRollbackError(
                "the outer block ended before this joined block; the transaction was rolled back"
            )
        if self._action is Action.JOIN or (
            self._action is Action.AUTOCOMMIT and not self._opened_scope
        ):
            return
        if scope.frames[-1] is not self._frame:
            raise unexpected_rollback(
                ConcurrentSessionError("a block that joined this one is still open; end it first")
            )
        if transaction is None:
            await scope.flush()
            return
        if transaction.rollback_requested:
            return
        if cause := transaction.rollback_cause or scope.failure_since(transaction.failure_mark):
            raise unexpected_rollback(cause)
        await scope.flush()
        if failed := scope.failure_since(transaction.failure_mark):
            raise unexpected_rollback(failed)

    async def _call_hooks_before_commit(self, transaction: Transaction) -> None:
        """Call them as from inside this block, and flush what each has done."""
        around = current_frame.get()
        current_frame.set(self._frame)
        try:
            for hook in in_rounds(partial(self._take_hooks_before_commit, transaction)):
                await call_hook(hook)
                await self._prepare_commit()
        finally:
            current_frame.set(around)

    def _take_hooks_before_commit(self, transaction: Transaction) -> list[Hook]:
        """Return the hooks to call now, those of the session around the transaction first."""
        if transaction.rollback_requested:
            return []
        hooks = transaction.take_hooks_before_commit()
        if self._scope.is_bare:
            hooks = [*take_hooks_before_commit(self._scope), *hooks]
        return hooks

    async def _apply_deadline(
        self, deadline: asyncio.Timeout, failure: BaseException | None
    ) -> BaseException | None:
        when = deadline.when()
        late = failure is None and when is not None and when <= asyncio.get_running_loop().time()
        try:
            await deadline.__aexit__(type(failure) if failure else None, failure, None)
        except TimeoutError:
            late = True
        if late or (deadline.expired() and not isinstance(failure, asyncio.CancelledError)):
            timeout = TransactionTimeoutError(
                f"the block was not done within {self._definition.timeout:g} s: rolled back"
            )
            timeout.__cause__ = failure
            return timeout
        return failure

    async def _end_savepoint(
        self,
        savepoint: AsyncSessionTransaction,
        transaction: Transaction,
        failure: BaseException | None,
        kept: BaseException | None,
    ) -> BaseException | None:
        scope, parent = self._scope, transaction.parent
        assert parent is not None
        try:
            if failure is None and not transaction.rollback_requested:
                await savepoint.commit()
                scope.change_count += not self._options.read_only
            else:
                transaction.mark_rolled_back()
                scope.change_count = self._changes_before
                work = scope.run_exclusively(
                    lambda _: cast(SessionTransaction, savepoint.sync_transaction).rollback()
                )
                if error := await finish_rollback(
                    work, self._database.settings.rollback_timeout, failure
                ):
                    parent.mark_rollback_only(error)
        except BaseException as error:
            transaction.mark_rolled_back()
            # SQLAlchemy cannot roll back to a savepoint that failed to end.
            parent.mark_rollback_only(error)
            failure = not_committed(kept, error)
        finally:
            if not transaction.has_ended:
                scope.end_savepoints(inside=parent)
            scope.pop_frame(self._frame, including_nested=True)
        return failure

    async def _end_transaction(
        self,
        failure: BaseException | None,
        raised_inside: BaseException | None,
        kept: BaseException | None,
        obstacle: BaseException | None,
    ) -> BaseException | None:
        scope, transaction = self._scope, self._transaction
        assert transaction is not None
        first_cause = failure and root_cause(obstacle or failure, scope.failure_since(0))
        scope.end_savepoints(inside=transaction)
        transaction.is_ending = True
        scope.pop_frame(self._frame, including_nested=True)
        transaction_error = failure  # without a cancellation that comes on top
        if failure is None and not transaction.rollback_requested:
            try:
                await scope.commit()
            except BaseException as error:
                first_cause, failure = error, not_committed(kept, error)
                transaction_error = (
                    error.__cause__ if isinstance(error, asyncio.CancelledError) else failure
                )
        if transaction_error is not None or transaction.rollback_requested:
            transaction.mark_rolled_back()
        scope.is_uncounted = False  # It is counted here.
        outcome = self._database.totals.count_end(
            None if transaction_error is raised_inside else transaction_error,
            rolls_back=transaction.rolled_back,
        )
        scope.transaction = None
        try:
            if self._opened_scope:
                await scope.close(failure)
            elif transaction.rolled_back:
                await scope.roll_back(failure)
        except asyncio.CancelledError as cancellation:
            failure = first_cause = cancellation
        hooks = transaction.take_due_hooks()
        is_unknown = isinstance(transaction_error, CommitOutcomeUnknownError)
        if self._find_retry_reason is not None and not is_unknown:
            try:
                self.retry_reason = self._find_retry_reason(first_cause)
            except BaseException as error:
                failure = chain_errors(failure, error, "retry_on")
        if self._observed is not None:
            self._observed.end(outcome, transaction_error, self.retry_reason)
        if is_unknown:
            return failure
        if self.retry_reason:
            self.postponed_hooks = hooks
            return failure
        if failure is None:
            failure = kept
        hooks = [*scope.take_due_hooks(), *hooks]
        return await run_hooks(hooks, failure) if hooks else failure
