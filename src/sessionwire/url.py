"""Database URLs: their async driver filled in, their passwords never shown."""

from __future__ import annotations

import difflib
import inspect

from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError

ASYNC_DRIVERS = {
    "postgres": "postgresql+asyncpg",
    "postgresql": "postgresql+asyncpg",
    "sqlite": "sqlite+aiosqlite",
    "mysql": "mysql+asyncmy",
    "mariadb": "mariadb+asyncmy",
}
# libpq's own, to which asyncpg gives the same meaning in a DSN
LIBPQ_KEYS = ("sslmode", "sslrootcert", "sslcert", "sslkey", "sslpassword", "sslcrl", "application_name", "options")
DIALECT_KEYS = ("prepared_statement_cache_size",)
SECRET_QUERY_KEYS = ("password", "passwd", "sslpassword")
SSL_MODES = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")


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
    if isinstance(value, str) and value.startswith("embedded:") and not value.startswith("embedded://"):
        value = URL.create("embedded", database=value.removeprefix("embedded:"))
    try:
        url = make_url(value)  # type: ignore[arg-type]  # it checks the type itself
    except (ArgumentError, ValueError):
        raise ValueError(
            "not a database URL; one looks like postgresql://user@host/database or sqlite:///file.db, "
            "with any of @ : / ? # in a password percent-encoded"
        ) from None
    url = url.set(drivername=ASYNC_DRIVERS.get(url.drivername, url.drivername))
    if url.drivername != "embedded":
        _check_driver(url)
    elif not url.database or url.host:
        raise ValueError("an embedded server needs a directory, such as embedded:./var/postgres, and no host")
    if url.drivername == "postgresql+asyncpg":
        _check_asyncpg(url)
    return DatabaseURL._make(url)


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
    import asyncpg

    known = {*LIBPQ_KEYS, *DIALECT_KEYS, *inspect.signature(asyncpg.connect).parameters}
    for key in url.query:
        if key not in known:
            close = difflib.get_close_matches(key, known, 1)
            raise ValueError(f"no URL parameter {key!r} is known" + (f"; did you mean {close[0]!r}?" if close else ""))
    if url.query.get("sslmode", "prefer") not in SSL_MODES:
        raise ValueError(f"there is no such sslmode; there are {', '.join(SSL_MODES)}")
