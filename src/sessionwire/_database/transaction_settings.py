"""The server's settings for the time of one transaction, such as the tenant of row-level
security.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any, cast

from sqlalchemy import Connection, text

from sessionwire.errors import IncompatibleTransactionError

from .options import WITHOUT_HOOKS, ConnectionOptions

SettingsSource = Callable[[], Mapping[str, object]]
# A comment by which the connection knows that nobody reads the answer.
SENT_AHEAD = "SELECT /*ahead*/ "
NAME = re.compile(r"[A-Za-z_][\w$]*(\.[A-Za-z_][\w$]*)*")
OPTIONS_OF_BLOCKS = {
    "transaction_isolation": "write isolation=…",
    "transaction_read_only": "write read_only=True",
}


class TransactionSettings:
    """The settings of all transactions of one database.

    Args:
        source: Returns them. It is asked at each begin.
    """

    def __init__(self, source: SettingsSource | None) -> None:
        if inspect.iscoroutinefunction(source):
            raise TypeError(
                "session_settings is called where nothing can be awaited: write a function "
                "without async, and find out before what it returns"
            )
        self.source = source

    def ask(self, options: ConnectionOptions) -> dict[str, str]:
        """Return the settings for a transaction with these options."""
        if WITHOUT_HOOKS in dict(options.execution_options):
            return {}
        common = () if self.source is None else settings_as_text(self.source())
        return {**dict(common), **dict(options.settings)}

    def apply(self, connection: Connection, settings: Mapping[str, str]) -> None:
        """Send the settings to the transaction of this connection.

        Raises:
            IncompatibleTransactionError: The database has no such settings, or the
                connection has no transaction.
        """
        if connection.get_execution_options().get("isolation_level") == "AUTOCOMMIT":
            raise IncompatibleTransactionError(
                "settings hold for a transaction, and this connection is in AUTOCOMMIT: use "
                "transaction(Propagation.NOT_SUPPORTED), which sends them with each statement"
            )
        if connection.dialect.name != "postgresql":
            raise IncompatibleTransactionError(
                f"settings are PostgreSQL's, and this database is {connection.dialect.name}: let "
                "settings be empty for it, and session_settings return {}"
            )
        calls, arguments = _calls(settings, ":p{}")
        statement = text(SENT_AHEAD + calls)
        connection.execute(statement, {f"p{at}": each for at, each in enumerate(arguments, 1)})


def ahead_of_each(settings: Mapping[str, str]) -> tuple[str, ...]:
    """Return the statement that gives the next one these settings, and its arguments."""
    calls, arguments = _calls(settings, "${}")
    return SENT_AHEAD + calls, *arguments


def _calls(settings: Mapping[str, str], placeholder: str) -> tuple[str, list[str]]:
    call = f"set_config({placeholder}, {placeholder}, true)"
    calls = [call.format(at, at + 1) for at in range(1, 2 * len(settings), 2)]
    return ", ".join(calls), [part for setting in settings.items() for part in setting]


def settings_as_text(settings: object) -> tuple[tuple[str, str], ...]:
    """Check settings, and return them as PostgreSQL takes them.

    Raises:
        TypeError: They are no mapping of names to text, numbers or booleans.
        ValueError: A name can't be one of PostgreSQL's, or is an option of the block.
    """
    if not isinstance(settings, Mapping):
        raise TypeError(
            f"settings are a mapping, and {settings!r} is none: write {{'app.tenant': '7'}}"
        )
    items = cast("Mapping[Any, object]", settings).items()
    return tuple(_as_text(name, value) for name, value in items)


def _as_text(name: object, value: object) -> tuple[str, str]:
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise ValueError(f"settings: {name!r} is no name of a setting: write 'app.tenant' or so")
    if name in OPTIONS_OF_BLOCKS:
        raise ValueError(f"settings: {name!r} is an option of the block: {OPTIONS_OF_BLOCKS[name]}")
    if isinstance(value, bool):
        return name, "on" if value else "off"
    if not isinstance(value, str | int | float):
        raise TypeError(
            f"settings: {name!r} has the value {value!r}: write text, a number, True or False"
        )
    return name, str(value)
