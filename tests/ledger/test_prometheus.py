"""The Grafana dashboard: Prometheus reads the ledger, and answers what each panel asks."""

from __future__ import annotations

import asyncio
import json
import math
import random
import shutil
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from itertools import count
from pathlib import Path

import httpx
import pytest

from tests.conftest import Postgres
from tests.postgres import until

from .conftest import CHECKOUT, Ledger
from .test_serve import Service, serving

DASHBOARD = json.loads((CHECKOUT / "config" / "grafana-dashboard.json").read_text(encoding="utf-8"))
CALLERS, ACCOUNTS = 20, 4
# What stands for the variables of the dashboard
VARIABLES = {"$__rate_interval": "10s", "$pool": ".*"}


def queries() -> list[tuple[str, str]]:
    """Return the title of each panel with each of its queries."""
    found: list[tuple[str, str]] = []
    for panel in DASHBOARD["panels"]:
        for target in panel["targets"]:
            query = target["expr"]
            for variable, value in VARIABLES.items():
                query = query.replace(variable, value)
            found.append((panel["title"], query))
    return found


def test_each_panel_and_target_of_the_dashboard_reads_the_chosen_source() -> None:
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    variables = {each["name"]: each["type"] for each in DASHBOARD["templating"]["list"]}
    assert variables == {"datasource": "datasource", "pool": "query"}
    source = {"type": "prometheus", "uid": "${datasource}"}
    for panel in DASHBOARD["panels"]:
        assert panel["type"] == "timeseries"
        assert [each["datasource"] for each in (panel, *panel["targets"])] == [source] * (
            1 + len(panel["targets"])
        )
    assert not any("$" in query for _, query in queries())


@contextmanager
def prometheus(directory: Path, target: str) -> Iterator[str]:
    """Run Prometheus, which reads the target each second. Yield its address."""
    program = shutil.which("prometheus")
    if program is None:
        pytest.fail("prometheus is missing: run apt-get install prometheus, on Debian")
    (directory / "prometheus.yml").write_text(
        "scrape_configs: [{job_name: ledger, scrape_interval: 1s, "
        f"static_configs: [{{targets: ['{target}']}}]}}]"
    )
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with (directory / "log").open("w") as log:
        process = subprocess.Popen(
            [
                program,
                f"--config.file={directory / 'prometheus.yml'}",
                f"--storage.tsdb.path={directory / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=log,
            stderr=log,
        )
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


@asynccontextmanager
async def load(service: Service) -> AsyncIterator[None]:
    """Let callers open accounts, read balances, and transfer money between few accounts."""
    client, keys = service.client, count()
    accounts = [
        (await client.post("/accounts", json={"owner": "a", "opening": "1000.00"})).json()["id"]
        for _ in range(ACCOUNTS)
    ]

    async def call() -> None:
        while True:
            source, target = random.sample(accounts, 2)
            order = {"source": source, "target": target, "amount": "0.01"}
            headers = {"Idempotency-Key": str(next(keys))}
            with suppress(httpx.TransportError):
                await client.post("/transfers", json=order, headers=headers)
                await client.get(f"/accounts/{source}/balance")

    callers = [asyncio.create_task(call()) for _ in range(CALLERS)]
    try:
        yield
    finally:
        for caller in callers:
            caller.cancel()
        await asyncio.gather(*callers, return_exceptions=True)


async def values(client: httpx.AsyncClient, query: str) -> list[float]:
    answer = (await client.get("/api/v1/query", params={"query": query})).json()
    assert answer["status"] == "success", (query, answer)
    return [float(each["value"][1]) for each in answer["data"]["result"]]


@pytest.mark.long
@pytest.mark.parametrize("backend", ["postgresql"])
async def test_prometheus_answers_each_query_of_the_dashboard_with_data_of_the_ledger(
    ledger: Ledger, database_url: str, server: Postgres, tmp_path: Path
) -> None:
    ledger.environment["LEDGER_DATABASE__POOL__SIZE"] = "5"
    ledger.environment["LEDGER_DATABASE__POOL__MAX_OVERFLOW"] = "0"
    async with (
        serving(ledger.on(database_url), options=("--metrics",)) as service,
        load(service),
    ):
        with prometheus(tmp_path, str(service.client.base_url.netloc.decode())) as address:
            async with httpx.AsyncClient(base_url=address, trust_env=False) as client:

                async def is_ready() -> bool:
                    with suppress(httpx.TransportError):
                        return (await client.get("/-/ready")).status_code == 200
                    return False

                await until(is_ready, 30)
                await server.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = $1",
                    database_url.partition("?")[0].rpartition("/")[2],
                )
                for title, query in queries():

                    async def has_data(query: str = query) -> bool:
                        # What has not run of late, such as CREATE TABLE, has no rate.
                        return not all(map(math.isnan, await values(client, query)))

                    try:
                        await until(has_data, 60)
                    except TimeoutError:
                        raise AssertionError(f"{title}: {query} has no data") from None
                assert sum(await values(client, "sessionwire_connections_lost_total")) > 0
                assert sum(await values(client, "sessionwire_retries_total")) > 0
                booked = await values(
                    client, 'sessionwire_transactions_total{sessionwire_outcome="committed"}'
                )
                assert sum(booked) > ACCOUNTS
    finished = await asyncio.wait_for(service.stop(), 30)
    assert finished.returncode == 0
    assert "Traceback" not in finished.stderr
