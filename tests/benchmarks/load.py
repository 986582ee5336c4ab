"""Drive a server with `wrk`, a load generator, and check each answer."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from .program import output_of
from .report import NotInstalledError

CLIENTS = 64
SCRIPT = Path(__file__).with_name("load.lua")


@dataclass(frozen=True)
class Found:
    answers: int
    throughput: float  # requests per second
    p50: float  # microseconds
    p99: float


class WrongAnswersError(Exception):
    """Answers were wrong or missing."""


def check_installed() -> None:
    """Raise `NotInstalledError` if `wrk` is missing."""
    if shutil.which("wrk") is None:
        raise NotInstalledError(
            "the load generator wrk is not installed: apt-get install wrk, or brew install wrk"
        )


async def drive(url: str, seconds: int) -> Found:
    """Load the URL. Raise `WrongAnswersError`, or `ChildProcessError` for no answer."""
    options = (
        "--threads=1",
        f"--connections={CLIENTS}",
        f"--duration={seconds + 1}s",  # the clients are connected in the first one
        "--timeout=30s",
        f"--script={SCRIPT}",
    )
    output = await output_of("wrk", *options, url, "--", f"{CLIENTS}")
    (found,) = [line.split()[1:] for line in output.splitlines() if line.startswith("found ")]
    answered, wrong, broken, microseconds, p50, p99 = map(int, found)
    if wrong or broken or not answered:
        raise WrongAnswersError(f"{answered} answers were right, {wrong} wrong, {broken} missing")
    return Found(answered, answered / microseconds * 1e6, float(p50), float(p99))
