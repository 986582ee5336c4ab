"""`managers_by_name()`: the databases that an application of the web is about."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from sessionwire.errors import ConfigurationError
from sessionwire.manager import DatabaseSessionManager

LONE_DATABASE = "database"  # the name of a database that is in no container

Managers: TypeAlias = dict[str, Callable[[], DatabaseSessionManager[Any]]]


def managers_by_name(database: Any) -> Managers:
    """Return what gives the managers of all databases, by the names of their providers.

    A container may still be overridden, until a manager is asked for.

    Args:
        database: A container, a `DatabaseContainer`, or a manager.

    Returns:
        `{"db": container.db.sessionmanager}`. A manager, and a `DatabaseContainer` that
        is in no other container, are called "database".

    Raises:
        ConfigurationError: The container has no database.
    """
    if isinstance(database, DatabaseSessionManager):
        manager: DatabaseSessionManager[Any] = database  # pyright: ignore[reportUnknownVariableType]
        return {LONE_DATABASE: lambda: manager}
    # A manager needs no dependency-injector, which this imports.
    from sessionwire.lifespan import database_containers

    found = {
        str(each.parent_name or "").partition(".")[2] or LONE_DATABASE: each.sessionmanager
        for each in database_containers(database)
    }
    if not found:
        raise ConfigurationError(
            "there is no DatabaseContainer in this container: give the manager itself"
        )
    return found
