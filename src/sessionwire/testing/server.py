"""A PostgreSQL server for tests: fast, since nothing on it has to outlast anything."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from sqlalchemy import text

from sessionwire.manager import DatabaseSessionManager
from sessionwire.plan import Propagation
from sessionwire.settings import DatabaseSettings

MEMORY, ROOM = Path("/dev/shm"), 2**30  # Linux has a file system in memory here; bytes that must be free in it
UNSAFE = ("fsync", "full_page_writes", "synchronous_commit")  # nobody pulls the plug here


def temporary_directory() -> Path:
    """In memory, where there is room; else that for temporary files."""
    if os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > ROOM:
        return MEMORY
    return Path(tempfile.gettempdir())


async def hurry(settings: DatabaseSettings) -> None:
    """Let the server not wait for its disk. Its databases are lost where the machine stops."""
    manager = DatabaseSessionManager(settings)
    async with manager, manager.transaction(Propagation.NOT_SUPPORTED) as session:
        for setting in UNSAFE:
            await session.execute(text(f"ALTER SYSTEM SET {setting} = off"))
        await session.execute(text("SELECT pg_reload_conf()"))
