"""What the helpers of this package take: a manager, or a container for all databases in it."""

from __future__ import annotations

from typing import Any

from sessionwire.errors import ConfigurationError
from sessionwire.lifespan import databases
from sessionwire.manager import DatabaseSessionManager


def managers_of(database: Any) -> list[DatabaseSessionManager]:
    """Raises `ConfigurationError` where a container has no database."""
    if isinstance(database, DatabaseSessionManager):
        return [database]
    managers = [found.sessionmanager() for found in databases(database)]
    if not managers:
        raise ConfigurationError("there is no DatabaseContainer in this container: give the manager itself")
    return managers
