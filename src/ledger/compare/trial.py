"""Starts a database and a server for each service, sends all the same, and holds the answers against the books."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import insert, select, text
from sqlalchemy.ext.asyncio import AsyncEngine

from sessionwire import DatabaseSessionManager

from .books import ACCOUNTS, DEPOSIT, Account, Base, Payer, Payment
from .lines import lines_of_code
from .server import PATIENCE, new_database, served
from .traffic import FAULTLESS, REGULARS, Kind, Request, plan, send

SERVICES = ("recipe", "by_hand", "ours")  # modules of this package


@dataclass(frozen=True)
class Findings:
    """What the books of one service say of its answers."""

    lost: int  # answered 2xx, row missing
    kept: int  # answered an error, row written
    failed: int  # answered an error or not at all, though nothing was wrong
    held: int  # connections not given back
    lines: int  # of code that the service has

    def are_faultless(self) -> bool:
        return self.lost == self.kept == self.failed == self.held == 0


async def compare(directory: Path, requests: int, workers: int, answered: Callable[[], None]) -> list[Findings]:
    """Of the documented recipe, of the service by hand, and of sessionwire."""
    async with DatabaseSessionManager(f"embedded:{directory}") as server:
        return [await try_out(server, name, plan(requests), workers, answered) for name in SERVICES]


async def try_out(
    server: DatabaseSessionManager, name: str, requests: list[Request], workers: int, answered: Callable[[], None]
) -> Findings:
    command = "uvicorn", f"ledger.compare.{name}:app", "--log-level=critical", "--port"
    async with new_database(server) as books:
        await fill(books)
        async with served(*command, database=books.url) as (url, process):
            await send(url, requests, workers, answered)
            held = await at_rest(server, books)
            if process.returncode is not None:
                raise ChildProcessError("it ended under the traffic")
        async with books.connect() as connection:
            rows = set(await connection.scalars(select(Payment.key)))
    return Findings(
        lost=sum(is_good(request) and writes(request) and request.order.key not in rows for request in requests),
        kept=sum(is_bad(request) and request.order.key in rows for request in requests),
        failed=sum(not is_good(request) and request.kind in FAULTLESS for request in requests),
        held=held,
        lines=lines_of_code(Path(__file__).with_name(f"{name}.py").read_text()),
    )


def is_good(request: Request) -> bool:
    return request.status is not None and request.status < 300


def is_bad(request: Request) -> bool:
    return request.status is not None and request.status >= 400


def writes(request: Request) -> bool:
    return request.kind is not Kind.REPORT


async def fill(books: AsyncEngine) -> None:
    async with books.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
        await connection.execute(insert(Account), [{"id": number} for number in ACCOUNTS])
        await connection.execute(insert(Payer), [{"name": payer} for payer in REGULARS])
        deposit = {"account": ACCOUNTS[0], "amount": DEPOSIT}
        await connection.execute(insert(Payment), [{"key": payer, "payer": payer} | deposit for payer in REGULARS])


async def at_rest(server: DatabaseSessionManager, books: AsyncEngine) -> int:
    """How many connections are in a transaction when nobody asks for anything any more."""
    count = text("SELECT state, count(*) FROM pg_stat_activity WHERE datname = :name AND state <> 'idle' GROUP BY 1")
    seen: dict[str, int] | None = None
    async with asyncio.timeout(PATIENCE), server.engine.connect() as connection:
        while True:
            last, seen = seen, dict((await connection.execute(count, {"name": books.url.database})).all())
            await connection.rollback()
            if seen == last and "active" not in seen:
                return sum(seen.values())
            await asyncio.sleep(0.2)
