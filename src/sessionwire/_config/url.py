"""Database URLs: their async driver filled in, their passwords never shown."""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError
from sqlalchemy.util import asbool

ASYNC_DRIVERS = {
    "postgres": "postgresql+asyncpg",
    "postgresql": "postgresql+asyncpg",
    "sqlite": "sqlite+aiosqlite",
    "mysql": "mysql+asyncmy",
    "mariadb": "mariadb+asyncmy",
}
# libpq's own, to which asyncpg gives the same meaning in a DSN
LIBPQ_KEYS = ("sslmode", "sslrootcert", "sslcert", "sslkey", "sslpassword", "sslcrl", "application_name", "options")
SECRET_QUERY_KEYS = ("password", "passwd", "sslpassword")
SSL_MODES = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")

# The further URL parameters of PostgreSQL are arguments of asyncpg and of SQLAlchemy's dialect
TEXTS = ("host", "port", "user", "password", "database", "passfile", "service", "servicefile", "krbsrvname")
CHOICES = {
    "sslmode": SSL_MODES,
    "ssl": SSL_MODES,
    "target_session_attrs": ("any", "primary", "standby", "read-write", "read-only", "prefer-standby"),
    "gsslib": ("gssapi", "sspi"),
}
ELSEWHERE = {  # what some would look for in a URL, and where it is
    "timeout": "set connect_timeout beside url",
    "connect_timeout": "set connect_timeout beside url",
    "server_settings": "write each of them as options=-c%20name=value",
    "dsn": "write its parts into this URL",
    **dict.fromkeys(
        ("loop", "connection_class", "record_class", "prepared_statement_name_func", "async_creator_fn"),
        "its value is a Python object, which a URL can't hold",
    ),
}
SQLITE_FLAGS: dict[str, Callable[[Any], object]] = {"uri": asbool, "detect_types": int, "cached_statements": int}
SQLITE_URI = ("mode", "cache", "immutable", "nolock", "psow", "vfs", "modeof")
SQLITE_MODES = {"mode": ("ro", "rw", "rwc", "memory"), "cache": ("shared", "private")}
SQLITE_ELSEWHERE = {
    "timeout": "set pool.timeout beside url",
    **dict.fromkeys(("isolation_level", "check_same_thread"), "the library needs a value of its own there"),
}


class DatabaseURL(URL):
    """A `sqlalchemy.URL` that shows no password, in its query neither."""

    def render_as_string(self, hide_password: bool = True) -> str:
        secrets = [key for key in self.query if key.lower() in SECRET_QUERY_KEYS] if hide_password else []
        return URL.render_as_string(self.update_query_dict(dict.fromkeys(secrets, "***")), hide_password)

    def __str__(self) -> str:
        return self.render_as_string()

    def __repr__(self) -> str:
        return self.render_as_string()


class ShownURL(str):
    """A URL as text without its passwords, as settings are dumped; given to settings again, it is the whole URL."""

    url: DatabaseURL


def show_url(url: DatabaseURL) -> str:
    shown = ShownURL(url)
    shown.url = url
    return shown


def parse_url(value: object) -> DatabaseURL:
    """The URL with its async driver filled in. Raises `ValueError` with the remedy, never showing what it was given."""
    if isinstance(value, ShownURL):
        return value.url
    if callable(reveal := getattr(value, "get_secret_value", None)):  # pydantic's `SecretStr`, and `Secret` of a URL
        value = reveal()
    if hasattr(value, "unicode_string"):  # pydantic's `AnyUrl`, `PostgresDsn` and the like
        value = str(value)
    if isinstance(value, str) and value.startswith("embedded:") and not value.startswith("embedded://"):
        value = URL.create("embedded", database=value.removeprefix("embedded:"))
    if isinstance(value, str):
        value = _checked_text(value)
    try:
        url = make_url(value)  # type: ignore[arg-type]  # it checks the type itself
    except (ArgumentError, ValueError):
        raise ValueError(
            "not a database URL; one looks like postgresql://user@host/database or sqlite:///file.db, "
            "with any of @ : / ? # in a password percent-encoded"
        ) from None
    _check_password(url, is_checked=isinstance(value, str | DatabaseURL))
    url = url.set(drivername=ASYNC_DRIVERS.get(url.drivername, url.drivername))
    if url.drivername != "embedded":
        _check_driver(url)
    elif not url.database or any((url.username, url.password, url.host, url.port, url.query)):
        raise ValueError("an embedded server needs a directory, such as embedded:./var/postgres, and no host")
    if url.drivername == "postgresql+asyncpg":
        _check_asyncpg(url)
    elif url.drivername == "sqlite+aiosqlite":
        _check_sqlite(url)
    return DatabaseURL._make(url)


USER_PART = re.compile(r"(?P<scheme>[\w+]+)://((?P<user>[^:/]*)(?P<password>:[^@]*)?@)?")  # as SQLAlchemy reads it
HIDDEN = "its password is nothing but *: it is a text in which the password was hidden; give the URL itself"
NOT_ENCODED = (
    "in a user name or password, @ : / ? # must be percent-encoded: @ is %40, : is %3A, / is %2F, ? is %3F, # is %23; "
    "here one of them is not, so a part of the password would be taken for something else"
)


def _checked_text(text: str) -> str:
    """A URL in which no part of a password is taken for host, database or parameter. Raises `ValueError`."""
    if text and not text.strip("*"):
        raise ValueError(HIDDEN)
    found = USER_PART.match(text)
    if not found or ASYNC_DRIVERS["sqlite"].startswith(found["scheme"]):
        return text
    address, question_mark, query = text[found.end() :].partition("?")
    if (
        "?" in (found["user"] or "")
        or (found["user"] is None and re.search(":[^@]*@", address))
        or (found["user"] is not None and "@" in address)
        or (found["password"] is not None and "@" in query)
    ):
        raise ValueError(NOT_ENCODED)
    if question_mark and not all(re.fullmatch(r"\w+=.+", part, re.DOTALL) for part in query.split("&")):
        raise ValueError("after its ? a URL has name=value, joined by &; an & in a value is written as %26")
    hosts, slash, database = address.partition("/")
    if "," in hosts:  # as libpq takes several; SQLAlchemy has them in the query
        several = (host if re.search(r":\d+$", host) else f"{host}:5432" for host in hosts.split(","))
        return (
            f"{found[0]}{slash}{database}?{'&'.join([*(f'host={host}' for host in several), *filter(None, [query])])}"
        )
    return text


def _check_password(url: URL, *, is_checked: bool) -> None:
    secrets = [url.password, *(url.query.get(key) for key in SECRET_QUERY_KEYS)]
    if any(secret and not str(secret).strip("*") for secret in secrets):
        raise ValueError(HIDDEN)
    if not is_checked and "@" in f"{url.host or ''}{url.database if url.password and url.host else ''}":
        raise ValueError(NOT_ENCODED)


def _check_driver(url: URL) -> None:
    try:
        dialect = url.get_dialect().get_async_dialect_cls(url)
        if not dialect.is_async:
            remedy = ASYNC_DRIVERS.get(url.get_backend_name(), "the name of an asynchronous driver")
            raise ValueError(f"{url.drivername!r} is a synchronous driver: write {remedy} instead")
        dialect.import_dbapi()
    except NoSuchModuleError:
        raise ValueError(
            f"SQLAlchemy knows no {url.drivername!r}: is it misspelt, or the package of its dialect not installed?"
        ) from None
    except ImportError as error:
        package = error.name or url.get_driver_name()
        raise ValueError(f"the driver of {url.drivername!r} is not installed: pip install {package}") from None


def _check_asyncpg(url: URL) -> None:
    known = (*LIBPQ_KEYS, *TEXTS, *CHOICES, *TYPED)
    _check_parameters(url, known, CHOICES, ELSEWHERE, several=("host", "port"))
    typed_arguments(url)
    try:
        _addresses(url)
    except (ArgumentError, ValueError) as error:
        several = "for several write ?host=one:5432&host=two:5432"
        reason = error if isinstance(error, ArgumentError) else "they are not understood"
        raise ValueError(f"host and port: {reason}; {several}") from None


def _check_sqlite(url: URL) -> None:
    if any((url.username, url.password, url.host, url.port)):
        raise ValueError("an SQLite file comes after three slashes: sqlite:///shop.db, or sqlite:////srv/shop.db")
    _check_parameters(url, (*SQLITE_FLAGS, *SQLITE_URI), SQLITE_MODES, SQLITE_ELSEWHERE)
    flags = _converted(url, SQLITE_FLAGS)
    is_uri = flags.get("uri") and (url.database or "").startswith("file:")
    for key in url.query:
        if key in SQLITE_URI and not is_uri and (key, url.query[key]) != ("mode", "memory"):
            raise ValueError(f"{key} is SQLite's for a URI: write sqlite:///file:shop.db?{key}=…&uri=true")


def _check_parameters(
    url: URL,
    known: Iterable[str],
    choices: Mapping[str, tuple[str, ...]],
    elsewhere: Mapping[str, str],
    several: Iterable[str] = (),
) -> None:
    for key, value in url.query.items():
        if key in elsewhere:
            raise ValueError(f"{key} can't be a URL parameter: {elsewhere[key]}")
        if key not in known:
            if any(secret in url.query for secret in SECRET_QUERY_KEYS):  # of which this may be a part
                raise ValueError("a URL parameter is not known; an & in a password is written as %26")
            close = difflib.get_close_matches(key, known, 1)
            raise ValueError(f"no URL parameter {key!r} is known" + (f"; did you mean {close[0]!r}?" if close else ""))
        if not isinstance(value, str) and key not in several:
            raise ValueError(f"{key} is there more than once in the URL")
        if key in choices and value not in choices[key]:
            raise ValueError(f"there is no such {key}; there are {', '.join(choices[key])}")


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
TYPED: dict[str, Callable[[Any], object]] = {
    "prepared_statement_cache_size": _count,
    "statement_cache_size": _count,
    "max_cached_statement_lifetime": _count,
    "max_cacheable_statement_size": _count,
    "command_timeout": _seconds,
    "direct_tls": asbool,
}


def typed_arguments(url: URL) -> dict[str, object]:
    """The URL parameters that asyncpg does not take as text. Raises `ValueError`."""
    return _converted(url, TYPED)


def _converted(url: URL, kinds: Mapping[str, Callable[[Any], object]]) -> dict[str, object]:
    converted: dict[str, object] = {}
    for key, kind in kinds.items():
        if key in url.query:
            try:
                converted[key] = kind(url.query[key])
            except ValueError:
                raise ValueError(f"{key} must be {EXPECTED[kind]}") from None
    return converted


# Where a URL leads to, for errors


def _addresses(url: URL) -> list[tuple[str, int | None]]:
    """Hosts and ports, as they are given to the driver."""
    dialect = cast("Any", url.get_dialect())()
    arguments: dict[str, Any] = dialect.create_connect_args(url)[1]
    hosts, ports = arguments.get("host", ""), arguments.get("port")
    if isinstance(hosts, list):
        return list(zip(cast("list[str]", hosts), cast("list[int | None]", ports), strict=True))
    return [(hosts, ports)]


def whereabouts(url: URL) -> str:
    """Name database, host and user, as they are after the defaults of the driver."""
    if url.drivername == "embedded":
        return f"the embedded server in {url.database!r}"
    if url.get_backend_name() == "sqlite":
        return f"database {url.database!r}"
    is_asyncpg = url.drivername == "postgresql+asyncpg"
    given: Mapping[str, Any] = url.query if is_asyncpg else {}
    defaults: Mapping[str, str] = os.environ if is_asyncpg else {}
    addresses = _addresses(url) if is_asyncpg else [(url.host or "", url.port)]
    shown: list[str] = []
    for host, port in addresses:
        host = host or defaults.get("PGHOST") or "its default"
        shown.append((f"[{host}]" if ":" in host else host) + (f":{port}" if port else ""))
    user = given.get("user") or url.username or defaults.get("PGUSER") or ""
    database = given.get("database") or url.database or defaults.get("PGDATABASE") or user
    service = f", or as service {given['service']!r} says" if "service" in given else ""
    database = repr(database) if database else "its default"
    return f"database {database} on host {', '.join(shown)} as user {user or 'its default'}{service}"
