"""`CurrentSession`: stands for the session of the scope in which it is used."""

from __future__ import annotations

import functools
import inspect
import operator
import types
from collections.abc import Callable, Iterator
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
    of any lifetime. If the manager has a `session_class`, it is one of that class too,
    with all methods and properties.

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
        database = self._database = database_of(manager)
        if database.session_class is not AsyncSession:
            # Not in __new__(), which a copy calls without a manager.
            classes: Any = type(self), database.session_class
            self.__class__ = _stand_in_class(*classes)

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


# What belongs to a session of the user's own class


class _StandIn(CurrentSession):
    """Pass on what only the session class has to the session of the scope."""

    @property
    def session_here(self) -> Any:
        scope = require_scope(self._database)
        session: Any = scope.session
        if scope.generator is None or not scope.is_iterated_here:
            return session
        session_class: Any = session.__class__
        reading = object.__new__(session_class)
        reading.__dict__ = {**session.__dict__}
        reading.sync_session = reading._proxied = self.sync_session
        return reading

    if not TYPE_CHECKING:  # to which it would have any attribute

        def __getattr__(self, name):
            """Get an attribute that the constructor of the class has set."""
            is_private = name == "_database" or name.startswith("__")
            scope = None if is_private else current_scope(self._database)
            if scope is None:
                raise AttributeError(
                    f"{type(self).__name__!r} object has no attribute {name!r} outside of a block"
                )
            return getattr(self.session_here, name)

        def __setattr__(self, name, value):
            setattr(self.session_here, name, value)

        def __delattr__(self, name):
            delattr(self.session_here, name)


@functools.cache
def _stand_in_class(cls: type[Any], session_class: type[Any]) -> Any:
    """Return a class that stands for sessions of `session_class`, and derives from it."""
    members = dict(_members_to_pass_on(session_class))
    members["__module__"] = __name__
    bases = (*((_StandIn,) if cls is CurrentSession else (cls, _StandIn)), session_class)
    return types.new_class(
        f"Current{session_class.__name__}", bases, exec_body=lambda body: body.update(members)
    )


def _members_to_pass_on(session_class: type[AsyncSession]) -> Iterator[tuple[str, Any]]:
    """List the methods and properties that `session_class` does not have from SQLAlchemy.

    On the session itself they find its state.
    """
    own = [cls for cls in session_class.__mro__ if cls not in AsyncSession.__mro__]
    for name in dict.fromkeys(name for cls in own for name in vars(cls)):
        member = inspect.getattr_static(session_class, name)
        is_special = name.startswith("__") or name in vars(CurrentSession)
        if is_special or isinstance(member, staticmethod | classmethod):
            continue
        if inspect.isfunction(member):
            yield name, _pass_call_on(name, member)
        elif hasattr(member, "__get__"):
            yield name, property(operator.attrgetter(f"session_here.{name}"))


def _pass_call_on(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(self: _StandIn, *args: Any, **options: Any) -> Any:
        return getattr(self.session_here, name)(*args, **options)

    @functools.wraps(method)
    async def call_later(self: _StandIn, *args: Any, **options: Any) -> Any:
        return await getattr(self.session_here, name)(*args, **options)

    # Like the methods of SQLAlchemy, an asynchronous one fails where it is awaited.
    return call_later if inspect.iscoroutinefunction(method) else call
