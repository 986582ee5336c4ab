"""Ask PostgreSQL for the sessions of a service."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import text

from sessionwire._database.options import WITHOUT_HOOKS
from sessionwire.errors import ConfigurationError
from sessionwire.manager import DatabaseSessionManager

SESSIONS = """
SELECT pid, application_name AS application, state,
    extract(epoch FROM clock_timestamp() - state_change)::float AS seconds_in_state,
    extract(epoch FROM clock_timestamp() - xact_start)::float AS seconds_in_transaction,
    wait_event_type AS waits_for, pg_blocking_pids(pid) AS blocked_by, query
FROM pg_stat_activity
WHERE datname = current_database() AND usename = current_user AND pid <> pg_backend_pid()
    AND backend_type = 'client backend'
ORDER BY xact_start NULLS LAST, pid
"""


async def sessions_of(managers: Mapping[str, DatabaseSessionManager]) -> Mapping[str, Any]:
    """Return the sessions that the role of each database has in its server.

    Raises:
        ConfigurationError: A database has no server.
    """
    return {"servers": {name: await _sessions(each) for name, each in managers.items()}}


async def _sessions(manager: DatabaseSessionManager) -> list[dict[str, Any]]:
    async with manager:
        if manager.engine.dialect.name != "postgresql":
            raise ConfigurationError(
                f"{manager.status().name} has no server to ask: give the address of the service's "
                "StatusPage, such as http://localhost:8000/status"
            )
        engine = manager.engine.execution_options(
            isolation_level="AUTOCOMMIT", **{WITHOUT_HOOKS: True}
        )
        async with engine.connect() as connection:
            rows = await connection.execute(text(SESSIONS))
            return [dict(row) for row in rows.mappings()]
