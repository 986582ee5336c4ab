"""Sessions of a user's own class, with the rules of their scope."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import Session

from sessionwire.errors import ConfigurationError

from .guarded_session import GuardedSession, ReadingSession

NewSession = Callable[[AsyncEngine], AsyncSession]

ONE_ENGINE = "a scope has one engine: make a manager for each database"
# Options that the library needs, and why or what to do instead.
NEEDED: dict[str, tuple[object, str]] = {
    "expire_on_commit": (
        False,
        "objects stay readable after the commit; session.refresh() and expire() load them anew",
    ),
    "autobegin": (True, "blocks begin with the first statement"),
    "twophase": (False, "blocks commit in one phase"),
    "bind": (None, ONE_ENGINE),
    "binds": (None, ONE_ENGINE),
    "sync_session_class": (
        None,
        "write it into the class: class MySession(AsyncSession): sync_session_class = …",
    ),
}
# Attributes that the library gives to each session.
RESERVED = ("scope", "commit_hooks", "reading_class")


def session_factory(session_class: object, options: Mapping[str, Any]) -> NewSession:
    """Return a function that makes sessions for an engine.

    Args:
        session_class: A subclass of `AsyncSession`.
        options: Arguments for its constructor.

    Raises:
        ConfigurationError: The class is no such class, or an option can't be used.
    """
    for name, (needed, reason) in NEEDED.items():
        if options.get(name, needed) is not needed:
            raise ConfigurationError(f"session_options: {name}: {reason}")
    if not (isinstance(session_class, type) and issubclass(session_class, AsyncSession)):
        raise ConfigurationError(
            "session_class: expected a subclass of sqlalchemy.ext.asyncio.AsyncSession"
        )
    options = {name: value for name, value in options.items() if name not in NEEDED}
    if session_class is AsyncSession:
        return partial(
            AsyncSession, sync_session_class=GuardedSession, expire_on_commit=False, **options
        )
    own_class: Any = session_class  # mypy takes it for unhashable
    return partial(_new_session, _guarded_async_class(own_class), options)


def check_session(new_session: NewSession, engine: AsyncEngine) -> None:
    """Make a session for a trial: it does no I/O.

    Raises:
        ConfigurationError: Its constructor does not take the options, or makes a
            session that does not keep the rules of a scope.
    """
    try:
        session: Any = new_session(engine).sync_session
    except (TypeError, SQLAlchemyError) as error:
        raise ConfigurationError(f"session_options: {error}") from error
    if not isinstance(session, GuardedSession):
        raise ConfigurationError(
            "session_class: its constructor makes a session of another class: "
            f"{NEEDED['sync_session_class'][1]}"
        )
    for name in RESERVED:
        if name in vars(session):
            raise _reserved(type(session), name)
    actual = {
        "bind": None if session.bind is engine.sync_engine else session.bind,
        # SQLAlchemy 2.0 has a private name for them.
        "binds": getattr(session, "binds", None) or vars(session).get("_Session__binds") or None,
        "autobegin": session.autobegin,
        "twophase": session.twophase,
    }
    for name, value in actual.items():
        needed, reason = NEEDED[name]
        if value is not needed:
            raise ConfigurationError(f"session_class: its constructor sets {name}: {reason}")


def _new_session(
    session_class: type[AsyncSession], options: Mapping[str, Any], engine: AsyncEngine
) -> AsyncSession:
    session = session_class(engine, **options)
    # Its constructor may take no such argument.
    session.sync_session.expire_on_commit = False
    return session


@functools.cache
def _guarded_async_class(session_class: type[Any]) -> type[AsyncSession]:
    """Return the class with a guarded session inside, whatever its constructor takes."""
    inside: Any = session_class.sync_session_class
    is_class = isinstance(inside, type) and issubclass(cast("type[Any]", inside), Session)
    if not is_class:
        raise ConfigurationError(
            "session_class: its sync_session_class must be a subclass of sqlalchemy.orm.Session"
        )
    return _derive(session_class, sync_session_class=_guarded_class(inside))


@functools.cache
def _guarded_class(session_class: type[Any]) -> type[GuardedSession]:
    """Return the class with the rules of a scope.

    They stand between the class and SQLAlchemy's own: `super().execute()` of the class
    leads to them.
    """
    if session_class is Session:
        return GuardedSession
    for name in RESERVED:
        if hasattr(session_class, name):
            raise _reserved(session_class, name)
    if session_class.get_bind is not Session.get_bind:
        raise ConfigurationError(
            f"session_class: {session_class.__name__}.get_bind(): {ONE_ENGINE}"
        )
    reading = _derive(session_class, ReadingSession)
    return _derive(session_class, GuardedSession, reading_class=reading)


def _reserved(session_class: type[Session], name: str) -> ConfigurationError:
    return ConfigurationError(
        f"session_class: {session_class.__name__}.{name}: the library gives each session an "
        "attribute of this name: choose another one"
    )


def _derive(*bases: type[Any], **members: Any) -> type[Any]:
    first = bases[0]
    names = {"__module__": first.__module__, "__qualname__": first.__qualname__, **members}
    return types.new_class(first.__name__, bases, exec_body=lambda body: body.update(names))
