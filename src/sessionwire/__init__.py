"""Async SQLAlchemy sessions and transactions, delivered through dependency-injector containers."""

from .containers import DatabaseContainer
from .decorators import transactional
from .errors import (
    AlreadyInitializedError,
    CommitOutcomeUnknownError,
    ConcurrentSessionError,
    ConfigurationError,
    ConnectionFailedError,
    NoSessionError,
    NotInitializedError,
    OwnershipError,
    ScopeError,
    ScopeOwnsTransactionError,
    SessionwireError,
    TransactionError,
    UncommittedChangesWarning,
    UnexpectedRollbackError,
)
from .lifespan import Lifespan
from .manager import Base, DatabaseSessionManager, sessionmanager
from .session import CurrentSession
from .settings import DatabaseSettings, PoolSettings, Settings
from .transaction import TransactionManager

__all__ = [
    "AlreadyInitializedError",
    "Base",
    "CommitOutcomeUnknownError",
    "ConcurrentSessionError",
    "ConfigurationError",
    "ConnectionFailedError",
    "CurrentSession",
    "DatabaseContainer",
    "DatabaseSessionManager",
    "DatabaseSettings",
    "Lifespan",
    "NoSessionError",
    "NotInitializedError",
    "OwnershipError",
    "PoolSettings",
    "ScopeError",
    "ScopeOwnsTransactionError",
    "SessionwireError",
    "Settings",
    "TransactionError",
    "TransactionManager",
    "UncommittedChangesWarning",
    "UnexpectedRollbackError",
    "sessionmanager",
    "transactional",
]
