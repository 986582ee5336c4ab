"""`python -m ledger compare`: the same traffic through three services that do the same, one of them with sessionwire.

Each answer is held against the books. `recipe.py`, `by_hand.py` and `ours.py` are the services, `traffic.py` what they
are sent.
"""

from pathlib import Path

from .screen import progress, show
from .trial import SERVICES, compare

DIRECTORY = Path("var", "compare")  # of the PostgreSQL that all write to


async def run(requests: int, workers: int) -> bool:
    """Whether sessionwire's books agree with its answers."""
    print(f"{requests:,} requests to each, {workers} at a time, on PostgreSQL\n")
    with progress(len(SERVICES) * requests) as answered:
        findings = await compare(DIRECTORY, requests, workers, answered)
    show(findings)
    return findings[-1].are_faultless()
