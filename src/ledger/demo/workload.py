"""The orders of the demo, some of which must fail, and the client that sends them."""

import asyncio
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from enum import StrEnum
from uuid import uuid4

from dependency_injector.wiring import Provide, inject

from ledger.container import Container
from ledger.errors import InsufficientFunds, InvalidAmount, LedgerError, UnknownAccount
from ledger.models import CENT, Account, Transfer
from ledger.services import TransferService


class OrderKind(StrEnum):
    """The kinds of orders, by the label in the report."""

    TRANSFER = "a transfer"
    REPEATED = "sent twice"
    CONFLICTING = "a used key, another amount"
    OVERDRAFT = "more than the balance"
    UNKNOWN_ACCOUNT = "to an unknown account"
    ZERO = "an amount of zero"


EXPECTED_ERRORS: dict[OrderKind, type[LedgerError]] = {
    OrderKind.OVERDRAFT: InsufficientFunds,
    OrderKind.UNKNOWN_ACCOUNT: UnknownAccount,
    OrderKind.ZERO: InvalidAmount,
}

# One in four is a special case. REPEATED and CONFLICTING use the key of the order
# before them, which may be still under way.
PATTERN = [kind for special in list(OrderKind)[1:] for kind in (*[OrderKind.TRANSFER] * 3, special)]


@dataclass(frozen=True)
class Order:
    """A transfer to send."""

    kind: OrderKind
    source: int
    target: int
    amount: Decimal
    key: str

    def matches(self, transfer: Transfer) -> bool:
        """Tell whether the transfer has the content of this order."""
        content = (transfer.source_id, transfer.target_id, transfer.amount, transfer.key)
        return content == (self.source, self.target, self.amount, self.key)


@dataclass(frozen=True)
class Answer:
    """The answer to an order: the acknowledged transfer, or the error."""

    order: Order
    transfer: Transfer | None = None
    error: Exception | None = None


def generate_orders(count: int, accounts: Sequence[Account]) -> list[Order]:
    """Generate orders between these accounts, with keys that no other run uses."""
    run = uuid4().hex
    numbers = [account.id for account in accounts]
    everything = sum(account.opening for account in accounts)
    orders: list[Order] = []
    for number in range(count):
        source, target = random.sample(numbers, 2)
        amount = random.randint(1, 2500) * CENT
        order = Order(PATTERN[number % len(PATTERN)], source, target, amount, f"{run}-{number}")
        match order.kind:
            case OrderKind.TRANSFER:
                pass
            case OrderKind.REPEATED:
                order = replace(orders[-1], kind=order.kind)
            case OrderKind.CONFLICTING:
                order = replace(orders[-1], kind=order.kind, amount=orders[-1].amount + CENT)
            case OrderKind.OVERDRAFT:
                order = replace(order, amount=everything + CENT)
            case OrderKind.UNKNOWN_ACCOUNT:
                order = replace(order, target=0)
            case OrderKind.ZERO:
                order = replace(order, amount=Decimal(0))
        orders.append(order)
    return orders


class Client:
    """Send orders from concurrent workers, and collect the answers."""

    def __init__(self, orders: Iterable[Order], on_answer: Callable[[], None]) -> None:
        self._answers: list[Answer] = []
        self._orders = iter(orders)
        self._on_answer = on_answer

    async def send_all(self, workers: int) -> list[Answer]:
        """Send all orders, as many at a time as there are workers."""
        async with asyncio.TaskGroup() as group:
            for _ in range(workers):
                group.create_task(self._work())
        return self._answers

    async def _work(self) -> None:
        for order in self._orders:
            self._answers.append(await self.send(order))
            self._on_answer()

    @inject
    async def send(
        self, order: Order, transfers: TransferService = Provide[Container.transfers]
    ) -> Answer:
        """Send one order."""
        try:
            return Answer(
                order, await transfers.transfer(order.source, order.target, order.amount, order.key)
            )
        except Exception as error:  # an answer too: the reconciliation checks it
            return Answer(order, error=error)
