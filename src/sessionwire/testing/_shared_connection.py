"""The one connection of a sandbox, on which tasks take turns."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, cast

from sqlalchemy import Connection, Pool, PoolProxiedConnection, event
from sqlalchemy.util import await_only, greenlet_spawn

from sessionwire._database.begin_hooks import BeginHooks
from sessionwire._database.call_sites import describe_task
from sessionwire._database.options import WITHOUT_HOOKS
from sessionwire._database.sql_text import is_dml, transaction_control
from sessionwire._database.sqlite import foreign_keys_switch
from sessionwire._database.sqlite_connections import interrupt_for
from sessionwire._database.transaction_settings import SENT_AHEAD
from sessionwire.errors import SandboxError

from ._cpython import close_unfinished_cursors, is_waiting_for
from ._interruptible import interrupt_if_unretrieved
from ._savepoint_stack import SavepointStack, VirtualConnection

POLL_INTERVAL = 0.05  # seconds between two searches for a deadlock


class SharedConnection:
    """The real connection of a sandbox.

    The `do_…` methods take the place of those of SQLAlchemy's dialect, and like them
    must be called in SQLAlchemy's greenlet.

    Args:
        real: The connection of the DBAPI, on which a transaction has begun.
        dialect: The SQLAlchemy dialect of the connection.
        begin_hooks: Hooks to run at the start of each transaction.
        check_deferred: Check deferred constraints at each commit.
        patience: Seconds without activity in the transaction of another task after
            which a waiting task raises `SandboxError`.
    """

    def __init__(
        self,
        real: Any,
        dialect: Any,
        begin_hooks: BeginHooks,
        *,
        check_deferred: bool,
        patience: float,
    ) -> None:
        self._begin_hooks = begin_hooks
        self._real = real
        self._check_deferred = check_deferred
        self._patience = patience
        self._savepoints = SavepointStack(real, dialect)
        self._blocked_pools: set[Pool] = set()
        self._is_closed = False
        self.cleanup_tasks: set[asyncio.Future[Any]] = set()
        # the tasks that went on after their cancellation
        self.uncancellable_tasks: set[asyncio.Task[Any]] = set()

    def connect(self) -> VirtualConnection:
        return VirtualConnection(self._real)

    # Turns

    def _acquire(self, virtual: VirtualConnection) -> None:
        while not self._can_proceed(virtual):
            await_only(self._wait_for_turn(virtual))

    def _can_proceed(self, virtual: VirtualConnection) -> bool:
        if virtual.rolled_back_by_outer:
            raise SandboxError(
                f"the transaction that was begun at {virtual.line} was rolled back "
                "together with the enclosing transaction: in a sandbox both share one connection"
            )
        if not self._savepoints.open:
            return True
        innermost = self._savepoints.open[-1]
        if innermost is virtual:
            return innermost.is_idle
        may_nest = virtual not in self._savepoints.open and innermost.unit in virtual.enclosing
        return innermost.is_idle and may_nest

    async def _wait_for_turn(self, virtual: VirtualConnection) -> None:
        holder = self._savepoints.open[-1]
        if reason := self._deadlock_reason(holder):
            error = _deadlock_error(virtual, holder, reason)
            interrupt_if_unretrieved(error)
            raise error
        timeout = min(POLL_INTERVAL, self._patience) if holder.is_idle else None
        await self._savepoints.wait_for_change(timeout)

    def _deadlock_reason(self, holder: VirtualConnection) -> str:
        task, loop = asyncio.current_task(), asyncio.get_running_loop()
        if not holder.is_idle:
            return ""
        if holder.task is task:
            return "which this very task has left open"
        if is_waiting_for(holder.task, task):
            return "which waits for this task"
        if loop.time() >= holder.last_used + self._patience:
            return f"in which nothing has happened for {self._patience:g} s"
        return ""

    # Methods of the dialect

    def do_begin(self, connection: PoolProxiedConnection) -> None:
        virtual = _virtual(connection)
        if not virtual.options.autocommit:
            self._begin(virtual)

    def do_commit(self, connection: PoolProxiedConnection) -> None:
        virtual = _virtual(connection)
        if virtual.rolled_back_by_outer or virtual in self._savepoints.open:
            self._acquire(virtual)
            try:
                if self._check_deferred and len(self._savepoints.open) == 1:
                    self._savepoints.check_deferred_constraints(virtual)
                self._savepoints.release(virtual)
            except Exception:
                self._savepoints.roll_back(virtual)
                raise

    def do_rollback(self, connection: PoolProxiedConnection) -> None:
        virtual = _virtual(connection)
        virtual.rolled_back_by_outer = False
        while not all(other.is_idle for other in self._savepoints.with_nested(virtual)):
            await_only(self._savepoints.wait_for_change())
        if virtual in self._savepoints.open:
            self._savepoints.roll_back(virtual)

    def do_execute(self, execute: Callable[..., None], *arguments: Any) -> None:
        connection: Connection = arguments[-1].root_connection
        statement: str = arguments[1]
        virtual = _virtual(connection.connection)
        self._check_allowed(statement)
        virtual.last_statement = statement
        in_autocommit = virtual not in self._savepoints.open and not virtual.rolled_back_by_outer
        if in_autocommit:
            self._begin(virtual)
        else:
            self._acquire(virtual)
            self._check_alive()
        try:
            if in_autocommit and not connection.get_execution_options().get(WITHOUT_HOOKS):
                self._begin_hooks.run_for_statement(connection)
            if statement.startswith(SENT_AHEAD):
                parameters = arguments[2]
                if isinstance(parameters, Mapping):  # psycopg's way
                    parameters = tuple(cast("Mapping[str, str]", parameters).values())
                self._savepoints.keep_settings(virtual, parameters[::2])
            virtual.running_task = asyncio.current_task()
            execute(*arguments)
        except Exception:
            if in_autocommit:
                self._savepoints.roll_back(virtual)
            raise
        finally:
            self._savepoints.mark_idle(virtual)
        virtual.has_written |= is_dml(statement)
        if in_autocommit:
            self._savepoints.release(virtual)

    def _begin(self, virtual: VirtualConnection) -> None:
        self._acquire(virtual)
        self._check_alive()
        self._savepoints.begin(virtual)

    def _check_alive(self) -> None:
        """Refuse to send a statement outside the sandbox's transaction."""
        if self._is_closed:
            raise SandboxError("the sandbox has ended, and this connection with it")
        if not self._savepoints.is_alive:
            raise SandboxError(
                "the database has ended the sandbox's transaction, and rolled back everything in it"
            )

    def _check_allowed(self, statement: str) -> None:
        if transaction_control(statement):
            raise SandboxError(
                f"{statement!r} would end the sandbox itself: use SQLAlchemy's begin(), commit() "
                "and rollback()"
            )
        if self._savepoints.is_sqlite and foreign_keys_switch(statement) is False:
            raise SandboxError(
                "foreign keys can't be switched off in a sandbox, which is one transaction: "
                "test this on a real database, with DatabaseTemplate"
            )

    # Aborting and closing

    def abort(self, virtual: VirtualConnection) -> None:
        """Roll back its transaction in the background."""
        if virtual in self._savepoints.open and not virtual.is_aborted:
            virtual.is_aborted = True
            task = asyncio.ensure_future(self._abort(virtual))
            self.cleanup_tasks.add(task)
            task.add_done_callback(self.cleanup_tasks.discard)

    def abort_all(self) -> None:
        """Roll back all open transactions in the background."""
        for virtual in reversed(self._savepoints.open):
            self.abort(virtual)

    async def wait_for_cleanup(self) -> None:
        """Wait until the aborted transactions are rolled back."""
        await asyncio.gather(*self.cleanup_tasks, return_exceptions=True)

    def close(self) -> None:
        """Send nothing from now on, and no longer block the pools."""
        self._is_closed = True
        self._savepoints.notify()
        if not self.uncancellable_tasks:
            for pool in self._blocked_pools:
                event.remove(pool, "checkout", self._reject_checkout)

    async def _abort(self, virtual: VirtualConnection) -> None:
        if self._savepoints.is_sqlite:
            # other tasks wait for the rollback, so it must be tried in any case
            with suppress(Exception):
                await self._interrupt_sqlite()
        while busy := [
            other for other in self._savepoints.with_nested(virtual) if other.running_task
        ]:
            for other in busy:
                if other.is_aborted and other.running_task is not None:
                    other.running_task.cancel()
            await self._savepoints.wait_for_change()
        if virtual in self._savepoints.open:
            # it fails if the connection is lost, and with it everything in the sandbox
            with suppress(Exception):
                await greenlet_spawn(self._savepoints.roll_back, virtual)

    async def _interrupt_sqlite(self) -> None:
        driver = self._real.driver_connection
        # if this interrupts a write, SQLite rolls back the whole sandbox
        await interrupt_for(driver, driver.execute("SELECT 1"), interrupt_after=1)
        close_unfinished_cursors(driver)

    # Pools

    def on_checkout(self, _: object, __: object, connection: PoolProxiedConnection) -> None:
        # a transaction that failed to commit may have left it set
        _virtual(connection).rolled_back_by_outer = False

    def on_checkin(self, virtual: VirtualConnection | None, _: object) -> None:
        if virtual is not None:
            virtual.forget_user()

    def block_checkouts(self, pool: Pool) -> None:
        """Refuse the pool's connections: changes on them would not be rolled back."""
        self._blocked_pools.add(pool)
        event.listen(pool, "checkout", self._reject_checkout)

    def _reject_checkout(self, *_: object) -> None:
        if not self._is_closed:
            raise SandboxError(
                "this engine is from before the sandbox: take it from the manager inside the "
                "sandbox"
            )
        if asyncio.current_task() in self.uncancellable_tasks:
            raise SandboxError(
                "this task began in a sandbox, which has ended: await it inside the sandbox"
            )


def _virtual(connection: PoolProxiedConnection) -> VirtualConnection:
    return cast(VirtualConnection, connection.dbapi_connection)


def _deadlock_error(
    virtual: VirtualConnection, holder: VirtualConnection, reason: str
) -> SandboxError:
    task = holder.task
    held_by = "" if task is None else f" by task {describe_task(task)}"
    return SandboxError(
        "a deadlock on the sandbox's one connection: "
        f"what was opened at {virtual.line} waits for the transaction "
        f"that was opened at {holder.line}{held_by}, {reason}. "
        "Transactions that must run concurrently need a real database: "
        "use DatabaseTemplate, or sessionwire_isolation = database."
    )
