"""PostgreSQL servers for tests: fast, because their data need not survive a crash."""

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

SHM = Path("/dev/shm")  # a file system in memory, on Linux
MIN_FREE_BYTES = 2**30
PREFIX = "sessionwire-tests-"
DURABILITY_SETTINGS = ("fsync", "full_page_writes", "synchronous_commit")


def temporary_directory() -> Path:
    """Return a directory in memory if it has enough space, otherwise one on disk."""
    if os.access(SHM, os.W_OK) and shutil.disk_usage(SHM).free > MIN_FREE_BYTES:
        return SHM
    return Path(tempfile.gettempdir())


def new_directory() -> Path:
    """Return a new name for a server's directory, with the id of this process."""
    return temporary_directory() / f"{PREFIX}{os.getpid()}-{uuid4().hex}"


def remove_stale_servers() -> None:
    """Stop the servers whose processes are gone, and remove their directories."""
    import psutil

    for directory in temporary_directory().glob(f"{PREFIX}*-*"):
        owner = directory.name.removeprefix(PREFIX).partition("-")[0]
        if owner.isdecimal() and not psutil.pid_exists(int(owner)):
            # joins the server if it runs, and stops it as its last user; fails if
            # another process does so at the same time
            with suppress(Exception), EmbeddedServer(directory / "data"):
                pass
            shutil.rmtree(directory, ignore_errors=True)


async def disable_durability(settings: DatabaseSettings) -> None:
    """Turn off durability: databases do not survive a crash of the machine."""
    manager = DatabaseSessionManager(settings)
    async with manager, manager.transaction(Propagation.NOT_SUPPORTED) as session:
        for setting in DURABILITY_SETTINGS:
            await session.execute(text(f"ALTER SYSTEM SET {setting} = off"))
        await session.execute(text("SELECT pg_reload_conf()"))
