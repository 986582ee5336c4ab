"""Errors of code that uses a session in a way that its scope does not allow."""

from __future__ import annotations

from sessionwire.errors import (
    ConcurrentSessionError,
    IncompatibleTransactionError,
    OwnershipError,
    ScopeError,
    ScopeOwnsTransactionError,
)


def already_entered_error() -> ScopeError:
    return ScopeError("a block can be entered only once: call transaction() or session() again")


def concurrent_use_error(reason: str) -> ConcurrentSessionError:
    return ConcurrentSessionError(
        f"a session serves one operation at a time: {reason}. In a task of its own, work in "
        "session() or in transaction(Propagation.REQUIRES_NEW), or start it with "
        "transaction.detached()"
    )


def managed_transaction_error(call: str) -> ScopeOwnsTransactionError:
    return ScopeOwnsTransactionError(
        f"{call} is not allowed inside transaction(), which commits when the block ends. To "
        "roll back, raise or call set_rollback_only(); to roll back a part, use "
        "Propagation.NESTED; to commit yourself, use session()"
    )


def other_loop_error() -> OwnershipError:
    return OwnershipError(
        "the session of the enclosing block belongs to another event loop or process: use it only "
        "there, as with asyncio.run_coroutine_threadsafe() from a thread, or make a manager for "
        "each"
    )


def second_writer_error() -> IncompatibleTransactionError:
    return IncompatibleTransactionError(
        "SQLite allows one writer, and the enclosing transaction is writing: join it, use "
        "Propagation.NESTED, or run this later with on_commit(), or in a task with detached()"
    )


def inner_durable_error(line: str) -> IncompatibleTransactionError:
    return IncompatibleTransactionError(
        "durable=True asks that all of this block is committed at its end, and it is inside the "
        f"transaction that was opened at {line}: call it before or after that one, leave out "
        "durable=True to join it, or use Propagation.REQUIRES_NEW without it"
    )


def write_in_iteration_error() -> IncompatibleTransactionError:
    """Make the error of a write that would silently leave the enclosing transaction."""
    return IncompatibleTransactionError(
        "an async generator that this code iterates over has opened a session of its own, so this "
        "write would go there and not to the transaction around the loop: fetch all items before "
        "you write, use the session that transaction() gave you, or write in "
        "transaction(Propagation.REQUIRES_NEW)"
    )
