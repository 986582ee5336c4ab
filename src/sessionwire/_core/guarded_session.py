"""SQLAlchemy's session, with the rules of its scope: one operation at a time, and only its block commits."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

from greenlet import getcurrent, greenlet
from sqlalchemy import Connection, Executable, TextClause, event
from sqlalchemy.exc import InvalidRequestError, PendingRollbackError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.orm import Session, SessionTransaction
from sqlalchemy.util import await_only

from sessionwire._database.driver_errors import sqlstate
from sessionwire._database.options import TERMS
from sessionwire._error_reports import lost_after, name_cause
from sessionwire.errors import ScopeOwnsTransactionError, UnexpectedRollbackError

from .context import scopes_here
from .implicit_io import implicit_io_error
from .scope import Scope, refuse_write_of_loop, second_writer
from .transaction import Hook

NO_TRANSACTION = "25P01"  # SQLSTATE no_active_sql_transaction
READ_ONLY = ("25006", "SQLITE_READONLY")
DISCARDING = ("close", "reset", "invalidate")
WRITING_VERBS = ("INSERT", "UPDATE", "DELETE", "MERGE", "REPLACE", "TRUNCATE", "COPY")


class ScopedSession(Session):
    """What all use of a scope's session passes through: lazy loads, `awaitable_attrs` and `run_sync` too."""

    scope: Scope
    commit_hooks: CommitHooks | None = None


class CommitHooks:
    """The functions that wait for a commit of a bare session; each until then, or until a rollback around it."""

    def __init__(self, session: ScopedSession) -> None:
        self._waiting: list[tuple[Hook, SessionTransaction | None]] = []  # with the savepoint that each was given in
        event.listen(session, "after_commit", self._committed)
        event.listen(session, "after_soft_rollback", self._rolled_back)
        event.listen(session, "after_transaction_end", self._ended)

    def add(self, hook: Hook, savepoint: SessionTransaction | None) -> None:
        self._waiting.append((hook, savepoint))

    def end(self, scope: Scope) -> None:
        """Drop those that wait in vain, and call those that are due; not within an operation, after whose end it is."""
        self._waiting.clear()
        if scope.due_hooks and not scope.is_operating:
            await_only(scope.run_due_hooks())

    def _committed(self, session: ScopedSession) -> None:
        if not session.in_nested_transaction():
            session.scope.due_hooks += [hook for hook, _ in self._waiting]
            self._waiting.clear()

    def _rolled_back(self, _session: ScopedSession, undone: SessionTransaction) -> None:
        self._waiting = [each for each in self._waiting if not _is_within(each[1], undone)]

    def _ended(self, session: ScopedSession, transaction: SessionTransaction) -> None:
        if transaction.parent is None:
            self.end(session.scope)


def _is_within(savepoint: SessionTransaction | None, transaction: SessionTransaction) -> bool:
    while savepoint is not None and savepoint is not transaction:
        savepoint = savepoint.parent
    return savepoint is transaction


def call_after_commit(scope: Scope, hook: Hook) -> None:
    """Let it wait for the next commit of this bare session."""
    session = cast(ScopedSession, scope.session.sync_session)
    session.commit_hooks = session.commit_hooks or CommitHooks(session)
    session.commit_hooks.add(hook, session.get_nested_transaction())


def _guarded(name: str, instead: Callable[..., Any] | None = None, *, sends: bool = False) -> Callable[..., Any]:
    """The method of this name, or the one in its stead, as one operation of the scope.

    One that `sends` a statement is refused where nothing can be awaited, and that before it does anything: what it
    would do first, such as an autoflush or a BEGIN, ends the transaction where it fails half-way.
    """
    method: Callable[..., Any] = instead or getattr(Session, name)

    @functools.wraps(method)
    def guarded(self: ScopedSession, *args: Any, **options: Any) -> Any:
        scope = self.scope
        operation = getcurrent()
        if sends and operation.__class__ is greenlet:  # SQLAlchemy's own, in which it awaits, is a subclass
            raise implicit_io_error()
        if not scope.start(operation):
            return method(self, *args, **options)
        try:
            return method(self, *args, **options)
        except Exception as error:
            if isinstance(error, PendingRollbackError):  # which only tells of an earlier one
                name_cause(error, [scope.failure] if scope.failure else [])
            else:
                scope.last_error = error
            if isinstance(error, InvalidRequestError) and isinstance(scope.failure, UnexpectedRollbackError):
                raise lost_after(scope.failure) from scope.failure  # which does not advise to call rollback()
            is_over = not self.is_active or getattr(error, "connection_invalidated", False)
            if scope.terms.autocommit and is_over and not self.in_nested_transaction():
                Session.rollback(self)  # what comes next stands alone
            _explain(scope, error)
            raise
        finally:
            scope.finish()

    return guarded


def _explain(scope: Scope, error: Exception) -> None:
    """Say so where the code that waited in vain holds itself what it waited for, or needs another kind of scope."""
    others = scopes_here(scope.owner) - {scope}
    held = sum(other.session.in_transaction() for other in others)
    if isinstance(error, PoolTimeoutError) and held:
        pool = scope.owner.settings.pool
        error.add_note(
            f"this task waited for one more connection while it held {held}: with n tasks that do so at once, "
            f"pool.size + pool.max_overflow must be at least n + {held}; it is {pool.size + pool.max_overflow}"
        )
    if sqlstate(error) == NO_TRANSACTION:
        error.add_note("a cursor, as of stream(), needs a transaction: for reading, transaction(read_only=True)")
    if scope.terms.read_only and sqlstate(error).startswith(READ_ONLY):
        error.add_note(
            "the block around this only reads, by read_only=True or @read_only: write in a transaction() or a "
            "@transactional without read_only"
        )
    if not sqlstate(error).startswith("SQLITE_BUSY"):
        return
    if scope.has_begun and not scope.terms.writes and not scope.terms.autocommit:
        error.add_note(
            "on SQLite a session() that has read can't wait for its turn to write, since what it has read may be out "
            "of date: take transaction(), which waits before it reads, or roll back, and read and write again"
        )
    if any(other.is_writer for other in others):
        error.add_note(
            "SQLite has one writer at a time, and it is the transaction around this block: write in that one"
        )


def _executing(name: str) -> Callable[..., Any]:
    """The guarded method, which takes note of statements that write."""
    execute = getattr(Session, name)

    @functools.wraps(execute)
    def executing(self: ScopedSession, statement: Executable, *args: Any, **options: Any) -> Any:
        writes = _is_write(statement)
        if writes:
            _prepare_to_write(self)
        result = execute(self, statement, *args, **options)
        if writes:
            self.scope.note_write()
        return result

    return _guarded(name, executing, sends=True)


def _prepare_to_write(session: ScopedSession) -> None:
    """Wait for the write lock of SQLite ahead of the first statement of a transaction, if that one writes.

    Later nothing can wait for the lock: what has been read may be out of date. Raises `IncompatibleTransactionError`
    inside a transaction that has the lock.
    """
    scope = session.scope
    if scope.written or scope.terms.read_only or not scope.owner.is_sqlite:
        return
    if any(other.is_writer and other.has_begun for other in scopes_here(scope.owner) - {scope}):
        raise second_writer()
    if not (scope.has_begun or scope.terms.writes or scope.terms.autocommit):
        session.connection(execution_options={TERMS: replace(scope.terms, writes=True)})


def writes(sql: str) -> bool:
    return sql.lstrip().upper().startswith(WRITING_VERBS)


def _is_write(statement: Executable) -> bool:
    return statement.is_dml or (isinstance(statement, TextClause) and writes(statement.text))


def _ending(name: str) -> Callable[..., Any]:
    """The guarded method, refused where a block owns the transaction."""
    end, undo = _guarded(name), _guarded("rollback")

    @functools.wraps(end)
    def ending(self: ScopedSession, *args: Any, **options: Any) -> Any:
        if name in DISCARDING and not self.scope.blocks:
            return None  # the end of its block has done so; close_all_sessions() comes by here
        if self.scope.transaction is not None and not options.get("nested"):
            raise _owned(name)
        if name == "commit" and self.scope.blocks and (reason := self.scope.failure):
            undo(self)
            self.scope.written = False
            raise lost_after(reason)
        result = end(self, *args, **options)
        if name != "begin":
            self.scope.written = False
        if self.commit_hooks is not None and name not in ("begin", "prepare"):
            self.commit_hooks.end(self.scope)
        return result

    return ending


def _owned(name: str) -> ScopeOwnsTransactionError:
    return ScopeOwnsTransactionError(
        f"{name}() inside transaction(), whose block does it: leave it to commit, raise or call "
        "set_rollback_only() to roll back; Propagation.NESTED undoes a part; in session() it is yours to call"
    )


for _name in ("flush", "connection", "merge", "refresh", "begin_nested", "bulk_save_objects"):
    setattr(ScopedSession, _name, _guarded(_name))


for _name in ("execute", "scalar", "scalars"):
    setattr(ScopedSession, _name, _executing(_name))


for _name in ("begin", "commit", "rollback", "close", "reset", "invalidate", "prepare"):
    setattr(ScopedSession, _name, _ending(_name))


@event.listens_for(ScopedSession, "before_flush")
def _before_flush(session: ScopedSession, _context: Any, _instances: Any) -> None:
    if session.scope.pending:
        _prepare_to_write(session)


@event.listens_for(ScopedSession, "after_flush")
def _note_written(session: ScopedSession, _context: Any) -> None:
    session.scope.note_write()


@event.listens_for(ScopedSession, "before_commit")
def _check_commit(session: ScopedSession) -> None:
    """The checks of `commit()`, for `session.begin()` and `get_transaction()`, which do without it."""
    scope = session.scope
    if session.in_nested_transaction():
        return
    if scope.transaction is None:
        if reason := scope.failure:
            raise lost_after(reason)
    elif not scope.transaction.is_ending:
        raise _owned("commit")


@event.listens_for(ScopedSession, "after_commit")
def _note_committed(session: ScopedSession) -> None:
    if not session.in_nested_transaction():
        session.scope.written = False


@event.listens_for(ScopedSession, "after_begin")
def _begun(session: ScopedSession, transaction: SessionTransaction, connection: Connection) -> None:
    scope = session.scope
    scope.connection = connection
    if scope.terms.autocommit or transaction.nested:
        return
    if scope.transaction is not None:
        scope.transaction.has_begun = True
    scope.owner.begin_hooks.run_due(connection)


class ReadingSession(ScopedSession):
    """A scope's session as the loop over the generator that opened it has it: the loop may not write there.

    It shares the state of the session itself.
    """

    @classmethod
    def of(cls, session: ScopedSession) -> ReadingSession:
        reading = cls.__new__(cls)
        reading.__dict__ = session.__dict__
        return reading


def _refusing(name: str, is_write: Callable[[Any], bool] = lambda _: True) -> Callable[..., Any]:
    method = getattr(ScopedSession, name)

    @functools.wraps(method)
    def refusing(self: ReadingSession, subject: Any, *args: Any, **options: Any) -> Any:
        if is_write(subject):
            raise refuse_write_of_loop()
        return method(self, subject, *args, **options)

    return refusing


for _name in ("add", "delete", "merge", "bulk_save_objects", "bulk_insert_mappings", "bulk_update_mappings"):
    setattr(ReadingSession, _name, _refusing(_name))


for _name in ("execute", "scalar", "scalars"):
    setattr(ReadingSession, _name, _refusing(_name, _is_write))
