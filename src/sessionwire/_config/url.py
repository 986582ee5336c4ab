"""Check database URLs, fill in their async drivers, and hide their passwords."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError

from .url_parameters import (
    SECRET_QUERY_KEYS,
    check_asyncpg_query,
    check_psycopg_query,
    check_sqlite_query,
    hosts_and_ports,
    with_hosts,
)

ASYNC_DRIVERS = {
    "postgres": "postgresql+asyncpg",
    "postgresql": "postgresql+asyncpg",
    "postgresql+psycopg_async": "postgresql+psycopg",
    "sqlite": "sqlite+aiosqlite",
    "mysql": "mysql+asyncmy",
    "mariadb": "mariadb+asyncmy",
}
# What to install for a driver that is an extra.
PACKAGES = {"postgresql+psycopg": "'sessionwire[psycopg]'"}
# Split a URL as SQLAlchemy does.
USER_PART = re.compile(r"(?P<scheme>[\w+]+)://((?P<user>[^:/]*)(?P<password>:[^@]*)?@)?")
HIDDEN = (
    "its password is nothing but *: it is a text in which the password was hidden; "
    "give the URL itself"
)
NOT_ENCODED = (
    "in a user name or password, @ : / ? # must be percent-encoded: @ is %40, : is %3A, "
    "/ is %2F, ? is %3F, # is %23; one of them is not encoded, so a part of the password "
    "would be taken for something else"
)


class DatabaseURL(URL):
    """A `sqlalchemy.URL` that shows no password, not even one in its query."""

    def render_as_string(self, hide_password: bool = True) -> str:
        secrets = [key for key in self.query if hide_password and key.lower() in SECRET_QUERY_KEYS]
        masked = self.update_query_dict(dict.fromkeys(secrets, "***"))
        return URL.render_as_string(masked, hide_password)


class MaskedURL(str):
    """The text of a URL without passwords; `parse_url()` returns the whole URL."""

    url: DatabaseURL


def mask_url(url: DatabaseURL) -> str:
    """Return the text that dumped settings contain."""
    masked = MaskedURL(url)
    masked.url = url
    return masked


def parse_url(value: object) -> DatabaseURL:
    """Parse and check a URL, and fill in its async driver.

    Args:
        value: A text, a `sqlalchemy.URL`, pydantic's URLs, or a secret that holds one.

    Raises:
        ValueError: The URL cannot work. The message has the remedy, and shows nothing
            of the value that may be a password.
    """
    if isinstance(value, MaskedURL):
        return value.url
    # pydantic's `SecretStr`, and its `Secret` of a URL
    if callable(reveal := getattr(value, "get_secret_value", None)):
        value = reveal()
    # pydantic's `AnyUrl`, `PostgresDsn` and the like
    if hasattr(value, "unicode_string"):
        value = str(value)
    hosts = ""
    if isinstance(value, str):
        embedded = re.fullmatch("embedded:(?!//)(.*)", value, re.DOTALL)
        if embedded:
            value = URL.create("embedded", database=embedded[1])
        else:
            value, hosts = _check_text(value)
    try:
        url = make_url(value)  # type: ignore[arg-type]  # it checks the type itself
    except (ArgumentError, ValueError):
        raise ValueError(
            "not a database URL; one looks like postgresql://user@host/database or "
            "sqlite:///file.db, with any of @ : / ? # in a password percent-encoded"
        ) from None
    _check_password(url, is_checked=isinstance(value, str | DatabaseURL))
    if hosts or "," in (url.host or ""):
        url = with_hosts(url, hosts or url.host or "", url.port)
    url = url.set(drivername=ASYNC_DRIVERS.get(url.drivername, url.drivername))
    if url.drivername == "embedded":
        if not url.database or any((url.username, url.password, url.host, url.port, url.query)):
            raise ValueError(
                "an embedded server needs a directory, such as embedded:./var/postgres, and no host"
            )
    else:
        _check_driver(url)
    if url.drivername == "postgresql+asyncpg":
        check_asyncpg_query(url)
    elif url.drivername == "postgresql+psycopg":
        check_psycopg_query(url)
    elif url.drivername == "sqlite+aiosqlite":
        check_sqlite_query(url)
    return DatabaseURL._make(url)


def _check_text(text: str) -> tuple[str, str]:
    """Return `text`, and several hosts in libpq's form, which SQLAlchemy would misread.

    Raises:
        ValueError: A part of the password would be taken for host, database or query.
    """
    if text and not text.strip("*"):
        raise ValueError(HIDDEN)
    found = USER_PART.match(text)
    if not found or ASYNC_DRIVERS["sqlite"].startswith(found["scheme"]):
        return text, ""
    address, question_mark, query = text[found.end() :].partition("?")
    if (
        "?" in (found["user"] or "")
        or (found["user"] is None and re.search(":[^@]*@", address))
        or (found["user"] is not None and "@" in address)
        or (found["password"] is not None and "@" in query)
    ):
        raise ValueError(NOT_ENCODED)
    if question_mark and not all(
        re.fullmatch(r"\w+=.+", part, re.DOTALL) for part in query.split("&")
    ):
        raise ValueError(
            "after its ? a URL has name=value, joined by &; an & in a value is written as %26"
        )
    hosts, slash, database = address.partition("/")
    if "," not in hosts:
        return text, ""
    return f"{found[0]}{slash}{database}{question_mark}{query}", hosts


def _check_password(url: URL, *, is_checked: bool) -> None:
    secrets = [url.password, *(url.query.get(key) for key in SECRET_QUERY_KEYS)]
    if any(secret and not str(secret).strip("*") for secret in secrets):
        raise ValueError(HIDDEN)
    database = url.database if url.password and url.host else ""
    if not is_checked and "@" in f"{url.host or ''}{database}":
        raise ValueError(NOT_ENCODED)


def _check_driver(url: URL) -> None:
    try:
        dialect = url.get_dialect().get_async_dialect_cls(url)
        if not dialect.is_async:
            driver = ASYNC_DRIVERS.get(url.get_backend_name(), "the name of an asynchronous driver")
            raise ValueError(f"{url.drivername!r} is a synchronous driver: write {driver} instead")
        dialect.import_dbapi()
    except NoSuchModuleError:
        raise ValueError(
            f"unknown SQLAlchemy dialect {url.drivername!r}: "
            "check the spelling, or install the package of the dialect"
        ) from None
    except ImportError as error:
        package = PACKAGES.get(url.drivername) or error.name or url.get_driver_name()
        raise ValueError(
            f"the driver of {url.drivername!r} is not installed: pip install {package}"
        ) from None


def whereabouts(url: URL) -> str:
    """Describe database, host and user for an error, driver defaults included."""
    if url.drivername == "embedded":
        return f"the embedded server in {url.database!r}"
    if url.get_backend_name() == "sqlite":
        return f"database {url.database!r}" if url.database else "a temporary database"
    is_postgresql = url.get_backend_name() == "postgresql"
    query: Mapping[str, Any] = url.query if is_postgresql else {}
    defaults: Mapping[str, str] = os.environ if is_postgresql else {}
    addresses: list[str] = []
    for host, port in hosts_and_ports(url) if is_postgresql else [(url.host or "", url.port)]:
        host = host or defaults.get("PGHOST") or "its default"
        host = f"[{host}]" if ":" in host else host
        addresses.append(f"{host}:{port}" if port else host)
    user = query.get("user") or url.username or defaults.get("PGUSER") or ""
    database = (
        query.get("database")
        or query.get("dbname")
        or url.database
        or defaults.get("PGDATABASE")
        or user
    )
    database = repr(database) if database else "its default"
    service = f", or as service {query['service']!r} says" if "service" in query else ""
    location = f"host {', '.join(addresses)} as user {user or 'its default'}"
    return f"database {database} on {location}{service}"
