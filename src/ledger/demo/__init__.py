"""`python -m ledger demo`: send concurrent transfers, and check each answer.

`workload` generates and sends the orders, `reconciliation` checks the answers,
`console` prints the report.
"""

import logging
import sys
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import Decimal
from logging.handlers import BufferingHandler
from time import perf_counter

from dependency_injector.wiring import Provide, inject

from ledger.container import Container
from ledger.models import Account, Transfer
from ledger.services import AccountService
from ledger.settings import LedgerSettings
from sessionwire import DatabaseSessionManager, Lifespan

from .console import ConsoleReport
from .reconciliation import LedgerSnapshot, reconcile
from .workload import Client, generate_orders

OPENING = Decimal("1000.00")
PAGE_SIZE = 500


@dataclass(frozen=True)
class Options:
    transfers: int = 1000
    workers: int = 50
    accounts: int = 10


async def run(settings: LedgerSettings, options: Options) -> bool:
    """Run the demo. Return True if every check passed."""
    async with Lifespan(Container(settings=settings), migrations="upgrade") as container:
        # Named one by one: wiring the whole package would also import its `__main__`.
        container.wire(modules=[__name__, f"{__name__}.workload"])
        try:
            return await demo(options, ConsoleReport())
        finally:
            container.unwire()


@inject
async def demo(
    options: Options,
    report: ConsoleReport,
    manager: DatabaseSessionManager = Provide[Container.db.sessionmanager],
    accounts: AccountService = Provide[Container.accounts],
) -> bool:
    """Open accounts, send transfers, check the answers. Return True if all are right."""
    report.show_header(manager.engine)
    before = await accounts.audit()
    report.show_earlier_runs(before)

    opened = [await accounts.open(f"demo {number}", OPENING) for number in range(options.accounts)]
    orders = generate_orders(options.transfers, opened)
    report.show_workload(len(opened), OPENING, len(orders), options.workers)

    with report.show_progress(len(orders)) as on_answer, record_retries() as retries:
        started = perf_counter()
        answers = await Client(orders, on_answer).send_all(options.workers)
        seconds = perf_counter() - started
    report.show_answers(answers)

    checks = reconcile(answers, before, opened, await read_snapshot(opened))
    report.show_checks(checks)
    all_passed = before.is_balanced and all(check.passed for check in checks)
    report.show_result(all_passed, len(answers), seconds, len(retries))
    return all_passed


@contextmanager
def record_retries() -> Generator[list[logging.LogRecord]]:
    """Collect the log records that the library writes at each retry."""
    handler = BufferingHandler(capacity=sys.maxsize)
    logger = logging.getLogger("sessionwire.retry")
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        yield handler.buffer
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


@inject
async def read_snapshot(
    opened: list[Account], accounts: AccountService = Provide[Container.accounts]
) -> LedgerSnapshot:
    """Read the balances and statements of these accounts, and the audit."""
    balances = {account.id: await accounts.balance(account.id) for account in opened}
    statements = {account.id: await read_statement(account.id) for account in opened}
    return LedgerSnapshot(balances, statements, await accounts.audit())


@inject
async def read_statement(
    account: int, accounts: AccountService = Provide[Container.accounts]
) -> list[Transfer]:
    """Read all pages of an account's statement."""
    page = await accounts.statement(account, limit=PAGE_SIZE)
    transfers = list(page)
    while len(page) == PAGE_SIZE:
        page = await accounts.statement(account, before=page[-1].id, limit=PAGE_SIZE)
        transfers.extend(page)
    return transfers
