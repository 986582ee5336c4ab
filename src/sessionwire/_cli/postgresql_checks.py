"""What goes wrong with PostgreSQL in production."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from datetime import UTC, datetime
from typing import Any, TypeAlias

from sqlalchemy import make_url, text
from sqlalchemy.ext.asyncio import AsyncConnection

from sessionwire._database.runtime import database_of
from sessionwire.manager import DatabaseSessionManager

from .findings import Finding, error, ok, warning

OLDEST_VERSION = 14
LARGEST_DIFFERENCE = 2.0  # seconds between two clocks
SHARE_OF_CONNECTIONS = 0.8  # that is worth a warning
LISTED = 5  # tables in a message

Look: TypeAlias = Callable[[AsyncConnection, DatabaseSessionManager, int], AsyncIterator[Finding]]


async def _row(connection: AsyncConnection, sql: str, **parameters: object) -> tuple[Any, ...]:
    return tuple((await connection.execute(text(sql), parameters)).one())


async def _look_at_version(
    connection: AsyncConnection, _manager: DatabaseSessionManager, _processes: int
) -> AsyncIterator[Finding]:
    version, number = await _row(
        connection,
        "SELECT current_setting('server_version'), current_setting('server_version_num')::int",
    )
    if number < OLDEST_VERSION * 10_000:
        yield error("server", f"PostgreSQL {version}: {OLDEST_VERSION} and later are supported")
    else:
        yield ok("server", f"PostgreSQL {version}")


async def _look_at_tls(
    connection: AsyncConnection, manager: DatabaseSessionManager, _processes: int
) -> AsyncIterator[Finding]:
    is_encrypted, version, is_socket = await _row(
        connection,
        "SELECT s.ssl, s.version, inet_server_addr() IS NULL FROM pg_stat_ssl AS s "
        "WHERE s.pid = pg_backend_pid()",
    )
    if is_socket:
        yield ok("tls", "the connection is a local socket")
    elif not is_encrypted:
        yield warning(
            "tls",
            "the connection is not encrypted: add ?sslmode=verify-full and sslrootcert to the url",
        )
    elif make_url(manager.settings.url).query.get("sslmode") != "verify-full":
        yield warning(
            "tls",
            f"the connection is encrypted ({version}), and the server's name is not verified: "
            "write sslmode=verify-full in the url",
        )
    else:
        yield ok("tls", f"the connection is encrypted ({version}), and the server is verified")


async def _look_at_role(
    connection: AsyncConnection, manager: DatabaseSessionManager, _processes: int
) -> AsyncIterator[Finding]:
    name, is_superuser, bypasses, in_recovery, read_only = await _row(
        connection,
        "SELECT rolname, rolsuper, rolbypassrls, pg_is_in_recovery(), "
        "current_setting('default_transaction_read_only') = 'on' "
        "FROM pg_roles WHERE rolname = current_user",
    )
    if in_recovery:
        yield error("role", "this server is a standby, and refuses writes: connect to the primary")
    elif read_only:
        yield error(
            "role",
            "transactions are read-only by default (default_transaction_read_only): a write fails",
        )
    if is_superuser:
        yield warning(
            "role",
            f"{name!r} is a superuser: row-level security does not hold, and a mistake can reach "
            "all databases; use a role of the service's own",
        )
    elif bypasses:
        yield warning("role", f"{name!r} has BYPASSRLS: row-level security does not hold")
    else:
        yield ok("role", f"{name!r} is no superuser")
    async for finding in _look_at_rights(connection, manager):
        yield finding


async def _look_at_rights(
    connection: AsyncConnection, manager: DatabaseSessionManager
) -> AsyncIterator[Finding]:
    format_table = manager.engine.dialect.identifier_preparer.format_table
    missing: list[str] = []
    refused: list[str] = []
    tables = manager.metadata.sorted_tables
    for table in tables:
        exists, may = await _row(
            connection,
            "SELECT to_regclass(:name) IS NOT NULL, "
            "(SELECT bool_and(has_table_privilege(to_regclass(:name), p)) "
            "FROM unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE']) AS p)",
            name=format_table(table),
        )
        if not exists:
            missing.append(table.fullname)
        elif not may:
            refused.append(table.fullname)
    if missing:
        yield error("tables", f"{_listed(missing)} not there: migrate the database")
    if refused:
        yield warning(
            "rights",
            f"the role may not select, insert, update and delete in all tables, {_listed(refused)} "
            "not open to it: GRANT what the service needs",
        )
    if tables and not (missing or refused):
        yield ok("rights", f"the role may read and write all {len(tables)} tables of the models")


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return f"{', '.join(names[:LISTED])}{more} {'is' if len(names) == 1 else 'are'}"


async def _look_at_pool(
    connection: AsyncConnection, manager: DatabaseSessionManager, processes: int
) -> AsyncIterator[Finding]:
    of_server, of_role, of_database, others = await _row(
        connection,
        "SELECT current_setting('max_connections')::int "
        "- current_setting('superuser_reserved_connections')::int "
        "- coalesce(current_setting('reserved_connections', true), '0')::int, "
        "(SELECT rolconnlimit FROM pg_roles WHERE rolname = current_user), "
        "(SELECT datconnlimit FROM pg_database WHERE datname = current_database()), "
        "(SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend' "
        "AND usename IS DISTINCT FROM current_user)",
    )
    pool = manager.status().pool.limit
    needed = pool * processes
    limits = {"the server": of_server, "the role": of_role, "the database": of_database}
    name, limit = min(
        ((name, limit) for name, limit in limits.items() if limit >= 0), key=lambda each: each[1]
    )
    said = (
        f"{processes} process(es) of pool.size + pool.max_overflow = {pool} need {needed} "
        f"connections, and {name} lets {limit} in"
    )
    if manager.settings.pooler is not None:
        yield ok("pool", f"{said}; a pooler is in front of it, and has limits of its own")
    elif needed > limit:
        yield error("pool", f"{said}: make the pool smaller, or put a pooler in front")
    elif needed + others > limit * SHARE_OF_CONNECTIONS:
        yield warning("pool", f"{said}, of which other roles use {others} now: little is left")
    else:
        yield ok("pool", said)


async def _look_at_pooler(
    connection: AsyncConnection, manager: DatabaseSessionManager, _processes: int
) -> AsyncIterator[Finding]:
    raw = await connection.get_raw_connection()
    driver = raw.driver_connection
    (process,) = await _row(connection, "SELECT pg_backend_pid()")
    announced = getattr(driver, "get_server_pid", lambda: process)()
    setting = manager.settings.pooler
    if announced != process and setting is None:
        yield error(
            "pooler",
            "a pooler or proxy is in front of the server: write pooler: transaction or "
            "pooler: session beside url, as its pool_mode is",
        )
    elif announced != process:
        yield ok("pooler", f"a pooler is in front of the server, and pooler: {setting} is set")
    elif setting is not None:
        yield ok("pooler", f"pooler: {setting} is set, and none is seen: nothing needs a session")
    else:
        yield ok("pooler", "none is in front of the server")


async def _look_at_commits(
    connection: AsyncConnection, manager: DatabaseSessionManager, _processes: int
) -> AsyncIterator[Finding]:
    synchronous, fsync, pages = await _row(
        connection,
        "SELECT current_setting('synchronous_commit'), current_setting('fsync'), "
        "current_setting('full_page_writes')",
    )
    if fsync == "off" or pages == "off":
        yield error(
            "commits",
            f"fsync is {fsync} and full_page_writes is {pages}: a crash of the machine can "
            "destroy the database; set both on",
        )
    elif synchronous == "off":
        yield warning(
            "commits",
            "synchronous_commit is off: a crash of the server can lose commits that it has "
            "acknowledged",
        )
    else:
        yield ok("commits", f"an acknowledged commit is kept (synchronous_commit: {synchronous})")
    resolver = database_of(manager).engines.resolver
    if resolver is None:
        yield warning(
            "commits",
            "the outcome of a commit whose answer is lost is not looked up: resolve_commits is "
            "off, or the pipeline is",
        )
    elif resolver.system_identifier is None:
        yield warning(
            "commits",
            "the server lets no outcome of a commit be looked up, whose answer is lost: the role "
            "may not call pg_control_system(), pg_current_wal_insert_lsn() or pg_walfile_name()",
        )
    else:
        yield ok("commits", "the outcome of a commit whose answer is lost can be looked up")


async def _look_at_isolation(
    connection: AsyncConnection, _manager: DatabaseSessionManager, _processes: int
) -> AsyncIterator[Finding]:
    (isolation,) = await _row(connection, "SELECT current_setting('default_transaction_isolation')")
    if isolation == "read committed":
        yield ok("isolation", "the default is READ COMMITTED")
    else:
        yield warning(
            "isolation",
            f"the default is {isolation.upper()}, not READ COMMITTED: any transaction can fail "
            "with a conflict; use retries=, or isolation= at the blocks that need it",
        )


async def _look_at_time(
    connection: AsyncConnection, _manager: DatabaseSessionManager, _processes: int
) -> AsyncIterator[Finding]:
    before = datetime.now(UTC)
    there, zone = await _row(connection, "SELECT clock_timestamp(), current_setting('TimeZone')")
    after = datetime.now(UTC)
    # The server has answered between the two.
    ahead, behind = (there - after).total_seconds(), (before - there).total_seconds()
    difference = max(ahead, behind, 0.0)
    if difference > LARGEST_DIFFERENCE:
        direction = "ahead of" if ahead > 0 else "behind"
        yield warning(
            "time",
            f"the server's clock is {difference:.1f} s {direction} this machine's: run a time "
            "service such as chrony on both",
        )
    else:
        yield ok("time", f"the clocks agree; the session's time zone is {zone}")


async def _look_at_encoding(
    connection: AsyncConnection, _manager: DatabaseSessionManager, _processes: int
) -> AsyncIterator[Finding]:
    encoding, recorded, actual = await _row(
        connection,
        "SELECT pg_encoding_to_char(encoding), to_jsonb(d) ->> 'datcollversion', "
        "CASE WHEN to_jsonb(d) ? 'datcollversion' "
        "THEN pg_database_collation_actual_version(d.oid) END "
        "FROM pg_database AS d WHERE datname = current_database()"
        if await _has_collation_versions(connection)
        else "SELECT pg_encoding_to_char(encoding), NULL, NULL "
        "FROM pg_database WHERE datname = current_database()",
    )
    if encoding != "UTF8":
        yield warning(
            "encoding",
            f"the database is in {encoding}, not UTF8: some characters can't be stored, or are "
            "stored unchecked",
        )
    else:
        yield ok("encoding", "the database is in UTF8")
    if recorded != actual:
        yield error(
            "encoding",
            f"the collation of the database has changed, from version {recorded} to {actual}: "
            "indexes on text can be wrong; REINDEX them, and then ALTER DATABASE … REFRESH "
            "COLLATION VERSION",
        )


async def _has_collation_versions(connection: AsyncConnection) -> bool:
    (version,) = await _row(connection, "SELECT current_setting('server_version_num')::int")
    return bool(version >= 150_000)


POSTGRESQL_CHECKS: Mapping[str, Look] = {
    "server": _look_at_version,
    "tls": _look_at_tls,
    "role": _look_at_role,
    "pool": _look_at_pool,
    "pooler": _look_at_pooler,
    "time": _look_at_time,
    "encoding": _look_at_encoding,
    "isolation": _look_at_isolation,
    "commits": _look_at_commits,
}
