"""aiosqlite's connection and cursor, which wait for its thread only for work on the database."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Iterable
from functools import partial
from typing import Any, cast

import aiosqlite
from aiosqlite.context import contextmanager

from .sql_text import transaction_control

ROWS_AT_ONCE = 64  # that iterating over a cursor fetches; aiosqlite's own default


def new_connection(*arguments: Any, **options: Any) -> Connection:
    """Return a connection that is not open yet, as `aiosqlite.connect()` does.

    Args:
        arguments: Those of `sqlite3.connect()`.
        options: The same.
    """
    connect = partial(sqlite3.connect, *arguments, **options)
    connection = Connection(connect, iter_chunk_size=ROWS_AT_ONCE)
    cast(Any, connection)._thread.daemon = True  # as SQLAlchemy has it
    return connection


class Connection(aiosqlite.Connection):
    """A connection that tells when its transaction ends."""

    _has_ended = False  # its last transaction, and nothing was sent since
    writer_ended: asyncio.Event | None = None  # set at the end of a transaction that writes
    last_statement: str | None = None  # of the user who has the connection

    async def _execute(self, fn: Any, *args: Any, **kwargs: Any) -> Any:
        self._has_ended = False
        return await cast(Any, super())._execute(fn, *args, **kwargs)

    @contextmanager
    async def cursor(self) -> aiosqlite.Cursor:
        return _Cursor(self, self._conn.cursor())

    async def commit(self) -> None:
        await super().commit()
        self._note_end()

    async def rollback(self) -> None:
        if not self._has_ended:  # The pool rolls back whatever has happened.
            await super().rollback()
            self._note_end()

    def _note_end(self) -> None:
        self._has_ended = True
        if self.writer_ended is not None:
            self.writer_ended.set()


class _Cursor(aiosqlite.Cursor):
    """A cursor that is closed in the driver's thread only if rows may be left."""

    _may_have_rows = False

    async def execute(self, sql: str, parameters: Iterable[Any] | None = None) -> aiosqlite.Cursor:
        self._may_have_rows = True
        self._note(sql)
        await super().execute(sql, parameters)
        self._may_have_rows = self._cursor.description is not None
        return self

    async def executemany(self, sql: str, parameters: Iterable[Iterable[Any]]) -> aiosqlite.Cursor:
        self._note(sql)
        return await super().executemany(sql, parameters)

    def _note(self, sql: str) -> None:
        if not transaction_control(sql):
            cast(Connection, self._conn).last_statement = sql

    async def fetchall(self) -> Iterable[sqlite3.Row]:
        rows = await super().fetchall()
        self._may_have_rows = False
        return rows

    async def close(self) -> None:
        if self._may_have_rows:
            await super().close()
