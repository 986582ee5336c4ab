"""A PostgreSQL server for tests: fast, since nothing on it has to outlast anything."""

from __future__ import annotations

import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

from sqlalchemy import text

from sessionwire._core.definition import Propagation
from sessionwire.embedded import EmbeddedServer
from sessionwire.manager import DatabaseSessionManager
from sessionwire.settings import DatabaseSettings

MEMORY, ROOM = Path("/dev/shm"), 2**30  # Linux has a file system in memory here; bytes that must be free in it
PREFIX = "sessionwire-tests-"
UNSAFE = ("fsync", "full_page_writes", "synchronous_commit")  # nobody pulls the plug here


def temporary_directory() -> Path:
    """In memory, where there is room; else that for temporary files."""
    if os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > ROOM:
        return MEMORY
    return Path(tempfile.gettempdir())


def new_directory() -> Path:
    """A name for a server's directory, which says whose it is."""
    return temporary_directory() / f"{PREFIX}{os.getpid()}-{uuid4().hex}"


def remove_left_by_killed() -> None:
    """End the servers of processes that are gone, and remove their directories."""
    import psutil

    for directory in temporary_directory().glob(f"{PREFIX}*-*"):
        owner = directory.name.removeprefix(PREFIX).partition("-")[0]
        if owner.isdecimal() and not psutil.pid_exists(int(owner)):
            with suppress(Exception), EmbeddedServer(directory / "data"):
                pass  # joined where it runs, and left by its last; or another process does so at the same time
            shutil.rmtree(directory, ignore_errors=True)


async def hurry(settings: DatabaseSettings) -> None:
    """Let the server not wait for its disk. Its databases are lost where the machine stops."""
    manager = DatabaseSessionManager(settings)
    async with manager, manager.transaction(Propagation.NOT_SUPPORTED) as session:
        for setting in UNSAFE:
            await session.execute(text(f"ALTER SYSTEM SET {setting} = off"))
        await session.execute(text("SELECT pg_reload_conf()"))
