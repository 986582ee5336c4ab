"""`TransactionManager`: opens transactions, registers hooks, and retries after conflicts."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, TypeVar, TypeVarTuple, Unpack

from sqlalchemy.ext.asyncio import AsyncSession

from ._core.context import current_frame, current_scope
from ._core.definition import Propagation, TransactionOptions, define
from ._core.hooks import call_at_once, log_failures, to_call
from ._core.retry import RetryOn, define_retries, run_with_retries
from ._core.session_hooks import call_after_commit, call_before_commit
from ._core.transaction import Hook, Transaction
from ._core.transaction_block import TransactionBlock
from ._database.begin_hooks import BeginHook
from ._database.call_sites import calling_site, site_of
from ._database.connect_hooks import ConnectHook
from ._database.runtime import database_of
from .errors import TransactionRequiredError

if TYPE_CHECKING:
    # Before Python 3.13 only this one has a default.
    from typing_extensions import TypeVar as TypeVarWithDefault

    from .manager import DatabaseSessionManager

    SessionT = TypeVarWithDefault(
        "SessionT", bound=AsyncSession, default=AsyncSession, covariant=True
    )
else:
    SessionT = TypeVar("SessionT", bound=AsyncSession, covariant=True)

R = TypeVar("R")
Ts = TypeVarTuple("Ts")


class TransactionManager(Generic[SessionT]):
    """Open transactions of one manager: `async with transaction() as session:`.

    Stateless: one serves any number of tasks, and every service may have its own.

    Args:
        manager: The manager whose transactions it opens.
    """

    def __init__(self, manager: DatabaseSessionManager[SessionT]) -> None:
        self._database = database_of(manager)

    def __call__(
        self,
        propagation: Propagation = Propagation.REQUIRED,
        **options: Unpack[TransactionOptions],
    ) -> AbstractAsyncContextManager[SessionT]:
        """Open a block that joins or begins a transaction, as `propagation` says.

        The block that began a transaction commits it when the block ends well, and
        otherwise rolls it back, unless `no_rollback_for` names the error. Nothing is
        sent before the first statement.

        Args:
            propagation: What to do about the current transaction.
            isolation: `"READ COMMITTED"`, `"REPEATABLE READ"` or `"SERIALIZABLE"`.
                SQLite always gives the last.
            read_only: The database refuses to write.
            timeout: A deadline for the block, up to its commit, in seconds or as a
                `timedelta`.
            execution_options: SQLAlchemy's, for the connection of the block.
            settings: The server's, such as `{"app.tenant": "7"}`, until the transaction
                ends. PostgreSQL only.
            durable: Refuse to be inside another transaction, so that all is committed
                at the end of the block. The name is Django's.
            no_rollback_for: Exception types. If such an error leaves the block, the
                block commits, and then raises it. If that can't be, all is rolled back,
                and a note on the error says why. The rule is Spring's.

        Raises:
            TypeError: An option is unknown, `timeout` is not a time, or
                `no_rollback_for` names something else than errors.
            ValueError: An isolation level is unknown, `timeout` is negative, or
                `durable` meets `MANDATORY`.
            TransactionRequiredError: On entering, by `MANDATORY`.
            TransactionForbiddenError: On entering, by `NEVER`.
            IncompatibleTransactionError: On entering, if the current transaction has
                other options, or if the block is `durable` and there is one.
            ConcurrentSessionError: On entering, if code in another task has joined the
                session.
            UnexpectedRollbackError: On leaving, if the block ended well and its
                transaction could not commit.
            TransactionTimeoutError: On leaving, after the deadline.
            CommitOutcomeUnknownError: On leaving, if the answer to the COMMIT was lost.

        Example:
            ```python
            async with transaction(isolation="SERIALIZABLE", timeout=5) as session:
                session.add(Order(item="tea"))
            ```
        """
        return TransactionBlock(self._database, define(propagation, **options), calling_site())

    if not TYPE_CHECKING:  # to which it has no such methods

        async def __aenter__(self):
            raise TypeError(
                "this is the TransactionManager, which opens blocks: call it, as in `async with "
                "transaction():`, or `async with container.db.transaction()():`, where the first "
                "call only builds it"
            )

        async def __aexit__(self, *_):
            """Let Python call the one above."""

    @property
    def active(self) -> bool:
        """Whether a transaction is current."""
        scope = current_scope(self._database)
        return scope is not None and scope.transaction is not None

    def set_rollback_only(self) -> None:
        """Let the current transaction, or savepoint, end in a rollback.

        Silent if the block that began the transaction calls it. If a joined block does,
        the outer block raises `UnexpectedRollbackError`.

        Raises:
            TransactionRequiredError: No transaction is current.
        """
        scope, transaction = current_scope(self._database), self._current()
        if scope is None or transaction is None:
            raise TransactionRequiredError("set_rollback_only() is for the inside of transaction()")
        transaction.set_rollback_only(scope.frames[-1])

    def on_commit(self, function: Hook, *, robust: bool = False) -> None:
        """Call `function` after the commit of the current transaction.

        It is dropped if the enclosing savepoint is rolled back. In `session()` it waits
        for the next `commit()` of that session, and is dropped at a rollback. Without
        any of them it is called at once. An error in a hook rolls nothing back: the
        other hooks run, then the block raises it, unless the hook is `robust`.

        Args:
            function: A function without arguments, sync or async; only sync if no
                transaction is current.
            robust: Log its error, with the logger `sessionwire.hooks`, instead of raising it.

        Raises:
            TypeError: It can't be called without arguments.
            TransactionRequiredError: It is async, and no transaction is current.
        """
        to_call(function, "on_commit()")
        hook = log_failures(function) if robust else function
        transaction, scope = self._current(), current_scope(self._database)
        if transaction is not None:
            transaction.add_hook(hook, on_rollback=False)
        elif scope is not None and scope.is_bare:
            scope.require_innermost_frame()
            call_after_commit(scope, hook)
        else:
            call_at_once(function, robust=robust)

    def before_commit(self, function: Hook) -> None:
        """Call `function` before the commit of the current transaction.

        It is called when the outermost block has ended well and its changes are
        flushed, in the order registered, still inside the block: it may use the session
        and join the transaction. An error rolls all back and leaves the block. It is
        dropped if the enclosing savepoint is rolled back, and never called if the block
        fails. In `session()` it precedes the next `commit()` of that session.

        Args:
            function: A function without arguments, sync or async. It may register
                further ones.

        Raises:
            TypeError: It can't be called without arguments.
            TransactionRequiredError: No transaction is current.

        Example:
            ```python
            async def check_total() -> None:
                if await orders.total() > limit:
                    raise LimitExceeded


            transaction.before_commit(check_total)
            ```
        """
        to_call(function, "before_commit()")
        transaction, scope = self._current(), current_scope(self._database)
        if transaction is not None:
            transaction.add_hook_before_commit(function)
        elif scope is not None and scope.is_bare:
            scope.require_innermost_frame()
            call_before_commit(scope, function)
        else:
            raise TransactionRequiredError(
                "before_commit() is for the inside of transaction() or session(): here is no "
                "commit that it could precede"
            )

    def on_rollback(self, function: Hook) -> None:
        """Call `function` after a rollback, once the outermost transaction has ended.

        A rollback of the enclosing savepoint counts too. Never called without a
        transaction, nor in `session()`, whose rollback is the caller's own.

        Args:
            function: A function without arguments, sync or async.

        Raises:
            TypeError: It can't be called without arguments.
        """
        to_call(function, "on_rollback()")
        transaction = self._current()
        if transaction is not None:
            transaction.add_hook(function, on_rollback=True)

    def _current(self) -> Transaction | None:
        """Return the current transaction.

        Raises `ConcurrentSessionError` if a block of another task has joined it.
        """
        scope = current_scope(self._database)
        if scope is None or scope.transaction is None:
            return None
        scope.require_innermost_frame()
        return scope.transaction

    def on_begin(self, function: BeginHook) -> BeginHook:
        """Call `function` at the begin of every later transaction of this manager.

        Use it for settings that every transaction needs, such as `SET LOCAL` for
        row-level security. While a hook is set, no statement is sent without it: reads
        run in transactions too, and in a block without a transaction each statement is
        a transaction of its own. AUTOCOMMIT on `manager.engine` raises
        `IncompatibleTransactionError`, unless it is marked with
        `execution_options(sessionwire_without_hooks=True)`.

        Args:
            function: A function of the `AsyncConnection`, sync or async.

        Raises:
            TypeError: It can't be called with one argument.
        """
        self._database.begin_hooks.append(to_call(function, "on_begin()", "the connection"))
        return function

    def on_connect(self, function: ConnectHook) -> ConnectHook:
        """Call `function` with each later connection of this manager, before anyone uses it.

        Use it for what must hold for the whole life of a connection, such as `SET ROLE`
        or a codec for a type of the server. Each statement in it commits by itself. A
        failure closes the connection, and is the error of the code that asked for one.
        Connections that are open already stay as they are.

        Args:
            function: A function of the `AsyncConnection`, sync or async. It may use no
                other connection of this database.

        Raises:
            TypeError: It can't be called with one argument.

        Example:
            ```python
            @manager.transaction.on_connect
            async def decode_json(connection: AsyncConnection) -> None:
                raw = await connection.get_raw_connection()
                await raw.driver_connection.set_type_codec(
                    "jsonb",
                    schema="pg_catalog",
                    encoder=orjson.dumps,
                    decoder=orjson.loads,
                )
            ```
        """
        self._database.connect_hooks.append(to_call(function, "on_connect()", "the connection"))
        return function

    async def detached(self, work: Coroutine[Any, Any, R]) -> R:
        """Run a coroutine as if no scope were open: `create_task(transaction.detached(work()))`."""
        enclosing = current_frame.get()
        current_frame.set(None)
        try:
            return await work
        finally:
            current_frame.set(enclosing)

    async def run(
        self,
        function: Callable[[*Ts], Awaitable[R]],
        *args: *Ts,
        retries: int = 0,
        retry_on: RetryOn | None = None,
        propagation: Propagation = Propagation.REQUIRED,
        **options: Unpack[TransactionOptions],
    ) -> R:
        """Run a coroutine function in a block, and again after retryable errors.

        `is_retryable()` says which these are, such as a serialization failure, a
        deadlock, or a connection that was lost before the commit was sent. Each retry
        waits a little longer. Inside another scope there is one attempt.

        Args:
            function: A coroutine function.
            args: Its arguments.
            retries: How many more attempts there may be.
            retry_on: Further errors after which there is another attempt: exception
                types, which an error or one of its causes may have, or a function that
                takes the error and returns whether to try again. Never after
                `CommitOutcomeUnknownError` or a deadline.
            propagation: That of the block.
            options: Those of the block.

        Raises:
            TypeError: The function can't be called with these arguments, an option is
                of a wrong type, or there is `retry_on` without `retries`.
            ValueError: An option has a value that is not allowed.
        """
        to_call(function, "run()", *args)
        call = partial(function, *args)
        definition, rule = define(propagation, **options), define_retries(retries, retry_on)
        return await run_with_retries(
            self._database, definition, rule, call, site_of(function) or calling_site()
        )
