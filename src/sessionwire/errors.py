"""Everything that this library raises.

    SessionwireError
    ├── ConfigurationError            settings that cannot work; names the key, the source and the remedy
    ├── ConnectionFailedError         open() got no answer from the database
    ├── NotInitializedError           the manager is not open, or not any more
    ├── AlreadyInitializedError       init() on a manager that has an engine
    ├── OwnershipError                the manager belongs to another event loop or process
    ├── ScopeError
    │   ├── NoSessionError            no scope is open here, or the session's scope has ended
    │   ├── ConcurrentSessionError    two at the same moment on one session
    │   ├── ScopeOwnsTransactionError commit(), rollback(), … inside a block that does it itself
    │   └── ImplicitIOError           what is not loaded was used without await; a MissingGreenlet too
    ├── TransactionError
    │   ├── TransactionRequiredError      MANDATORY where no transaction is current
    │   ├── TransactionForbiddenError     NEVER where one is
    │   ├── IncompatibleTransactionError  it cannot be joined on these terms, or not be begun here
    │   ├── TransactionTimeoutError       its deadline has passed; a TimeoutError too
    │   ├── UnexpectedRollbackError       the block ended well, its work could not be kept
    │   └── CommitOutcomeUnknownError     the commit was sent, and no answer came
    └── SandboxError                  what cannot be had in a sandbox, or was left open in it

    UncommittedChangesWarning         a session() was written to and neither committed nor rolled back

Errors of the database stay SQLAlchemy's own.
"""

from sqlalchemy.exc import MissingGreenlet


class SessionwireError(Exception):
    """The root of the tree."""


class ConfigurationError(SessionwireError):
    """Settings that cannot work: the message names the key, where it came from, and the remedy."""


class ConnectionFailedError(SessionwireError):
    """The database did not answer `open()`: the message says what was tried, and why it failed."""


class NotInitializedError(SessionwireError):
    """The manager was used before `init()` or `open()`, or after `close()`."""

    def __init__(self, remedy: str) -> None:
        super().__init__("DatabaseSessionManager is not initialized")
        self.add_note(remedy)


class AlreadyInitializedError(SessionwireError):
    """`init()` was called on a manager that has an engine, which would leak."""

    def __init__(self, remedy: str) -> None:
        super().__init__("DatabaseSessionManager is already initialized")
        self.add_note(remedy)


class OwnershipError(SessionwireError):
    """The manager belongs to another event loop, which is open, or to the process that this one was forked from."""


class ScopeError(SessionwireError):
    """A session was used where, when or how it cannot be."""


class NoSessionError(ScopeError):
    """No scope is open in this context, or the scope of this session has ended."""


class ConcurrentSessionError(ScopeError):
    """A session serves one operation at a time, and only the code inside its innermost open block."""


class ScopeOwnsTransactionError(ScopeError):
    """Inside `transaction()` the block begins, commits, rolls back and closes; nobody else does."""


class ImplicitIOError(ScopeError, MissingGreenlet):
    """What is not loaded was used without await: the message names the attribute, and what loads it."""


class TransactionError(SessionwireError):
    """A transaction cannot be what was asked for, or did not end as its block did."""


class TransactionRequiredError(TransactionError):
    """A block with `Propagation.MANDATORY`, or what only a transaction has, where none is current."""


class TransactionForbiddenError(TransactionError):
    """A block with `Propagation.NEVER` inside a transaction."""


class IncompatibleTransactionError(TransactionError):
    """The current transaction cannot give what the block asks for: another isolation level, or writing."""


class TransactionTimeoutError(TransactionError, TimeoutError):
    """The block was not done before its deadline: all that was done in it was rolled back."""


class UnexpectedRollbackError(TransactionError):
    """The block ended well, but its transaction or savepoint was rolled back; the cause is attached."""


class CommitOutcomeUnknownError(TransactionError):
    """The commit was sent, and no answer came: it is not known whether it was carried out."""


class SandboxError(SessionwireError):
    """A deadlock on the one connection of a sandbox, what cannot be had on it, or what a test has left open in it."""


class UncommittedChangesWarning(UserWarning):
    """A `session()` block ended with changes that were neither committed nor rolled back: they are lost."""
