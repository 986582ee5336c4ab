"""PostgreSQL through psycopg: connect arguments, errors, and the options of a transaction."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from sqlalchemy import URL, AdaptedConnection, Connection, Engine, event
from sqlalchemy.pool import ConnectionPoolEntry

from sessionwire._config.url_parameters import typed_psycopg_arguments
from sessionwire.embedded import EmbeddedServer
from sessionwire.settings import DatabaseSettings

from .driver_errors import (
    CANNOT_CONNECT,
    CANNOT_CONNECT_NOW,
    INVALID_CATALOG_NAME,
    INVALID_PASSWORD,
    NOT_CONNECTED,
    TOO_MANY_CONNECTIONS,
)
from .options import ConnectionOptions
from .postgresql_pool import Cleanup, PostgreSQLPool, watch_connections
from .server_settings import server_settings
from .sql_text import surely_reads

if TYPE_CHECKING:
    from .commit_resolver import CommitResolver
    from .credential_source import CredentialSource

SENDS_AHEAD = False
IDLE = 0  # libpq's status of a connection without a transaction
# libpq tells no SQLSTATE of a connection that was refused, only what the server says.
REFUSALS = {
    r"database .* does not exist": INVALID_CATALOG_NAME,
    r"password authentication failed": INVALID_PASSWORD,
    r"too many (clients|connections)|connection slots are reserved": TOO_MANY_CONNECTIONS,
    r"database system is |not yet accepting connections|database .* is being": CANNOT_CONNECT_NOW,
    r"server closed the connection|terminating connection": CANNOT_CONNECT_NOW,
    r"Connection refused|No such file|failed to resolve host": CANNOT_CONNECT_NOW,
}


class Pool(PostgreSQLPool):
    """A pool of connections of psycopg."""

    def _reset(self, adapted: Any) -> bool:
        is_idle: bool = adapted.driver_connection.end_use()
        return is_idle


def split_url(url: URL, settings: DatabaseSettings) -> tuple[URL, dict[str, Any]]:
    """Return the URL for SQLAlchemy and the arguments for psycopg's `connect()`."""
    from .psycopg_connection import Connection  # psycopg is an extra

    typed = typed_psycopg_arguments(url)  # In the URL they would be text.
    of_server = server_settings(settings)
    shares_sessions = settings.pooler == "transaction"
    connect_args: dict[str, Any] = {
        "async_creator_fn": partial(
            Connection.open,
            timeout=settings.connect_timeout,
            at_connect=of_server.at_connect,
            at_begin=of_server.at_begin,
            shares_sessions=shares_sessions,
        ),
        # The next transaction may meet a session that has prepared others.
        **({"prepare_threshold": None} if shares_sessions else {}),
        **typed,
    }
    parameters = of_server.at_start
    if settings.pooler is not None:  # It refuses `options`.
        connect_args |= {name: value for name, value in parameters.items() if name not in url.query}
    elif parameters:
        own = [f"-c {name}={_escape(value)}" for name, value in parameters.items()]
        connect_args["options"] = " ".join([*own, str(url.query.get("options", ""))]).rstrip()
    if settings.tcp_timeout:
        for name, value in (
            ("keepalives", 1),
            ("keepalives_idle", settings.tcp_timeout / 2),
            ("keepalives_interval", settings.tcp_timeout / 6),
            ("keepalives_count", 3),
            ("tcp_user_timeout", settings.tcp_timeout * 1000),
        ):
            if name not in url.query:
                connect_args[name] = max(1, round(value))
    return url.difference_update_query(typed), connect_args


def _escape(value: str) -> str:
    """Escape a value for libpq's parameter `options`."""
    return re.sub(r"([ \\])", r"\\\1", value)


def configure_engine(
    engine: Engine,
    settings: DatabaseSettings,
    server: EmbeddedServer | None,
    cleanup_of: Callable[[Any], Cleanup | None],
    resolver: CommitResolver | None,
    credentials: CredentialSource | None,
) -> None:
    """Set up an engine's connections.

    Args:
        engine: The engine to set up.
        settings: The settings of its database.
        server: None; an embedded server is reached by asyncpg.
        cleanup_of: Returns the task that closes a driver's connection, or None.
        resolver: What looks up the outcomes of commits, if that is wanted.
        credentials: Those of each new connection, if they are asked for.
    """
    dialect: Any = engine.dialect
    # A connection that is garbage-collected while it is checked out is closed too.
    dialect.has_terminate = True

    @event.listens_for(engine, "do_connect")
    def connect(dialect: Any, _record: Any, arguments: Any, parameters: dict[str, Any]) -> Any:
        if credentials is not None:
            credentials.add_to(parameters, dialect.loaded_dbapi)
        try:
            return dialect.connect(*arguments, **parameters)
        except (OSError, dialect.loaded_dbapi.Error) as error:
            wrapped = _connect_error(dialect.loaded_dbapi, error)
            if credentials is not None and wrapped.sqlstate == INVALID_PASSWORD:
                credentials.forget()
            raise wrapped from error

    watch_connections(engine, settings, cleanup_of)

    @event.listens_for(engine, "connect", insert=True)
    def on_connect(connection: AdaptedConnection, _record: ConnectionPoolEntry) -> None:
        driver: Any = connection.driver_connection
        driver.resolver = resolver

    @event.listens_for(engine, "before_cursor_execute")
    def note_statement(connection: Connection, _cursor: Any, sql: str, *_: Any) -> None:
        driver: Any = connection.connection.driver_connection
        driver.last_statement = sql
        is_first = driver.pgconn.transaction_status == IDLE
        driver.has_only_read = (is_first or driver.has_only_read) and surely_reads(sql)


def set_up(connection: Connection, options: ConnectionOptions, settings: Mapping[str, str]) -> None:
    """Set the options of a transaction before its BEGIN is sent.

    They are reset at the return of the connection.
    """
    adapted: Any = connection.connection.dbapi_connection
    autocommit = options.autocommit and not options.transaction_per_statement
    if autocommit or options.read_only or options.isolation:
        adapted.driver_connection.set_up(
            autocommit=autocommit, read_only=options.read_only, isolation=options.isolation
        )


def abandon(driver: Any, *, is_forked: bool) -> None:
    """Close a connection whose event loop is closed, or that a fork has inherited."""
    driver.abandon(is_forked=is_forked)


def _connect_error(dbapi: Any, error: Exception) -> Any:
    """Add the SQLSTATE to what `connect()` raised."""
    text = str(error)
    wrapped: Any = dbapi.OperationalError(f"could not connect: {type(error).__name__}: {text}")
    states = (state for pattern, state in REFUSALS.items() if re.search(pattern, text))
    is_refused = "FATAL" in text
    wrapped.sqlstate = next(states, None if is_refused else CANNOT_CONNECT)
    setattr(wrapped, NOT_CONNECTED, True)
    return wrapped
