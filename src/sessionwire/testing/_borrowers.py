"""Borrowers: the code that opened a scope or a connection."""

from __future__ import annotations

import asyncio
from typing import cast

from sessionwire._database.runtime import Unit

from ._call_sites import call_site

BORROWER = "sessionwire_borrower"  # the execution option that holds a connection's borrower


class Borrower:
    """The task and the line of the code that opened a scope or a connection.

    Args:
        enclosing: The borrowers of the open scopes around that code. Its transactions
            may begin inside theirs.
    """

    def __init__(self, enclosing: frozenset[Borrower | None] = frozenset()) -> None:
        self.enclosing = enclosing
        self.task = asyncio.current_task()
        self.call_site = call_site()


def borrower_of(unit: Unit) -> Borrower | None:
    """Return the borrower, or None if no sandbox or test has recorded it."""
    return cast("Borrower | None", unit.engine.sync_engine.get_execution_options().get(BORROWER))
