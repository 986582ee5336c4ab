"""The session of a scope, and `CurrentSession`, the stand-in for it that repositories hold."""

from __future__ import annotations

import functools
import operator
import warnings
from collections.abc import Callable
from types import TracebackType
from typing import Any

from greenlet import getcurrent
from sqlalchemy import Executable, TextClause, event
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from .errors import ScopeOwnsTransactionError, UncommittedChangesWarning
from .scope import Owner, Scope, require_scope

WRITING_VERBS = ("INSERT", "UPDATE", "DELETE", "MERGE", "REPLACE", "TRUNCATE", "COPY")


class ScopedSession(Session):
    """What all use of a scope's session passes through: lazy loads, `awaitable_attrs` and `run_sync` too."""

    scope: Scope


def _guarded(name: str) -> Callable[..., Any]:
    """The method as one operation of the scope."""
    method = getattr(Session, name)

    @functools.wraps(method)
    def guarded(self: ScopedSession, *args: Any, **options: Any) -> Any:
        scope = self.scope
        if not scope.start(getcurrent()):
            return method(self, *args, **options)
        try:
            return method(self, *args, **options)
        finally:
            scope.finish()

    return guarded


def _executing(name: str) -> Callable[..., Any]:
    """The guarded method, which takes note of statements that write."""
    execute = _guarded(name)

    @functools.wraps(execute)
    def executing(self: ScopedSession, statement: Executable, *args: Any, **options: Any) -> Any:
        result = execute(self, statement, *args, **options)
        if statement.is_dml or (isinstance(statement, TextClause) and _writes(statement.text)):
            self.scope.written = True
        return result

    return executing


def _writes(sql: str) -> bool:
    return sql.lstrip().upper().startswith(WRITING_VERBS)


def _ending(name: str) -> Callable[..., Any]:
    """The guarded method, refused where a block owns the transaction."""
    end = _guarded(name)

    @functools.wraps(end)
    def ending(self: ScopedSession, *args: Any, **options: Any) -> Any:
        if self.scope.transaction is not None and not options.get("nested"):
            raise ScopeOwnsTransactionError(
                f"{name}() inside transaction(), whose block does it: leave it to commit, raise to roll back; "
                "in session() it is yours to call"
            )
        result = end(self, *args, **options)
        if name != "begin":
            self.scope.written = False
        return result

    return ending


for _name in ("flush", "connection", "merge", "refresh", "begin_nested", "bulk_save_objects"):
    setattr(ScopedSession, _name, _guarded(_name))
for _name in ("execute", "scalar", "scalars"):
    setattr(ScopedSession, _name, _executing(_name))
for _name in ("begin", "commit", "rollback", "close", "reset", "invalidate", "prepare"):
    setattr(ScopedSession, _name, _ending(_name))


@event.listens_for(ScopedSession, "after_flush")
def _note_written(session: ScopedSession, _context: Any) -> None:
    session.scope.written = True


class SessionBlock:
    """`async with manager.session()`: a session that commits nothing by itself."""

    def __init__(self, owner: Owner) -> None:
        self._owner = owner

    async def __aenter__(self) -> AsyncSession:
        self._scope = self._owner.open_scope(writes=False)
        self._block = self._scope.enter()
        return self._scope.session

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        scope = self._scope
        lost = error is None and (scope.written or scope.pending)
        scope.leave(self._block)
        await scope.close(error)
        if lost:
            warnings.warn(
                "a session() block ended with changes that are now lost: call commit() or rollback() in it, "
                "or use transaction(), which commits at its end",
                UncommittedChangesWarning,
                stacklevel=2,
            )


class CurrentSession(AsyncSession):
    """Behaves as the `AsyncSession` of the scope in which it is used; holds none itself, and is never closed.

    Raises `NoSessionError` where no scope of the manager is open, and `ConcurrentSessionError` where another
    operation is running on its session, or code in another task has joined it.
    """

    def __init__(self, manager: Owner) -> None:
        self._owner = manager  # and no more: all that AsyncSession.__init__ would set belongs to the scope's session

    @property
    def _current(self) -> AsyncSession:
        return require_scope(self._owner).session

    @property
    def sync_session(self) -> Session:  # type: ignore[override]  # the one attribute that all of AsyncSession goes by
        return require_scope(self._owner).session.sync_session

    _proxied = sync_session


for _name in ("bind", "binds", "_async_bind", "_async_binds", "_translate_binds"):
    setattr(CurrentSession, _name, property(operator.attrgetter(f"_current.{_name}")))
