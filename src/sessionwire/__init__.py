"""Async SQLAlchemy sessions and transactions from dependency-injector containers."""

from importlib import import_module
from typing import TYPE_CHECKING

from ._core.definition import Propagation
from ._database.driver_errors import is_retryable
from .base import Base
from .credentials import Credentials
from .decorators import read_only, transactional
from .errors import (
    AlreadyInitializedError,
    CommitOutcomeUnknownError,
    ConcurrentSessionError,
    ConfigurationError,
    ConnectionFailedError,
    ImplicitIOError,
    IncompatibleTransactionError,
    MigrationError,
    MigrationsPendingError,
    NoSessionError,
    NotInitializedError,
    OwnershipError,
    SandboxError,
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
from .health import Health
from .manager import DatabaseSessionManager, sessionmanager
from .session import CurrentSession
from .settings import DatabaseSettings, PoolSettings, Settings
from .status import Holder, MigrationState, Status
from .transaction import TransactionManager

if TYPE_CHECKING:
    from .containers import DatabaseContainer, nested_container
    from .lifespan import Lifespan

# These need dependency-injector, which imports the web frameworks that it finds.
_LAZY_IMPORTS = {
    "DatabaseContainer": ".containers",
    "Lifespan": ".lifespan",
    "nested_container": ".containers",
}

__all__ = [
    "AlreadyInitializedError",
    "Base",
    "CommitOutcomeUnknownError",
    "ConcurrentSessionError",
    "ConfigurationError",
    "ConnectionFailedError",
    "Credentials",
    "CurrentSession",
    "DatabaseContainer",
    "DatabaseSessionManager",
    "DatabaseSettings",
    "Health",
    "Holder",
    "ImplicitIOError",
    "IncompatibleTransactionError",
    "Lifespan",
    "MigrationError",
    "MigrationState",
    "MigrationsPendingError",
    "NoSessionError",
    "NotInitializedError",
    "OwnershipError",
    "PoolSettings",
    "Propagation",
    "SandboxError",
    "ScopeError",
    "ScopeOwnsTransactionError",
    "SessionwireError",
    "Settings",
    "Status",
    "TransactionError",
    "TransactionForbiddenError",
    "TransactionManager",
    "TransactionRequiredError",
    "TransactionTimeoutError",
    "UncommittedChangesWarning",
    "UnexpectedRollbackError",
    "is_retryable",
    "nested_container",
    "read_only",
    "sessionmanager",
    "transactional",
]


def __getattr__(name: str) -> object:
    if name not in _LAZY_IMPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_LAZY_IMPORTS[name], __name__), name)
    return value
