"""The HTTP API under uvicorn, from the first connection to the last answer."""

import asyncio
import math
import signal
import socket

import uvicorn
from starlette.requests import Request
from starlette.types import Message, Receive, Scope, Send

from .api import create_app
from .container import Container
from .problems import cut_off
from .settings import LedgerSettings

BACKLOG = 2048


async def serve(settings: LedgerSettings, host: str, port: int) -> bool:
    """Serve until SIGTERM or SIGINT, and then finish what was accepted.

    Connections on which nothing is asked are closed then, and the others after their answer. What takes longer than
    `drain_timeout` is cut off, and rolled back unless it was being committed. Raises `OSError` where it can't listen.
    """
    with _bound(host, port) as listener:
        app = create_app(Container(settings=settings))

        async def last_answers(scope: Scope, receive: Receive, send: Send) -> None:
            """Once the end has begun: tell each client that nothing more is taken on its connection."""

            async def send_last(message: Message) -> None:
                if server.should_exit and message["type"] == "http.response.start":
                    message["headers"] = [*message["headers"], (b"connection", b"close")]
                await send(message)

            try:
                await app(scope, receive, send_last)
            except asyncio.CancelledError:  # it took longer than uvicorn waits
                await cut_off(Request(scope))(scope, receive, send_last)

        config = uvicorn.Config(
            last_answers,
            lifespan="off",  # ours, around the server: what fails in it is raised here
            ws="none",
            log_level="warning",
            timeout_graceful_shutdown=math.ceil(settings.database.drain_timeout),
        )
        server = uvicorn.Server(config)
        # uvicorn raises again what it was stopped by, which would end the process before the database is closed.
        this = asyncio.current_task()
        assert this is not None

        def stop() -> None:
            server.should_exit = True
            if not server.started:
                this.cancel()  # nothing was accepted yet, and the database may not answer

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


def _bound(host: str, port: int) -> socket.socket:
    """Bound before anything else is done, listening not before all is ready."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # after a restart, too
            listener.bind(address)
        except OSError:
            listener.close()
            raise
    except (OSError, UnicodeError) as error:
        raise OSError(f"can't listen on {host}:{port}: {getattr(error, 'strerror', None) or error}") from error
    return listener
