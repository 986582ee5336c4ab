"""The hooks of `on_connect`, which run on each new connection before anyone uses it."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from typing import Any

from sqlalchemy import AdaptedConnection, Connection, Engine
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine
from sqlalchemy.pool import ConnectionPoolEntry
from sqlalchemy.pool.base import _AdhocProxiedConnection  # pyright: ignore[reportPrivateUsage]
from sqlalchemy.util import await_only

from sessionwire.errors import TransactionError

from .options import CONNECTION_OPTIONS, WITHOUT_HOOKS, ConnectionOptions

ConnectHook = Callable[[AsyncConnection], Awaitable[object] | None]
OPTIONS = {CONNECTION_OPTIONS: ConnectionOptions(autocommit=True), WITHOUT_HOOKS: True}


class ConnectHooks(list[ConnectHook]):
    """The hooks of `on_connect`. One that is added holds for connections made later."""

    def run(self, engine: Engine, adapted: AdaptedConnection, record: ConnectionPoolEntry) -> None:
        """Run the hooks on a new connection, in SQLAlchemy's greenlet.

        If one fails, the pool closes the connection. The error names the hook.
        """
        for hook in self:
            try:
                _run(hook, engine, adapted, record)
            except Exception as error:
                name = getattr(hook, "__qualname__", type(hook).__name__)
                error.add_note(f"raised in the on_connect function {name}, by a new connection")
                raise


def _run(hook: ConnectHook, engine: Engine, adapted: Any, record: ConnectionPoolEntry) -> None:
    # SQLAlchemy does the same for its own first statements, because the pool has not
    # handed the connection out yet. Listeners of the engine see none of these.
    proxy = _AdhocProxiedConnection(adapted, record)
    connection = Connection(engine, proxy, _has_events=False, _allow_revalidate=False)
    connection = connection.execution_options(**OPTIONS)
    begins_by_itself = engine.dialect.name != "sqlite"  # the driver
    if begins_by_itself:
        adapted.autocommit = True
    result = hook(AsyncConnection(AsyncEngine(engine), connection))
    if inspect.isawaitable(result):
        await_only(result)
    if transaction := connection.get_transaction():
        transaction.close()  # SQLAlchemy's note of one
    if _is_in_transaction(adapted.driver_connection):
        raise TransactionError(
            "the function left a transaction open on the driver's connection: end it there, or "
            "use the AsyncConnection, whose statements commit by themselves"
        )
    if begins_by_itself:
        adapted.autocommit = False


def _is_in_transaction(driver: Any) -> bool:
    is_in_transaction = getattr(driver, "is_in_transaction", None)  # asyncpg's
    if is_in_transaction is not None:
        return bool(is_in_transaction())
    return bool(getattr(driver, "in_transaction", False))  # aiosqlite's
