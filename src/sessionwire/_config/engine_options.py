"""Check the options for SQLAlchemy's engine and the arguments for the driver."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from pydantic import TypeAdapter, ValidationError

from .keys import did_you_mean
from .url_parameters import ASYNCPG, EXPECTED, SQLITE

IN_URL = "write it in url"
IN_SETTINGS = "write {} in the settings"
LIBRARYS_POOL = "the settings size the library's own pool; for another class of it, write poolclass"
# What an engine or a connection of the library can't be given, and what to do instead.
ENGINE_ELSEWHERE = {
    "isolation_level": "each block has its own: transaction(isolation=…)",
    "echo": IN_SETTINGS.format("echo"),
    "pool_size": IN_SETTINGS.format("pool.size"),
    "max_overflow": IN_SETTINGS.format("pool.max_overflow"),
    "pool_timeout": IN_SETTINGS.format("pool.timeout"),
    "pool_recycle": IN_SETTINGS.format("pool.max_lifetime"),
    "pool_pre_ping": IN_SETTINGS.format("pool.ping_after"),
    "pool_use_lifo": "leave it out: the pool does so, and idle connections age out",
    "pool_reset_on_return": "leave it out: no connection returns to the pool in a transaction",
    "skip_autocommit_rollback": "leave it out: the library sends no such ROLLBACK",
    "pool": LIBRARYS_POOL,
    "pool_class": "SQLAlchemy calls it poolclass",
    "connect_args": "write connect_args=… beside engine_options, or connect in the settings",
    "creator": "write connect_args={'connection_class': …}",
    "async_creator": "write connect_args={'connection_class': …}",
    "module": "the driver is named in url",
}
CONNECT_ELSEWHERE = {
    **dict.fromkeys(
        ("host", "hostaddr", "port", "user", "password", "database", "dbname", "dsn", "conninfo"),
        IN_URL,
    ),
    **dict.fromkeys(
        ("timeout", "connect_timeout"),
        "write connect_timeout in the settings; of SQLite, pool.timeout",
    ),
    "loop": "leave it out: a manager belongs to the event loop in which it is first used",
    "async_creator_fn": "write connection_class",
    **dict.fromkeys(
        ("isolation_level", "autocommit", "check_same_thread", "factory"),
        "leave it out: the library needs a value of its own there",
    ),
}
EXECUTION_ELSEWHERE = {
    "isolation_level": ENGINE_ELSEWHERE["isolation_level"],
    "postgresql_readonly": "each block has its own: transaction(read_only=True)",
    "postgresql_deferrable": "write it for a block: transaction(execution_options=…)",
    "sessionwire_without_hooks": "write it for a block: transaction(execution_options=…)",
}
# Python objects, which no file and no variable can hold.
OBJECTS = {
    "json_serializer",
    "json_deserializer",
    "poolclass",
    "connection_class",
    "record_class",
    "prepared_statement_name_func",
}
# The types of options that environment variables write as text.
ENGINE_TYPES: dict[str, Any] = {
    **dict.fromkeys(
        (
            "insertmanyvalues_page_size",
            "label_length",
            "max_identifier_length",
            "query_cache_size",
        ),
        int,
    ),
    **dict.fromkeys(
        (
            "enable_from_linting",
            "hide_parameters",
            "native_datetime",
            "native_inet_types",
            "use_insertmanyvalues",
        ),
        bool,
    ),
}
CONNECT_TYPES: dict[str, Any] = {**SQLITE, **ASYNCPG}


def check_engine_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options for SQLAlchemy's `create_async_engine()`, texts converted.

    Raises:
        ValueError: The library needs another value of one; the message has the remedy.
    """
    checked = _check(options, ENGINE_ELSEWHERE, ENGINE_TYPES)
    _check(checked.get("execution_options") or {}, EXECUTION_ELSEWHERE, {})
    return checked


def check_connect_args(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments for the driver's `connect()`, texts converted.

    Raises:
        ValueError: The library needs another value of one; the message has the remedy.
    """
    checked = _check(arguments, CONNECT_ELSEWHERE, CONNECT_TYPES)
    if isinstance(checked.get("server_settings"), Mapping):
        settings = cast("Mapping[object, object]", checked["server_settings"])
        checked["server_settings"] = {
            str(name): _server_text(value) for name, value in settings.items()
        }
    return checked


def unknown_argument(name: str, known: Mapping[str, Any] | set[str], driver: str) -> str:
    """Describe an argument that the driver does not know."""
    hint = did_you_mean(name, known)
    return f"{name}: {driver} has no such argument{f'; {hint}' if hint else ''}"


def _check(
    options: Mapping[str, Any], elsewhere: Mapping[str, str], types: Mapping[str, Any]
) -> dict[str, Any]:
    checked: dict[str, Any] = {}
    for name, value in options.items():
        if name in elsewhere:
            raise ValueError(f"{name}: {elsewhere[name]}")
        if isinstance(value, str) and name in OBJECTS:
            raise ValueError(
                f"{name}: it is a Python object, no text: give it to DatabaseSessionManager"
            )
        expected: Any = types.get(name)
        if isinstance(value, str) and expected in EXPECTED:
            try:
                checked[name] = TypeAdapter(expected).validate_python(value)
            except ValidationError:
                raise ValueError(f"{name} must be {EXPECTED[expected]}") from None
        else:
            checked[name] = value
    return checked


def _server_text(value: object) -> str:
    """Return the text of a setting of the server; YAML reads `on` and `off` as booleans."""
    return ("on" if value else "off") if isinstance(value, bool) else str(value)
