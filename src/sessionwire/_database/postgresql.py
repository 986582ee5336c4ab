"""PostgreSQL through asyncpg: connect arguments, errors, and the options of a transaction."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import urlencode

from sqlalchemy import URL, AdaptedConnection, Connection, Engine, event
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.pool import ConnectionPoolEntry
from sqlalchemy.util import await_only

from sessionwire._config.url_parameters import LIBPQ_KEYS, typed_arguments
from sessionwire.embedded import EmbeddedServer
from sessionwire.errors import ConfigurationError
from sessionwire.settings import DatabaseSettings

from . import several_hosts
from .credential_source import CredentialSource
from .driver_errors import NOT_CONNECTED
from .options import WITHOUT_HOOKS, ConnectionOptions
from .pipeline import Pipeline, Statement
from .postgresql_pool import Cleanup, PostgreSQLPool, watch_connections
from .server_settings import server_settings
from .transaction_settings import ahead_of_each

if TYPE_CHECKING:
    from .commit_resolver import CommitResolver

Pool = PostgreSQLPool
SENDS_AHEAD = True
# The driver's names. The server treats the first two levels alike, and the driver knows
# only the second.
ISOLATION_LEVELS = {
    "READ UNCOMMITTED": "read_committed",
    "READ COMMITTED": "read_committed",
    "REPEATABLE READ": "repeatable_read",
    "SERIALIZABLE": "serializable",
}
REFUSED = "28"  # the class of SQLSTATEs for a wrong password or user
# What keeps a statement from writing, if sent ahead of it.
READ_ONLY: tuple[Statement, ...] = (("SET transaction_read_only = on",),)


def split_url(url: URL, settings: DatabaseSettings) -> tuple[URL, dict[str, Any]]:
    """Return the URL for SQLAlchemy and the arguments for `asyncpg.connect()`.

    Raises:
        ConfigurationError: A file that the URL names does not exist.
    """
    from .asyncpg_connection import connection_class  # asyncpg is not needed on SQLite

    libpq = {key: value for key, value in url.query.items() if key in LIBPQ_KEYS}
    for key in ("sslrootcert", "sslcert", "sslkey"):
        if key in libpq and not Path(str(libpq[key])).expanduser().is_file():
            raise ConfigurationError(f"url: {key}: there is no file {libpq[key]!r} on this machine")
    typed = typed_arguments(url)  # In the URL they would be text.
    of_server = server_settings(settings)
    shares_sessions = settings.pooler == "transaction"
    connect_args: dict[str, Any] = {
        "timeout": settings.connect_timeout,
        "server_settings": of_server.at_start,
        "connection_class": connection_class(
            tcp_timeout=settings.tcp_timeout,
            pipeline=settings.pipeline,
            at_begin=of_server.at_begin,
            shares_sessions=shares_sessions,
        ),
        # The next transaction may meet a session that has prepared others.
        **({"statement_cache_size": 0} if shares_sessions else {}),
        **typed,
    }
    if libpq:  # In its DSN asyncpg gives them the meaning that they have in libpq.
        connect_args["dsn"] = "postgresql://?" + urlencode(libpq, doseq=True)
    return url.difference_update_query([*typed, *libpq]), connect_args


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
        server: The embedded server to connect to, if the URL names one.
        cleanup_of: Returns the task that closes a driver's connection, or None.
        resolver: What looks up the outcomes of commits, if that is wanted.
        credentials: Those of each new connection, if they are asked for.
    """

    at_connect = server_settings(settings).at_connect

    @event.listens_for(engine, "do_connect")
    def connect(dialect: Any, _record: Any, _arguments: Any, parameters: dict[str, Any]) -> Any:
        if server:
            parameters["host"] = server.socket_directory
        if credentials is not None:
            credentials.add_to(parameters, dialect.loaded_dbapi)
        asyncpg = dialect.loaded_dbapi.asyncpg
        wrong_role = asyncpg.TargetServerAttributeNotMatched
        known = OSError, dialect.loaded_dbapi.Error, asyncpg.PostgresError, wrong_role
        try:
            adapted = several_hosts.connect(dialect, parameters)
            if at_connect:
                await_only(adapted.driver_connection.run(at_connect, settings.connect_timeout))
        except known as error:
            # A TimeoutError is caused by its cancellation.
            is_reason = isinstance(error, TimeoutError) or error.__cause__ is None
            reason = error if is_reason else error.__cause__
            state = str(getattr(reason, "sqlstate", ""))
            if credentials is not None and state.startswith(REFUSED):
                credentials.forget()
            raise _connect_error(dialect.loaded_dbapi, reason) from reason
        adapted.autocommit = True  # SQLAlchemy asks for the version, and needs no transaction.
        return adapted

    watch_connections(engine, settings, cleanup_of)

    @event.listens_for(engine, "connect", insert=True)
    def on_connect(connection: AdaptedConnection, _record: ConnectionPoolEntry) -> None:
        driver: Any = connection.driver_connection
        driver.resolver = resolver

    # SQLAlchemy's listener, which asks, comes before this one.
    @event.listens_for(engine, "connect")
    def leave_autocommit(connection: Any, _record: ConnectionPoolEntry) -> None:
        connection.autocommit = False

    @event.listens_for(engine, "handle_error")
    def name_the_cause(context: ExceptionContext) -> None:
        """Note on a statement's error that a statement ahead of it has failed."""
        connection, error = context.connection, context.sqlalchemy_exception
        if connection is None or connection.invalidated or error is None:
            return
        driver: Any = connection.connection.driver_connection
        pipeline: Pipeline | None = getattr(driver, "pipeline", None)
        if pipeline is not None and pipeline.failed and not pipeline.unanswered:
            failed = pipeline.failed[0]
            error.add_note(f"it was sent after {failed!r}, which failed, and did not run")


def set_up(connection: Connection, options: ConnectionOptions, settings: Mapping[str, str]) -> None:
    """Set the options of a transaction before its BEGIN is sent.

    SQLAlchemy would set them by listeners for each connection, which cost more. They
    are reset at the return of the connection.
    """
    adapted: Any = connection.connection.dbapi_connection
    adapted.readonly = options.read_only
    if options.autocommit and not options.transaction_per_statement:
        adapted.isolation_level = "autocommit"
        driver = adapted.driver_connection
        ahead = driver.ahead_of_all
        if ahead and WITHOUT_HOOKS in dict(options.execution_options):
            ahead = ()
        if options.read_only:
            ahead += READ_ONLY
        if settings:
            ahead = (*ahead, ahead_of_each(settings))
        driver.send_ahead_of_each(ahead)
    elif options.isolation:
        adapted.isolation_level = ISOLATION_LEVELS[options.isolation]


def _connect_error(dbapi: Any, reason: Any) -> Exception:
    """Turn the reason why `connect()` failed into an error that SQLAlchemy wraps."""
    why = "no answer in time" if isinstance(reason, TimeoutError) else reason
    wrapped: Any = dbapi.OperationalError(f"could not connect: {type(reason).__name__}: {why}")
    # No server has the wanted role now.
    is_not_yet = isinstance(reason, dbapi.asyncpg.TargetServerAttributeNotMatched)
    wrapped.pgcode = wrapped.sqlstate = getattr(
        reason, "sqlstate", several_hosts.NOT_YET if is_not_yet else None
    )
    setattr(wrapped, NOT_CONNECTED, True)
    return cast(Exception, wrapped)


# Connections of the parent process. Their finalizers would disturb it.
_inherited: list[Any] = []


def abandon(driver: Any, *, is_forked: bool) -> None:
    """Close a connection whose event loop is closed, or that a fork has inherited.

    No transport closes its socket once its loop is closed. A forked process sends
    nothing.
    """
    transport = driver._transport
    if not is_forked:
        with suppress(Exception):  # It fails on the closed loop, after the goodbye was sent.
            driver.terminate()
    tls = getattr(transport, "_ssl_protocol", None)
    close = getattr(tls._transport if tls else transport, "_call_connection_lost", None)
    if close is not None:
        with suppress(Exception):  # Those who waited for the connection are gone.
            close(None)
        with suppress(Exception):
            driver._protocol.connection_lost(None)  # TLS leaves this call to the loop.
    elif is_forked:  # It is uvloop's transport. A closed loop of uvloop has closed its own.
        _inherited.append(driver)
