"""Combine and describe errors: which one a block raises, and what is noted on it."""

from __future__ import annotations

from sqlalchemy.exc import PendingRollbackError

from .errors import CommitOutcomeUnknownError, UnexpectedRollbackError


def summarize(error: BaseException) -> str:
    """Return the type and first line of an error.

    In SQLAlchemy's errors, the other lines are SQL and its parameters.
    """
    return f"{type(error).__name__}: {error}".partition("\n")[0]


def explain_pending_rollback(error: BaseException, first: BaseException | None) -> None:
    """Make the first failure the cause of a `PendingRollbackError`, which has none."""
    if isinstance(error, PendingRollbackError) and error.__cause__ is None:
        error.__cause__ = first


def chain_errors(first: BaseException | None, later: BaseException, action: str) -> BaseException:
    """Combine two errors into the one to raise.

    The first error is kept and the later one noted on it, unless the later one is a
    cancellation or an exit.

    Args:
        first: The error raised so far, or None.
        later: The error that `action` raised after it.
        action: What failed last, to complete "then … failed".
    """
    if first is None:
        return later
    if isinstance(later, Exception) or not isinstance(first, Exception):
        first.add_note(f"then {action} failed: {summarize(later)}")
        return first
    later.__cause__ = first
    return later


def not_committed(kept: BaseException | None, failure: BaseException) -> BaseException:
    """Return what to raise if a block can't commit.

    Args:
        kept: The error after which it was to commit, named by `no_rollback_for`. It is
            raised, and says why all was rolled back.
        failure: Why it can't commit. It is raised if it is a cancellation or an exit,
            or if the outcome is unknown.
    """
    if kept is None:
        return failure
    if not isinstance(failure, Exception) or isinstance(failure, CommitOutcomeUnknownError):
        return failure
    cause = failure.__cause__ if isinstance(failure, UnexpectedRollbackError) else None
    kept.add_note(f"rolled back in spite of no_rollback_for: {summarize(cause or failure)}")
    return kept


def unexpected_rollback(cause: BaseException) -> UnexpectedRollbackError:
    """Make the error of a block that finished normally after an error was caught."""
    error = UnexpectedRollbackError(
        str(cause)  # It names a remedy of its own.
        if isinstance(cause, UnexpectedRollbackError)
        else "the block finished normally, but its transaction was rolled back, because an "
        f"error inside it had been caught: {summarize(cause)}. Put code whose errors you catch "
        "in transaction(Propagation.NESTED)"
    )
    error.__cause__ = cause
    return error


def closed_while_open_error() -> UnexpectedRollbackError:
    """Make the error for a block that was still open when its manager was closed."""
    return UnexpectedRollbackError(
        "the manager was closed before this block ended, so all was rolled back: end the block "
        "before close(), or give it more time with drain_timeout"
    )
