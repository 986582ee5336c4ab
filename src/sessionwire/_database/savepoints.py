"""Cancel a statement inside a savepoint without losing the connection.

SQLAlchemy closes the connection of every cancelled statement, and with it the whole
transaction. Here the statement is stopped in the server, and only the savepoint is
lost.
"""

from __future__ import annotations

import asyncio
from typing import Any

from sqlalchemy import Engine, event
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.util import await_only

from sessionwire.errors import UnexpectedRollbackError

from .driver_errors import IN_FAILED_TRANSACTION, sqlstate
from .failed_statements import failure_log
from .sql_text import is_dml
from .sqlite_connections import interrupt_for

STOP_TIMEOUT = 0.3  # seconds for a cancelled statement to be stopped
SAVEPOINT_STATEMENTS = ("SAVEPOINT ", "ROLLBACK TO ", "RELEASE ")


def install_cancellation_listener(engine: Engine) -> None:
    """Let a cancellation or a deadline cost only the savepoint in which it strikes."""
    stop = {
        "asyncpg": _stop_on_asyncpg,
        "psycopg": _stop_on_psycopg,
        "aiosqlite": _stop_on_sqlite,
    }.get(engine.dialect.driver)
    if stop is None:
        return

    @event.listens_for(engine, "handle_error")
    def on_error(context: ExceptionContext) -> None:
        connection = context.connection
        if not isinstance(context.original_exception, asyncio.CancelledError) or connection is None:
            return
        if (context.statement or "").startswith(SAVEPOINT_STATEMENTS):
            how = "while a savepoint was set, released or rolled back"
            failure_log(connection).record(_lost_transaction_error(how), whole=True)
        elif connection.in_nested_transaction():
            is_stopped = False
            try:
                is_stopped = await_only(stop(connection.connection.driver_connection, context))
            finally:  # After a second cancellation the connection is closed.
                if is_stopped:
                    context.is_disconnect = False
                    failure_log(connection).record(_lost_savepoint_error())
                else:
                    how = f"and could not be stopped within {STOP_TIMEOUT:g} s"
                    failure_log(connection).record(_lost_transaction_error(how), whole=True)


def _lost_savepoint_error() -> UnexpectedRollbackError:
    return UnexpectedRollbackError(
        "this savepoint was rolled back, because a statement in it was cancelled while it ran: "
        "let the cancellation leave the block of the savepoint, and catch it outside"
    )


def _lost_transaction_error(how: str) -> UnexpectedRollbackError:
    return UnexpectedRollbackError(
        "the whole transaction was rolled back, because a statement was cancelled "
        f"{how}, and its connection was closed: run the whole transaction again"
    )


async def _stop_on_asyncpg(driver: Any, _context: ExceptionContext) -> bool:
    """Wait until the server has cancelled the statement, as asyncpg has asked it to.

    Return whether the transaction still exists.
    """
    skipped: tuple[str, ...] = driver.pipeline.failed
    try:
        # asyncpg sends this only after the cancellation is over.
        await driver.execute("SELECT 1", timeout=STOP_TIMEOUT)
    except Exception as error:
        if sqlstate(error) != IN_FAILED_TRANSACTION:
            return False
    skipped = skipped or driver.pipeline.failed
    is_set = not any(each.startswith("SAVEPOINT ") for each in skipped)
    return is_set and bool(driver.is_in_transaction())


async def _stop_on_psycopg(driver: Any, _context: ExceptionContext) -> bool:
    """Let the server cancel the statement. Return whether the transaction still exists."""
    return await driver.stop(STOP_TIMEOUT) and bool(driver.is_in_transaction())


async def _stop_on_sqlite(driver: Any, context: ExceptionContext) -> bool:
    """Wait for the statement, and interrupt it if it reads.

    Interrupting a write would roll back the whole transaction. The cursor is closed,
    because an unfinished statement that writes keeps the transaction from ending.

    Return whether the transaction still exists.
    """
    is_write = is_dml(context.statement or "")
    cursor: Any = getattr(getattr(context.execution_context, "cursor", None), "_cursor", None) or (
        _cursor_of(context.original_exception)
    )
    # For a write, the interrupt would come only after the timeout.
    interrupt_after = STOP_TIMEOUT * (2 if is_write else 0.5)
    try:
        async with asyncio.timeout(STOP_TIMEOUT):
            finish = cursor.close() if cursor else driver.execute("SELECT 1")
            await interrupt_for(driver, finish, interrupt_after=interrupt_after)
        return bool(driver.in_transaction)
    except Exception:
        return False


def _cursor_of(error: BaseException) -> Any:
    """Find the driver's cursor; SQLAlchemy 2.0 has it in a local variable only."""
    traceback = error.__traceback__
    while traceback is not None:
        if "_cursor" in traceback.tb_frame.f_locals:
            return traceback.tb_frame.f_locals["_cursor"]
        traceback = traceback.tb_next
    return None
