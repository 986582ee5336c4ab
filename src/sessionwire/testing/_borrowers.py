"""Whose a connection is: the scope or the connection of its own that was opened, and where."""

from __future__ import annotations

import asyncio
from typing import cast

from sessionwire._database.runtime import Unit

from ._call_sites import where

PARTY = "sessionwire_party"  # the execution option that tells a connection whose it is


class Party:
    """Whose turn it is: a scope, or a connection of its own."""

    def __init__(self, around: frozenset[Party | None] = frozenset()) -> None:
        self.around = around  # the scopes whose code it runs in: it may begin inside their transactions
        self.task = asyncio.current_task()
        self.where = where()


def party_of(unit: Unit) -> Party | None:
    """None of one that is not of a sandbox."""
    return cast("Party | None", unit.engine.sync_engine.get_execution_options().get(PARTY))
