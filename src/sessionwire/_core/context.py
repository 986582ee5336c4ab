"""Find the blocks that enclose the running code, and the current scope.

A context variable holds the innermost frame. It is never reset with a token. Look-ups
skip frames that have ended, so blocks may end in any order, and in another task than
they began in.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING

from sessionwire._database.call_sites import line_of
from sessionwire._database.runtime import Database
from sessionwire.errors import NoSessionError

from .usage_errors import inner_durable_error, second_writer_error

if TYPE_CHECKING:
    from .scope import Scope


class Frame:
    """One `async with` in the chain of enclosing blocks. `scope` is None after it has ended."""

    __slots__ = ("aborted_by", "parent", "scope")

    def __init__(self, scope: Scope, parent: Frame | None) -> None:
        self.scope: Scope | None = scope
        self.parent = parent
        self.aborted_by: Database | None = None  # whose close() ended it


current_frame: ContextVar[Frame | None] = ContextVar("sessionwire_current_frame", default=None)


def enclosing_frames() -> Iterator[tuple[Frame, Scope]]:
    """Yield the open frames around the running code with their scopes, innermost first."""
    frame = current_frame.get()
    while frame is not None:
        if frame.scope is not None:
            yield frame, frame.scope
        frame = frame.parent


def innermost_open_frame() -> Frame | None:
    frame = current_frame.get()
    while frame is not None and frame.scope is None:
        frame = frame.parent
    return frame


def current_scope(database: Database) -> Scope | None:
    """Return the innermost open scope of this database in this context."""
    # Inlined for speed: every use of a CurrentSession goes through here.
    frame = current_frame.get()
    while frame is not None and (frame.scope is None or frame.scope.database is not database):
        frame = frame.parent
    return frame.scope if frame is not None else None


def enclosing_scopes(database: Database) -> set[Scope]:
    """Return all open scopes of this database in this context."""
    return {scope for _, scope in enclosing_frames() if scope.database is database}


def require_scope(database: Database) -> Scope:
    """Return the innermost open scope.

    Raises:
        NoSessionError: There is none.
    """
    scope = current_scope(database)
    if scope is None:
        raise _no_session_error(database)
    return scope


def require_no_enclosing_writer(database: Database) -> None:
    """Check that no enclosing transaction holds SQLite's write lock.

    Waiting for it would never end.

    Raises:
        IncompatibleTransactionError: One holds it.
    """
    if database.is_sqlite and any(scope.holds_write_lock for scope in enclosing_scopes(database)):
        raise second_writer_error()


def require_no_enclosing_transaction(database: Database) -> None:
    """Check that no transaction encloses the running code.

    Raises:
        IncompatibleTransactionError: One is.
    """
    for _, scope in enclosing_frames():
        if scope.database is database and scope.transaction is not None:
            raise inner_durable_error(line_of(scope.call_site))


def _no_session_error(database: Database) -> NoSessionError:
    frame = current_frame.get()
    while frame is not None and frame.aborted_by is not database:
        frame = frame.parent
    if frame is not None:
        return NoSessionError(
            "the session that was open here is gone: close() of the manager has rolled it back"
        )
    if database.has_unit_of_finished_task():
        return NoSessionError(
            "no session is found here, though one is open: its block was entered in another task, "
            "as asyncio.wait_for() does before Python 3.12. Write 'async with "
            "asyncio.timeout(…):' around it instead"
        )
    mix_up = (
        "one of another database is, was the right one injected? "
        if any(enclosing_frames())
        else ""
    )
    error = NoSessionError(
        f"no session is open here: {mix_up}wrap the call in transaction(), @transactional or "
        "session()"
    )
    error.add_note(
        "Code that outlives the enclosing block, such as a streaming body or a background task, "
        "must open its own session(). A request's transaction ends when its response begins."
    )
    return error
