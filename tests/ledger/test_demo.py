"""The demo as its user runs it, on both databases: its report and its exit code."""

from __future__ import annotations

import asyncio
import io
import re
from decimal import Decimal

import pytest
from dependency_injector import providers
from rich.console import Console
from sqlalchemy import text

from ledger.container import Container
from ledger.demo import OPENING, Options, demo
from ledger.demo.console import ConsoleReport
from ledger.demo.reconciliation import Check
from ledger.demo.workload import Answer, Order, OrderKind
from ledger.errors import Busy, InsufficientFunds
from ledger.models import Transfer
from ledger.repositories import Audit
from ledger.services import TransferService

from .conftest import Ledger


@pytest.fixture
def container(committed: Container) -> Container:
    return committed


@pytest.mark.long
def test_two_demos_on_one_database_both_find_nothing_lost(
    ledger: Ledger, database_url: str
) -> None:
    ledger.on(database_url)

    first = ledger.run("demo", "--transfers", "60", python=("-W", "error", "-X", "dev"))
    second = ledger.run_here("demo", "--transfers", "40", "--accounts", "3", "--workers", "2")

    assert first.returncode == 0, first.stderr
    assert "Warning" not in first.stderr
    assert "Traceback" not in first.stderr
    assert "The books are empty." in first.stdout
    assert re.search(r"✔ sum of all balances +0.00 \+ 10,000.00 opened = 10,000.00", first.stdout)
    assert re.search(r"✔ acknowledged, booked once +48 of 48", first.stdout)
    assert re.search(r"✔ refused, not booked +12 of 12", first.stdout)
    assert re.search(r"Nothing lost. 60 transfers in .*; retries: \d+\.", first.stdout)
    assert second.returncode == 0, second.stderr
    assert "Earlier runs left 10 accounts and 45 transfers: the books are right." in second.stdout
    assert "10,000.00 + 3,000.00 opened = 13,000.00" in second.stdout


@pytest.mark.long
async def test_the_demo_with_fifty_workers_finds_nothing_lost_and_explains_its_retries(
    container: Container, backend: str
) -> None:
    output = io.StringIO()
    container.wire(modules=["ledger.demo", "ledger.demo.workload"])

    right = await demo(
        Options(transfers=200, workers=50, accounts=5),
        ConsoleReport(Console(file=output, width=120)),
    )

    container.unwire()
    assert right, output.getvalue()  # any error but a LedgerError would be reported
    told = re.search(r"Nothing lost. 200 transfers in .*; retries: ([\d,]+)\.", output.getvalue())
    assert told is not None
    # SQLite lets one transfer write at a time, so none conflicts.
    assert (told[1] == "0") is (backend == "sqlite")
    assert ("can conflict; one of them is tried again." in output.getvalue()) is (told[1] != "0")


@pytest.mark.long
def test_the_demo_prints_no_line_of_more_than_80_columns(ledger: Ledger, database_url: str) -> None:
    ledger.on(database_url).environment["COLUMNS"] = "80"

    first = ledger.run_here("demo", "--transfers", "200", "--accounts", "2")
    again = ledger.run_here("demo", "--transfers", "40")

    assert (first.returncode, again.returncode) == (0, 0)
    for line in (first.stdout + again.stdout).splitlines():
        assert len(line) <= 80, line


def test_the_report_of_an_unhappy_run_fits_in_80_columns() -> None:
    output = io.StringIO()
    report = ConsoleReport(Console(file=output, width=80))
    errors = [InsufficientFunds(1, OPENING, OPENING), Busy(1, 2), RuntimeError("secret " * 30)]
    order = Order(OrderKind.CONFLICTING, 1, 2, OPENING, "key")
    audit = Audit(1_000_000, 1_000_000, OPENING, OPENING, mismatched_accounts=1_000_000)

    report.show_earlier_runs(audit)
    report.show_answers([Answer(order, error=error) for error in errors] * 1000)
    report.show_checks(
        [Check("meant to fail, refused as meant", False, f"{1_000_000:,}, the first: {errors[2]}")]
    )
    report.show_result(False, 1_000_000, 1000.0, 1_000_000)

    assert "retries: 1,000,000" in output.getvalue()
    assert all(word in output.getvalue() for word in ("InsufficientFunds", "Busy", "RuntimeError"))
    assert output.getvalue().count("secret") == 30
    for line in output.getvalue().splitlines():
        assert len(line) <= 80, line


@pytest.mark.long
def test_two_concurrent_demos_on_one_empty_database_both_pass(
    ledger: Ledger, database_url: str
) -> None:
    ledger.on(database_url)

    finished = [
        ledger.finish(demo)
        for demo in [ledger.start("demo", "--transfers", "40") for _ in range(2)]
    ]

    assert [demo.returncode for demo in finished] == [0, 0], finished


@pytest.mark.parametrize("backend", ["sqlite"])
async def test_the_demo_reports_wrong_balances_of_earlier_runs_and_exits_with_1(
    ledger: Ledger, container: Container, database_url: str
) -> None:
    account = await container.accounts().open("Alice", Decimal("100.00"))
    async with container.db.sessionmanager().connect() as connection:
        await connection.execute(
            text(f"UPDATE account SET balance = balance + 1 WHERE id = {account.id}")
        )

    finished = await asyncio.to_thread(
        ledger.on(database_url).run_here, "demo", "--transfers", "20"
    )

    assert finished.returncode == 1
    assert "the books are WRONG." in finished.stdout
    assert re.search(r"✘ balances match their transfers +10 of 11 accounts", finished.stdout)
    assert "Nothing lost." not in finished.stdout


class AcknowledgesWhatItNeverBooked(TransferService):
    async def transfer(self, source: int, target: int, amount: Decimal, key: str) -> Transfer:
        if key.endswith("-1"):
            return Transfer(id=0, source_id=source, target_id=target, amount=amount, key=key)
        return await super().transfer(source, target, amount, key)


class BooksTwice(TransferService):
    async def transfer(self, source: int, target: int, amount: Decimal, key: str) -> Transfer:
        if key.endswith("-1"):
            await super().transfer(source, target, amount, f"{key} again")
        return await super().transfer(source, target, amount, key)


class BooksAnotherAmount(TransferService):
    async def transfer(self, source: int, target: int, amount: Decimal, key: str) -> Transfer:
        less = Decimal("0.01") if key.endswith("-1") else amount
        booked = await super().transfer(source, target, less, key)
        return Transfer(id=booked.id, source_id=source, target_id=target, amount=amount, key=key)


class RefusesWhatItBooked(TransferService):
    async def transfer(self, source: int, target: int, amount: Decimal, key: str) -> Transfer:
        transfer = await super().transfer(source, target, amount, key)
        if key.endswith("-1"):
            raise RuntimeError("the answer was lost")
        return transfer


@pytest.mark.parametrize(
    ("liar", "found"),
    [
        (AcknowledgesWhatItNeverBooked, "✘ acknowledged, booked once"),
        (BooksTwice, "✘ booked, never sent"),
        (BooksAnotherAmount, "✘ acknowledged, booked once"),
        (RefusesWhatItBooked, "✘ refused, not booked"),
    ],
)
@pytest.mark.parametrize("backend", ["sqlite"])
async def test_the_demo_detects_a_service_that_gives_false_answers(
    container: Container, liar: type[TransferService], found: str
) -> None:
    output = io.StringIO()
    lying = providers.Factory(
        liar,
        accounts=container.account_repository,
        transfers=container.transfer_repository,
        transaction=container.db.transaction,
    )

    with container.transfers.override(lying):
        container.wire(modules=["ledger.demo", "ledger.demo.workload"])
        right = await demo(
            Options(transfers=20, workers=1, accounts=2),
            ConsoleReport(Console(file=output, width=120)),
        )
        container.unwire()

    assert not right
    assert found in output.getvalue()
    assert "Nothing lost." not in output.getvalue()
