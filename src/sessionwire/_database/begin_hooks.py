"""The hooks of `on_begin`, which run before the first statement of a transaction."""

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

from .options import WITHOUT_HOOKS, ConnectionOptions, options_of
from .transaction_settings import SENT_AHEAD, TransactionSettings

BeginHook = Callable[[AsyncConnection], Awaitable[object] | None]


class BeginHooks(list[BeginHook]):
    """The hooks of `on_begin`, and the connections that have yet to run them.

    They run before the first statement of a transaction at the latest, whoever began
    it.
    """

    def __init__(self, settings: TransactionSettings) -> None:
        super().__init__()
        self._settings = settings
        self._due: weakref.WeakSet[Connection] = weakref.WeakSet()
        # Without hooks, no engine is listened to.
        self._silent_engines: weakref.WeakSet[Engine] = weakref.WeakSet()

    def append(self, hook: BeginHook) -> None:
        """Add a hook, from the next begin on."""
        super().append(hook)
        while self._silent_engines:
            self._listen(self._silent_engines.pop())

    def watch(self, engine: Engine) -> None:
        """Run the hooks in all transactions of an engine and of those derived from it."""
        if self:
            self._listen(engine)
        else:
            self._silent_engines.add(engine)

    def _listen(self, engine: Engine) -> None:
        def on_begin(connection: Connection, *_: object) -> None:
            is_left_out = connection.get_execution_options().get(WITHOUT_HOOKS)
            options = options_of(connection)
            if not (is_left_out or (options and options.transaction_per_statement)):
                self._due.add(connection)

        def on_statement(connection: Connection, _cursor: Any, sql: str, *_: object) -> None:
            if not sql.startswith(SENT_AHEAD):  # The hooks find the settings set.
                self.run_if_due(connection)

        event.listen(engine, "begin", on_begin)
        event.listen(engine, "begin_twophase", on_begin)
        event.listen(engine, "before_cursor_execute", on_statement)

    def run_if_due(self, connection: Connection) -> None:
        """Run the hooks now, unless the transaction of this connection has run them.

        Raises:
            IncompatibleTransactionError: The connection is in AUTOCOMMIT.
        """
        if not self or connection not in self._due:
            return
        options = options_of(connection)
        isolation = connection.get_execution_options().get("isolation_level")
        if isolation == "AUTOCOMMIT" or (options and options.autocommit):
            raise _autocommit_error()
        self._due.discard(connection)
        try:
            self.run(connection)
        except BaseException:
            # Nothing may be sent in a transaction that lacks what the hooks set up.
            connection.invalidate()
            raise

    def run_for_statement(self, connection: Connection) -> None:
        """Set up the transaction of one statement."""
        if settings := self._settings.ask(options_of(connection) or ConnectionOptions()):
            self._settings.apply(connection, settings)
        self.run(connection)

    def run(self, connection: Connection) -> None:
        """Run the hooks, in SQLAlchemy's greenlet, so that sync hooks can send SQL."""
        for hook in self:
            result = hook(AsyncConnection(AsyncEngine(connection.engine), connection))
            if inspect.isawaitable(result):
                await_only(result)

    def with_transaction_per_statement(self, dialect: Any) -> Any:
        """Return a dialect that gives each statement a transaction and the hooks."""
        own_dialect = copy(dialect)
        running: set[Connection] = set()

        def execute_in_transaction(execute: Callable[..., None], *arguments: Any) -> None:
            connection: Connection = arguments[-1].root_connection
            if connection in running:  # The statement is a hook's own.
                execute(*arguments)
                return
            if getattr(arguments[0], "server_side", False):
                raise IncompatibleTransactionError(
                    "a cursor, such as that of stream(), must outlast its statement, but with "
                    "on_begin hooks each statement in this block is a transaction of its own: "
                    "to read with a cursor, use transaction(read_only=True)"
                )
            running.add(connection)
            try:
                if dialect.name == "sqlite":  # Its driver does not begin by itself.
                    cursor = connection.connection.cursor()
                    cursor.execute("BEGIN")
                    cursor.close()
                self.run_for_statement(connection)
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
                    "a savepoint needs a transaction, but in this block each statement is one "
                    "of its own: use transaction(), and Propagation.NESTED for a part of it"
                )
            dialect.do_savepoint(connection, name)

        for name in ("do_execute", "do_executemany", "do_execute_no_params"):
            setattr(own_dialect, name, partial(execute_in_transaction, getattr(dialect, name)))
        own_dialect.do_savepoint = do_savepoint
        return own_dialect


def _autocommit_error() -> IncompatibleTransactionError:
    return IncompatibleTransactionError(
        "on_begin hooks run in transactions, but this connection is in AUTOCOMMIT: leave out "
        "isolation_level, or let the connection do without the hooks, with "
        f"execution_options({WITHOUT_HOOKS}=True)"
    )
