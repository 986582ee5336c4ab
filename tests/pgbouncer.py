"""Real PgBouncers before the server of a test run: see `.ci/pgbouncer`."""

from __future__ import annotations

import asyncio
import shutil
import socket
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from sessionwire.testing._servers import new_directory

from .cluster import PATIENCE, SERVER_USER
from .documents import CHECKOUT, free_port

DEBIAN_12, NEWEST = "bookworm", "forky"
SUITES = DEBIAN_12, NEWEST
USERS = "postgres", "shop"
ALWAYS = {
    "listen_addr": "127.0.0.1",
    "unix_socket_dir": "",
    "auth_type": "trust",
}


def program(suite: str) -> Path:
    """Return the PgBouncer of a suite of Debian. Without it the test fails."""
    path = CHECKOUT / ".pgbouncer" / suite / "pgbouncer"
    if not path.exists():
        pytest.fail(f"{path} is missing: run .ci/pgbouncer, on Debian")
    return path


@dataclass
class PgBouncer:
    """One PgBouncer in its own directory, which the server's user can read.

    Args:
        suite: The suite of Debian that has its version.
        directory: An empty directory for its files.
        host: The directory of the server's socket.
        settings: What is in its configuration beside `ALWAYS`.
    """

    suite: str
    directory: Path
    host: str
    settings: dict[str, str | int]

    def __post_init__(self) -> None:
        self.port = free_port()
        self.log = self.directory / "log"
        users = self.directory / "users.txt"
        users.write_text("".join(f'"{user}" ""\n' for user in USERS))
        all_settings = {
            **ALWAYS,
            "listen_port": self.port,
            "auth_file": users,
            **self.settings,
        }
        lines = [
            "[databases]",
            f"* = host={self.host}",
            "[pgbouncer]",
            *(f"{name} = {value}" for name, value in all_settings.items()),
        ]
        self._ini = self.directory / "pgbouncer.ini"
        self._ini.write_text("\n".join(lines) + "\n")
        self._process: subprocess.Popen[bytes] | None = None

    def url(self, database: str, *, user: str = "postgres", query: str = "") -> str:
        return f"postgresql://{user}@127.0.0.1:{self.port}/{database}?sslmode=disable{query}"

    async def start(self) -> None:
        process = self._process = self._run()
        async with asyncio.timeout(PATIENCE):
            while not self._listens():
                assert process.poll() is None, self.log.read_text()
                await asyncio.sleep(0.01)

    def kill(self) -> None:
        """End it at once, and with it the connections of its clients."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def _run(self) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [program(self.suite), self._ini],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                user=SERVER_USER,  # It refuses to run as root.
                start_new_session=True,
            )

    def _listens(self) -> bool:
        with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
            return True
        return False


@asynccontextmanager
async def pgbouncer(suite: str, host: str, **settings: str | int) -> AsyncIterator[PgBouncer]:
    """Run a PgBouncer before the server of this socket directory."""
    directory = new_directory()
    directory.mkdir(mode=0o755)
    bouncer = PgBouncer(suite, directory, host, settings)
    try:
        await bouncer.start()
        yield bouncer
    finally:
        bouncer.kill()
        shutil.rmtree(directory)
