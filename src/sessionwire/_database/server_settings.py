"""The server's settings that connections have, and how these reach it through a pooler."""

from __future__ import annotations

from typing import NamedTuple

from sessionwire.settings import DatabaseSettings

# PgBouncer takes it with a start, and keeps it for each of its clients.
KEPT_BY_POOLERS = "application_name"
LISTEN_REFUSED = (
    "pooler: transaction: LISTEN needs a session of the server, and the pooler gives it to other "
    "clients after each transaction, so no notification would arrive: connect to the server "
    "itself for it, with another manager"
)


class ServerSettings(NamedTuple):
    """What gives connections the server's settings. An empty one gives none."""

    at_start: dict[str, str]  # the parameters of a start
    at_connect: str  # a statement for each new connection
    at_begin: str  # a statement for each transaction


def server_settings(settings: DatabaseSettings) -> ServerSettings:
    """Return how connections get the server's settings.

    Poolers refuse or ignore most parameters of a start. If one gives each transaction
    another connection of the server, nothing may outlast a transaction.
    """
    parameters = start_up_parameters(settings)
    if settings.pooler is None:
        return ServerSettings(parameters, "", "")
    at_start = {name: parameters.pop(name) for name in (KEPT_BY_POOLERS,) if name in parameters}
    is_local = settings.pooler == "transaction"
    statement = _set(parameters, is_local=is_local) if parameters else ""
    return ServerSettings(
        at_start, at_connect="" if is_local else statement, at_begin=statement if is_local else ""
    )


def start_up_parameters(settings: DatabaseSettings) -> dict[str, str]:
    """Return the server's settings by their names."""
    path = settings.search_path
    if isinstance(path, list):
        path = ", ".join('"' + schema.replace('"', '""') + '"' for schema in path)
    durations = {
        "statement_timeout": settings.statement_timeout,
        "lock_timeout": settings.lock_timeout,
        "idle_in_transaction_session_timeout": settings.idle_in_transaction_timeout,
    }
    parameters = {
        "application_name": settings.application_name,
        "search_path": path,
        # 0 would be none.
        **{name: f"{max(1, round(t * 1000))}ms" for name, t in durations.items() if t},
    }
    return {name: value for name, value in parameters.items() if value}


def _set(parameters: dict[str, str], *, is_local: bool) -> str:
    calls = (
        f"set_config({_literal(name)}, {_literal(value)}, {str(is_local).lower()})"
        for name, value in parameters.items()
    )
    return "SELECT " + ", ".join(calls)


def _literal(value: str) -> str:
    return "E'" + value.replace("\\", "\\\\").replace("'", "''") + "'"
