"""SQLite: connection setup, BEGIN, and the switch for foreign keys."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any, cast

from sqlalchemy import URL, Connection, Engine, event
from sqlalchemy.dialects.sqlite.base import SQLiteDialect
from sqlalchemy.exc import OperationalError
from sqlalchemy.pool import ConnectionPoolEntry

from sessionwire.errors import IncompatibleTransactionError

from .driver_errors import sqlstate
from .options import CONNECTION_OPTIONS, ConnectionOptions
from .sqlite_connections import BUSY_TIMEOUT, ConnectionOpening, SQLitePool

SET_BUSY_TIMEOUT = f"PRAGMA busy_timeout={BUSY_TIMEOUT * 1000:.0f};"
FOREIGN_KEYS = re.compile(
    r"\s*PRAGMA\s+(?:\w+\s*\.\s*)?foreign_keys\s*[=(]\s*['\"]?(\w+)", re.IGNORECASE
)
READS = re.compile(r"\s*(SELECT|PRAGMA|EXPLAIN|VALUES)\b", re.IGNORECASE)
# In the info of a connection: "reads" or "writes", by what the transaction has sent.
STATEMENTS_SENT = "sessionwire_statements_sent"
# In the info of a connection: whether it refuses writes, if that is known.
QUERY_ONLY = "sessionwire_query_only"
# In the info of a connection: foreign keys must be switched on again for the next user.
FOREIGN_KEYS_OFF = "sessionwire_foreign_keys_off"


def is_in_memory(url: URL) -> bool:
    """Tell whether a URL of SQLite names a database in memory."""
    return url.database in (None, "", ":memory:") or url.query.get("mode") == "memory"


def foreign_keys_switch(sql: str) -> bool | None:
    """Return the value to which `sql` sets foreign keys, or None if it does not."""
    match = FOREIGN_KEYS.match(sql)
    return None if match is None else match[1].lower() not in ("off", "0", "false", "no")


def configure_engine(engine: Engine, *, lock_timeout: float) -> None:
    """Set up an engine's connections.

    Args:
        engine: The engine to set up.
        lock_timeout: Seconds that a transaction which writes waits for the write lock.
    """

    @event.listens_for(engine, "connect")
    def on_connect(connection: Any, _record: Any) -> None:
        try:
            _run(connection, f"PRAGMA foreign_keys=ON; PRAGMA journal_mode=WAL; {SET_BUSY_TIMEOUT}")
        except Exception as error:
            if not sqlstate(error).startswith("SQLITE_READONLY"):
                raise
            _run(connection, SET_BUSY_TIMEOUT)  # A file that can't be written stays as it is.

    @event.listens_for(engine, "checkout")
    def restore_foreign_keys(connection: Any, record: ConnectionPoolEntry, _proxy: Any) -> None:
        if record.info.pop(FOREIGN_KEYS_OFF, False):
            cursor = connection.cursor()
            cursor.execute("PRAGMA foreign_keys=ON")
            cursor.close()

    @event.listens_for(engine, "begin")
    def on_begin(connection: Connection) -> None:
        _begin(connection, lock_timeout)

    @event.listens_for(engine, "before_cursor_execute")
    def on_statement(connection: Connection, _cursor: Any, statement: str, *_: Any) -> None:
        switch = foreign_keys_switch(statement)
        if switch is not None:
            if _driver(connection).in_transaction:
                _switch_foreign_keys(connection, lock_timeout, on=switch)
            if not switch:
                connection.info[FOREIGN_KEYS_OFF] = True
        elif not READS.match(statement):
            connection.info[STATEMENTS_SENT] = "writes"
        else:
            connection.info.setdefault(STATEMENTS_SENT, "reads")

    _adapt_dialect(engine.dialect)


def _adapt_dialect(dialect: Any) -> None:
    from .sqlite_driver import new_connection  # aiosqlite is not needed on PostgreSQL

    connect, commit = dialect.connect, dialect.do_commit

    def set_isolation_level(connection: Any, level: Any) -> None:
        # _begin() takes care of AUTOCOMMIT; the driver's own setting stays as it is.
        if level != "AUTOCOMMIT":
            SQLiteDialect.set_isolation_level(dialect, connection, level)

    def connect_or_abort(*arguments: Any, **options: Any) -> Any:
        opening = ConnectionOpening()
        try:
            return connect(*arguments, **options, factory=opening, async_creator_fn=new_connection)
        except BaseException:
            opening.abort()
            raise

    def commit_or_rollback(connection: Any) -> None:
        try:
            commit(connection)
        except Exception:
            # PostgreSQL rolls back too. A transaction left open here would be committed
            # by the next user of the connection.
            connection.rollback()
            raise

    dialect.set_isolation_level = set_isolation_level
    dialect.connect = connect_or_abort
    dialect.do_commit = commit_or_rollback


def _begin(connection: Connection, lock_timeout: float) -> None:
    """Begin now; the driver would wait for the first write.

    A writing transaction takes the write lock at once, because one that has already
    read cannot wait for it (SQLITE_BUSY_SNAPSHOT). It waits in the queue of its pool,
    and for other processes in short intervals, so that it can be cancelled.
    """
    options = connection.get_execution_options()
    ours: ConnectionOptions = options.get(CONNECTION_OPTIONS) or ConnectionOptions()
    if options.get("isolation_level") == "AUTOCOMMIT":
        ours = replace(ours, autocommit=True, write_intent=False)
    connection.info.pop(STATEMENTS_SENT, None)
    script = ""
    if connection.info.pop(QUERY_ONLY, None) != ours.read_only:
        script = f"PRAGMA query_only={'ON' if ours.read_only else 'OFF'};"
    if ours.write_intent:
        script += f"PRAGMA busy_timeout=20; BEGIN IMMEDIATE; {SET_BUSY_TIMEOUT}"
    elif not ours.autocommit:
        script += f"{SET_BUSY_TIMEOUT} BEGIN;"
    adapted: Any = connection.connection.dbapi_connection
    try:
        if ours.write_intent:
            queue = cast(SQLitePool, connection.engine.pool).write_queue
            deadline = monotonic() + lock_timeout
            adapted.run_async(partial(queue.begin, script=script, deadline=deadline))
        elif script:
            _run(adapted, script)
    except Exception as error:
        raise OperationalError("BEGIN", None, error) from error
    connection.info[QUERY_ONLY] = ours.read_only


def _driver(connection: Connection) -> Any:
    return cast(Any, connection.connection.dbapi_connection).driver_connection


def _switch_foreign_keys(connection: Connection, lock_timeout: float, *, on: bool) -> None:
    """Begin anew with foreign keys on or off; inside a transaction SQLite ignores that.

    If the transaction has written, "off" is refused, and "on" takes effect at its end.
    """
    sent = connection.info.get(STATEMENTS_SENT)
    if sent == "writes":
        if not on:
            raise IncompatibleTransactionError(
                "SQLite can switch foreign keys off only outside a transaction, and this one "
                "has written already: execute PRAGMA foreign_keys=OFF before the first write, "
                "on this connection"
            )
        return
    adapted: Any = connection.connection.dbapi_connection

    async def data_version(driver: Any) -> list[Any]:
        # It changes when another connection commits.
        return list(await driver.execute_fetchall("PRAGMA data_version"))

    async def switch(driver: Any) -> None:
        await driver.rollback()
        await driver.execute_fetchall(f"PRAGMA foreign_keys={'ON' if on else 'OFF'}")

    try:
        before = adapted.run_async(data_version)
        adapted.run_async(switch)
        _begin(connection, lock_timeout)
        if sent == "reads" and adapted.run_async(data_version) != before:
            raise IncompatibleTransactionError(
                "another transaction committed while foreign keys were switched, so what this "
                "one has read is out of date: execute the PRAGMA before the first query"
            )
    except BaseException:
        connection.invalidate()  # Nothing may go on outside a transaction.
        raise


def _run(connection: Any, script: str) -> None:
    """Run a script; unlike a statement, it leaves no unfinished cursor if cancelled.

    An unfinished cursor of `PRAGMA journal_mode` cannot be ended once the file is gone.
    """

    def execute(driver: Any) -> Any:
        return driver.executescript(script)

    connection.run_async(execute)


def delete_database_files(file: Path) -> None:
    """Delete a database file and the files that SQLite keeps beside it."""
    for suffix in ("", "-wal", "-shm", ".migrating"):
        Path(f"{file}{suffix}").unlink(missing_ok=True)
