"""Combine and describe errors: which one a block raises, and what is noted on it."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy.exc import PendingRollbackError

from .errors import UnexpectedRollbackError


def in_short(error: BaseException) -> str:
    """Its type and first line: the lines after it, of SQLAlchemy's errors, are SQL and its parameters."""
    return f"{type(error).__name__}: {error}".partition("\n")[0]


def name_cause(error: BaseException, failed: Sequence[BaseException]) -> None:
    """Give a `PendingRollbackError` the failure as its cause that made the transaction end; SQLAlchemy gives none."""
    if isinstance(error, PendingRollbackError) and error.__cause__ is None and failed:
        error.__cause__ = failed[0]


def after(first: BaseException | None, later: BaseException, what: str) -> BaseException:
    """What to raise: the first, and the later one is a note on it; but a cancellation or an exit goes on."""
    if first is None:
        return later
    if isinstance(later, Exception) or not isinstance(first, Exception):
        first.add_note(f"then {what} failed: {in_short(later)}")
        return first
    later.__cause__ = first
    return later


def lost_after(reason: BaseException) -> UnexpectedRollbackError:
    """What to raise where all seemed well, but a failure was caught on the way."""
    error = UnexpectedRollbackError(
        str(reason)  # which has a remedy of its own
        if isinstance(reason, UnexpectedRollbackError)
        else "what was done was rolled back, although this block ended well, because of a failure that was caught in "
        f"it: {in_short(reason)}; what may fail and be caught belongs into transaction(Propagation.NESTED)"
    )
    error.__cause__ = reason
    return error


def cut_off() -> UnexpectedRollbackError:
    return UnexpectedRollbackError("the manager was closed before this block ended: all was rolled back")
