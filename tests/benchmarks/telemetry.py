"""Measure what spans and metrics cost a service.

Run it with `python -m tests.benchmarks.telemetry`. The ledger's `balance` is called over
HTTP, and the method alone; its `open` writes in a transaction. Each is called without
`instrument()` and with it, in turns, in one process. The SDK has a batch processor and a
periodic reader, whose exporters drop what they get. The table has the processor time
with it, relative to that without it: the median of the rounds, the lowest and highest.
"""

from __future__ import annotations

import asyncio
import gc
import socket
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from decimal import Decimal
from pathlib import Path
from statistics import median
from time import process_time
from typing import Any

import uvicorn
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import (
    MetricExporter,
    MetricExportResult,
    PeriodicExportingMetricReader,
)
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

from ledger.api import create_app
from ledger.container import Container
from ledger.settings import LedgerSettings
from sessionwire.embedded import EmbeddedServer
from sessionwire.opentelemetry import instrument

ROUNDS, CALLS, CONNECTIONS = 30, 200, 4


class NoSpans(SpanExporter):
    def export(self, spans: object) -> SpanExportResult:
        return SpanExportResult.SUCCESS


class NoMetrics(MetricExporter):
    def export(self, *_: object, **__: object) -> MetricExportResult:
        return MetricExportResult.SUCCESS

    def force_flush(self, timeout_millis: float = 0) -> bool:
        return True

    def shutdown(self, timeout_millis: float = 0, **_: object) -> None: ...


@asynccontextmanager
async def requests_to(container: Container) -> AsyncIterator[Callable[[str], Awaitable[None]]]:
    """Serve the ledger. Yield a function with which another process sends requests."""
    app = create_app(container)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        config = uvicorn.Config(app, lifespan="off", log_level="warning", timeout_keep_alive=3600)
        server = uvicorn.Server(config)
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        client = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.benchmarks.telemetry"),
            str(listener.getsockname()[1]),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        assert client.stdin is not None
        assert client.stdout is not None

        async def send(path: str) -> None:
            client.stdin.write(f"{path}\n".encode())
            answer = await client.stdout.readline()
            assert answer.startswith(b"200 OK"), answer

        try:
            yield send
        finally:
            client.stdin.close()
            await client.wait()
            server.should_exit = True
            await serving


async def client(port: int) -> None:
    """Request each path that is asked for, over a few connections at once."""
    streams = [await asyncio.open_connection("127.0.0.1", port) for _ in range(CONNECTIONS)]

    async def request(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, path: str) -> str:
        for _ in range(CALLS // CONNECTIONS):
            writer.write(f"GET {path} HTTP/1.1\r\nHost: ledger\r\n\r\n".encode())
            head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            await reader.readexactly(int(head.split("content-length: ")[1].split()[0]))
            if " 200 " not in head:
                return head
        return "200 OK"

    while path := (await asyncio.to_thread(sys.stdin.readline)).strip():
        said = await asyncio.gather(*(request(*each, path) for each in streams))
        print(max(said), flush=True)
    for _, writer in streams:
        writer.close()


async def seconds(work: Callable[[], Awaitable[Any]]) -> float:
    gc.collect()
    started = process_time()
    await work()
    return process_time() - started


async def main() -> None:
    tracers, meters = TracerProvider(), MeterProvider([PeriodicExportingMetricReader(NoMetrics())])
    tracers.add_span_processor(BatchSpanProcessor(NoSpans()))
    with (
        tempfile.TemporaryDirectory(prefix="sessionwire-", ignore_cleanup_errors=True) as directory,
        EmbeddedServer(Path(directory, "data")) as server,
    ):
        settings = LedgerSettings.model_validate({"database": {"url": server.url}})
        container = Container(settings=settings)
        app = create_app(container)
        async with app.router.lifespan_context(app), requests_to(container) as send:
            accounts = container.accounts()
            account = await accounts.open("the reader", Decimal(10))

            async def over_http() -> None:
                await send(f"/accounts/{account.id}/balance")

            async def read() -> None:
                for _ in range(CALLS):
                    await accounts.balance(account.id)

            async def write() -> None:
                for _ in range(CALLS):
                    await accounts.open("a writer", Decimal(10))

            works = {
                "balance, over HTTP": over_http,
                "balance, the method alone": read,
                "open, the method alone": write,
            }
            ratios: dict[str, list[float]] = {name: [] for name in works}
            taken: dict[str, list[float]] = {name: [] for name in works}
            for turn in range(ROUNDS + 1):
                for name, work in works.items():
                    measured: dict[bool, float] = {}
                    for is_on in (turn % 2 == 0, turn % 2 == 1):
                        if is_on:
                            with instrument(
                                container, tracer_provider=tracers, meter_provider=meters
                            ):
                                measured[is_on] = await seconds(work)
                        else:
                            measured[is_on] = await seconds(work)
                    if turn:  # the first one warms up
                        ratios[name].append(measured[True] / measured[False])
                        taken[name].append((measured[True] - measured[False]) / CALLS * 1e6)
    print("with spans and metrics, medians of", ROUNDS, "rounds, lowest, highest; microseconds")
    for name, each in ratios.items():
        print(
            f"{median(each):6.3f} {min(each):6.3f} {max(each):6.3f} "
            f"{median(taken[name]):6.1f}  {name}"
        )


if __name__ == "__main__":
    asyncio.run(client(int(sys.argv[1])) if len(sys.argv) > 1 else main())
