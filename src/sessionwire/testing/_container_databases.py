"""The databases of a container under test: their templates, copies and overrides."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Generator, Iterable
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from functools import partial
from typing import Any

from dependency_injector import containers

from sessionwire._database.runtime import database_of
from sessionwire._managers import database_containers
from sessionwire.containers import DatabaseContainer
from sessionwire.manager import DatabaseSessionManager
from sessionwire.settings import DatabaseSettings

from ._substitution import override_settings
from .migrations import MigratedDatabase
from .overriding import overriding, providers_by_name
from .templates import DatabaseCopy, DatabaseTemplate, Seed


def build_container(container: Any) -> containers.Container:
    """Return the container itself, or the one that a class or function makes."""
    return container if isinstance(container, containers.Container) else container()


@asynccontextmanager
async def open_templates(
    container: containers.Container, server: DatabaseSettings, seed: Seed | None, *, run: str
) -> AsyncGenerator[list[DatabaseTemplate]]:
    """Open a template for each database of a container, in the order of their names.

    Args:
        container: The container.
        server: The settings of a database beside which the templates are made.
        seed: An async function that makes their tables and rows; by default
            `migrate()`, or `create_all()` for a database without migrations.
        run: The name of a test run, whose processes share the templates.
    """
    async with AsyncExitStack() as stack:
        yield [
            await stack.enter_async_context(
                DatabaseTemplate(server, partial(_seed, database, seed), key=f"{run} {name}")
            )
            for name, database in _databases_by_settings_name(container).items()
        ]


@asynccontextmanager
async def open_copies(
    templates: Iterable[DatabaseTemplate],
) -> AsyncGenerator[list[DatabaseCopy]]:
    """Open a copy of each template."""
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(template.copy()) for template in templates]


@asynccontextmanager
async def open_migrated(
    container: containers.Container, server: DatabaseSettings, runner: asyncio.Runner
) -> AsyncGenerator[list[MigratedDatabase]]:
    """Open an empty database for each of a container that has migrations."""
    async with AsyncExitStack() as stack:
        migrated: list[MigratedDatabase] = []
        for database in _databases_by_settings_name(container).values():
            if (migrations := database.migrations()) is not None:
                template = DatabaseTemplate(server, _leave_empty)
                copy = (await stack.enter_async_context(template)).copy()
                manager = DatabaseSessionManager(
                    (await stack.enter_async_context(copy)).settings,
                    metadata=database.metadata(),
                    migrations=migrations,
                )
                await stack.enter_async_context(manager)
                migrated.append(MigratedDatabase(manager, runner))
        yield migrated


async def _leave_empty(_: DatabaseSessionManager) -> None: ...


@contextmanager
def override_databases(
    container: containers.Container, settings: Iterable[DatabaseSettings]
) -> Generator[containers.Container]:
    """Put each database of a container, in the order of their names, on another one."""
    own = dict(zip(_databases_by_settings_name(container), settings, strict=True))
    overrides: dict[str, object] = {**own}
    for name in own:  # The other server has other passwords.
        overrides[f"{name.removesuffix('settings')}credentials"] = None
    with ExitStack() as stack:
        for name, manager in managers_by_settings_name(container).items():
            # keep the manager itself: modules may have taken it when they were imported
            stack.enter_context(override_settings(database_of(manager), own[name]))
            overrides[f"{name.removesuffix('settings')}sessionmanager"] = manager
        yield stack.enter_context(overriding(container, **overrides))


def managers_by_settings_name(
    container: containers.Container,
) -> dict[str, DatabaseSessionManager]:
    """Return the managers of a container, except for those that have no settings yet."""
    managers: dict[str, DatabaseSessionManager] = {}
    for name, database in _databases_by_settings_name(container).items():
        try:
            managers[name] = database.sessionmanager()
        except Exception:  # without settings of its own, it cannot have been built before
            continue
    return managers


def _databases_by_settings_name(container: containers.Container) -> dict[str, DatabaseContainer]:
    """Return the databases of a container, sorted by the names of their settings."""
    names = {provider: name for name, provider in providers_by_name(container).items()}
    found = {names[database.settings]: database for database in database_containers(container)}
    return dict(sorted(found.items()))


async def _seed(
    database: DatabaseContainer, seed: Seed | None, manager: DatabaseSessionManager
) -> None:
    manager.metadata, manager.migrations = database.metadata(), database.migrations()
    if seed is not None:
        await seed(manager)
    elif manager.migrations is not None:
        await manager.migrate()
    else:
        await _create_tables(manager)


async def _create_tables(manager: DatabaseSessionManager) -> None:
    async with manager.connect() as connection:
        await manager.create_all(connection)
