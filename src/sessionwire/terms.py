"""Terms: what a session asks of the connection that it gets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

TERMS = "sessionwire_terms"  # the execution option that tells a connection its terms


@dataclass(frozen=True)
class Terms:
    """On what terms a session has its connection. Equal terms share a variant of the engine."""

    autocommit: bool = False
    writes: bool = False  # known from the start, as in `transaction()`
    read_only: bool = False
    isolation: str | None = None
    execution_options: tuple[tuple[str, Any], ...] = ()
