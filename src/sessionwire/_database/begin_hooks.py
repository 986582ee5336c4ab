"""The hooks of `on_begin`, without which no statement may be sent."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Awaitable, Callable
from copy import copy
from functools import partial
from typing import Any

from sqlalchemy import Connection, Engine, event
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine
from sqlalchemy.util import await_only

from sessionwire.errors import IncompatibleTransactionError

from .options import TERMS

BeginHook = Callable[[AsyncConnection], Awaitable[object] | None]
WITHOUT_HOOKS = "sessionwire_without_hooks"  # the execution option of a connection that may go without


class BeginHooks(list[BeginHook]):
    """The hooks of `on_begin`, and the connections whose transaction has yet to have them.

    A transaction has them before its first statement at the latest, whoever began it.
    """

    def __init__(self) -> None:
        super().__init__()
        self._due: weakref.WeakSet[Connection] = weakref.WeakSet()

    def watch(self, engine: Engine, *, autocommit: bool = False) -> None:
        """Let no statement of this engine, and of those derived from it, be sent without the hooks."""
        is_watching = False

        def begins(connection: Connection, *_: object) -> None:
            nonlocal is_watching
            if not self:
                return
            options = connection.get_execution_options()
            if options.get(WITHOUT_HOOKS) or getattr(options.get(TERMS), "hooked", False):
                return
            self._due.add(connection)
            if not is_watching:  # statements cost nothing before
                is_watching = True
                event.listen(engine, "before_cursor_execute", executes)

        def executes(connection: Connection, *_: object) -> None:
            if self and connection in self._due:
                if autocommit:
                    raise _in_autocommit()
                self.run_due(connection)

        event.listen(engine, "begin", begins)
        event.listen(engine, "begin_twophase", begins)

    def run_due(self, connection: Connection) -> None:
        """Run them now, if the transaction of this connection has yet to have them.

        Raises:
            IncompatibleTransactionError: The connection is in AUTOCOMMIT.
        """
        if not self or connection not in self._due:
            return
        if connection.get_execution_options().get("isolation_level") == "AUTOCOMMIT":
            raise _in_autocommit()
        self._due.discard(connection)
        try:
            self.run(connection)
        except BaseException:
            connection.invalidate()  # nothing may go on in a transaction that lacks what must hold in it
            raise

    def run(self, connection: Connection) -> None:
        """Run them in SQLAlchemy's greenlet, where a sync hook may send statements too."""
        for hook in self:
            result = hook(AsyncConnection(AsyncEngine(connection.engine), connection))
            if inspect.isawaitable(result):
                await_only(result)

    def one_by_one(self, dialect: Any) -> Any:
        """Return a dialect that runs each statement in a transaction of its own, with the hooks."""
        alone = copy(dialect)
        running: set[Connection] = set()

        def execute_alone(execute: Callable[..., None], *arguments: Any) -> None:
            connection: Connection = arguments[-1].root_connection
            if connection in running:  # a statement of a hook
                execute(*arguments)
                return
            if getattr(arguments[0], "server_side", False):
                raise IncompatibleTransactionError(
                    "a cursor, as of stream(), needs a transaction that outlasts its statement, where on_begin hooks "
                    "are set: for reading, take transaction(read_only=True)"
                )
            running.add(connection)
            try:
                if dialect.name == "sqlite":  # where no driver begins by itself
                    cursor = connection.connection.cursor()
                    cursor.execute("BEGIN")
                    cursor.close()
                self.run(connection)
                execute(*arguments)
                dialect.do_commit(connection.connection)
            except Exception:
                try:
                    dialect.do_rollback(connection.connection)
                except Exception:
                    connection.invalidate()
                raise
            finally:
                running.discard(connection)

        def do_savepoint(connection: Connection, name: str) -> None:
            if connection not in running:
                raise IncompatibleTransactionError(
                    "a savepoint needs a transaction, and in this block each statement is one: take transaction(), "
                    "and for a part of it Propagation.NESTED"
                )
            dialect.do_savepoint(connection, name)

        for name in ("do_execute", "do_executemany", "do_execute_no_params"):
            setattr(alone, name, partial(execute_alone, getattr(dialect, name)))
        alone.do_savepoint = do_savepoint
        return alone


def _in_autocommit() -> IncompatibleTransactionError:
    return IncompatibleTransactionError(
        "on_begin hooks hold in a transaction, and this connection is in AUTOCOMMIT: leave out isolation_level, or "
        f"mark a connection that may go without the hooks: execution_options({WITHOUT_HOOKS}=True)"
    )
