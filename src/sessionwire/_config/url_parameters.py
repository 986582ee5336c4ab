"""Check and convert the query parameters of a database URL."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import AllowInfNan, NonNegativeInt, PositiveFloat, TypeAdapter, ValidationError
from sqlalchemy import URL
from sqlalchemy.exc import ArgumentError

from .keys import did_you_mean

SECRET_QUERY_KEYS = ("password", "passwd", "sslpassword")
# Parameters of libpq to which asyncpg gives the meaning of libpq in a DSN.
LIBPQ_KEYS = (
    "sslmode",
    "sslrootcert",
    "sslcert",
    "sslkey",
    "sslpassword",
    "sslcrl",
    "application_name",
    "options",
)

SslMode = Literal["disable", "allow", "prefer", "require", "verify-ca", "verify-full"]
Seconds = Annotated[PositiveFloat, AllowInfNan(False)]
# The types that a URL writes as text, and how an error names them.
EXPECTED: dict[Any, str] = {
    int: "a whole number",
    NonNegativeInt: "a whole number, at least 0",
    Seconds: "a number of seconds, above 0",
    bool: "true or false",
}

# The types of libpq's parameters, and of arguments of asyncpg and SQLAlchemy's dialect for it.
ASYNCPG: dict[str, Any] = {
    **dict.fromkeys(LIBPQ_KEYS, str),
    "host": str,
    "port": str,
    "user": str,
    "password": str,
    "database": str,
    "passfile": str,
    "service": str,
    "servicefile": str,
    "krbsrvname": str,
    "sslmode": SslMode,
    "ssl": SslMode,
    "target_session_attrs": Literal[
        "any", "primary", "standby", "read-write", "read-only", "prefer-standby"
    ],
    "gsslib": Literal["gssapi", "sspi"],
    "prepared_statement_cache_size": NonNegativeInt,
    "statement_cache_size": NonNegativeInt,
    "max_cached_statement_lifetime": NonNegativeInt,
    "max_cacheable_statement_size": NonNegativeInt,
    "command_timeout": Seconds,
    "direct_tls": bool,
}
# Those of psycopg's `connect()` and SQLAlchemy's dialect, beside what libpq knows.
PSYCOPG: dict[str, Any] = {
    "sslmode": SslMode,
    "target_session_attrs": ASYNCPG["target_session_attrs"],
    "prepare_threshold": NonNegativeInt,
}
PSYCOPG_ELSEWHERE = {
    "connect_timeout": "set connect_timeout beside url",
    "autocommit": "the library needs a value of its own there",
    **dict.fromkeys(
        ("conninfo", "dsn"),
        "write its parts into this URL",
    ),
    **dict.fromkeys(
        ("context", "row_factory", "cursor_factory", "async_creator_fn"),
        "its value is a Python object, which a URL can't hold",
    ),
}
REPEATABLE = ("host", "port")
DEFAULT_PORT = 5432
HOST = re.compile(r"(?P<name>\[[^\[\]]+\]|[^:\[\]]+|[^\[\]]*:[^\[\]]*:[^\[\]]*)(:(?P<port>\d+))?")
# Arguments that cannot be URL parameters, and what to do instead.
ASYNCPG_ELSEWHERE = {
    "timeout": "set connect_timeout beside url",
    "connect_timeout": "set connect_timeout beside url",
    "server_settings": "write each of them as options=-c%20name=value",
    "dsn": "write its parts into this URL",
    **dict.fromkeys(
        (
            "loop",
            "connection_class",
            "record_class",
            "prepared_statement_name_func",
            "async_creator_fn",
        ),
        "its value is a Python object, which a URL can't hold",
    ),
}
SQLITE_URI: dict[str, Any] = {
    **dict.fromkeys(("immutable", "nolock", "psow", "vfs", "modeof"), str),
    "mode": Literal["ro", "rw", "rwc", "memory"],
    "cache": Literal["shared", "private"],
}
SQLITE = {**SQLITE_URI, "uri": bool, "detect_types": int, "cached_statements": int}
SQLITE_ELSEWHERE = {
    "timeout": "set pool.timeout beside url",
    **dict.fromkeys(
        ("isolation_level", "check_same_thread"),
        "the library needs a value of its own there",
    ),
}


def check_asyncpg_query(url: URL) -> None:
    """Reject parameters that asyncpg would not understand.

    Raises:
        ValueError: A parameter is unknown or wrong; the message has the remedy.
    """
    typed_arguments(url)
    _check_hosts(url)


def check_psycopg_query(url: URL) -> None:
    """Reject parameters that neither psycopg nor libpq would understand.

    Raises:
        ValueError: A parameter is unknown or wrong; the message has the remedy.
    """
    typed_psycopg_arguments(url)
    _check_hosts(url)


def _check_hosts(url: URL) -> None:
    try:
        hosts_and_ports(url)
    except (ArgumentError, ValueError) as error:
        reason = error if isinstance(error, ArgumentError) else "they are not understood"
        raise ValueError(
            f"host and port: {reason}; for several write ?host=one:5432&host=two:5432"
        ) from None


def check_sqlite_query(url: URL) -> None:
    """Reject parameters that SQLite would ignore.

    Raises:
        ValueError: A parameter is unknown or wrong; the message has the remedy.
    """
    if any((url.username, url.password, url.host, url.port)):
        raise ValueError(
            "an SQLite file comes after three slashes: sqlite:///shop.db, or sqlite:////srv/shop.db"
        )
    typed = _typed_values(url, SQLITE, SQLITE_ELSEWHERE)
    is_uri = typed.get("uri") and (url.database or "").startswith("file:")
    for key, value in url.query.items():
        if key in SQLITE_URI and not is_uri and (key, value) != ("mode", "memory"):
            raise ValueError(
                f"{key} is a parameter of SQLite's URIs: write "
                f"sqlite:///file:shop.db?{key}=…&uri=true"
            )


def typed_arguments(url: URL) -> dict[str, object]:
    """Convert the parameters that asyncpg does not take as text.

    Raises:
        ValueError: A parameter is unknown or wrong; the message has the remedy.
    """
    return _typed_values(url, ASYNCPG, ASYNCPG_ELSEWHERE)


def typed_psycopg_arguments(url: URL) -> dict[str, object]:
    """Convert the parameters that psycopg does not take as text.

    Raises:
        ValueError: A parameter is unknown or wrong; the message has the remedy.
    """
    from psycopg.pq import Conninfo  # psycopg is an extra

    libpq = dict.fromkeys((option.keyword.decode() for option in Conninfo.get_defaults()), str)
    return _typed_values(url, libpq | PSYCOPG, PSYCOPG_ELSEWHERE)


def hosts_and_ports(url: URL) -> list[tuple[str, int | None]]:
    """Return the addresses that the driver connects to, as the URL names them."""
    arguments: Any = url.get_dialect()().create_connect_args(url)[1]
    hosts: str | list[str] = arguments.get("host", "")
    ports: Any = arguments.get("port")
    if isinstance(hosts, str) and "," in hosts:  # libpq's way
        hosts, ports = hosts.split(","), [port or None for port in str(ports).split(",")]
    return [(hosts, ports)] if isinstance(hosts, str) else list(zip(hosts, ports, strict=True))


def split_hosts(text: str) -> list[tuple[str, int | None]]:
    """Return the hosts and ports of a text in libpq's form, such as `one:5432,two`.

    Raises:
        ValueError: It is none; the message has the remedy.
    """
    if text.startswith("/"):
        return [(directory, None) for directory in text.split(",")]
    found = [HOST.fullmatch(host.strip()) for host in text.split(",")]
    if not all(found):
        raise ValueError("a host is written as db.example.com, and several as one:5432,two:5432")
    return [
        (match["name"].strip("[]"), int(match["port"]) if match["port"] else None)
        for match in found
        if match
    ]


def with_hosts(url: URL, hosts: str, port: int | None) -> URL:
    """Return a URL of these hosts, in the form that SQLAlchemy reads.

    Args:
        url: The URL. Its own port holds for a single host.
        hosts: One, several in libpq's form, or the directory of a socket.
        port: The port of each that names none.
    """
    addresses = split_hosts(hosts)
    bare = url._replace(host=None, port=None).difference_update_query(["host", "port"])
    if len(addresses) == 1:
        ((host, own_port),) = addresses
        port = own_port or port or url.port
        if not host.startswith("/"):
            return bare._replace(host=host, port=port)
        query = {"host": host} | ({"port": str(port)} if port else {})
        return bare.update_query_dict(query)
    ports = [str(own_port or port or DEFAULT_PORT) for _, own_port in addresses]
    names = [host for host, _ in addresses]
    if any(":" in name for name in names):  # SQLAlchemy would take that for a port.
        return bare.update_query_dict({"host": ",".join(names), "port": ",".join(ports)})
    return bare.update_query_dict(
        {"host": [f"{name}:{port}" for name, port in zip(names, ports, strict=True)]}
    )


def with_port(url: URL, port: int) -> URL:
    """Return a URL of the same host and this port.

    Raises:
        ValueError: It names several hosts, or the host's port is a part of its name.
    """
    host = url.query.get("host")
    if host is None:
        return url.set(port=port)
    if not isinstance(host, str) or "," in host or re.search(r":\d+$", host):
        raise ValueError("the url names each host with its port: change it there, or set host too")
    return url.update_query_dict({"port": str(port)})


def _typed_values(
    url: URL, known: Mapping[str, Any], elsewhere: Mapping[str, str]
) -> dict[str, object]:
    """Check all parameters, and convert those that are no texts."""
    typed: dict[str, object] = {}
    for key, value in url.query.items():
        if key in elsewhere:
            raise ValueError(f"{key} can't be a URL parameter: {elsewhere[key]}")
        if key not in known:
            # Show no unknown name beside a password: it may be a part of that.
            if any(secret in url.query for secret in SECRET_QUERY_KEYS):
                raise ValueError("unknown URL parameter; an & in a password is written as %26")
            hint = did_you_mean(key, known)
            raise ValueError(f"unknown URL parameter {key!r}{f'; {hint}' if hint else ''}")
        if not isinstance(value, str) and key not in REPEATABLE:
            raise ValueError(f"{key} is there more than once in the URL; write it once")
        expected = known[key]
        if get_origin(expected) is Literal and value not in get_args(expected):
            raise ValueError(f"unknown {key}; choose one of {', '.join(get_args(expected))}")
        if expected in EXPECTED:
            try:
                typed[key] = TypeAdapter(expected).validate_python(value)
            except ValidationError:
                raise ValueError(f"{key} must be {EXPECTED[expected]}") from None
    return typed
