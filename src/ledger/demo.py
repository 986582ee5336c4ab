"""The demo: money moves between accounts, from many callers at once, and the books prove that no answer was a lie."""
# pyright: reportUnknownMemberType=false
# The providers of a nested container have no types in dependency-injector.

import logging
import sys
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import Decimal
from logging.handlers import BufferingHandler
from time import perf_counter

from dependency_injector.wiring import Provide, inject

from sessionwire import DatabaseSessionManager, Lifespan

from .container import Container
from .models import Account, Transfer, create_tables
from .proof import Books, prove
from .screen import Screen
from .services import AccountService
from .settings import LedgerSettings
from .traffic import Client, plan

OPENING = Decimal("1000.00")
PAGE = 500


@dataclass(frozen=True)
class Options:
    transfers: int = 1000
    workers: int = 50
    accounts: int = 10


async def run(settings: LedgerSettings, options: Options) -> bool:
    """Whether the books are right."""
    async with Lifespan(Container(settings=settings)) as container:
        # By name, module by module: wiring the package would import its `__main__` too.
        container.wire(modules=[__name__, "ledger.traffic"])
        try:
            return await demo(options, Screen())
        finally:
            container.unwire()


@inject
async def demo(
    options: Options,
    screen: Screen,
    manager: DatabaseSessionManager = Provide[Container.db.sessionmanager],
    accounts: AccountService = Provide[Container.accounts],
) -> bool:
    screen.began(manager.engine)
    await create_tables(manager)
    before = await accounts.audit()
    screen.found(before)

    opened = [await accounts.open(f"demo {number}", OPENING) for number in range(options.accounts)]
    orders = plan(options.transfers, opened)
    screen.opened(len(opened), OPENING, len(orders), options.workers)

    with screen.progress(len(orders)) as answered, counted_retries() as retries:
        started = perf_counter()
        answers = await Client(orders, answered).send_all(options.workers)
        seconds = perf_counter() - started
    screen.answered(answers)

    checks = prove(answers, before, opened, await read_books(opened))
    screen.proved(checks)
    right = before.agree and all(check.holds for check in checks)
    screen.verdict(right, len(answers), seconds, len(retries))
    return right


@contextmanager
def counted_retries() -> Generator[list[logging.LogRecord]]:
    """What the library logs of the attempts that it repeats."""
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
async def read_books(opened: list[Account], accounts: AccountService = Provide[Container.accounts]) -> Books:
    balances = {account.id: await accounts.balance(account.id) for account in opened}
    statements = {account.id: await read_statement(account.id) for account in opened}
    return Books(balances, statements, await accounts.audit())


@inject
async def read_statement(account: int, accounts: AccountService = Provide[Container.accounts]) -> list[Transfer]:
    page = await accounts.statement(account, limit=PAGE)
    transfers = list(page)
    while len(page) == PAGE:
        page = await accounts.statement(account, before=page[-1].id, limit=PAGE)
        transfers.extend(page)
    return transfers
