"""Check and convert the query parameters of a database URL."""

from __future__ import annotations

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
REPEATABLE = ("host", "port")
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


def hosts_and_ports(url: URL) -> list[tuple[str, int | None]]:
    """Return the addresses that the driver connects to, as the URL names them."""
    arguments: Any = url.get_dialect()().create_connect_args(url)[1]
    hosts: str | list[str] = arguments.get("host", "")
    ports: Any = arguments.get("port")
    return [(hosts, ports)] if isinstance(hosts, str) else list(zip(hosts, ports, strict=True))


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
