"""Locks that let one process migrate at a time, and that end with the process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from time import monotonic

from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection

from sessionwire._log_events import WAITING_FOR_MIGRATIONS

# The key of the advisory lock, 8320239136064823668. It is not that of create_all(), which
# waits inside a transaction: CREATE INDEX CONCURRENTLY would wait for that one.
MIGRATION_LOCK = int.from_bytes(b"swmigrat")
POLL_INTERVAL = 0.05  # seconds
PATIENCE = 10.0  # seconds after which a wait is worth a line in the log


@asynccontextmanager
async def migration_lock(
    connection: AsyncConnection, lock_timeout: float | None
) -> AsyncGenerator[None]:
    """Wait until no other process migrates this database.

    On PostgreSQL the lock belongs to the session of the connection, and ends with that.
    Its statements wait for locks for `lock_timeout` seconds, and have no other limit.
    """
    if connection.dialect.name == "postgresql":
        await _prepare_session(connection, lock_timeout)
        await _poll(lambda: _try_advisory_lock(connection))
        yield
    elif connection.dialect.name == "sqlite":
        async with _file_lock(connection):
            yield
    else:
        yield


async def _poll(try_lock: Callable[[], Awaitable[bool]]) -> None:
    """Try until the lock is there.

    A statement that waits for an advisory lock has a snapshot, and CREATE INDEX
    CONCURRENTLY in the other process would wait for its end forever.
    """
    warn_at = monotonic() + PATIENCE
    while not await try_lock():
        if monotonic() > warn_at:
            WAITING_FOR_MIGRATIONS.log()
            warn_at = float("inf")
        await asyncio.sleep(POLL_INTERVAL)


async def _prepare_session(connection: AsyncConnection, lock_timeout: float | None) -> None:
    # The service's limits are for requests, and an index may take an hour.
    limits = {
        "lock_timeout": round((lock_timeout or 0) * 1000),
        "statement_timeout": 0,
        "idle_in_transaction_session_timeout": 0,
    }
    for name, milliseconds in limits.items():
        await connection.execute(text(f"SET {name} = {milliseconds}"))
    await connection.commit()
    # Otherwise a process that was killed goes on in the server, with its lock, until its
    # statement has ended. Servers on some systems can't find out.
    try:
        await connection.execute(text("SET client_connection_check_interval = 1000"))
        await connection.commit()
    except DBAPIError:
        await connection.rollback()


async def _try_advisory_lock(connection: AsyncConnection) -> bool:
    is_locked = await connection.scalar(text(f"SELECT pg_try_advisory_lock({MIGRATION_LOCK})"))
    await connection.commit()
    return bool(is_locked)


@asynccontextmanager
async def _file_lock(connection: AsyncConnection) -> AsyncGenerator[None]:
    try:
        from filelock import FileLock, Timeout
    except ImportError as error:
        raise ImportError(
            "migrations on SQLite need filelock: pip install 'sessionwire[alembic]'"
        ) from error

    file = await connection.scalar(
        text("SELECT file FROM pragma_database_list WHERE name = 'main'")
    )
    await connection.rollback()
    lock = FileLock(f"{file}.migrating", thread_local=False)

    async def try_lock() -> bool:
        try:
            lock.acquire(blocking=False)
        except Timeout:
            return False
        return True

    await _poll(try_lock)
    try:
        yield
    finally:
        lock.release()
