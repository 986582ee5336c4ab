"""`serve()`: answer GET and HEAD as an ASGI application that is mounted anywhere."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

ASGIScope: TypeAlias = MutableMapping[str, Any]
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
ASGIApp: TypeAlias = Callable[[ASGIScope, Receive, Send], Awaitable[None]]

# What each answer says: that it is of this moment, and of the type that it names.
HEADERS = {"cache-control": "no-store", "x-content-type-options": "nosniff"}


@dataclass(frozen=True)
class Answer:
    """The answer to a request."""

    body: str
    status: int = 200
    media_type: str = "text/plain; charset=utf-8"
    headers: Mapping[str, str] = field(default_factory=dict[str, str])


# Returns the answer to a request for this path of the application: "" or "/name". None:
# there is nothing at this path.
Route: TypeAlias = Callable[[str, ASGIScope], Awaitable[Answer | None]]


def json_answer(value: object, status: int = 200) -> Answer:
    """Return a value as JSON. What JSON has no type for becomes text."""
    body = json.dumps(value, default=str, ensure_ascii=False)
    return Answer(body, status, "application/json")


async def serve(find: Route, scope: ASGIScope, receive: Receive, send: Send) -> None:
    """Answer one scope of ASGI.

    Args:
        find: Finds the answer to a path.
        scope: The scope, as the other arguments are, of ASGI.
        receive: Receives an event.
        send: Sends an event.

    Raises:
        ValueError: The scope is of an unknown type, as ASGI demands.
    """
    if scope["type"] == "http":
        await _send_answer(await _find_answer(find, scope), scope, send)
    elif scope["type"] == "lifespan":
        while (event := (await receive())["type"]) != "lifespan.shutdown":
            await send({"type": f"{event}.complete"})
        await send({"type": "lifespan.shutdown.complete"})
    elif scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.close"})  # Servers answer it with a status of 403.
    else:
        raise ValueError(f"{scope['type']!r} is no type of an ASGI scope that is known here")


async def _find_answer(find: Route, scope: ASGIScope) -> Answer:
    answer = await find(path_in(scope), scope) if scope["method"] in ("GET", "HEAD") else None
    if answer is not None:
        return answer
    if scope["method"] in ("GET", "HEAD"):
        return Answer("there is nothing at this path\n", 404)
    return Answer("only GET and HEAD are answered\n", 405, headers={"allow": "GET, HEAD"})


def path_in(scope: ASGIScope) -> str:
    """Return the path below the place where the application is mounted, such as "/live".

    ASGI's `path` begins with `root_path`; in earlier versions of frameworks it did not.
    """
    path, root = str(scope["path"]), str(scope.get("root_path", "")).rstrip("/")
    if path == root or path.startswith(f"{root}/"):
        path = path[len(root) :]
    return path.rstrip("/")


async def _send_answer(answer: Answer, scope: ASGIScope, send: Send) -> None:
    body = answer.body.encode()
    headers = {
        **HEADERS,
        "content-type": answer.media_type,
        "content-length": str(len(body)),
        **answer.headers,
    }
    await send(
        {
            "type": "http.response.start",
            "status": answer.status,
            "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
        }
    )
    is_head = scope["method"] == "HEAD"
    await send({"type": "http.response.body", "body": b"" if is_head else body})
