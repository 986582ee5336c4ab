"""Run each service on a new database, send the requests, and check the answers."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import insert, select, text
from sqlalchemy.ext.asyncio import AsyncEngine

from sessionwire import DatabaseSessionManager

from .line_count import count_lines_of_code
from .models import ACCOUNT_IDS, DEPOSIT, Account, Base, Payer, Payment
from .server import SERVER_TIMEOUT, new_database, run_server
from .workload import KNOWN_PAYERS, VALID_KINDS, Request, RequestKind, generate_requests, send_all

SERVICES = ("recipe", "by_hand", "with_sessionwire")  # modules of this package


@dataclass(frozen=True)
class Result:
    """The faults of one service, and its length.

    Attributes:
        missing_rows: answered 2xx, but the row is missing.
        unexpected_rows: answered with an error, but the row was written.
        spurious_failures: valid requests with an error or no answer.
        leaked_connections: connections that stayed in a transaction.
        lines_of_code: of the service.
    """

    missing_rows: int
    unexpected_rows: int
    spurious_failures: int
    leaked_connections: int
    lines_of_code: int

    def is_faultless(self) -> bool:
        counts = (
            self.missing_rows,
            self.unexpected_rows,
            self.spurious_failures,
            self.leaked_connections,
        )
        return not any(counts)


async def compare(
    directory: Path, requests: int, workers: int, on_answer: Callable[[], None]
) -> list[Result]:
    """Measure all SERVICES on a PostgreSQL server in this directory."""
    async with DatabaseSessionManager(f"embedded:{directory}") as server:
        return [
            await measure(server, name, generate_requests(requests), workers, on_answer)
            for name in SERVICES
        ]


async def measure(
    server: DatabaseSessionManager,
    name: str,
    requests: list[Request],
    workers: int,
    on_answer: Callable[[], None],
) -> Result:
    """Send the requests to one service, and check the answers against its database."""
    command = "uvicorn", f"ledger.compare.{name}:app", "--log-level=critical", "--port"
    async with new_database(server) as database:
        await create_rows(database)
        async with run_server(*command, database=database.url) as (url, process):
            await send_all(url, requests, workers, on_answer)
            leaked_connections = await count_leaked_connections(server, database)
            if process.returncode is not None:
                raise ChildProcessError("it ended while it got requests")
        async with database.connect() as connection:
            rows = set(await connection.scalars(select(Payment.key)))
    return Result(
        missing_rows=sum(
            succeeded(request) and writes(request) and request.order.key not in rows
            for request in requests
        ),
        unexpected_rows=sum(failed(request) and request.order.key in rows for request in requests),
        spurious_failures=sum(
            not succeeded(request) and request.kind in VALID_KINDS for request in requests
        ),
        leaked_connections=leaked_connections,
        lines_of_code=count_lines_of_code(Path(__file__).with_name(f"{name}.py").read_text()),
    )


def succeeded(request: Request) -> bool:
    return request.status is not None and request.status < 300


def failed(request: Request) -> bool:
    return request.status is not None and request.status >= 400


def writes(request: Request) -> bool:
    return request.kind is not RequestKind.REPORT


async def create_rows(database: AsyncEngine) -> None:
    """Create the tables, the accounts, and the known payers with their deposits."""
    async with database.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
        await connection.execute(insert(Account), [{"id": number} for number in ACCOUNT_IDS])
        await connection.execute(insert(Payer), [{"name": payer} for payer in KNOWN_PAYERS])
        deposit = {"account": ACCOUNT_IDS[0], "amount": DEPOSIT}
        await connection.execute(
            insert(Payment), [{"key": payer, "payer": payer} | deposit for payer in KNOWN_PAYERS]
        )


async def count_leaked_connections(server: DatabaseSessionManager, database: AsyncEngine) -> int:
    """Wait until no statement runs and nothing changes, then count open transactions."""
    query = text(
        "SELECT state, count(*) FROM pg_stat_activity "
        "WHERE datname = :name AND state <> 'idle' GROUP BY 1"
    )
    states: dict[str, int] | None = None
    async with asyncio.timeout(SERVER_TIMEOUT), server.engine.connect() as connection:
        while True:
            result = await connection.execute(query, {"name": database.url.database})
            previous, states = states, dict(result.all())
            await connection.rollback()
            if states == previous and "active" not in states:
                return sum(states.values())
            await asyncio.sleep(0.2)
