"""The databases of a container, as their managers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

from .errors import ConfigurationError
from .manager import DatabaseSessionManager

LONE_DATABASE = "database"  # the name of a database that is in no container

Managers: TypeAlias = dict[str, Callable[[], DatabaseSessionManager[Any]]]


def managers_of(database: Any) -> list[DatabaseSessionManager]:
    """Return the managers of all databases in a container; of a manager, itself.

    Raises:
        ConfigurationError: The container has no database.
    """
    return [provide() for provide in managers_by_name(database).values()]


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
    found = {
        str(each.parent_name or "").partition(".")[2] or LONE_DATABASE: each.sessionmanager
        for each in database_containers(database)
    }
    if not found:
        raise ConfigurationError(
            "there is no DatabaseContainer in this container: give the manager itself"
        )
    return found


def database_containers(container: Any) -> Iterator[Any]:
    """Yield every `DatabaseContainer` in `container`, and itself if it is one."""
    # A manager alone needs no dependency-injector.
    from dependency_injector import providers

    from .containers import DatabaseContainer

    nested: list[Any] = list(container.traverse(types=[providers.Container]))
    for candidate in (container, *(provider.container for provider in nested)):
        declared = getattr(candidate, "declarative_parent", None)
        if declared is not None and issubclass(declared, DatabaseContainer):
            yield candidate
