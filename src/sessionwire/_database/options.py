"""`ConnectionOptions`: what the connection of a session must have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection

# The execution option that holds them.
CONNECTION_OPTIONS = "sessionwire_connection_options"
# In the attributes of a connection: the call site of the block that uses it.
CALL_SITE = "sessionwire_call_site"
# The execution option of a connection whose statements may be sent without hooks and
# settings.
WITHOUT_HOOKS = "sessionwire_without_hooks"


@dataclass(frozen=True)
class ConnectionOptions:
    """The options that a session's connection must have. Equal ones share an engine."""

    autocommit: bool = False
    # In autocommit with `on_begin` hooks: each statement has its own transaction.
    transaction_per_statement: bool = False
    # It is known from the start that the block may write, as in `transaction()`.
    write_intent: bool = False
    read_only: bool = False
    isolation: str | None = None
    execution_options: tuple[tuple[str, Any], ...] = ()
    # The server's settings for the time of the transaction.
    settings: tuple[tuple[str, str], ...] = ()

    def copy_execution_options(self) -> dict[str, Any]:
        """Copy the execution options for a connection.

        The copy has a `schema_translate_map` of its own, because SQLAlchemy adds to it.
        """
        options = dict(self.execution_options)
        if schemas := options.get("schema_translate_map"):
            options["schema_translate_map"] = dict(schemas)
        return options


def options_of(connection: Connection) -> ConnectionOptions | None:
    """Return the options of a connection's transaction, or else those of its engine."""
    options: ConnectionOptions | None = connection.__dict__.get(CONNECTION_OPTIONS)
    return options or connection.get_execution_options().get(CONNECTION_OPTIONS)
