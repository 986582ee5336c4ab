"""`EngineOptions`: what a user adds to the engine and to the arguments of the driver."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import URL
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import Pool

from sessionwire._config.engine_options import (
    check_connect_args,
    check_engine_options,
    unknown_argument,
)
from sessionwire._config.sources import merge
from sessionwire.errors import ConfigurationError
from sessionwire.settings import DatabaseSettings

# Arguments that SQLAlchemy takes for asyncpg, beside those of `asyncpg.connect()`.
OF_THE_ADAPTER = {"prepared_statement_cache_size", "prepared_statement_name_func"}


@dataclass(frozen=True)
class EngineOptions:
    """Options of an engine that come from the user.

    Args:
        engine: Those of SQLAlchemy's `create_async_engine()`.
        connect: The arguments for the driver's `connect()`.
    """

    engine: Mapping[str, Any] = field(default_factory=dict[str, Any])
    connect: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @classmethod
    def check(
        cls, engine: Mapping[str, Any] | None, connect: Mapping[str, Any] | None
    ) -> EngineOptions:
        """Return the options.

        Raises:
            ConfigurationError: The library needs another value of one.
        """
        return cls(
            checked("engine_options", check_engine_options, engine),
            checked("connect_args", check_connect_args, connect),
        )

    def create_engine(
        self, url: URL, settings: DatabaseSettings, *, poolclass: type[Pool], **options: Any
    ) -> AsyncEngine:
        """Create an engine with these options, then those of the settings.

        Args:
            url: The URL.
            settings: The settings of the database.
            poolclass: The library's pool.
            options: What the library needs; `connect_args` are completed.

        Raises:
            ConfigurationError: SQLAlchemy or the driver does not know an option.
        """
        engine_options = merge(self.engine, settings.engine)
        own_pool = engine_options.pop("poolclass", poolclass)
        _check_pool(own_pool, poolclass)
        connect_args = merge(self.connect, settings.connect)
        if connect_args:
            options["connect_args"] = _complete(url, options.get("connect_args", {}), connect_args)
        try:
            return create_async_engine(url, **engine_options, **options, poolclass=own_pool)
        except (TypeError, SQLAlchemyError) as error:
            if not engine_options:
                raise
            raise ConfigurationError(f"engine_options: {error}") from error


def checked(
    place: str,
    check: Callable[[Mapping[str, Any]], dict[str, Any]],
    options: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Return options that have been checked.

    Raises:
        ConfigurationError: They are no mapping, or one can't be used.
    """
    if options is not None and not isinstance(options, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ConfigurationError(f"{place}: expected a mapping, got {type(options).__name__}")
    try:
        return check(options or {})
    except ValueError as error:
        raise ConfigurationError(f"{place}: {error}") from None


def _check_pool(pool: object, needed: type[Pool]) -> None:
    if not (isinstance(pool, type) and issubclass(pool, needed)):
        remedy = (
            "derive it from sessionwire.asyncpg.Pool"
            if needed.__name__ == "PostgreSQLPool"
            else "leave it out"
        )
        raise ConfigurationError(
            f"engine_options: poolclass: the library's own pool checks, counts and resets "
            f"connections: {remedy}"
        )


def _complete(url: URL, needed: Mapping[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Add a user's arguments for the driver to those that the library needs."""
    if url.drivername == "postgresql+asyncpg":
        from asyncpg import connect

        _check_names(own, {*inspect.signature(connect).parameters, *OF_THE_ADAPTER}, "asyncpg")
        if "connection_class" in own:
            own["connection_class"] = _with_settings(
                own["connection_class"], needed["connection_class"]
            )
    elif url.drivername == "sqlite+aiosqlite":
        _check_names(own, {"detect_types", "cached_statements", "uri"}, "SQLite")
    return merge(own, needed)


def _check_names(own: Mapping[str, Any], known: set[str], driver: str) -> None:
    for name in own:
        if name not in known:
            raise ConfigurationError(f"connect_args: {unknown_argument(name, known, driver)}")


def _with_settings(own: Any, needed: Any) -> type[Any]:
    """Give a user's class of connections the settings of the library's."""
    from .asyncpg_connection import Connection

    if not (isinstance(own, type) and issubclass(own, Connection)):
        raise ConfigurationError(
            "connect_args: connection_class: the library's own class sends ahead what needs no "
            "answer, and looks up lost commits: derive it from sessionwire.asyncpg.Connection"
        )
    return type(own.__name__, (own, needed), {"__module__": own.__module__})
