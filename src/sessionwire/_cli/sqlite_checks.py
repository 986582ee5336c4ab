"""What goes wrong with SQLite in production."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Mapping

from sqlalchemy import inspect, text
from sqlalchemy.ext.asyncio import AsyncConnection

from sessionwire.manager import DatabaseSessionManager

from .findings import Finding, error, ok, warning
from .postgresql_checks import Look


async def _look_at_file(
    connection: AsyncConnection, _manager: DatabaseSessionManager, processes: int
) -> AsyncIterator[Finding]:
    file = await connection.scalar(text("SELECT file FROM pragma_database_list WHERE seq = 0"))
    if all(os.access(path, os.W_OK) for path in (file, os.path.dirname(file))):
        yield ok("file", f"{file} is writable")
    else:
        yield error("file", f"{file} and its directory must be writable for this user")
    journal = await connection.scalar(text("PRAGMA journal_mode"))
    if journal == "wal":
        yield ok("journal", "readers and the writer don't wait for each other (WAL)")
    else:
        yield warning("journal", f"journal_mode is {journal}, not wal: readers and the writer wait")
    if processes > 1:
        yield warning(
            "processes",
            f"{processes} processes share one writer: each waits for the others, up to "
            "pool.timeout; use PostgreSQL if they often write at once",
        )


async def _look_at_content(
    connection: AsyncConnection, manager: DatabaseSessionManager, _processes: int
) -> AsyncIterator[Finding]:
    found = await connection.scalar(text("PRAGMA quick_check(1)"))
    if found == "ok":
        yield ok("content", "the file is intact (quick_check)")
    else:
        yield error("content", f"the file is damaged: {found}; restore a backup")
    encoding = await connection.scalar(text("PRAGMA encoding"))
    if encoding == "UTF-8":
        yield ok("encoding", "the database is in UTF-8")
    else:
        yield warning("encoding", f"the database is in {encoding}, not UTF-8")
    broken = (await connection.execute(text("PRAGMA foreign_key_check"))).first()
    if broken is not None:
        yield error("foreign keys", f"a row of {broken[0]} refers to a row that {broken[2]} lacks")
    names = await connection.run_sync(lambda sync: inspect(sync).get_table_names())
    missing = sorted({table.name for table in manager.metadata.sorted_tables} - {*names})
    if missing:
        yield error("tables", f"not there: {', '.join(missing)}; migrate the database")


SQLITE_CHECKS: Mapping[str, Look] = {"file": _look_at_file, "content": _look_at_content}
