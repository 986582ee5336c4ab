"""Fixtures for the ledger.

`container` is rolled back after each test, `committed` commits, and `ledger` runs the
command line.
"""

from __future__ import annotations

import asyncio
import io
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import chdir, closing, redirect_stderr, redirect_stdout
from decimal import Decimal
from pathlib import Path
from typing import TypeAlias
from unittest import mock

import pytest
from sqlalchemy import URL

from ledger.__main__ import main
from ledger.container import Container
from ledger.models import Account
from ledger.settings import LedgerSettings
from sessionwire import DatabaseSettings, Lifespan, PoolSettings
from tests.conftest import Postgres

Finished: TypeAlias = "subprocess.CompletedProcess[str]"

POOL = PoolSettings(size=5, max_overflow=0)
CHECKOUT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def sessionwire_container() -> type[Container]:
    return Container


@pytest.fixture(scope="session", params=["sqlite", "postgresql"])
def sessionwire_settings(request: pytest.FixtureRequest) -> DatabaseSettings:
    """Settings for the databases of `container`, with a pool of five."""
    url = (
        "sqlite://"
        if request.param == "sqlite"
        else request.getfixturevalue("postgres").url("postgres")
    )
    return DatabaseSettings(url=url, pool=POOL)


@pytest.fixture(scope="session")
def sessionwire_databases(
    sessionwire_databases: list[DatabaseSettings],
) -> Iterator[list[DatabaseSettings]]:
    """Check at the end that the databases are unchanged."""
    before = [dump(settings.url) for settings in sessionwire_databases]
    yield sessionwire_databases
    assert [dump(settings.url) for settings in sessionwire_databases] == before


def dump(url: URL) -> list[str]:
    """Return the content of the database, without the state of its sequences."""
    if url.get_backend_name() == "sqlite":
        with closing(sqlite3.connect(str(url.database))) as connection:
            return [line for line in connection.iterdump() if "sqlite_sequence" not in line]
    server = Postgres(str(url.query["host"]))
    [(programs,)] = asyncio.run(
        server.execute("SELECT setting FROM pg_config WHERE name = 'BINDIR'")
    )
    address = (
        f"--host={server.host}",
        f"--username={url.username}",
        "--restrict-key=same",
        str(url.database),
    )
    dumped = subprocess.run(
        [f"{programs}/pg_dump", *address], check=True, capture_output=True, text=True
    ).stdout
    return [line for line in dumped.splitlines() if "pg_catalog.setval" not in line]


@pytest.fixture
async def committed(database_url: str) -> AsyncIterator[Container]:
    """A container over empty tables that other connections and processes also see."""
    database = DatabaseSettings(url=database_url, pool=POOL)
    container = Container(settings=LedgerSettings(database=database))
    async with Lifespan(container, migrations="upgrade"):
        yield container


@pytest.fixture
async def alice(container: Container) -> Account:
    return await container.accounts().open("Alice", Decimal("100.00"))


@pytest.fixture
async def bob(container: Container) -> Account:
    return await container.accounts().open("Bob", Decimal("100.00"))


class Ledger:
    """Run `python -m ledger …` in its own working directory and environment."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.environment = {
            name: value for name, value in os.environ.items() if not name.startswith("LEDGER_")
        }
        self.environment |= {
            "PYTHONPATH": str(CHECKOUT / "src"),
            "PYTHONUTF8": "1",
            "COLUMNS": "120",
        }
        self.started: list[subprocess.Popen[str]] = []

    def on(self, database_url: str) -> Ledger:
        self.environment["LEDGER_DATABASE__URL"] = database_url
        return self

    def start(self, *arguments: str, python: tuple[str, ...] = ()) -> subprocess.Popen[str]:
        return self.start_python(*python, "-m", "ledger", *arguments)

    def start_python(self, *arguments: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=self.directory,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # A background job of a shell ignores SIGINT unless it is reset.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        self.started.append(process)
        return process

    def run(self, *arguments: str, python: tuple[str, ...] = ()) -> Finished:
        return self.finish(self.start(*arguments, python=python))

    def run_here(self, *arguments: str) -> Finished:
        """Run the command in this process, which has imported all modules already."""
        output, errors = io.StringIO(), io.StringIO()
        with (
            mock.patch.dict(os.environ, self.environment, clear=True),
            mock.patch.object(sys, "argv", ["ledger", *arguments]),
            chdir(self.directory),
            redirect_stdout(output),
            redirect_stderr(errors),
        ):
            try:
                code = main()
            except SystemExit as refused:
                code = int(refused.code or 0)
        return subprocess.CompletedProcess(arguments, code, output.getvalue(), errors.getvalue())

    @staticmethod
    def finish(process: subprocess.Popen[str]) -> Finished:
        output, errors = process.communicate(timeout=60)
        return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    ledger = Ledger(tmp_path)
    yield ledger
    for process in ledger.started:
        process.kill()
        process.communicate()


def assert_explained(finished: Finished, *says: str) -> None:
    assert finished.returncode == 2
    assert finished.stdout == ""
    assert "Traceback" not in finished.stderr
    for words in says:
        assert words in finished.stderr
