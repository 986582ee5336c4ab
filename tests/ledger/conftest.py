"""A ledger on the test's own database: in this process (`container`), and as its user runs it (`ledger`)."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import chdir, redirect_stderr, redirect_stdout
from decimal import Decimal
from pathlib import Path
from typing import TypeAlias
from unittest import mock

import pytest

from ledger.__main__ import main
from ledger.container import Container
from ledger.models import Account
from ledger.settings import LedgerSettings
from sessionwire import DatabaseSettings, Lifespan, PoolSettings

Finished: TypeAlias = "subprocess.CompletedProcess[str]"

CHECKOUT = Path(__file__).parents[2]


@pytest.fixture
async def container(database_url: str) -> AsyncIterator[Container]:
    """A started container over empty tables, with a pool of five."""
    database = DatabaseSettings(url=database_url, pool=PoolSettings(size=5, max_overflow=0))
    async with Lifespan(Container(settings=LedgerSettings(database=database))) as container:
        manager = container.db.sessionmanager()
        async with manager.connect() as connection:
            await manager.create_all(connection)
        yield container


@pytest.fixture
async def alice(container: Container) -> Account:
    return await container.accounts().open("Alice", Decimal("100.00"))


@pytest.fixture
async def bob(container: Container) -> Account:
    return await container.accounts().open("Bob", Decimal("100.00"))


class Ledger:
    """`python -m ledger …`, in a working directory and an environment of its own."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("LEDGER_")}
        self.environment |= {"PYTHONPATH": str(CHECKOUT / "src"), "PYTHONUTF8": "1", "COLUMNS": "120"}
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
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
        )
        self.started.append(process)
        return process

    def run(self, *arguments: str, python: tuple[str, ...] = ()) -> Finished:
        return self.finish(self.start(*arguments, python=python))

    def run_here(self, *arguments: str) -> Finished:
        """The same without another Python, which would take seconds to import what this one has already."""
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
