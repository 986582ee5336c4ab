"""Check and convert the query parameters of a database URL."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

from sqlalchemy import URL
from sqlalchemy.exc import ArgumentError
from sqlalchemy.util import asbool

from .keys import did_you_mean

SECRET_QUERY_KEYS = ("password", "passwd", "sslpassword")


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds < math.inf:
        raise ValueError
    return seconds


def _count(text: str) -> int:
    count = int(text)
    if count < 0:
        raise ValueError
    return count


EXPECTED: dict[Callable[[Any], object], str] = {
    int: "a whole number",
    _count: "a whole number, at least 0",
    _seconds: "a number of seconds, above 0",
    asbool: "true or false",
}

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
SSL_MODES = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")
# Arguments of asyncpg, and of SQLAlchemy's dialect for it.
ASYNCPG_TEXTS = (
    "host",
    "port",
    "user",
    "password",
    "database",
    "passfile",
    "service",
    "servicefile",
    "krbsrvname",
)
ASYNCPG_CHOICES = {
    "sslmode": SSL_MODES,
    "ssl": SSL_MODES,
    "target_session_attrs": (
        "any",
        "primary",
        "standby",
        "read-write",
        "read-only",
        "prefer-standby",
    ),
    "gsslib": ("gssapi", "sspi"),
}
ASYNCPG_TYPED: dict[str, Callable[[Any], object]] = {
    "prepared_statement_cache_size": _count,
    "statement_cache_size": _count,
    "max_cached_statement_lifetime": _count,
    "max_cacheable_statement_size": _count,
    "command_timeout": _seconds,
    "direct_tls": asbool,
}
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
SQLITE_TYPED: dict[str, Callable[[Any], object]] = {
    "uri": asbool,
    "detect_types": int,
    "cached_statements": int,
}
SQLITE_URI_KEYS = ("mode", "cache", "immutable", "nolock", "psow", "vfs", "modeof")
SQLITE_CHOICES = {"mode": ("ro", "rw", "rwc", "memory"), "cache": ("shared", "private")}
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
    known = (*LIBPQ_KEYS, *ASYNCPG_TEXTS, *ASYNCPG_CHOICES, *ASYNCPG_TYPED)
    _check_query(url, known, ASYNCPG_CHOICES, ASYNCPG_ELSEWHERE, repeatable=("host", "port"))
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
    known = (*SQLITE_TYPED, *SQLITE_URI_KEYS)
    _check_query(url, known, SQLITE_CHOICES, SQLITE_ELSEWHERE)
    is_uri = _convert(url, SQLITE_TYPED).get("uri") and (url.database or "").startswith("file:")
    for key, value in url.query.items():
        if key in SQLITE_URI_KEYS and not is_uri and (key, value) != ("mode", "memory"):
            raise ValueError(
                f"{key} is a parameter of SQLite's URIs: write "
                f"sqlite:///file:shop.db?{key}=…&uri=true"
            )


def typed_arguments(url: URL) -> dict[str, object]:
    """Convert the parameters that asyncpg does not take as text.

    Raises:
        ValueError: A value has the wrong type.
    """
    return _convert(url, ASYNCPG_TYPED)


def hosts_and_ports(url: URL) -> list[tuple[str, int | None]]:
    """Return the addresses that the driver connects to, as the URL names them."""
    dialect = cast("Any", url.get_dialect())()
    arguments: dict[str, Any] = dialect.create_connect_args(url)[1]
    hosts, ports = arguments.get("host", ""), arguments.get("port")
    if isinstance(hosts, list):
        return list(zip(cast("list[str]", hosts), cast("list[int | None]", ports), strict=True))
    return [(hosts, ports)]


def check_separators(query: str) -> None:
    """Reject a query that is not of the form name=value&name=value.

    Raises:
        ValueError: A part of it has no value.
    """
    if not all(re.fullmatch(r"\w+=.+", part, re.DOTALL) for part in query.split("&")):
        raise ValueError(
            "after its ? a URL has name=value, joined by &; an & in a value is written as %26"
        )


def _check_query(
    url: URL,
    known: Iterable[str],
    choices: Mapping[str, tuple[str, ...]],
    elsewhere: Mapping[str, str],
    repeatable: Iterable[str] = (),
) -> None:
    for key, value in url.query.items():
        if key in elsewhere:
            raise ValueError(f"{key} can't be a URL parameter: {elsewhere[key]}")
        if key not in known:
            # Show no unknown name beside a password: it may be a part of that.
            if any(secret in url.query for secret in SECRET_QUERY_KEYS):
                raise ValueError("unknown URL parameter; an & in a password is written as %26")
            hint = did_you_mean(key, known)
            raise ValueError(f"unknown URL parameter {key!r}{f'; {hint}' if hint else ''}")
        if not isinstance(value, str) and key not in repeatable:
            raise ValueError(f"{key} is there more than once in the URL; write it once")
        if key in choices and value not in choices[key]:
            raise ValueError(f"unknown {key}; choose one of {', '.join(choices[key])}")


def _convert(url: URL, types: Mapping[str, Callable[[Any], object]]) -> dict[str, object]:
    converted: dict[str, object] = {}
    for key, convert in types.items():
        if key in url.query:
            try:
                converted[key] = convert(url.query[key])
            except ValueError:
                raise ValueError(f"{key} must be {EXPECTED[convert]}") from None
    return converted
