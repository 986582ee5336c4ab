"""`TransactionManager`: opens blocks, takes their hooks, and runs functions again that others got in the way of."""

from __future__ import annotations

import asyncio
import inspect
import logging
import random
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, TypeVarTuple, Unpack

from ._core.blocks import TransactionBlock
from ._core.context import current_scope, innermost_block
from ._core.definition import BlockOptions, Plan, Propagation, attempts, plan
from ._core.guarded_session import call_after_commit
from ._core.hooks import run_hooks, to_call
from ._core.scope import Owner
from ._core.transaction import Hook, Transaction
from ._database.begin_hooks import BeginHook
from ._database.driver_errors import is_retryable
from ._error_reports import in_short
from .errors import TransactionRequiredError

logger = logging.getLogger("sessionwire.retry")
R = TypeVar("R")
Ts = TypeVarTuple("Ts")

FIRST_PAUSE, LONGEST_PAUSE = 0.01, 1.0  # seconds before a retry, doubled each time, with full jitter


class TransactionManager:
    """Opens transactions of one manager: `async with transaction() as session:`.

    Stateless: one serves any number of tasks, and every service may have its own.
    """

    def __init__(self, manager: Owner) -> None:
        self._owner = manager

    def __call__(
        self,
        propagation: Propagation = Propagation.REQUIRED,
        **options: Unpack[BlockOptions],
    ) -> TransactionBlock:
        """A block that joins or begins a transaction, as `propagation` says.

        The block that began one commits it when it ends well, and else rolls it back. Nothing is sent before the
        first statement. Options:

        - `isolation`: `"READ COMMITTED"`, `"REPEATABLE READ"`, `"SERIALIZABLE"`; SQLite always gives the last.
        - `read_only`: the database refuses to write.
        - `timeout`: a deadline for the block, up to its commit, in seconds or as a `timedelta`.
        - `execution_options`: SQLAlchemy's, for the connection of the block.

        Raises `TypeError` for an unknown option and a `timeout` that is no time, `ValueError` for an unknown isolation
        level and a negative `timeout`. Entering the block raises
        `TransactionRequiredError`, `TransactionForbiddenError`, `IncompatibleTransactionError`,
        `ConcurrentSessionError`; leaving it `UnexpectedRollbackError`, `TransactionTimeoutError`,
        `CommitOutcomeUnknownError`, and what the database says to the commit.
        """
        return TransactionBlock(self._owner, plan(propagation, **options))

    if not TYPE_CHECKING:  # to which it has no such methods

        async def __aenter__(self):
            raise TypeError(
                "this is the TransactionManager, which opens blocks: call it, as in `async with transaction():`, or "
                "`async with container.db.transaction()():`, where the first call only builds it"
            )

        async def __aexit__(self, *_):
            """Let Python call the one above."""

    @property
    def active(self) -> bool:
        """Whether a transaction is current."""
        scope = current_scope(self._owner)
        return scope is not None and scope.transaction is not None

    def set_rollback_only(self) -> None:
        """Let the current transaction, or savepoint, end in a rollback.

        Quiet where the block that began it asks; where one that joined it does, the beginner ends in
        `UnexpectedRollbackError`. Raises `TransactionRequiredError`.
        """
        scope, transaction = current_scope(self._owner), self._current()
        if scope is None or transaction is None:
            raise TransactionRequiredError("set_rollback_only() is for the inside of transaction()")
        transaction.level.set_rollback_only(scope.blocks[-1])

    def on_commit(self, function: Hook) -> None:
        """Call it, sync or async, after the commit of the current transaction; with none, at once (sync only).

        In `session()` it waits for the next `commit()` of that session, and is dropped at a rollback.

        It is dropped where the savepoint that it was given in is rolled back. What it raises undoes nothing: the
        others still run, then the block raises it.

        Raises:
            TypeError: It can't be called without arguments.
        """
        to_call(function, "on_commit()")
        transaction, scope = self._current(), current_scope(self._owner)
        if transaction is not None:
            transaction.add_hook(function, on_rollback=False)
        elif scope is not None and scope.is_bare:
            scope.check_caller()
            call_after_commit(scope, function)
        elif inspect.isawaitable(result := function()):  # of which nothing has run yet
            if inspect.iscoroutine(result):
                result.close()
            raise TransactionRequiredError("no transaction is current, so there is nothing to wait for: await it")

    def on_rollback(self, function: Hook) -> None:
        """The same after a rollback, of a savepoint too: at the outermost end.

        Without a transaction it never runs, nor in `session()`, whose rollback is the caller's own.
        """
        to_call(function, "on_rollback()")
        transaction = self._current()
        if transaction is not None:
            transaction.add_hook(function, on_rollback=True)

    def _current(self) -> Transaction | None:
        """Raises `ConcurrentSessionError` where a block of another task has it."""
        scope = current_scope(self._owner)
        if scope is None or scope.transaction is None:
            return None
        scope.check_caller()
        return scope.transaction

    def on_begin(self, function: BeginHook) -> BeginHook:
        """Call it with the `AsyncConnection` at the begin of every transaction of this manager, from now on.

        For what must hold in each, such as `SET LOCAL` for row-level security. While one is set, no statement is sent
        without it: reads run in transactions too, and in a block that goes without one each statement is a transaction
        of its own. AUTOCOMMIT on `manager.engine` raises `IncompatibleTransactionError`, unless it is marked with
        `execution_options(sessionwire_without_hooks=True)`.

        Raises:
            TypeError: It can't be called with one argument.
        """
        self._owner.begin_hooks.append(to_call(function, "on_begin()", "the connection"))
        return function

    async def detached(self, work: Coroutine[Any, Any, R]) -> R:
        """Run a coroutine as if no scope were open: `create_task(transaction.detached(work()))`."""
        around = innermost_block.get()
        innermost_block.set(None)
        try:
            return await work
        finally:
            innermost_block.set(around)

    async def run(
        self,
        function: Callable[[*Ts], Awaitable[R]],
        *args: *Ts,
        retries: int = 0,
        propagation: Propagation = Propagation.REQUIRED,
        **options: Unpack[BlockOptions],
    ) -> R:
        """Run a coroutine function in a block, again up to `retries` times where it is certain that nothing was done.

        That is after a serialization failure, a deadlock (SQLSTATE 40001, 40P01; SQLite busy), and a connection lost
        before the commit was sent; after a pause each time. Inside another scope it is one attempt. The options are
        those of a block.

        Raises:
            TypeError: The function can't be called with these arguments, or an option is of a wrong type.
            ValueError: An option has a value that can't be.
        """
        to_call(function, "run()", *args)
        return await self.run_planned(plan(propagation, **options), attempts(retries), partial(function, *args))

    async def run_planned(self, planned: Plan, attempts: int, function: Callable[[], Awaitable[R]]) -> R:
        """The same, of what a decorator has planned before."""
        if current_scope(self._owner) is not None:
            attempts = 1
        attempt, again = 0, False

        def is_repeated_after(outcome: BaseException | None) -> bool:
            nonlocal again  # not so after the error of a hook, when all is committed, nor without a transaction
            again = attempt < attempts and is_retryable(outcome)
            return again

        put_off: list[Hook] = []  # of the attempt that failed: they run if no other one begins
        while True:
            attempt += 1
            again = False
            block = TransactionBlock(self._owner, planned)
            block.is_repeated_after = is_repeated_after
            try:
                if attempt > 1:
                    longest = min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** min(attempt - 1, 20))
                    await asyncio.sleep(random.uniform(0, longest))
                async with block:
                    put_off = []
                    return await function()
            except BaseException as error:
                if again:
                    put_off = block.put_off
                    logger.info("attempt %d of %d failed: %s", attempt, attempts, in_short(error))
                    continue
                failure = await run_hooks(put_off, error)
                if failure is not None and failure is not error:
                    raise failure from error
                raise
