"""Run the HTTP API with uvicorn, and end it gracefully."""

import asyncio
import logging
import math
import signal
import socket
from contextlib import ExitStack

import uvicorn
from starlette.requests import Request
from starlette.types import Message, Receive, Scope, Send

from .api import create_app
from .container import Container
from .problems import cancelled_response
from .settings import LedgerSettings

BACKLOG = 2048
logger = logging.getLogger("ledger.server")


async def serve(
    settings: LedgerSettings, host: str, port: int, *, has_metrics: bool = False
) -> bool:
    """Serve until SIGTERM or SIGINT, and then finish the accepted requests.

    Idle connections are closed then, the others after their response. A request that
    takes longer than `drain_timeout` is cancelled, and rolled back unless its commit
    has begun. The log names the blocks that are waited for, and those that are cut off.

    Raises:
        OSError: The server can't listen on this address.
    """
    with _bind_socket(host, port) as listener, ExitStack() as stack:
        container = Container(settings=settings)
        app, manager = create_app(container), container.db.sessionmanager()
        if has_metrics:
            from .metrics import metrics_at  # It needs the exporter for Prometheus.

            stack.enter_context(metrics_at("/metrics", app, container))

        async def close_connections_on_shutdown(scope: Scope, receive: Receive, send: Send) -> None:
            """During the shutdown, tell clients to close their connections."""

            async def send_with_close(message: Message) -> None:
                if server.should_exit and message["type"] == "http.response.start":
                    message["headers"] = [*message["headers"], (b"connection", b"close")]
                await send(message)

            try:
                await app(scope, receive, send_with_close)
            except asyncio.CancelledError:  # uvicorn has stopped waiting for it
                await cancelled_response(Request(scope))(scope, receive, send_with_close)

        patience = math.ceil(settings.database.drain_timeout)
        config = uvicorn.Config(
            close_connections_on_shutdown,
            lifespan="off",  # it runs below, around the server, so that its errors are raised here
            ws="none",
            log_level="warning",
            timeout_graceful_shutdown=patience,
        )
        server = uvicorn.Server(config)
        # After its shutdown, uvicorn raises the signal again, which would end the
        # process before the database is closed. So the signals are handled here.
        current_task = asyncio.current_task()
        assert current_task is not None

        def stop() -> None:
            server.should_exit = True
            if not server.started:
                # No request was accepted yet, and the database may never answer.
                current_task.cancel()
            elif blocks := manager.status().blocks:
                logger.warning(
                    "stopping: waiting up to %g s for %d open block(s)", patience, len(blocks)
                )
                asyncio.get_running_loop().call_later(patience, report_those_cut_off)

        def report_those_cut_off() -> None:
            for block in manager.status().blocks:
                logger.warning("stopping: cutting off a block, %s", block)

        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop)
        try:
            async with app.router.lifespan_context(app):
                listener.listen(BACKLOG)
                host, port = listener.getsockname()[:2]
                print(f"ledger: http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
                await server.serve(sockets=[listener])
        except asyncio.CancelledError:
            if not server.should_exit:
                raise
    return True


def _bind_socket(host: str, port: int) -> socket.socket:
    """Bind a socket that does not listen yet.

    An address that is in use is an error before anything else starts, and no client
    connects before the app is ready.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM
        )[0]
        listener = socket.socket(family, kind, protocol)
        try:
            # The address can be used again right after a restart.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError:
            listener.close()
            raise
    except (OSError, UnicodeError) as error:
        raise OSError(
            f"can't listen on {host}:{port}: {getattr(error, 'strerror', None) or error}"
        ) from error
    return listener
