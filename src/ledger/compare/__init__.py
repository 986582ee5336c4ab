"""`python -m ledger compare`: send equal requests to three versions of one service.

`recipe`, `by_hand` and `with_sessionwire` are the three versions, on the tables of
`models`. `workload` generates and sends the requests, `server` runs a service,
`experiment` checks the answers against the database, `line_count` counts lines,
`console` prints the report.
"""

from pathlib import Path

from .console import show_progress, show_results
from .experiment import SERVICES, compare

DIRECTORY = Path("var", "compare")  # of the PostgreSQL server that all three use


async def run(requests: int, workers: int) -> bool:
    """Run the comparison. Return True if the version with sessionwire had no fault."""
    print(f"{requests:,} requests to each, {workers} at a time, on PostgreSQL\n")
    with show_progress(len(SERVICES) * requests) as on_answer:
        results = await compare(DIRECTORY, requests, workers, on_answer)
    show_results(results)
    return results[-1].is_faultless()
