"""Complete a database URL with the keys beside it, and keep a password hidden."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import SecretStr
from sqlalchemy import URL

from .url import DatabaseURL
from .url_parameters import with_hosts, with_port

# The keys, and the parameters of a URL that would outrank its parts.
PARTS = {
    "host": ("host", "port"),
    "port": ("port",),
    "username": ("user",),
    "password": ("password",),
    "password_file": ("password",),
    "database": ("database", "dbname"),
}
# The databases that have no such parts.
KINDS = {"sqlite": "an SQLite file", "embedded": "an embedded server"}


class MaskedSecret(str):
    """The stars in place of a secret; `parse_secret()` returns the secret."""

    secret: SecretStr


def mask_secret(secret: SecretStr | None) -> str | None:
    """Return the text that dumped settings contain."""
    if secret is None:
        return None
    masked = MaskedSecret(secret)
    masked.secret = secret
    return masked


def parse_secret(value: object) -> SecretStr | None:
    """Return a password; an empty one is none.

    Raises:
        ValueError: It is no text, or was hidden.
    """
    if isinstance(value, MaskedSecret):
        return value.secret
    if callable(reveal := getattr(value, "get_secret_value", None)):
        value = reveal()
    if value is None or value == "":
        return None
    if not isinstance(value, str):
        raise ValueError("a password is a text: write it in quotes")
    if not value.strip("*"):
        raise ValueError("it is nothing but *, so somebody has hidden it: give the password itself")
    return SecretStr(value)


def read_password(file: str | Path) -> str:
    """Return the content of a file, without the line break at its end.

    Raises:
        ValueError: It cannot be read, or is empty.
    """
    path = Path(file).expanduser()
    try:
        password = path.read_text(encoding="utf-8")
    except OSError as error:
        relative = "" if path.is_absolute() else f"; the path is relative to {Path.cwd()}"
        raise ValueError(f"{path}: {error.strerror}{relative}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path}: this is not a text in UTF-8") from None
    password = password.removesuffix("\n").removesuffix("\r")
    if not password:
        raise ValueError(f"{path}: the file is empty")
    return password


def check_password_file(file: str | Path | None) -> str | Path | None:
    """Return the name of a file that can be read."""
    if file is not None:
        read_password(file)
    return file


def check_keys(
    url: URL, keys: Mapping[str, object], of_postgresql: Iterable[str]
) -> Iterator[tuple[str, str]]:
    """Yield each key that contradicts the URL or another key, and the remedy.

    Args:
        url: The URL of the settings.
        keys: The keys that are set.
        of_postgresql: The keys that only PostgreSQL understands.
    """
    backend = url.drivername if url.drivername == "embedded" else url.get_backend_name()
    if backend in KINDS:
        for key in filter(keys.__contains__, PARTS):
            yield (
                key,
                (
                    f"the url is that of {KINDS[backend]}, which has no {key}: leave it out, or "
                    "let the url begin with postgresql://"
                ),
            )
    if backend not in ("postgresql", "embedded"):
        for key in filter(keys.__contains__, of_postgresql):
            yield key, f"only PostgreSQL has it, and the url is that of {backend}: leave it out"
    if "pooler" in keys and "options" in url.query:
        yield (
            "pooler",
            "a pooler refuses or ignores options= in the url: set search_path, statement_timeout, "
            "lock_timeout or idle_in_transaction_timeout beside url, or all else by ALTER ROLE",
        )
    if keys.keys() >= {"password", "password_file"}:
        yield "password_file", "password is set too: leave out one of them"


def complete_url(url: DatabaseURL, keys: Mapping[str, Any]) -> DatabaseURL:
    """Return the URL with the values of these keys in place of its own parts.

    Raises:
        ValueError: Host and port do not fit together.
    """
    parts = {key: value for key, value in keys.items() if key in PARTS}
    outranked = {name for key in parts for name in PARTS[key]}
    completed: URL = url.difference_update_query(outranked)
    if "host" in parts:
        completed = with_hosts(completed, parts["host"], parts.get("port"))
    elif "port" in parts:
        completed = with_port(completed, parts["port"])
    if "password_file" in parts:
        completed = completed._replace(password=None)
    if "password" in parts:
        completed = completed._replace(password=parts["password"].get_secret_value())
    if "username" in parts:
        completed = completed._replace(username=parts["username"])
    if "database" in parts:
        completed = completed._replace(database=parts["database"])
    return DatabaseURL._make(completed)


def fill_up_url(url: DatabaseURL, other: URL) -> DatabaseURL:
    """Return the URL with user, password and database of another one, unless it names them."""
    username, password = url.username or other.username, url.password
    if password is None and username == other.username:
        password = other.password
    database = url.database or other.database
    return DatabaseURL._make(url._replace(username=username, password=password, database=database))
