"""The internals of asyncio, CPython and aiosqlite that the test helpers rely on.

They are gathered here because a new release may change them.
"""

from __future__ import annotations

import asyncio
import gc
import sqlite3
from typing import Any


def is_waiting_for(task: asyncio.Task[Any] | None, other: asyncio.Task[Any] | None) -> bool:
    """Return whether `task` can go on only after `other`.

    It awaits the other task directly, through `gather()`, or through tasks in between.
    """
    found: list[Any] = [task]
    for each in found:
        waiter = getattr(each, "_fut_waiter", None)
        awaited = getattr(waiter, "_children", [waiter])  # the children of a gather()
        found += [future for future in awaited if future not in found]
    return other in found[1:]


def has_unretrieved_error(task: asyncio.Task[Any]) -> bool:
    """Return whether `task` raised an error that nobody has retrieved.

    asyncio logs such an error when the task is freed.
    """
    return bool(getattr(task, "_log_traceback", False))


def close_unfinished_cursors(driver: Any) -> None:
    """Close the cursors of an aiosqlite connection that have an unfinished statement.

    Such a statement keeps every savepoint from being released. On Python 3.11, an
    interrupted one that is garbage-collected during the next statement blocks the event
    loop: it resets itself, and waits for SQLite's mutex.
    """
    for cursor in gc.get_referrers(driver._conn):
        # isinstance() would ask a proxy for the class of the object behind it
        if issubclass(type(cursor), sqlite3.Cursor) and _has_unfinished_statement(cursor):
            cursor.close()


def _has_unfinished_statement(cursor: sqlite3.Cursor) -> bool:
    return any(type(each).__name__ == "Statement" for each in gc.get_referents(cursor))
