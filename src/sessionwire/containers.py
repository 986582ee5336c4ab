"""`DatabaseContainer`: the providers of one database, for a container of your own."""

from __future__ import annotations

from typing import Any, Self, TypeVar, cast

from dependency_injector import containers, providers

from .base import Base
from .manager import DatabaseSessionManager
from .session import CurrentSession
from .settings import DatabaseSettings
from .transaction import TransactionManager

C = TypeVar("C", bound=containers.DeclarativeContainer)


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


class DatabaseContainer(containers.DeclarativeContainer):
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
        session_settings: A function that returns the server's settings for a
            transaction, or a provider of one.
        credentials: A function that returns the password of a new connection, or a
            provider of one.

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
    session_settings: providers.Provider[Any] = providers.Object(None)
    credentials: providers.Provider[Any] = providers.Object(None)
    sessionmanager = providers.ThreadSafeSingleton(
        DatabaseSessionManager,
        settings,
        metadata=metadata,
        session_settings=session_settings,
        credentials=credentials,
    )
    manager = providers.Resource(sessionmanager)
    session = providers.Factory(CurrentSession, sessionmanager)
    transaction = providers.Factory(TransactionManager, sessionmanager)

    @classmethod
    def nested(cls, **overriding_providers: Any) -> Self:
        """Nest the database in a container: `db = DatabaseContainer.nested(settings=…)`.

        It returns `providers.Container(DatabaseContainer, …)`. mypy and pyright know
        what its providers give: `db.session()` is a `CurrentSession`.

        Args:
            **overriding_providers: `settings` and the like: a provider, or the object
                to provide.

        Raises:
            AttributeError: There is no provider of such a name.
        """
        return nested_container(cls, **overriding_providers)
