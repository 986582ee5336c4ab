"""`Health`: whether a manager can serve, and why not."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Health:
    """What `manager.health()` has found, for a probe.

    Attributes:
        is_live: False if nothing but a restart of the process helps. A server that is
            away is no reason for one.
        is_ready: Whether the manager is open, and the server has answered on a
            connection of the pool.
        reason: One sentence that says why it is not live or not ready; None if it is.
    """

    is_live: bool
    is_ready: bool
    reason: str | None = None
