"""Check the installed wheel as a newcomer would: it is complete, typed, and only the library."""

import asyncio
import importlib.util
import subprocess
import sys
from pathlib import Path

from sqlalchemy import text

import sessionwire


async def main() -> None:
    sessionwire.sessionmanager.init("sqlite://")
    async with sessionwire.sessionmanager, sessionwire.sessionmanager.session() as session:
        assert await session.scalar(text("SELECT 1")) == 1


assert Path(sessionwire.__file__).with_name("py.typed").exists(), "py.typed is missing"
assert importlib.util.find_spec("ledger") is None, "the ledger is in the wheel"
asyncio.run(main())
command = subprocess.run([sys.executable, "-m", "sessionwire"], capture_output=True, text=True)
assert "pip install 'sessionwire[cli]'" in command.stderr, "the command line explains nothing"
print("the wheel works")
