"""What all blocks have in common: they are entered with `async with`, once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sessionwire._database.call_sites import CallSite
from sessionwire._database.runtime import Database


class Block:
    """What is entered with `async with`, once."""

    __slots__ = ("_call_site", "_database", "_was_entered")

    def __init__(self, database: Database, call_site: CallSite | None) -> None:
        self._database = database
        self._call_site = call_site
        self._was_entered = False

    if not TYPE_CHECKING:  # to which it has no such methods

        def __enter__(self):
            raise TypeError("a block of sessionwire is entered with `async with`, not with `with`")

        def __exit__(self, *_):
            """Let Python call the one above."""

        def __getattr__(self, name):
            if name.startswith("_"):
                raise AttributeError(name)
            raise AttributeError(
                f"{name!r} was looked for in a block that is not entered: write `async with …() as "
                "session:`, and use that session inside it"
            )
