"""`check_health()`: find out whether a database can serve, for `manager.health()`."""

from __future__ import annotations

import asyncio

from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.util import greenlet_spawn

from sessionwire.health import Health

from .engines import DatabaseEngines
from .runtime import Database, explain


async def check_health(database: Database, timeout: float) -> Health:
    """Let the server answer, unless it is known without a message that nothing can serve.

    Args:
        database: The database.
        timeout: Seconds for a connection of the pool and for the answer.
    """
    if defect := database.find_defect():
        return defect
    reason = await _ask(database.engines, timeout)
    # It may have been closed meanwhile.
    return database.find_defect() or Health(is_live=True, is_ready=reason is None, reason=reason)


async def _ask(engines: DatabaseEngines, timeout: float) -> str | None:
    """Let the server answer on a connection of the pool. Return why it did not."""
    pool, connection = engines.pool, None
    try:
        async with asyncio.timeout(timeout):
            connection = await greenlet_spawn(pool.connect)
            await pool.ping(connection)
    except (TimeoutError, PoolTimeoutError):
        now = pool.status_now()
        if connection is None and now.in_use >= now.limit:
            return _explain_full_pool(engines, min(timeout, pool.timeout()))
        return f"the server did not answer within {timeout:g} s"
    except Exception as error:
        return f"the server can't be reached: {explain(error, timeout)}"
    return None


def _explain_full_pool(engines: DatabaseEngines, timeout: float) -> str:
    now, holder = engines.pool.status_now(), engines.holders.list_all()[0]
    line = f", now at {holder.line}" if holder.line else ""
    return (
        f"no connection became free within {timeout:g} s: {now.in_use} of {now.limit} are in use, "
        f"the longest for {holder.held_for:.1f} s by {holder.call_site}{line}"
    )
