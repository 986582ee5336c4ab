"""What SQLite needs to behave as the others do, and its driver, which runs it in a thread, to be stopped."""

from __future__ import annotations

import asyncio
import re
import sqlite3
import threading
import weakref
from collections.abc import Awaitable
from contextlib import suppress
from pathlib import Path
from threading import Thread
from time import monotonic
from typing import Any, cast

from sqlalchemy import AsyncAdaptedQueuePool, Connection, Engine, event
from sqlalchemy.dialects.sqlite.base import SQLiteDialect
from sqlalchemy.exc import OperationalError
from sqlalchemy.pool import ConnectionPoolEntry
from sqlalchemy.pool.base import _ConnectionRecord  # pyright: ignore[reportPrivateUsage]

from sessionwire.errors import IncompatibleTransactionError

from .driver_errors import sqlstate
from .options import TERMS, Terms

BUSY_TIMEOUT = 5.0  # seconds that a statement waits for a lock, in the driver's thread, where it can't be cancelled
STOP_TIMEOUT = 1.0  # seconds for the driver's thread to end
PATIENT = f"PRAGMA busy_timeout={BUSY_TIMEOUT * 1000:.0f};"


FOREIGN_KEYS = re.compile(r"\s*PRAGMA\s+(?:\w+\s*\.\s*)?foreign_keys\s*[=(]\s*['\"]?(\w+)", re.IGNORECASE)
OFF = ("off", "0", "false", "no")
READS = re.compile(r"\s*(SELECT|PRAGMA|EXPLAIN|VALUES)\b", re.IGNORECASE)
SENT, LEFT_OFF = "sessionwire_sent", "sessionwire_foreign_keys_off"  # in the info of a connection


class FileConnection(sqlite3.Connection):
    """A connection whose `close()` closes its files, whoever still has its cursors.

    SQLite closes no file that an unfinished cursor may read, and the traceback of a cancelled task keeps such cursors.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._cursors: weakref.WeakSet[sqlite3.Cursor] = weakref.WeakSet()

    def cursor(self, *arguments: Any, **options: Any) -> Any:
        cursor = super().cursor(*arguments, **options)
        self._cursors.add(cursor)
        return cursor

    def close(self) -> None:
        for cursor in list(self._cursors):
            with suppress(sqlite3.Error):
                cursor.close()
        super().close()


class Opening:
    """Makes a connection in the driver's thread, and closes it where its caller has gone meanwhile."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._connection: FileConnection | None = None
        self._is_abandoned = False

    def __call__(self, *arguments: Any, factory: object, **options: Any) -> FileConnection:
        connection = FileConnection(*arguments, **options)
        with self._lock:
            self._connection = connection
            if self._is_abandoned:
                connection.close()
        return connection

    def abandon(self) -> None:
        with self._lock:
            self._is_abandoned = True
            if self._connection is not None:
                self._connection.close()


class FilePool(AsyncAdaptedQueuePool):
    """A pool that closes the connections which it cannot finish making, as when it is cancelled meanwhile."""

    def _create_connection(self) -> _ConnectionRecord:
        record = _ConnectionRecord(self, connect=False)
        try:
            record.get_connection()
        except BaseException as error:
            record.invalidate(error)
            raise
        return record


ARGUMENTS = {
    "isolation_level": None,  # the driver would begin late, and not know savepoints
    "timeout": BUSY_TIMEOUT,
    "check_same_thread": False,
}


def prepare(engine: Engine, *, read_only: bool, patience: float) -> None:
    """What is asked of each connection. One that writes waits so many seconds for the lock."""

    query_only = f"PRAGMA query_only={'ON' if read_only else 'OFF'};"

    @event.listens_for(engine, "connect")
    def connected(connection: Any, _record: Any) -> None:
        try:
            _run(connection, f"PRAGMA foreign_keys=ON; PRAGMA journal_mode=WAL; {query_only}")
        except Exception as error:
            if not sqlstate(error).startswith("SQLITE_READONLY"):
                raise
            _run(connection, query_only)  # a file that can't be written stays as it is

    @event.listens_for(engine, "checkout")
    def check_foreign_keys(connection: Any, record: ConnectionPoolEntry, _proxy: Any) -> None:
        if record.info.pop(LEFT_OFF, False):
            cursor = connection.cursor()
            cursor.execute("PRAGMA foreign_keys=ON")
            cursor.close()

    if not read_only:

        @event.listens_for(engine, "begin")
        def begin(connection: Connection) -> None:
            _begin(connection, patience)

    @event.listens_for(engine, "before_cursor_execute")
    def executes(connection: Connection, _cursor: Any, statement: str, *_: Any) -> None:
        if switch := FOREIGN_KEYS.match(statement):
            off = switch[1].lower() in OFF
            if _driver(connection).in_transaction:
                _switch_foreign_keys(connection, patience, off=off)
            if off:
                connection.info[LEFT_OFF] = True
        elif not READS.match(statement):
            connection.info[SENT] = "writes"
        else:
            connection.info.setdefault(SENT, "reads")

    dialect: Any = engine.dialect

    def set_isolation_level(connection: Any, level: Any) -> None:
        if level != "AUTOCOMMIT":  # of which _begin() knows; the driver's own setting stays as it is
            SQLiteDialect.set_isolation_level(dialect, connection, level)

    dialect.set_isolation_level = set_isolation_level
    connect, commit = dialect.connect, dialect.do_commit

    def connect_or_abandon(*arguments: Any, **options: Any) -> Any:
        opening = Opening()
        try:
            return connect(*arguments, **options, factory=opening)
        except BaseException:
            opening.abandon()
            raise

    def commit_or_undo(connection: Any) -> None:
        try:
            commit(connection)
        except Exception:
            connection.rollback()  # as PostgreSQL does: what is left open, the next one would commit
            raise

    dialect.connect = connect_or_abandon
    dialect.do_commit = commit_or_undo


async def stop(driver: Any, *steps: Awaitable[object], patience: float = 0.02) -> None:
    """Stop what runs in the driver's thread for these steps, which have waited there behind it for so many seconds."""
    done = asyncio.gather(*steps, return_exceptions=True)
    while not (await asyncio.wait((done,), timeout=patience))[0]:
        with suppress(ValueError, sqlite3.ProgrammingError):  # closed
            driver._conn.interrupt()  # only now: where a cursor is unfinished, it would strike the first step instead


_inherited: list[Any] = []  # of the parent process


def drop(driver: Any, *, is_forked: bool, is_idle: bool) -> None:
    """Close it without awaiting, once its loop is closed, or in a forked process, which has none of its threads.

    There an idle one is closed by hand: while SQLite knows of it, it would take the parent's locks for its own.
    """
    if not is_forked:
        _stop_thread(driver)
        if driver._thread.is_alive():
            return  # it closes it when it comes to that
    if is_idle or not is_forked:
        with suppress(ValueError, sqlite3.Error):
            if not is_forked:
                driver._conn.rollback()  # an unfinished cursor would keep its lock
            driver._conn.close()
        driver._connection = None  # it would warn that it is not closed
    else:
        _inherited.append(driver)  # in the middle of something, which finalizers would end


def _stop_thread(driver: Any) -> None:
    """Stop what runs in it. It fails to tell the closed loop, and would say so on the standard error output."""
    driver._thread._invoke_excepthook = _ignore
    stopping = Thread(target=driver.stop)  # in a thread without a loop, to which its answer would come too late
    stopping.start()
    stopping.join()
    deadline = monotonic() + STOP_TIMEOUT
    while driver._thread.is_alive() and monotonic() < deadline:
        with suppress(ValueError, sqlite3.ProgrammingError):  # closed
            driver._conn.interrupt()
        driver._thread.join(0.01)


def _ignore(_: object) -> None: ...


def _begin(connection: Connection, timeout: float) -> None:
    """Begin for real, which the driver leaves until the first write. One that writes takes the write lock now, since a
    transaction that has read cannot wait for it (SQLITE_BUSY_SNAPSHOT); it waits in short turns, to be cancellable.
    """
    options = connection.get_execution_options()
    terms: Terms = options.get(TERMS) or Terms(autocommit=options.get("isolation_level") == "AUTOCOMMIT")
    connection.info.pop(SENT, None)
    script = f"{PATIENT} PRAGMA query_only={'ON' if terms.read_only else 'OFF'};"
    if terms.writes:
        script += f"PRAGMA busy_timeout=20; BEGIN IMMEDIATE; {PATIENT}"
    elif not terms.autocommit:
        script += "BEGIN;"
    deadline = monotonic() + timeout
    while True:
        try:
            _run(connection.connection.dbapi_connection, script)
            return
        except Exception as error:
            busy = sqlstate(error).startswith("SQLITE_BUSY")
            if not busy or not terms.writes or monotonic() > deadline:
                raise OperationalError("BEGIN", None, error) from error


def _driver(connection: Connection) -> Any:
    return cast(Any, connection.connection.dbapi_connection).driver_connection


def _switch_foreign_keys(connection: Connection, timeout: float, *, off: bool) -> None:
    """Begin the transaction anew with foreign keys on or off: inside of one SQLite ignores the PRAGMA.

    Where the transaction has written, `off` is refused, and "on" holds from its end on.
    """
    sent = connection.info.get(SENT)
    if sent == "writes":
        if off:
            raise IncompatibleTransactionError(
                "SQLite switches foreign keys off only outside of a transaction, and this one has written already: "
                "execute PRAGMA foreign_keys=OFF before the first write, on this connection"
            )
        return
    adapted: Any = connection.connection.dbapi_connection

    async def version(driver: Any) -> list[Any]:
        return list(await driver.execute_fetchall("PRAGMA data_version"))  # changes with the commits of others

    async def switch(driver: Any) -> None:
        await driver.rollback()
        await driver.execute_fetchall(f"PRAGMA foreign_keys={'OFF' if off else 'ON'}")

    try:
        before = adapted.run_async(version)
        adapted.run_async(switch)
        _begin(connection, timeout)
        if sent == "reads" and adapted.run_async(version) != before:
            raise IncompatibleTransactionError(
                "another transaction committed while foreign keys were switched, so what this one has read is out of "
                "date: execute the PRAGMA before the first query"
            )
    except BaseException:
        connection.invalidate()  # nothing may go on outside of a transaction
        raise


def _run(connection: Any, script: str) -> None:
    """Run a script. Cancelled or not, it leaves no cursor unfinished, as statements do.

    That of `PRAGMA journal_mode` can't be ended any more once the file is gone.
    """

    def execute(driver: Any) -> Any:
        return driver.executescript(script)

    connection.run_async(execute)


def remove(file: Path) -> None:
    for suffix in ("", "-wal", "-shm"):
        Path(f"{file}{suffix}").unlink(missing_ok=True)
