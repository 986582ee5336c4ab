"""Run the ledger's server under load for minutes, with clients that hang up.

Its memory may not grow.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
import tempfile
from asyncio.subprocess import PIPE, Process
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from random import Random
from statistics import median
from time import monotonic

import psutil

from tests.cluster import server

CLIENTS, ACCOUNTS = 16, 20
HANG_UP = 0.1  # share of the requests whose client is gone before the answer
WARM = 30.0  # seconds after which the memory has its size
GROWTH = 1.10  # the limit at the end, relative to the warm size
REFUSED = "0.13"  # an amount that the database refuses when it is committed
TRIGGER = f"""
CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS
    $$ BEGIN
        IF NEW.amount = {int(float(REFUSED) * 100)} THEN RAISE EXCEPTION 'refused'; END IF;
        RETURN NULL;
    END $$;
CREATE CONSTRAINT TRIGGER refuse AFTER INSERT ON transfer DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW EXECUTE FUNCTION refuse();
"""


async def soak(seconds: float) -> int:
    """Return 0 if the memory has kept about its size, and 1 if it has grown."""
    async with server() as postgres, _ledger(postgres.url("postgres")) as (process, port):
        told: Counter[str] = Counter()
        clients = [Client(port, number, told) for number in range(CLIENTS)]
        for _ in range(ACCOUNTS):
            await clients[0].ask("POST", "/accounts", {"owner": "A", "opening": "1000000.00"})
        await postgres.run(TRIGGER, "postgres")
        until = monotonic() + seconds
        working = [asyncio.create_task(client.work(until)) for client in clients]
        early = await _memory(process, min(WARM, seconds / 6), told)
        late = await _memory(process, until - monotonic() - 1, told)
        await asyncio.gather(*working)
        process.terminate()
        assert await process.wait() == 0, "the server has not ended well"
    print(
        f"memory: {early:.1f} MB, at the end {late:.1f} MB: "
        f"{late / early:.3f} of it, {GROWTH:.2f} at most"
    )
    missing = [kind for kind in ("201", "200", "409", "500", "hung up") if not told[kind]]
    assert not missing, f"not among the traffic: {missing}"
    return int(late > early * GROWTH)


class Client:
    """Sends one request after the other, on one connection as long as that lasts."""

    def __init__(self, port: int, number: int, told: Counter[str]) -> None:
        self.told = told
        self._port = port
        self._random = Random(number)
        self._number = number
        self._connection: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def work(self, until: float) -> None:
        count = 0
        while monotonic() < until:
            count += 1
            try:
                await self._one(f"{self._number}-{count}")
            except (
                OSError,
                asyncio.IncompleteReadError,
            ):  # as after a 500, and where nothing was asked for a while
                self._hang_up()
        self._hang_up()

    async def _one(self, key: str) -> None:
        random = self._random
        hangs_up_after = random.uniform(0, 0.02) if random.random() < HANG_UP else None
        account = random.randint(1, ACCOUNTS)
        kind = random.random()
        if kind < 0.1:
            await self.ask("GET", f"/accounts/{account}/balance", hangs_up_after=hangs_up_after)
        elif kind < 0.2:
            await self.ask(
                "GET", f"/accounts/{account}/statement?limit=20", hangs_up_after=hangs_up_after
            )
        else:
            amount = REFUSED if kind < 0.5 else "99999999.00" if kind < 0.55 else "0.01"
            order = {"source": account, "target": account % ACCOUNTS + 1, "amount": amount}
            await self.ask("POST", "/transfers", order, key, hangs_up_after)

    async def ask(
        self,
        method: str,
        path: str,
        body: object = None,
        key: str = "",
        hangs_up_after: float | None = None,
    ) -> None:
        if self._connection is None:
            self._connection = await asyncio.open_connection("127.0.0.1", self._port)
        reader, writer = self._connection
        content = b"" if body is None else json.dumps(body).encode()
        head = f"{method} {path} HTTP/1.1\r\nHost: ledger\r\nContent-Length: {len(content)}\r\n"
        head += f"Content-Type: application/json\r\nIdempotency-Key: {key}\r\n\r\n"
        writer.write(head.encode() + content)
        if hangs_up_after is not None:
            await asyncio.sleep(hangs_up_after)
            self._hang_up()
            self.told["hung up"] += 1
            return
        answer = (await reader.readuntil(b"\r\n\r\n")).decode()
        length = re.search(r"content-length: (\d+)", answer, re.IGNORECASE)
        assert length, answer
        await reader.readexactly(int(length[1]))
        self.told[answer.split()[1]] += 1

    def _hang_up(self) -> None:
        if self._connection is not None:
            self._connection[1].transport.abort()
            self._connection = None


@asynccontextmanager
async def _ledger(database_url: str) -> AsyncIterator[tuple[Process, int]]:
    """Yield the running process, and its port."""
    with (
        tempfile.TemporaryDirectory(prefix="ledger-") as directory,
        (Path(directory) / "log").open("w+") as log,
    ):
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "ledger", "serve", "--port", "0"),
            stdout=PIPE,
            stderr=log,  # it has a traceback for each refused commit
            cwd=directory,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(sys.path),
                "LEDGER_DATABASE__URL": database_url,
            },
        )
        try:
            assert process.stdout is not None
            said = (await process.stdout.readline()).decode()
            address = re.fullmatch(r"ledger: http://127\.0\.0\.1:(\d+)\n", said)
            log.seek(0)
            assert address, said or log.read()
            yield process, int(address[1])
        finally:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()


async def _memory(process: Process, after: float, told: Counter[str]) -> float:
    """Return megabytes: the median over a second, after so many seconds."""
    await asyncio.sleep(after)
    measured: list[int] = []
    for _ in range(10):
        await asyncio.sleep(0.1)
        measured.append(psutil.Process(process.pid).memory_info().rss)
    size = median(measured) / 2**20
    print(
        f"{size:7.1f} MB after {sum(told.values()):,} requests: {dict(sorted(told.items()))}",
        flush=True,
    )
    return size
