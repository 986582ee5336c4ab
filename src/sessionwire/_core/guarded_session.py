"""SQLAlchemy's session with the rules of its scope.

It runs one operation at a time, and only its block commits. Lazy loads,
`awaitable_attrs` and `run_sync()` pass through here too.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from greenlet import getcurrent, greenlet
from sqlalchemy import Connection, Executable, TextClause, event
from sqlalchemy.exc import InvalidRequestError, PendingRollbackError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.orm import Session, SessionTransaction
from sqlalchemy.util import await_only

from sessionwire._database.driver_errors import sqlstate
from sessionwire._database.options import CONNECTION_OPTIONS
from sessionwire._database.sql_text import is_dml, transaction_control
from sessionwire._error_reports import explain_pending_rollback, unexpected_rollback
from sessionwire.errors import UnexpectedRollbackError

from .context import enclosing_scopes
from .implicit_io import implicit_io_error
from .usage_errors import managed_transaction_error, second_writer_error, write_in_iteration_error

if TYPE_CHECKING:
    from .scope import Scope
    from .session_hooks import CommitHooks

ACTIVE_TRANSACTION = "25001"  # SQLSTATE active_sql_transaction
NO_TRANSACTION = "25P01"  # SQLSTATE no_active_sql_transaction
READ_ONLY = ("25006", "SQLITE_READONLY")
DISCARDING = ("close", "reset", "invalidate")

# Tells of a call, by the session and its first argument, whether it writes past the
# unit of work, so that no flush is noticed.
IsWrite = Callable[["GuardedSession", Any], bool]


def _as_operation(
    name: str, *, sends_sql: bool = False, is_write: IsWrite | None = None
) -> Callable[..., Any]:
    """Wrap a `Session` method as one operation of its scope.

    Methods that send SQL are refused outside SQLAlchemy's greenlet, where nothing can
    be awaited, before they do anything, because an autoflush or BEGIN that fails
    half-way would end the transaction.

    Args:
        name: The method of `Session`.
        sends_sql: The method always sends SQL.
        is_write: Whether a call writes; None if no call does.
    """
    call: Callable[..., Any] = getattr(Session, name)

    @functools.wraps(call)
    def operation(self: GuardedSession, *args: Any, **options: Any) -> Any:
        scope = self.scope
        current = getcurrent()
        # SQLAlchemy's own greenlet, in which it awaits, is of a subclass.
        if sends_sql and current.__class__ is greenlet:
            raise implicit_io_error()
        is_outermost = scope.operation is not current
        if is_outermost:
            scope.begin_operation(current)
        try:
            if not (is_write and is_write(self, args[0] if args else options.get("statement"))):
                return call(self, *args, **options)
            _take_write_lock(self)
            result = call(self, *args, **options)
            scope.record_write()
            return result
        except Exception as error:
            if is_outermost:
                _handle_failure(self, error)
            raise
        finally:
            if is_outermost:
                scope.end_operation()

    return operation


def _handle_failure(session: GuardedSession, error: Exception) -> None:
    """Note that an operation has failed, and explain its error."""
    scope = session.scope
    if isinstance(error, PendingRollbackError):  # it only reports an earlier failure
        explain_pending_rollback(error, scope.failure_since(0))
    else:
        scope.last_operation_error = error
    first = scope.failure_since(0)
    if isinstance(error, InvalidRequestError) and isinstance(first, UnexpectedRollbackError):
        # SQLAlchemy would advise to call rollback().
        raise unexpected_rollback(first) from first
    transaction_is_over = not session.is_active or getattr(error, "connection_invalidated", False)
    if scope.options.autocommit and transaction_is_over and not session.in_nested_transaction():
        Session.rollback(session)  # the next statement is a transaction of its own
    _add_hints(scope, error)


def _executes_write(session: GuardedSession, statement: Executable) -> bool:
    # The block would take the work of a COMMIT or ROLLBACK as text for committed.
    if (
        isinstance(statement, TextClause)
        and session.scope.transaction is not None
        and (verb := transaction_control(statement.text))
    ):
        raise managed_transaction_error(f"text('{verb}')")
    return _is_write(statement)


def _always_writes(_session: GuardedSession, _objects: Any) -> bool:
    return True


_as_execution = partial(_as_operation, sends_sql=True, is_write=_executes_write)
_as_bulk_write = partial(_as_operation, sends_sql=True, is_write=_always_writes)


def _as_transaction_control(name: str) -> Callable[..., Any]:
    """Wrap a transaction method: it is refused if a block manages the transaction."""
    call, rollback = _as_operation(name), _as_operation("rollback")

    @functools.wraps(call)
    def control(self: GuardedSession, *args: Any, **options: Any) -> Any:
        scope = self.scope
        if name in DISCARDING and not scope.frames:
            return None  # the end of its block has done so; close_all_sessions() comes by here
        if scope.transaction is not None and not options.get("nested"):
            raise managed_transaction_error(f"{name}()")
        # A commit without hooks and failures is spared the call.
        if name == "commit" and scope.frames and (self.commit_hooks or scope.failure_since(0)):
            try:
                _prepare_commit(self)
            except BaseException as error:
                scope.count_end(error)
                rollback(self)
                scope.has_uncommitted_writes = False
                if self.commit_hooks is not None:
                    self.commit_hooks.finish(scope)
                raise
        if name in DISCARDING and scope.has_uncommitted_writes:
            scope.count_end(None, rolls_back=True)
        try:
            result = call(self, *args, **options)
        except BaseException as error:
            if name == "commit":
                scope.count_end(error)
            raise
        if name != "begin":
            scope.has_uncommitted_writes = False
        if self.commit_hooks is not None and name not in ("begin", "prepare"):
            self.commit_hooks.finish(scope)
        return result

    return control


def _prepare_commit(session: GuardedSession) -> None:
    """Check that nothing has failed, and call the hooks that precede the commit.

    Raises:
        UnexpectedRollbackError: A statement has failed.
    """
    scope, hooks = session.scope, session.commit_hooks
    if failure := scope.failure_since(0):
        raise unexpected_rollback(failure)
    if hooks is not None and hooks.has_any_before_commit:
        await_only(hooks.call_before_commit(scope))
        if failure := scope.failure_since(0):
            raise unexpected_rollback(failure)


class GuardedSession(Session):
    """The `Session` of one scope."""

    scope: Scope
    commit_hooks: CommitHooks | None = None
    reading_class: type[ReadingSession]

    if not TYPE_CHECKING:  # the signatures are those of Session
        flush = _as_operation("flush")
        connection = _as_operation("connection")
        merge = _as_operation("merge")
        refresh = _as_operation("refresh")
        begin_nested = _as_operation("begin_nested")
        bulk_save_objects = _as_bulk_write("bulk_save_objects")
        bulk_insert_mappings = _as_bulk_write("bulk_insert_mappings")
        bulk_update_mappings = _as_bulk_write("bulk_update_mappings")

        execute = _as_execution("execute")
        scalar = _as_execution("scalar")
        scalars = _as_execution("scalars")

        begin = _as_transaction_control("begin")
        commit = _as_transaction_control("commit")
        rollback = _as_transaction_control("rollback")
        close = _as_transaction_control("close")
        reset = _as_transaction_control("reset")
        invalidate = _as_transaction_control("invalidate")
        prepare = _as_transaction_control("prepare")


def _refusing(name: str, is_write: Callable[[Any], bool] = lambda _: True) -> Callable[..., Any]:
    """Wrap a method so that it refuses writes."""
    method = getattr(GuardedSession, name)

    @functools.wraps(method)
    def refusing(self: ReadingSession, subject: Any, *args: Any, **options: Any) -> Any:
        if is_write(subject):
            raise write_in_iteration_error()
        return method(self, subject, *args, **options)

    return refusing


def _is_write(statement: Executable) -> bool:
    return statement.is_dml or (isinstance(statement, TextClause) and is_dml(statement.text))


class ReadingSession(GuardedSession):
    """The session of a generator's scope, for the loop over the generator.

    It may not write there. It shares the state of the session itself.
    """

    if not TYPE_CHECKING:  # the signatures are those of Session
        add = _refusing("add")
        delete = _refusing("delete")
        merge = _refusing("merge")
        bulk_save_objects = _refusing("bulk_save_objects")
        bulk_insert_mappings = _refusing("bulk_insert_mappings")
        bulk_update_mappings = _refusing("bulk_update_mappings")

        execute = _refusing("execute", _is_write)
        scalar = _refusing("scalar", _is_write)
        scalars = _refusing("scalars", _is_write)

    @staticmethod
    def of(session: GuardedSession) -> ReadingSession:
        reading = object.__new__(session.reading_class)
        reading.__dict__ = session.__dict__
        return reading


GuardedSession.reading_class = ReadingSession


def _take_write_lock(session: GuardedSession) -> None:
    """Wait for SQLite's write lock if a transaction's first statement writes.

    Later nothing can wait for the lock, because the data that was read may be out of
    date.

    Raises:
        IncompatibleTransactionError: An enclosing transaction holds the lock.
    """
    scope = session.scope
    if scope.has_uncommitted_writes or scope.options.read_only or not scope.database.is_sqlite:
        return
    if any(
        other.holds_write_lock and other.has_begun
        for other in enclosing_scopes(scope.database) - {scope}
    ):
        raise second_writer_error()
    if not (scope.has_begun or scope.options.write_intent or scope.options.autocommit):
        session.connection(
            execution_options={CONNECTION_OPTIONS: replace(scope.options, write_intent=True)}
        )


def _add_hints(scope: Scope, error: Exception) -> None:
    """Add a note if the caller waits for itself, or needs another kind of block."""
    others = enclosing_scopes(scope.database) - {scope}
    held = sum(other.session.in_transaction() for other in others)
    if isinstance(error, PoolTimeoutError) and held:
        pool = scope.database.settings.pool
        error.add_note(
            f"this task already held {held} connection(s) while waiting for another: for n such "
            f"tasks at once, pool.size + pool.max_overflow must be at least n + {held}; it is "
            f"{pool.size + pool.max_overflow}"
        )
    if scope.options.autocommit and sqlstate(error) == ACTIVE_TRANSACTION:
        error.add_note(
            "settings are sent ahead of each statement here, and this one takes none: let the "
            "block do without, execution_options={'sessionwire_without_hooks': True}"
        )
    if sqlstate(error) == NO_TRANSACTION:
        error.add_note(
            "a cursor, as of stream(), needs a transaction: for reading, "
            "transaction(read_only=True)"
        )
    if scope.options.read_only and sqlstate(error).startswith(READ_ONLY):
        error.add_note(
            "the enclosing block only reads, by read_only=True or @read_only: write in a "
            "transaction() or a @transactional without read_only"
        )
    if not sqlstate(error).startswith("SQLITE_BUSY"):
        return
    if scope.has_begun and not scope.options.write_intent and not scope.options.autocommit:
        error.add_note(
            "on SQLite a session() that has read can't wait for its turn to write, because the "
            "data that it has read may be out of date: use transaction(), which waits before it "
            "reads, or roll back, and read and write again"
        )
    if any(other.holds_write_lock for other in others):
        error.add_note(
            "SQLite allows one writer, and it is the enclosing transaction: write in that one"
        )


@event.listens_for(GuardedSession, "before_flush")
def _on_before_flush(session: GuardedSession, _context: Any, _instances: Any) -> None:
    if session.scope.has_pending_changes:
        _take_write_lock(session)


@event.listens_for(GuardedSession, "after_flush")
def _on_flush(session: GuardedSession, _context: Any) -> None:
    session.scope.record_write()


@event.listens_for(GuardedSession, "before_commit")
def _on_before_commit(session: GuardedSession) -> None:
    """Check like `commit()`, for `session.begin()` and `get_transaction()`, which bypass it."""
    scope = session.scope
    if session.in_nested_transaction():
        return
    if scope.transaction is None:
        if session.commit_hooks or scope.failure_since(0):
            try:
                _prepare_commit(session)
            except BaseException as error:
                scope.count_end(error)
                raise
    elif not scope.transaction.is_ending:
        raise managed_transaction_error("commit()")


@event.listens_for(GuardedSession, "after_commit")
def _on_commit(session: GuardedSession) -> None:
    if not session.in_nested_transaction():
        session.scope.has_uncommitted_writes = False
        session.scope.count_end(None)


@event.listens_for(GuardedSession, "after_soft_rollback")
def _on_rollback(session: GuardedSession, transaction: SessionTransaction) -> None:
    if transaction.parent is None:
        session.scope.has_uncommitted_writes = False
        # `async with session.begin()` rolls back while it handles the error of a commit.
        session.scope.count_end(sys.exception(), rolls_back=True)


@event.listens_for(GuardedSession, "after_begin")
def _on_begin(
    session: GuardedSession, transaction: SessionTransaction, connection: Connection
) -> None:
    scope = session.scope
    scope.transaction_connection = connection
    if transaction.nested:
        return
    scope.is_uncounted = scope.is_bare
    if scope.transaction is not None and not scope.options.autocommit:
        scope.transaction.has_begun = True
    if scope.database.observer is not None:
        scope.tell_connection(scope.database.observer, connection)
    scope.database.set_up_transaction(connection, scope.options, scope.call_site)
