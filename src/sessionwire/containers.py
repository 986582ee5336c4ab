"""`DatabaseContainer`: a database as providers, to be used in a container of one's own."""

from __future__ import annotations

from dependency_injector import containers, providers

from .base import Base
from .manager import DatabaseSessionManager
from .session import CurrentSession
from .settings import DatabaseSettings
from .transaction import TransactionManager


class DatabaseContainer(containers.DeclarativeContainer):
    """Give it `settings=` (a `DatabaseSettings`, or a URL) or `config=` (raw values), and start it with `Lifespan`.

    `sessionmanager` is the manager, `manager` its switch: nothing depends on the `Resource`, so nothing above it
    becomes awaitable.
    """

    config = providers.Configuration()
    settings = providers.ThreadSafeSingleton(DatabaseSettings.load, config)
    metadata = providers.Object(Base.metadata)
    sessionmanager = providers.ThreadSafeSingleton(DatabaseSessionManager, settings, metadata=metadata)
    manager = providers.Resource(sessionmanager)
    session = providers.Factory(CurrentSession, sessionmanager)
    transaction = providers.Factory(TransactionManager, sessionmanager)
