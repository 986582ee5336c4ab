"""Serve web applications to real clients: a real server on a free port."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import uvicorn


@asynccontextmanager
async def served(app: Any) -> AsyncIterator[httpx.AsyncClient]:
    """Serve the application in this event loop, and yield a client of it.

    At the end everything that ran in the server has ended. This uses the parts of
    `Server.serve()`, without its signal handlers and its pauses of a tenth of a second.
    """
    listening = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(app, log_config=None, ws="websockets-sansio")
    config.load()
    server = uvicorn.Server(config)
    server.lifespan = config.lifespan_class(config)
    await server.startup(sockets=[listening])
    host, port = listening.getsockname()
    try:
        async with httpx.AsyncClient(base_url=f"http://{host}:{port}", trust_env=False) as client:
            yield client
    finally:
        for listener in server.servers:
            listener.close()
        async with asyncio.timeout(5):
            while server.server_state.tasks or server.server_state.connections:
                await asyncio.sleep(0.001)
        await server.lifespan.shutdown()
        listening.close()
