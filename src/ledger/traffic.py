"""The demo's traffic: what is sent, some of it meant to fail, and what each call was answered."""

import asyncio
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from enum import StrEnum
from uuid import uuid4

from dependency_injector.wiring import Provide, inject

from .container import Container
from .errors import InsufficientFunds, InvalidAmount, LedgerError, UnknownAccount
from .models import CENT, Account, Transfer
from .services import TransferService


class Kind(StrEnum):
    TRANSFER = "a transfer"
    AGAIN = "the same again"
    OTHER = "its key, another amount"
    OVERDRAFT = "more than there is"
    UNKNOWN = "to an unknown account"
    ZERO = "an amount of zero"


MEANT_TO_FAIL: dict[Kind, type[LedgerError]] = {
    Kind.OVERDRAFT: InsufficientFunds,
    Kind.UNKNOWN: UnknownAccount,
    Kind.ZERO: InvalidAmount,
}

# One in four is a special case. AGAIN and OTHER repeat the order before them while that one is still on its way.
PATTERN = [kind for special in list(Kind)[1:] for kind in (Kind.TRANSFER, Kind.TRANSFER, Kind.TRANSFER, special)]


@dataclass(frozen=True)
class Order:
    kind: Kind
    source: int
    target: int
    amount: Decimal
    key: str

    def is_booked_as(self, transfer: Transfer) -> bool:
        content = (transfer.source_id, transfer.target_id, transfer.amount, transfer.key)
        return content == (self.source, self.target, self.amount, self.key)


@dataclass(frozen=True)
class Answer:
    """What a caller knows: the transfer that was acknowledged, or the error."""

    order: Order
    transfer: Transfer | None = None
    error: Exception | None = None


def plan(count: int, accounts: Sequence[Account]) -> list[Order]:
    """Orders between these accounts, with keys that no other run has."""
    run = uuid4().hex
    numbers = [account.id for account in accounts]
    everything = sum(account.opening for account in accounts)
    orders: list[Order] = []
    for number in range(count):
        source, target = random.sample(numbers, 2)
        amount = random.randint(1, 2500) * CENT
        order = Order(PATTERN[number % len(PATTERN)], source, target, amount, f"{run}-{number}")
        match order.kind:
            case Kind.TRANSFER:
                pass
            case Kind.AGAIN:
                order = replace(orders[-1], kind=order.kind)
            case Kind.OTHER:
                order = replace(orders[-1], kind=order.kind, amount=orders[-1].amount + CENT)
            case Kind.OVERDRAFT:
                order = replace(order, amount=everything + CENT)
            case Kind.UNKNOWN:
                order = replace(order, target=0)
            case Kind.ZERO:
                order = replace(order, amount=Decimal(0))
        orders.append(order)
    return orders


class Client:
    """Sends orders as so many callers at once, and keeps what each was answered."""

    def __init__(self, orders: Iterable[Order], answered: Callable[[], None]) -> None:
        self.answers: list[Answer] = []
        self._orders = iter(orders)
        self._answered = answered

    async def send_all(self, workers: int) -> list[Answer]:
        async with asyncio.TaskGroup() as group:
            for _ in range(workers):
                group.create_task(self._work())
        return self.answers

    async def _work(self) -> None:
        for order in self._orders:
            self.answers.append(await self.send(order))
            self._answered()

    @inject
    async def send(self, order: Order, transfers: TransferService = Provide[Container.transfers]) -> Answer:
        try:
            return Answer(order, await transfers.transfer(order.source, order.target, order.amount, order.key))
        except Exception as error:  # an answer as well: the proof holds each one against the books
            return Answer(order, error=error)
