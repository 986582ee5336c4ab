"""`connect()`: a connection in a transaction, which the block ends."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from time import monotonic
from typing import Any, cast

from sqlalchemy import Connection, event
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncTransaction

from sessionwire._database.call_sites import CallSite
from sessionwire._database.completion import close_or_invalidate, finish_commit, finish_rollback
from sessionwire._database.failed_statements import failure_log
from sessionwire._database.observer import ObservedTransaction
from sessionwire._database.options import ConnectionOptions
from sessionwire._database.runtime import Database, running_loop
from sessionwire._database.sql_text import is_dml
from sessionwire._error_reports import (
    closed_while_open_error,
    explain_pending_rollback,
    unexpected_rollback,
)
from sessionwire.errors import NotInitializedError

from .context import current_scope, require_no_enclosing_writer
from .generators import early_end_error


class _ConnectionUnit:
    """The connection of one `connect()` block, as the database knows it."""

    def __init__(self, connection: AsyncConnection, call_site: CallSite | None) -> None:
        self.connection = connection
        self.call_site = call_site
        self.task = asyncio.current_task()
        self.opened_at = monotonic()
        self.is_aborted = False
        self.has_written = False

    @property
    def transaction_connection(self) -> Connection | None:
        return self.connection.sync_connection

    def is_connecting(self, task: asyncio.Task[Any] | None, greenlet: object) -> bool:
        return self.connection.sync_connection is None and self.task is task

    def abort(self) -> None:
        self.is_aborted = True

    def record_write(self, _connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        self.has_written = self.has_written or is_dml(statement)


@asynccontextmanager
async def connection_block(
    database: Database, call_site: CallSite | None
) -> AsyncGenerator[AsyncConnection]:
    """`async with manager.connect()`: a connection in a transaction, which the block ends.

    A generator, which asyncio closes if its block is dropped or its event loop shut down.
    """
    engines = database.admit(is_enclosed=current_scope(database) is not None)
    require_no_enclosing_writer(database)
    loop, options = running_loop(), ConnectionOptions(write_intent=True)
    connection = engines.engine_for(options).connect()
    unit = _ConnectionUnit(connection, call_site)
    database.add(unit)
    transaction: AsyncTransaction | None = None
    failure: BaseException | None = None
    end_failure: BaseException | None = None  # No error that only passes through.
    observed: ObservedTransaction | None = None
    outcome: str | None = None
    if database.observer is not None:
        observed = database.observer.begin(call_site, options)
    is_ending = False
    try:
        await connection
        log = failure_log(cast(Connection, connection.sync_connection))
        failures = log.errors
        event.listen(connection.sync_connection, "rollback", log.clear)
        try:
            if unit.is_aborted:
                # It came out of a pool that nobody disposes any more.
                await connection.invalidate()
                raise NotInitializedError("it was closed while connect() waited for a connection")
            transaction = await connection.begin()
            if database.observer is not None and observed is not None:
                database.observer.connect(
                    cast(Connection, connection.sync_connection), observed, call_site
                )
            await connection.run_sync(database.set_up_transaction, options, call_site)
            event.listen(connection.sync_connection, "after_cursor_execute", unit.record_write)
            yield connection
            is_ending = True
            if running_loop() is not loop:
                raise database.ownership_error()
            if unit.is_aborted:
                raise closed_while_open_error()
            if failures:
                raise unexpected_rollback(failures[0])
            await finish_commit(transaction.commit(), database.settings.commit_timeout)
        except GeneratorExit as closing:
            failure = closing
            if unit.has_written and (lost := early_end_error(closing)):
                failure = end_failure = lost
                raise lost from None
            raise
        except BaseException as error:
            failure = error
            if is_ending:
                is_cancelled = isinstance(error, asyncio.CancelledError)
                end_failure = error.__cause__ if is_cancelled else error
            explain_pending_rollback(error, failures[0] if failures else None)
            raise
        finally:
            if running_loop() is loop:  # otherwise it is another process's, or its loop is closed
                if transaction is not None:
                    outcome = database.totals.count_end(end_failure, rolls_back=not is_ending)
                work = close_or_invalidate(connection)
                await finish_rollback(work, database.settings.rollback_timeout, failure)
    finally:
        database.release(unit)
        if observed is not None:
            observed.end(outcome, None if outcome == "committed" else sys.exception())
