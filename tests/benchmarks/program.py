"""A program that is not ours, run to its end."""

import asyncio
import os
from asyncio.subprocess import PIPE, STDOUT
from pathlib import Path


async def output_of(program: str, *arguments: str) -> str:
    """Return the output of a program. Raise `ChildProcessError` if it fails."""
    environment = os.environ | {"LC_ALL": "C"}
    process = await asyncio.create_subprocess_exec(
        program, *arguments, stdout=PIPE, stderr=STDOUT, env=environment
    )
    try:
        output = (await process.communicate())[0].decode()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        raise ChildProcessError(f"{Path(program).name} failed: {output[-500:]}")
    return output
