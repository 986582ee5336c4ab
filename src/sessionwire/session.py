"""`CurrentSession`: stands for the session of the scope in which it is used."""

from __future__ import annotations

import operator
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, cast

from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession
from sqlalchemy.orm import Session

from ._core.context import current_scope, require_scope
from ._core.guarded_session import GuardedSession, ReadingSession
from ._database.runtime import database_of

if TYPE_CHECKING:
    from .manager import DatabaseSessionManager

NO_INFO = cast("dict[Any, Any]", MappingProxyType({}))


class CurrentSession(AsyncSession):
    """Behave as the `AsyncSession` of the scope in which it is used.

    It holds no session itself and is never closed, so it can be injected into objects
    of any lifetime.

    Args:
        manager: The manager whose scopes it stands for.

    Raises:
        NoSessionError: On use, if no scope of the manager is open.
        ConcurrentSessionError: On use, if another operation is running on the session,
            or code in another task has joined it.
    """

    def __init__(self, manager: DatabaseSessionManager) -> None:
        # super().__init__() is not called: all its state belongs to the scope's
        # session.
        self._database = database_of(manager)

    @property
    def _current(self) -> AsyncSession:
        return require_scope(self._database).session

    @property
    def sync_session(self) -> Session:  # type: ignore[override]  # the one attribute that all of AsyncSession uses
        scope = require_scope(self._database)
        session = scope.session.sync_session
        if scope.generator is not None and scope.is_iterated_here:
            return ReadingSession.of(cast(GuardedSession, session))
        return session

    _proxied = sync_session

    @property  # type: ignore[misc]  # where AsyncSession has an attribute
    def bind(self) -> AsyncEngine | AsyncConnection | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The engine of the scope's session.

        Outside of a block, it is the manager's, for code that asks for the dialect.
        """
        if current_scope(self._database) is None:
            return self._database.engine_for_reference
        return self._current.bind

    @property
    def info(self) -> dict[Any, Any]:
        """The `info` of the scope's session; outside of a block it is empty, and takes nothing."""
        return NO_INFO if current_scope(self._database) is None else self.sync_session.info


for _name in ("binds", "_async_bind", "_async_binds", "_translate_binds"):
    setattr(CurrentSession, _name, property(operator.attrgetter(f"_current.{_name}")))
