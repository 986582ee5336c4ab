"""A transaction per request, for any ASGI application."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, TypeAlias, Unpack

from ._core.blocks import TransactionBlock
from ._core.definition import TransactionOptions
from .transaction import TransactionManager

Scope: TypeAlias = MutableMapping[str, Any]
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
ASGIApp: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]


class TransactionMiddleware:
    """Runs each HTTP request in a transaction, which has ended when its response begins.

    It is committed where the status is below 400, and else rolled back. Nothing is sent to the database for a request
    that doesn't use it. The body of a streaming response, background tasks and websockets have no scope: what uses the
    database there opens `session()` or `transaction()` itself. Options are those of `transaction()`; a `timeout` ends
    where the response begins.

    Where the end fails, its error, one of those that a `transaction()` block raises, takes the place of the response:
    `send` raises it in the application, which may still answer with a status of 400 or more, and this middleware
    raises it to those around it. To a framework's exception handlers the response has started then, save to Starlette's
    for `Exception`: what they shall answer, let `flush()` raise in the endpoint.

    Put it innermost. Between it and the endpoint, Starlette's `BaseHTTPMiddleware` lets a streamed body run before the
    response begins: one that queries at once makes the request fail.
    """

    def __init__(self, app: ASGIApp, *, transaction: TransactionManager, **options: Unpack[TransactionOptions]) -> None:
        """Raises `ValueError` and `TypeError` for an option that cannot be."""
        transaction(**options)  # at each request would be late to learn it
        self._app = app
        self._transaction = transaction
        self._options = options

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        block = self._transaction(**self._options)
        await block.__aenter__()
        response = _Response(block, send)
        try:
            await self._app(scope, receive, response.send)
        except BaseException as error:
            await response.end_transaction(error)
            if response.refused is None or not isinstance(error, Exception):
                raise
        else:
            await response.end_transaction(rollback_only=True)  # unless it has ended, nothing was answered
        if response.refused is not None:
            raise response.refused  # whatever has become of it in the application


class _Response:
    """Of one request: what is sent of it, and before that the end of its transaction."""

    def __init__(self, block: TransactionBlock, send: Send) -> None:
        self._block = block
        self._send = send
        self._has_ended = False
        self._refusal: BaseException | None = None

    @property
    def refused(self) -> Exception | None:
        """The error of the end, until the application has answered it."""
        return self._refusal if isinstance(self._refusal, Exception) else None

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            is_error = message["status"] >= 400
            if is_error:
                self._refusal = None
            try:
                await self.end_transaction(rollback_only=is_error)
            except BaseException as error:
                self._refusal = error  # a cancellation too: who swallows it must not answer as if all were kept
        if self._refusal is not None:
            raise self._refusal
        await self._send(message)

    async def end_transaction(self, error: BaseException | None = None, *, rollback_only: bool = False) -> None:
        """Once. Raises what the end of a block raises, save `error` itself."""
        if self._has_ended:
            return
        self._has_ended = True
        if rollback_only:
            self._block.set_rollback_only()
        await self._block.__aexit__(type(error) if error else None, error, None)
