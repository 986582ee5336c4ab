"""What to derive from for PostgreSQL: the classes of connections and of their pool.

A class of one's own is given to the manager:

    class Traced(sessionwire.asyncpg.Connection): ...

    DatabaseSessionManager(settings, connect_args={"connection_class": Traced})
"""

from __future__ import annotations

from ._database.asyncpg_connection import Connection
from ._database.postgresql_pool import PostgreSQLPool as Pool

__all__ = ["Connection", "Pool"]
