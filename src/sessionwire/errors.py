"""The exceptions and the warning of this library, in one tree.

    SessionwireError
    ├── ConfigurationError              settings or overrides cannot work
    ├── ConnectionFailedError           open() could not reach the database
    ├── NotInitializedError             the manager is not open yet, or closed already
    ├── AlreadyInitializedError         init() on a manager that has an engine
    ├── OwnershipError                  the manager belongs to another event loop or process
    ├── ScopeError
    │   ├── NoSessionError              no block is open here, or the session has ended
    │   ├── ConcurrentSessionError      two operations at once on one session
    │   ├── ScopeOwnsTransactionError   commit(), rollback() and the like in transaction()
    │   └── ImplicitIOError             an unloaded attribute was used without await
    ├── TransactionError
    │   ├── TransactionRequiredError      MANDATORY without a transaction
    │   ├── TransactionForbiddenError     NEVER inside a transaction
    │   ├── IncompatibleTransactionError  the current transaction lacks what a block needs
    │   ├── TransactionTimeoutError       the deadline of a block has passed
    │   ├── UnexpectedRollbackError       the block finished, its transaction rolled back
    │   └── CommitOutcomeUnknownError     the commit was sent, and no answer came
    ├── MigrationError                  a migration was refused, or did not end in time
    │   └── MigrationsPendingError        the database lacks migrations of this build
    └── SandboxError                    a sandbox cannot do this, or a test left it open

    UncommittedChangesWarning           a session() block ended with uncommitted changes

Errors of the database stay SQLAlchemy's own.
"""

from sqlalchemy.exc import MissingGreenlet


class SessionwireError(Exception):
    """The base class of all errors of this library: catch it to catch them all."""


class ConfigurationError(SessionwireError):
    """Settings cannot work, or an override cannot take effect. Nothing was opened.

    The message names the key, its source and the remedy. It shows no password.
    """


class ConnectionFailedError(SessionwireError):
    """`open()` could not reach the database, or was refused by it.

    The message says what was tried and why it failed: see whether the database runs,
    and whether host, user and database are right.
    """


class NotInitializedError(SessionwireError):
    """The manager was used before `init()` or `open()`, or after `close()`.

    Start the container with `Lifespan`, or call `init(url)`.
    """

    def __init__(self, remedy: str) -> None:
        super().__init__("DatabaseSessionManager is not initialized")
        self.add_note(remedy)


class AlreadyInitializedError(SessionwireError):
    """`init()` was called on a manager that has an engine, which would leak.

    Call `close()` first, or make a second manager.
    """

    def __init__(self, remedy: str) -> None:
        super().__init__("DatabaseSessionManager is already initialized")
        self.add_note(remedy)


class OwnershipError(SessionwireError):
    """The manager was used in another event loop or process than the one it belongs to.

    Its own event loop is still open, or this process was forked from its own. Make a
    manager for each event loop and process, or call `close()` in the first one.
    """


class ScopeError(SessionwireError):
    """A session or block was used in a wrong place, at a wrong time, or twice.

    Raised itself if a block is entered a second time: call `transaction()` or
    `session()` again for each block.
    """


class NoSessionError(ScopeError):
    """No block is open in this context, or the block of this session has ended.

    Wrap the call in `transaction()`, `@transactional` or `session()`.
    """


class ConcurrentSessionError(ScopeError):
    """Two tasks used one session at once, or one used it past an inner block.

    A session runs one operation at a time, and only for code inside its innermost open
    block. Run the operations one after the other, or open a `session()` in each task.
    """


class ScopeOwnsTransactionError(ScopeError):
    """`commit()`, `rollback()`, `begin()` or `close()` was called in `transaction()`.

    The block does that itself. End it to commit; raise or call `set_rollback_only()` to
    roll back; use `session()` to commit by hand.
    """


class ImplicitIOError(ScopeError, MissingGreenlet):
    """An attribute that is not loaded was used without `await`.

    The message names the attribute, and how to load it.
    """


class TransactionError(SessionwireError):
    """The base class of errors about transactions."""


class TransactionRequiredError(TransactionError):
    """`Propagation.MANDATORY` or a call that needs a transaction found none.

    Wrap the call in `transaction()` or `@transactional`.
    """


class TransactionForbiddenError(TransactionError):
    """A block with `Propagation.NEVER` was entered inside a transaction.

    Call it before the transaction or after it.
    """


class IncompatibleTransactionError(TransactionError):
    """The current transaction cannot give what a block or statement needs.

    It has another isolation level or other execution options, or is read-only; on
    SQLite, it is the one writer. Request the options in the outermost block, or use
    `Propagation.REQUIRES_NEW`; the message names the case. The transaction goes on.
    """


class TransactionTimeoutError(TransactionError, TimeoutError):
    """The deadline of a block passed before its end; its work was rolled back.

    Give it a longer `timeout`, or do less in one transaction.
    """


class UnexpectedRollbackError(TransactionError):
    """The block finished normally, but its transaction or savepoint was rolled back.

    Most often an error inside it was caught; that error is the cause. Let errors leave
    the block, or put code whose errors you catch in `transaction(Propagation.NESTED)`.
    """


class CommitOutcomeUnknownError(TransactionError):
    """The commit was sent, and no answer came: nobody can tell whether it took effect.

    Look in the database before repeating the work.

    Attributes:
        transaction_id: PostgreSQL's id of the transaction, or None if it is not known.
        reason: Why the outcome could not be settled.
    """

    def __init__(
        self, message: str = "", *, transaction_id: int | None = None, reason: str = ""
    ) -> None:
        super().__init__(message)
        self.transaction_id = transaction_id
        self.reason = reason


class MigrationError(SessionwireError):
    """A migration was refused or not finished; the message says why, and what to do.

    What belongs to its transaction was rolled back. On PostgreSQL and SQLite that is
    all, except for statements in an `autocommit_block()`.
    """


class MigrationsPendingError(MigrationError):
    """The database is behind: it lacks migrations that this build of the program has.

    Run `alembic upgrade head` or `await manager.migrate()` before the program starts,
    or let it do so itself: `Lifespan(container, migrations="upgrade")`.
    """


class SandboxError(SessionwireError):
    """A sandbox deadlocked on its one connection, or a test left something open in it.

    Also raised for what one connection cannot do. The message names the call sites; use
    a copy of a `DatabaseTemplate` for tests that need several connections.
    """


class UncommittedChangesWarning(UserWarning):
    """A `session()` block ended with uncommitted changes, which are lost.

    Call `commit()` in the block, or use `transaction()`.
    """
