"""Terms: what a session asks of the connection that it gets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

TERMS = "sessionwire_terms"  # the execution option that tells a connection its terms


@dataclass(frozen=True)
class Terms:
    """On what terms a session has its connection. Equal terms share a variant of the engine."""

    autocommit: bool = False
    hooked: bool = False  # in autocommit: each statement in a transaction of its own, with the hooks of on_begin
    writes: bool = False  # known from the start, as in `transaction()`
    read_only: bool = False
    isolation: str | None = None
    execution_options: tuple[tuple[str, Any], ...] = ()

    def copy_options(self) -> dict[str, Any]:
        """Copy the execution options for a connection: SQLAlchemy adds to a `schema_translate_map`."""
        options = dict(self.execution_options)
        if schemas := options.get("schema_translate_map"):
            options["schema_translate_map"] = dict(schemas)
        return options
