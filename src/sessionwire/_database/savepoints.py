"""A statement that is cancelled inside a savepoint: it is stopped in the server, and its connection is kept.

SQLAlchemy gives up the connection of each statement that is cancelled, and so the whole transaction.
"""

from __future__ import annotations

import asyncio
from typing import Any

from sqlalchemy import Engine, event
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.util import await_only

from sessionwire.errors import UnexpectedRollbackError

from . import sqlite
from .driver_errors import IN_FAILED_TRANSACTION, sqlstate
from .failed_statements import note_failure

PATIENCE = 0.3  # seconds for the statement to be stopped
OF_SAVEPOINTS = ("SAVEPOINT ", "ROLLBACK TO ", "RELEASE ")
WRITING_VERBS = ("INSERT", "UPDATE", "DELETE", "REPLACE")  # of SQLite


def keep_connections(engine: Engine) -> None:
    """Let a cancellation or a deadline cost no more than the savepoint in which it strikes a statement."""
    stop = {"asyncpg": _stop_on_postgresql, "aiosqlite": _stop_on_sqlite}.get(engine.dialect.driver)
    if stop is None:
        return

    @event.listens_for(engine, "handle_error")
    def failed(context: ExceptionContext) -> None:
        connection = context.connection
        if not isinstance(context.original_exception, asyncio.CancelledError) or connection is None:
            return
        if (context.statement or "").startswith(OF_SAVEPOINTS):
            note_failure(connection, _lost("while a savepoint was set, released or rolled back"), whole=True)
        elif connection.in_nested_transaction():
            is_stopped = False
            try:
                is_stopped = await_only(stop(connection.connection.driver_connection, context))
            finally:  # another cancellation gives the connection up
                if is_stopped:
                    context.is_disconnect = False
                    note_failure(connection, _caught())
                else:
                    note_failure(connection, _lost(f"and could not be stopped within {PATIENCE:g} s"), whole=True)


def _caught() -> UnexpectedRollbackError:
    return UnexpectedRollbackError(
        "all that was done in this savepoint was rolled back, because a statement in it was cancelled while it ran: "
        "let the cancellation leave the block of the savepoint, and catch it outside"
    )


def _lost(how: str) -> UnexpectedRollbackError:
    return UnexpectedRollbackError(
        f"the whole transaction was rolled back, because a statement was cancelled {how}, and its connection was "
        "closed: run the whole transaction again"
    )


async def _stop_on_postgresql(driver: Any, _context: ExceptionContext) -> bool:
    """Wait until the server has stopped it, which asyncpg has asked for. Tell whether its transaction is there yet."""
    try:
        await driver.execute("SELECT 1", timeout=PATIENCE)  # is sent after that
    except Exception as error:
        if sqlstate(error) != IN_FAILED_TRANSACTION:
            return False
    return bool(driver.is_in_transaction())


async def _stop_on_sqlite(driver: Any, context: ExceptionContext) -> bool:
    """Wait for it, and interrupt it if it reads: an interrupted write undoes the whole transaction.

    Its cursor is closed: an unfinished statement that writes would keep the transaction from its end.
    """
    is_write = (context.statement or "").lstrip().upper().startswith(WRITING_VERBS)
    cursor: Any = getattr(getattr(context.execution_context, "cursor", None), "_cursor", None) or _cursor_of(
        context.original_exception
    )
    try:
        async with asyncio.timeout(PATIENCE):
            finish = cursor.close() if cursor else driver.execute("SELECT 1")
            await sqlite.stop(driver, finish, patience=PATIENCE * (2 if is_write else 0.5))
        return bool(driver.in_transaction)
    except Exception:
        return False


def _cursor_of(error: BaseException) -> Any:
    """Find the driver's cursor where only a local variable of SQLAlchemy 2.0 has it."""
    traceback = error.__traceback__
    while traceback is not None:
        if "_cursor" in traceback.tb_frame.f_locals:
            return traceback.tb_frame.f_locals["_cursor"]
        traceback = traceback.tb_next
    return None
