"""`Lifespan`: opens a container's resources in order of dependency, and closes them all, whatever fails."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Any, Generic, TypeAlias, TypeVar, cast

from dependency_injector import containers, providers

from ._error_reports import chain_errors
from .containers import DatabaseContainer
from .errors import ConfigurationError
from .manager import DatabaseSessionManager
from .settings import DatabaseSettings, settings_of

C = TypeVar("C", bound=containers.Container)
AnyResource: TypeAlias = "providers.Resource[Any]"


class Lifespan(Generic[C]):
    """`async with Lifespan(container) as container:`, and `FastAPI(lifespan=Lifespan(container))` or Starlette's alike.

    Where a resource fails to start, those already started are shut down, and its error is raised. At the end all are
    shut down, dependents first; the first failure is raised after that, or noted on the error of the block. One inside
    another of the same container, as that of an application in a test, leaves it as it found it.
    """

    def __init__(self, container: C) -> None:
        given: Any = container
        if not isinstance(given, containers.DynamicContainer | providers.Container):
            raise ConfigurationError(_meant_by(given))
        self.container = container
        self._started: list[AnyResource] = []
        self._found: list[AnyResource] = []  # which another one around this has started, and ends

    async def __aenter__(self) -> C:
        self.container.check_dependencies()
        for database in databases(self.container):
            _check_overrides(database)
        self._started.clear()
        is_inner = any(other.container is self.container for other in _open)
        self._found = [each for each in _in_order(self.container) if each.initialized] if is_inner else []
        _open.add(self)
        try:
            for resource in _in_order(self.container):
                if resource not in self._found:
                    self._started.append(resource)
                    await _settled(resource.init())
        except BaseException as error:
            await self._shut_down(error)
            raise
        return self.container

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._shut_down(error)

    @asynccontextmanager
    async def __call__(self, app: object) -> AsyncGenerator[None]:
        """As an ASGI framework calls it."""
        async with self:
            yield

    async def _shut_down(self, error: BaseException | None) -> None:
        first = error
        _open.discard(self)
        known = self._started + self._found
        started_later = [resource for resource in _in_order(self.container) if resource not in known]
        for resource in reversed(self._started + started_later):
            try:
                if resource.initialized:
                    await _settled(cast(Any, resource).shutdown())
            except BaseException as failure:
                first = chain_errors(first, failure, "the shutdown of a resource")
        if first is not None and first is not error:
            raise first


def _meant_by(given: object) -> str:
    kind = type(given).__name__
    if isinstance(given, type) and issubclass(given, containers.DeclarativeContainer):
        return f"Lifespan needs a container, and {given.__name__} is a class: write Lifespan({given.__name__}())"
    return f"Lifespan needs a container, such as Lifespan(Container()), and this is of type {kind}"


_open: weakref.WeakSet[Lifespan[Any]] = weakref.WeakSet()


async def _settled(result: Any) -> None:
    if asyncio.isfuture(result) or asyncio.iscoroutine(result):
        await result


def _in_order(container: containers.Container) -> Iterator[AnyResource]:
    """All resources, each after those that it depends on, also through other providers.

    A resource over a provider, as `manager` is over `sessionmanager`, makes that one ready to use: it comes before
    all else that depends on that provider.
    """
    resources: list[AnyResource] = list(cast(Any, container).traverse(types=[providers.Resource]))
    readied_by = {id(resource.provides): resource for resource in resources}
    visited: set[int] = set()

    def visit(provider: Any) -> Iterator[AnyResource]:
        if id(provider) in visited:
            return
        visited.add(id(provider))
        for dependency in provider.related:
            yield from visit(dependency)
        if isinstance(provider, providers.Resource):
            yield provider
        elif id(provider) in readied_by:
            yield from visit(readied_by[id(provider)])

    for resource in resources:
        yield from visit(resource)


def managers_of(database: Any) -> list[DatabaseSessionManager]:
    """Return the managers of all databases in a container; of a manager, itself.

    Raises:
        ConfigurationError: The container has no database.
    """
    if isinstance(database, DatabaseSessionManager):
        return [database]
    managers = [found.sessionmanager() for found in databases(database)]
    if not managers:
        raise ConfigurationError("there is no DatabaseContainer in this container: give the manager itself")
    return managers


def databases(container: Any) -> Iterator[Any]:
    """The `DatabaseContainer`s in it, itself included."""
    nested: list[Any] = list(container.traverse(types=[providers.Container]))
    for candidate in (container, *(provider.container for provider in nested)):
        declared = getattr(candidate, "declarative_parent", None)
        if declared is not None and issubclass(declared, DatabaseContainer):
            yield candidate


def _check_overrides(database: Any) -> None:
    """Refuse the overrides that cannot take effect. Raises `ConfigurationError`."""
    settings, sessionmanager = database.settings, database.sessionmanager
    name = f"{database.parent_name}." if database.parent_name else ""
    switch = database.manager.last_overriding
    if switch is not None and getattr(switch, "provides", None) is not sessionmanager.last_overriding:
        raise ConfigurationError(
            f"{name}manager is overridden, but nothing depends on it: it only opens and closes sessionmanager; "
            f"override {name}sessionmanager"
        )
    if sessionmanager.overridden:
        return
    from_config = settings.provides == DatabaseSettings.load and not settings.overridden
    if from_config and settings() != DatabaseSettings.load(database.config()):
        raise ConfigurationError(
            f"{name}config was changed after settings were built from it: call {name}settings.reset() first"
        )
    if sessionmanager().settings != settings_of(settings()) or sessionmanager().metadata is not database.metadata():
        raise ConfigurationError(
            f"{name}settings or metadata were overridden after sessionmanager was built from others: "
            f"call {name}sessionmanager.reset() first"
        )
