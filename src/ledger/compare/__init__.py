"""`python -m ledger compare`: the same traffic through the usual recipe and through sessionwire.

Each answer is held against the books. `usual.py` and `ours.py` are the two services, `traffic.py` what they are sent.
"""

from pathlib import Path

from .screen import progress, show
from .trial import Findings, compare

DIRECTORY = Path("var", "compare")  # of the PostgreSQL that both write to


async def run(requests: int, workers: int) -> bool:
    """Whether sessionwire's books agree with its answers."""
    print(f"{requests:,} requests to each, {workers} at a time, on PostgreSQL\n")
    with progress(2 * requests) as answered:
        findings = await compare(DIRECTORY, requests, workers, answered)
    show(*findings)
    return findings[1] == Findings(lost=0, kept=0, failed=0, held=0)
