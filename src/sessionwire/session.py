"""`CurrentSession`: stands for the session of the scope in which it is used."""

from __future__ import annotations

import operator
from types import MappingProxyType
from typing import Any, cast

from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession
from sqlalchemy.orm import Session

from ._core.context import current_scope
from ._core.guarded_session import ReadingSession, ScopedSession
from ._core.scope import Owner, require_scope

NO_INFO = cast("dict[Any, Any]", MappingProxyType({}))


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
        scope = require_scope(self._owner)
        session = scope.session.sync_session
        if scope.generator is not None and scope.is_iterated_here:
            return ReadingSession.of(cast(ScopedSession, session))
        return session

    _proxied = sync_session

    @property  # type: ignore[misc]  # where AsyncSession has an attribute
    def bind(self) -> AsyncEngine | AsyncConnection | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The engine of the scope's session; outside of a block the manager's, for those who ask for its dialect."""
        return self._owner.engine_for_reference if current_scope(self._owner) is None else self._current.bind

    @property
    def info(self) -> dict[Any, Any]:
        """The `info` of the scope's session; outside of a block it is empty, and takes nothing."""
        return NO_INFO if current_scope(self._owner) is None else self.sync_session.info


for _name in ("binds", "_async_bind", "_async_binds", "_translate_binds"):
    setattr(CurrentSession, _name, property(operator.attrgetter(f"_current.{_name}")))
