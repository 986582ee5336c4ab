"""`DatabaseContainer`: the providers of one database, for a container of your own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar, cast, overload

from dependency_injector import containers, providers
from sqlalchemy.ext.asyncio import AsyncSession

from .base import Base
from .manager import DatabaseSessionManager
from .session import CurrentSession
from .settings import DatabaseSettings
from .transaction import TransactionManager

C = TypeVar("C", bound=containers.DeclarativeContainer)
S = TypeVar("S", bound=AsyncSession)
# The session class of a container, and the class of what stands for its sessions.
if TYPE_CHECKING:
    # Before Python 3.13 only this one has a default.
    from typing_extensions import TypeVar as TypeVarWithDefault

    SessionT = TypeVarWithDefault("SessionT", bound=AsyncSession, default=AsyncSession)
    CurrentT = TypeVarWithDefault("CurrentT", bound=AsyncSession, default=CurrentSession)
else:
    SessionT, CurrentT = TypeVar("SessionT"), TypeVar("CurrentT")


def nested_container(container_class: type[C], /, **overriding_providers: Any) -> C:
    """Nest a container in another one, so that type checkers know its providers.

    It returns `providers.Container(container_class, …)`, of which they know nothing. To
    them the result is the nested container itself.

    Args:
        container_class: The class of the nested container. Of a `DatabaseContainer`,
            call `nested()` instead.
        **overriding_providers: A provider, or the object to provide, by the name of the
            provider that it overrides.

    Raises:
        AttributeError: The nested container has no provider of such a name.

    Example:
        ```python
        class Databases(containers.DeclarativeContainer):
            shop = DatabaseContainer.nested(settings="sqlite:///shop.db")


        class Container(containers.DeclarativeContainer):
            databases = nested_container(Databases)
            notes = providers.Factory(NoteRepository, session=databases.shop.session)
        ```
    """
    return cast(C, providers.Container(container_class, **overriding_providers))


class _Shared(dict[str, Any]):
    """Options that copies of a container share: a TLS context, say, has no copy."""

    def __deepcopy__(self, memo: object) -> Self:
        return self


class DatabaseContainer(containers.DeclarativeContainer, Generic[SessionT, CurrentT]):
    """Provide one database: its manager, sessions and transactions.

    `sessionmanager` provides the manager; `manager` is the resource that opens and
    closes it, for `Lifespan`. Nothing depends on the resource, so nothing above the
    database becomes awaitable. Inject `session` into repositories, and `transaction`
    into services.

    Args:
        settings: A `DatabaseSettings`, or a URL, or a provider of one of them.
        config: Raw values in place of `settings`, as `Configuration` providers hold
            them.
        metadata: The `MetaData` of the models; that of `Base` by default.
        migrations: The directory of the migrations, or that of a package, such as
            `"shop:migrations"`.
        session_settings: A function that returns the server's settings for a
            transaction, or a provider of one.
        credentials: A function that returns the password of a new connection, or a
            provider of one.
        session_class: The class of the sessions, derived from `AsyncSession`.
        session_options: Arguments for its constructor.
        engine_options: Arguments for SQLAlchemy's `create_async_engine()`.
        connect_args: Arguments for the driver's `connect()`.

    Raises:
        ConfigurationError: A value is wrong, missing or unknown. Raised when the first
            object is built, or by `Lifespan`.

    Example:
        ```python
        class Container(containers.DeclarativeContainer):
            db = DatabaseContainer.nested(settings="sqlite://")
            notes = providers.Factory(NoteRepository, session=db.session)
            notebook = providers.Factory(
                Notebook, notes=notes, transaction=db.transaction
            )


        async with Lifespan(Container()) as container:
            await container.notebook().add("milk")
        ```
    """

    config = providers.Configuration()
    settings = providers.ThreadSafeSingleton(DatabaseSettings.load, config)
    metadata = providers.Object(Base.metadata)
    migrations: providers.Provider[Any] = providers.Object(None)
    session_settings: providers.Provider[Any] = providers.Object(None)
    credentials: providers.Provider[Any] = providers.Object(None)
    session_class: providers.Provider[Any] = providers.Object(None)
    session_options: providers.Provider[Any] = providers.Object(None)
    engine_options: providers.Provider[Any] = providers.Object(None)
    connect_args: providers.Provider[Any] = providers.Object(None)
    sessionmanager: providers.ThreadSafeSingleton[DatabaseSessionManager[SessionT]]
    sessionmanager = providers.ThreadSafeSingleton(
        DatabaseSessionManager,
        settings,
        metadata=metadata,
        migrations=migrations,
        session_settings=session_settings,
        credentials=credentials,
        session_class=session_class,
        session_options=session_options,
        engine_options=engine_options,
        connect_args=connect_args,
    )
    manager: providers.Resource[DatabaseSessionManager[SessionT]]
    manager = providers.Resource(sessionmanager)
    session: providers.Factory[CurrentT]
    session = providers.Factory(cast("type[CurrentT]", CurrentSession), sessionmanager)
    transaction: providers.Factory[TransactionManager[SessionT]]
    transaction = providers.Factory(
        cast("type[TransactionManager[SessionT]]", TransactionManager), sessionmanager
    )

    @overload
    @classmethod
    def nested(
        cls, *, session_class: type[S], **overriding_providers: Any
    ) -> DatabaseContainer[S, S]: ...

    @overload
    @classmethod
    def nested(cls, **overriding_providers: Any) -> Self: ...

    @classmethod
    def nested(cls, **overriding_providers: Any) -> Any:
        """Nest the database in a container: `db = DatabaseContainer.nested(settings=…)`.

        It returns `providers.Container(DatabaseContainer, …)`. mypy and pyright know
        what its providers give: `db.session()` is a `CurrentSession`, or of the
        `session_class` that is given here.

        Args:
            **overriding_providers: `settings` and the like: a provider, or the object
                to provide.

        Raises:
            AttributeError: There is no provider of such a name.
        """
        for name in ("session_options", "engine_options", "connect_args"):
            if isinstance(overriding_providers.get(name), Mapping):
                overriding_providers[name] = _Shared(overriding_providers[name])
        return nested_container(cls, **overriding_providers)
