"""`Lifespan`: open the resources of a container in order, and close them all."""

from __future__ import annotations

import asyncio
import inspect
import weakref
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Any, Generic, Literal, TypeAlias, TypeVar, cast, get_args

from dependency_injector import containers, providers
from sqlalchemy.ext.asyncio import AsyncSession

from ._database.runtime import database_of
from ._error_reports import chain_errors
from ._managers import database_containers
from .errors import ConfigurationError
from .manager import DatabaseSessionManager, require_migrations
from .settings import DatabaseSettings, as_settings

C = TypeVar("C", bound=containers.Container)
AnyResource: TypeAlias = "providers.Resource[Any]"
Migrations: TypeAlias = Literal["ignore", "require", "upgrade"]


class Lifespan(Generic[C]):
    """Open all resources of a container, and close them when the block ends.

    Each resource is opened after those that it depends on, and closed before them. If
    one fails to open, those already open are closed, and its error is raised. All are
    closed even if some fail: then the first error is raised after that, or noted on the
    error of the block. A Lifespan nested in another one of the same container, such as
    an app's inside a test's, closes only what it opened.

    It is an async context manager, and the `lifespan=` of FastAPI and Starlette.

    Args:
        container: An instance of a container.
        migrations: What to do about a database that has `migrations`, when it is open
            and before what depends on it. `"upgrade"` runs `migrate()`; `"require"`
            refuses to start while the database is behind; both start if it is ahead.

    Raises:
        ConfigurationError: `container` is no container. On entering: settings cannot
            work, an override cannot take effect, or no database has migrations.
        MigrationsPendingError: On entering: the database is behind, with `"require"`.

    Example:
        ```python
        async with Lifespan(Container()) as container:
            await container.notebook().add("milk")

        app = FastAPI(lifespan=Lifespan(Container()))
        ```
    """

    def __init__(self, container: C, *, migrations: Migrations = "ignore") -> None:
        given: Any = container
        if inspect.isclass(given) and issubclass(given, containers.DeclarativeContainer):
            name = given.__name__
            raise ConfigurationError(
                f"Lifespan needs a container, and {name} is a class: write Lifespan({name}())"
            )
        if not isinstance(given, containers.DynamicContainer | providers.Container):
            raise ConfigurationError(
                "Lifespan needs a container, such as Lifespan(Container()), and this is of type "
                f"{type(given).__name__}"
            )
        if migrations not in get_args(Migrations):
            raise ConfigurationError(
                f"Lifespan(migrations={migrations!r}): write 'ignore', 'require' or 'upgrade'"
            )
        self.container = container
        self._migrations: Migrations = migrations

    async def __aenter__(self) -> C:
        self.container.check_dependencies()
        for database in database_containers(self.container):
            _check_overrides(database)
        migrated = self._managers_to_migrate()
        is_nested = any(other.container is self.container for other in _active_lifespans)
        # The enclosing Lifespan has opened these, and will close them.
        self._already_started = [
            resource
            for resource in _in_dependency_order(self.container)
            if is_nested and resource.initialized
        ]
        self._started: list[AnyResource] = []
        _active_lifespans.add(self)
        try:
            for resource in _in_dependency_order(self.container):
                if resource not in self._already_started:
                    self._started.append(resource)
                    await _await_if_needed(resource.init())
                    if (manager := migrated.get(id(resource))) is not None:
                        await self._migrate(manager)
        except BaseException as error:
            await self.__aexit__(type(error), error, None)
            raise
        return self.container

    def _managers_to_migrate(self) -> dict[int, DatabaseSessionManager]:
        """Return the managers that have migrations, by the resources that open them."""
        if self._migrations == "ignore":
            return {}
        databases = list(database_containers(self.container))
        managers = {id(each.manager): each.sessionmanager() for each in databases}
        found = {key: each for key, each in managers.items() if each.migrations is not None}
        if not found:
            raise ConfigurationError(
                f"Lifespan(migrations={self._migrations!r}): no database of the container has any: "
                "write DatabaseContainer.nested(migrations='shop:migrations')"
            )
        return found

    async def _migrate(self, manager: DatabaseSessionManager) -> None:
        if self._migrations == "upgrade":
            await manager.migrate()
        else:
            await require_migrations(manager)

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        first = error
        _active_lifespans.discard(self)
        known = self._started + self._already_started
        started_later = [
            resource for resource in _in_dependency_order(self.container) if resource not in known
        ]
        for resource in reversed(self._started + started_later):
            try:
                if resource.initialized:
                    await _await_if_needed(cast(Any, resource).shutdown())
            except BaseException as failure:
                first = chain_errors(first, failure, "the shutdown of a resource")
        if first is not None and first is not error:
            raise first

    @asynccontextmanager
    async def __call__(self, app: object) -> AsyncGenerator[None]:
        """Open and close as `lifespan=` of an ASGI framework, which passes its app."""
        async with self:
            yield


_active_lifespans: weakref.WeakSet[Lifespan[Any]] = weakref.WeakSet()


async def _await_if_needed(result: Any) -> None:
    if asyncio.isfuture(result) or asyncio.iscoroutine(result):
        await result


def _in_dependency_order(container: containers.Container) -> Iterator[AnyResource]:
    """Yield all resources, each after those that it depends on, even indirectly.

    A resource over a provider, such as `manager` over `sessionmanager`, makes that
    provider ready to use: it comes before everything else that depends on the provider.
    """
    resources: list[AnyResource] = list(cast(Any, container).traverse(types=[providers.Resource]))
    resource_over = {id(resource.provides): resource for resource in resources}
    visited: set[int] = set()

    def visit(provider: Any) -> Iterator[AnyResource]:
        if id(provider) in visited:
            return
        visited.add(id(provider))
        for dependency in provider.related:
            yield from visit(dependency)
        if isinstance(provider, providers.Resource):
            yield provider
        elif id(provider) in resource_over:
            yield from visit(resource_over[id(provider)])

    for resource in resources:
        yield from visit(resource)


def _check_overrides(database: Any) -> None:
    """Reject overrides that cannot take effect.

    Raises:
        ConfigurationError: `manager` is overridden, or a provider was overridden after
            the object that depends on it had been built.
    """
    settings, sessionmanager = database.settings, database.sessionmanager
    prefix = f"{database.parent_name}." if database.parent_name else ""
    override = database.manager.last_overriding
    if override is not None and (
        getattr(override, "provides", None) is not sessionmanager.last_overriding
    ):
        raise ConfigurationError(
            f"{prefix}manager is overridden, but nothing depends on it: it only opens and closes "
            f"sessionmanager; override {prefix}sessionmanager"
        )
    if sessionmanager.overridden:
        return
    is_from_config = settings.provides == DatabaseSettings.load and not settings.overridden
    if is_from_config and settings() != DatabaseSettings.load(database.config()):
        raise ConfigurationError(
            f"{prefix}config was changed after settings were built from it: "
            f"call {prefix}settings.reset() first"
        )
    manager = sessionmanager()
    if manager.settings != as_settings(settings()) or manager.metadata is not database.metadata():
        raise ConfigurationError(
            f"{prefix}settings or metadata were overridden after sessionmanager was built from "
            f"others: call {prefix}sessionmanager.reset() first"
        )
    overridden = ""
    if database_of(manager).session_class is not (database.session_class() or AsyncSession):
        overridden = "session_class"
    elif manager.migrations != database.migrations():
        overridden = "migrations"
    if overridden:
        raise ConfigurationError(
            f"{prefix}{overridden} was overridden after sessionmanager was built with another: "
            f"call {prefix}sessionmanager.reset() first"
        )
