"""Connect to the first of several servers that answers and has the wanted role."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from time import monotonic
from typing import Any

# What a client asks for in turn, to get what asyncpg does for all hosts at once.
IN_TURN = {"prefer-standby": ("standby", "any")}
NOT_YET = "57P03"  # SQLSTATE cannot_connect_now


def connect(dialect: Any, parameters: Mapping[str, Any]) -> Any:
    """Open a connection of SQLAlchemy's adapter.

    asyncpg has one timeout for all hosts: the first, if it is silent, would leave no
    time for the next one. Here each gets its share of the time that is left.

    Raises:
        Exception: That of the last host. An error that is not about reaching a server,
            such as a wrong password, ends the search, as in libpq.
    """
    if not isinstance(parameters.get("host"), list):
        return dialect.connect(**parameters)
    deadline = monotonic() + parameters["timeout"]
    choices = list(_choices(parameters))
    for left, choice in zip(range(len(choices), 0, -1), choices, strict=True):
        try:
            share = max(0.01, deadline - monotonic()) / left
            return dialect.connect(**{**parameters, **choice, "timeout": share})
        except Exception as error:
            if left == 1 or not _is_unavailable(dialect, error):
                raise


def _is_unavailable(dialect: Any, error: Exception) -> bool:
    """Tell whether a server can't be reached, is starting, or has another role."""
    dbapi = dialect.loaded_dbapi
    reason = error.__cause__ if isinstance(error, dbapi.Error) else error
    wrong_role = dbapi.asyncpg.TargetServerAttributeNotMatched
    is_starting = getattr(reason, "sqlstate", None) == NOT_YET
    return is_starting or isinstance(reason, OSError | wrong_role)


def _choices(parameters: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield each host with its port, and the role that it must have."""
    wanted = parameters.get("target_session_attrs") or os.environ.get("PGTARGETSESSIONATTRS")
    for attribute in IN_TURN.get(wanted or "any", (wanted or "any",)):
        for host, port in zip(parameters["host"], parameters["port"], strict=True):
            yield {"host": host, "port": port, "target_session_attrs": attribute}
