"""For any ASGI application: a transaction per request, answers to probes, a status page."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Unpack

from ._core.definition import TransactionOptions
from ._core.transaction_block import TransactionBlock
from ._web.answers import ASGIApp as ASGIApp
from ._web.answers import ASGIScope, Message, Receive, Send
from ._web.health_app import HealthApp
from ._web.status_page import StatusPage
from .transaction import TransactionManager

__all__ = ["HealthApp", "StatusPage", "TransactionMiddleware"]


class TransactionMiddleware:
    """Run each HTTP request in a transaction that ends before its response begins.

    It commits if the status is below 400, and otherwise rolls back. A request that does
    not use the database sends nothing to it. Streamed bodies, background tasks and
    websockets run outside the transaction: if they use the database, they open
    `session()` or `transaction()` themselves.

    If the commit fails, its error replaces the response. `send` raises it in the
    application, which may still answer with a status of 400 or more; if it does not,
    the middleware re-raises the error. Most frameworks' exception handlers no longer
    run at that point (Starlette's handler for `Exception` does): to have them answer a
    constraint violation, call `flush()` in the endpoint.

    Add it as the innermost middleware. Starlette's `BaseHTTPMiddleware`, between it and
    the endpoint, runs a streamed body before the response begins: a body that queries
    at once makes the request fail.

    Args:
        app: The ASGI application.
        transaction: The manager that opens the transactions.
        **options: The options of `transaction()`. A `timeout`, in seconds, covers the
            time until the response begins.

    Raises:
        TypeError: An option is unknown, or has a wrong type.
        ValueError: An option has a wrong value.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        transaction: TransactionManager,
        **options: Unpack[TransactionOptions],
    ) -> None:
        # Check the options now: the first request would be late.
        transaction(**options)
        self._app = app
        self._transaction = transaction
        self._options = options

    async def __call__(self, scope: ASGIScope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        block: Any = self._transaction(**self._options)
        await block.__aenter__()
        response = _TransactionalSend(block, send)
        try:
            await self._app(scope, receive, response.send)
            # If the transaction has not ended yet, there was no response.
            await response.end_transaction(rollback_only=True)
        except BaseException as error:
            await response.end_transaction(error)
            if not (isinstance(error, Exception) and isinstance(response.end_error, Exception)):
                raise
        # Raise the error of the commit even if the application swallowed it.
        if isinstance(response.end_error, Exception):
            raise response.end_error


@dataclass(eq=False)
class _TransactionalSend:
    """The `send` of one request, which ends the transaction before the response.

    Attributes:
        block: The transaction.
        send_on: The server's own `send`.
        has_ended: Whether the transaction has ended, or tried to.
        end_error: The error of the end, until the application has answered it.
    """

    block: TransactionBlock
    send_on: Send
    has_ended: bool = False
    end_error: BaseException | None = None

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            is_error = message["status"] >= 400
            if is_error:
                self.end_error = None
            try:
                await self.end_transaction(rollback_only=is_error)
            except BaseException as error:
                # Keep a cancellation too: an application that swallows it must not
                # report success.
                self.end_error = error
        if self.end_error is not None:
            raise self.end_error
        await self.send_on(message)

    async def end_transaction(
        self, error: BaseException | None = None, *, rollback_only: bool = False
    ) -> None:
        """End the transaction, once: further calls do nothing.

        Args:
            error: The error that the application raised; it is not raised again.
            rollback_only: Roll back even without an error.

        Raises:
            Exception: Any error of the end of a `transaction()` block.
        """
        if self.has_ended:
            return
        self.has_ended = True
        if rollback_only:
            self.block.set_rollback_only()
        await self.block.__aexit__(type(error) if error else None, error, None)
