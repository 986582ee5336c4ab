"""`StatusPage`: a page that shows what the databases of a process do now."""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import asdict
from datetime import UTC, datetime
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

from sessionwire._managers import managers_by_name

from .answers import Answer, ASGIScope, Receive, Send, json_answer, serve
from .status_html import render_databases, summary

PAGE = files("sessionwire._web").joinpath("status_page.html").read_text(encoding="utf-8")


def _hash_of(name: str) -> str:
    """Return the source for a Content-Security-Policy of the page's element `name`."""
    found = re.search(f"<{name}>(.*?)</{name}>", PAGE, re.DOTALL)
    assert found is not None
    digest = hashlib.sha256(found[1].encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


TEMPLATE = Template(PAGE)
# Nothing but what the page itself brings, and its own refreshing.
POLICY = "; ".join(
    [
        "default-src 'none'",
        f"style-src {_hash_of('style')}",
        f"script-src {_hash_of('script')}",
        "connect-src 'self'",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
)


class StatusPage:
    """Show what the databases of this process do now. An ASGI application, to be mounted.

    At its root it answers with a page that refreshes itself every two seconds: the
    pools, the open blocks with their lines and statements, slow statements, and totals.
    `status.json` has the same as JSON. It sends nothing to a database.

    Whoever sees the page sees lines of code and the text of statements, though no
    parameters. It has no protection of its own: **mount it behind yours**.

    Args:
        database: A container, a `DatabaseContainer`, or a manager.

    Raises:
        ConfigurationError: The container has no database.

    Example:
        ```python
        app.mount("/status", StatusPage(container))
        ```
    """

    def __init__(self, database: Any) -> None:
        self._managers = managers_by_name(database)

    async def __call__(self, scope: ASGIScope, receive: Receive, send: Send) -> None:
        await serve(self._find_answer, scope, receive, send)

    async def _find_answer(self, path: str, scope: ASGIScope) -> Answer | None:
        if path not in ("", "/status.json"):
            return None
        statuses = {name: manager().status() for name, manager in self._managers.items()}
        if path == "/status.json":
            return json_answer(
                {"databases": {name: asdict(status) for name, status in statuses.items()}}
            )
        now = datetime.now(UTC)
        page = TEMPLATE.substitute(
            title=escape(summary(statuses)),
            json=escape(_path_of_json(str(scope["path"]))),
            now=now.isoformat(timespec="seconds"),
            time=f"{now:%H:%M:%S} UTC",
            databases=render_databases(statuses, now),
        )
        headers = {"content-security-policy": POLICY, "referrer-policy": "no-referrer"}
        return Answer(page, media_type="text/html; charset=utf-8", headers=headers)


def _path_of_json(path: str) -> str:
    """Return the path of the JSON, relative to that of the page, which may end with "/"."""
    name = path.rpartition("/")[2]
    return f"{name}/status.json" if name else "status.json"
