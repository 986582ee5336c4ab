"""`NullTransactionManager`: transactions of no database, for unit tests."""

from __future__ import annotations

import sqlite3
from typing import Any, NoReturn, cast

from sqlalchemy import Connection, Engine, NullPool, event, make_url
from sqlalchemy.dialects.postgresql.base import PGDialect
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from sessionwire._core.session_classes import session_factory
from sessionwire._database.call_sites import CallSite
from sessionwire._database.engines import DatabaseEngines
from sessionwire._database.options import ConnectionOptions
from sessionwire._database.runtime import Database
from sessionwire.errors import NoSessionError
from sessionwire.settings import DatabaseSettings
from sessionwire.transaction import TransactionManager


class NullTransactionManager(TransactionManager):
    """Open transactions without a database, for unit tests of services.

    `@transactional`, `@read_only`, `transaction()` and `run()` do what they do with a
    database: hooks are called, retries are made, and propagation is checked. Nothing is
    sent anywhere. `on_begin` and `on_connect` hooks, which need a connection, are never
    called. One serves any number of tests, threads and event loops.

    Raises:
        NoSessionError: When a session of one of its blocks sends SQL or flushes.

    Example:
        ```python
        async def test_a_note_is_kept() -> None:
            notes = NotesInMemory()
            await Notebook(notes, NullTransactionManager()).add("milk")
            assert notes.texts == ["milk"]
        ```
    """

    def __init__(self) -> None:
        self._database = _NullDatabase()


class _NullDatabase(Database):
    """A database without connections, which belongs to no event loop."""

    def __init__(self) -> None:
        super().__init__(DatabaseSettings(url="postgresql:///null"))
        self.new_session = session_factory(AsyncSession, {})
        self.current_engines = _NullEngines()

    def check_loop(self) -> None:
        """Nothing of it is bound to an event loop."""

    def sets_up_transactions(self, options: ConnectionOptions) -> bool:
        return False

    def set_up_transaction(
        self, connection: Connection, options: ConnectionOptions, call_site: CallSite | None
    ) -> None:
        """There are no settings to send."""


class _NullEngines(DatabaseEngines):
    """An engine whose connections begin and end transactions, and do nothing else."""

    is_sqlite = False
    sends_ahead = False
    refuses_writes_in_autocommit = True

    def __init__(self) -> None:
        self.cleanup_tasks = set()
        dialect = cast(Any, PGDialect)()
        # SQLAlchemy asks each driver for its classes of errors.
        dialect.driver, dialect.is_async, dialect.dbapi = "null", True, sqlite3
        for name in ("do_savepoint", "do_rollback_to_savepoint", "do_release_savepoint"):
            setattr(dialect, name, _do_nothing)
        pool = NullPool(cast(Any, _NullConnection), dialect=dialect)
        engine = Engine(pool, dialect, make_url("postgresql+null://"))
        event.listen(engine, "before_execute", _refuse)
        self.primary = AsyncEngine(engine)

    def engine_for(self, options: ConnectionOptions) -> AsyncEngine:
        return self.primary

    def abort(self, dbapi_connection: Any) -> None:
        """No statement of it is running."""


def _do_nothing(*_: object) -> None: ...


def _refuse(*_: object) -> NoReturn:
    raise NoSessionError(
        "NullTransactionManager has no database, so its sessions can send nothing: give the "
        "service a fake in place of what uses the session, or test with a database, as in "
        "sandbox() or a DatabaseTemplate"
    )


class _NullConnection:
    commit = rollback = close = _do_nothing
    cursor = _refuse  # of exec_driver_sql()
