"""`HealthApp`: answer the probes of an orchestrator or a load balancer."""

from __future__ import annotations

import asyncio
from typing import Any

from sessionwire._database.runtime import database_of
from sessionwire._managers import managers_by_name

from .answers import Answer, ASGIScope, Receive, Send, json_answer, serve


class HealthApp:
    """Answer `/live` and `/ready`, for probes. An ASGI application, to be mounted.

    It answers GET and HEAD with 200, or with 503 and a reason for each database that
    is the cause: `{"status": "not ready", "reasons": {"db": "the manager was closed"}}`.
    The reasons name hosts and lines of code: where everybody can reach it, leave them out.

    `/live` sends nothing to a database. It fails if nothing but a restart of the process
    helps. `/ready` asks all databases at once, by `manager.health()`.

    Args:
        database: A container, a `DatabaseContainer`, or a manager.
        timeout: Seconds that `/ready` may take. Let the probe wait a little longer.
        reasons: Whether the answers have reasons.

    Raises:
        ConfigurationError: The container has no database.

    Example:
        ```python
        app.mount("/health", HealthApp(container))
        ```
    """

    def __init__(self, database: Any, *, timeout: float = 2.0, reasons: bool = True) -> None:
        self._managers = managers_by_name(database)
        self._timeout = timeout
        self._has_reasons = reasons

    async def __call__(self, scope: ASGIScope, receive: Receive, send: Send) -> None:
        await serve(self._find_answer, scope, receive, send)

    async def _find_answer(self, path: str, _scope: ASGIScope) -> Answer | None:
        if path == "/live":
            return self._answer_live()
        if path == "/ready":
            return await self._answer_ready()
        return None

    def _answer_live(self) -> Answer:
        reasons: dict[str, str | None] = {}
        for name, manager in self._managers.items():
            defect = database_of(manager()).find_defect()
            if defect and not defect.is_live:
                reasons[name] = defect.reason
        return self._answer("live", reasons)

    async def _answer_ready(self) -> Answer:
        found = await asyncio.gather(
            *(manager().health(self._timeout) for manager in self._managers.values())
        )
        named = zip(self._managers, found, strict=True)
        return self._answer("ready", {name: h.reason for name, h in named if not h.is_ready})

    def _answer(self, state: str, reasons: dict[str, str | None]) -> Answer:
        if not reasons:
            return json_answer({"status": state})
        shown = {"reasons": reasons} if self._has_reasons else {}
        return json_answer({"status": f"not {state}", **shown}, 503)
