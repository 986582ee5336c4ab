"""Async SQLAlchemy sessions and transactions, delivered through dependency-injector containers."""

from .containers import DatabaseContainer
from .decorators import read_only, transactional
from .errors import (
    AlreadyInitializedError,
    CommitOutcomeUnknownError,
    ConcurrentSessionError,
    ConfigurationError,
    ConnectionFailedError,
    IncompatibleTransactionError,
    NoSessionError,
    NotInitializedError,
    OwnershipError,
    ScopeError,
    ScopeOwnsTransactionError,
    SessionwireError,
    TransactionError,
    TransactionForbiddenError,
    TransactionRequiredError,
    TransactionTimeoutError,
    UncommittedChangesWarning,
    UnexpectedRollbackError,
)
from .lifespan import Lifespan
from .manager import Base, DatabaseSessionManager, sessionmanager
from .plan import Propagation
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
    "IncompatibleTransactionError",
    "Lifespan",
    "NoSessionError",
    "NotInitializedError",
    "OwnershipError",
    "PoolSettings",
    "Propagation",
    "ScopeError",
    "ScopeOwnsTransactionError",
    "SessionwireError",
    "Settings",
    "TransactionError",
    "TransactionForbiddenError",
    "TransactionManager",
    "TransactionRequiredError",
    "TransactionTimeoutError",
    "UncommittedChangesWarning",
    "UnexpectedRollbackError",
    "read_only",
    "sessionmanager",
    "transactional",
]
