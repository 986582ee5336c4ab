"""Find out in `open()` about a pooler that the settings don't name, and explain it.

A pooler or proxy that answers for the server tells its clients a process id of its own
making (see "BackendKeyData" in PostgreSQL's documentation). The server tells the true
one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, NamedTuple

from sqlalchemy import Engine, event
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.util import greenlet_spawn

from sessionwire._log_events import (
    POOLER_FOUND,
    POOLER_IGNORES_SETTINGS,
    POOLER_SHARES_SESSIONS,
)
from sessionwire.errors import ConfigurationError
from sessionwire.settings import DatabaseSettings

from .driver_errors import sqlstate
from .server_settings import KEPT_BY_POOLERS, start_up_parameters

PROCESS = "SELECT pg_catalog.pg_backend_pid()"
# The process; whether the pooler leaves the names of prepared statements as the drivers
# choose them, alike in all programs; and the settings that did not reach the server.
LOOK = """\
SELECT pg_catalog.pg_backend_pid(),
EXISTS (SELECT FROM pg_catalog.pg_prepared_statements WHERE name ~ '^(__asyncpg_|_pg3_)'),
(SELECT string_agg(name, ', ') FROM pg_catalog.pg_settings WHERE source <> 'client'
AND name = ANY (string_to_array('{}', ',')))"""
LONGEST_LOOK = 1.0  # seconds; a pooler without a free connection lets clients wait
SHARE = 0.25  # of connect_timeout
# SQLSTATEs duplicate_prepared_statement and invalid_sql_statement_name
LOST_STATEMENTS = "42P05", "26000"
REFUSED_PARAMETER = "unsupported startup parameter"


class Look(NamedTuple):
    """The answer to `LOOK` on another connection."""

    process: int
    keeps_names: bool
    ignored: str | None


async def check_pooler(
    connection: AsyncConnection,
    process: int,
    settings: DatabaseSettings,
    connect: Callable[[], Any],
) -> None:
    """Explain what a pooler in front of the server needs, if there is one.

    Without one nothing is sent. In front of a pooler that may be shared, a second
    connection shows whether that meets the same session of the server.

    Args:
        connection: A connection with nothing to commit.
        process: The process that serves it, as the server tells.
        settings: The settings of the database.
        connect: Opens another connection, in SQLAlchemy's greenlet.

    Raises:
        ConfigurationError: The settings can't work with this pooler.
    """
    raw: Any = await connection.get_raw_connection()
    if settings.pooler == "transaction" or raw.driver_connection.get_server_pid() == process:
        return
    await connection.rollback()  # Its session is free for another client, if it is shared.
    look = await _look(connect, settings)
    is_shared = look is not None and look.process == process
    if is_shared and settings.pooler == "session":
        raise ConfigurationError(
            "pooler: session is set, but the pooler in front of the server gives each transaction "
            "another session, as PgBouncer does with pool_mode = transaction: write pooler: "
            "transaction"
        )
    if settings.pooler == "session":
        return
    if look is not None and is_shared and look.keeps_names:
        raise ConfigurationError(
            "a pooler in front of the server gives each transaction another session, as PgBouncer "
            "does with pool_mode = transaction, and knows no prepared statements, which would be "
            "missing there: write pooler: transaction beside url"
        )
    if look is not None and look.ignored:
        POOLER_IGNORES_SETTINGS.log(
            ignored=look.ignored,
            setting="transaction"
            if is_shared
            else "transaction or pooler: session, as its pool_mode is,",
        )
    elif is_shared:
        POOLER_SHARES_SESSIONS.log()
    else:
        POOLER_FOUND.log()


async def _look(connect: Callable[[], Any], settings: DatabaseSettings) -> Look | None:
    """Look at the server through another connection. Return None if it shows nothing."""
    driver: Any = None
    names = ",".join(start_up_parameters(settings).keys() - {KEPT_BY_POOLERS})
    try:
        async with asyncio.timeout(min(LONGEST_LOOK, settings.connect_timeout * SHARE)):
            driver = (await greenlet_spawn(connect)).driver_connection
            return Look(*await driver.fetchrow(LOOK.format(names)))
    except Exception:
        return None
    finally:
        if driver is not None:
            driver.terminate()


def remedy_for(error: BaseException) -> str:
    """Return what to do about an error that a pooler has caused, or ""."""
    if REFUSED_PARAMETER in str(error):
        return "a pooler refuses it: write pooler: transaction or pooler: session beside url"
    if sqlstate(error) in LOST_STATEMENTS:
        return (
            "a pooler in front of the server gives each transaction another session, which does "
            "not know the statements that were prepared: write pooler: transaction beside url"
        )
    return ""


def explain_lost_statements(engine: Engine) -> None:
    """Note the remedy on errors of statements that a pooler has lost."""

    @event.listens_for(engine, "handle_error")
    def add_remedy(context: ExceptionContext) -> None:
        if remedy := remedy_for(context.original_exception):
            (context.sqlalchemy_exception or context.original_exception).add_note(remedy)
