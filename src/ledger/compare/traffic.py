"""What is sent to each: payments, refunds and reports as life brings them, the same ones in the same order."""

import asyncio
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum

import httpx

from .books import ACCOUNTS, DEPOSIT, Order

LARGEST = 100  # amount of what is ordinary
REGULARS = [f"regular {number}" for number in range(5)]
SOON = 0.003  # seconds after which an impatient client hangs up


class Kind(Enum):
    FIRST_PAYMENT = "payment, payer is new"
    PAYMENT = "payment, payer is known already"
    UNKNOWN_ACCOUNT = "payment to an account that is not there"
    REFUND = "refund"
    LARGE_REFUND = "refund of more than was paid"
    REPORT = "report"
    IMPATIENT = "payment, the client hangs up"


SHARES = {
    Kind.FIRST_PAYMENT: 8,
    Kind.PAYMENT: 4,
    Kind.UNKNOWN_ACCOUNT: 1,
    Kind.REFUND: 4,
    Kind.LARGE_REFUND: 1,
    Kind.REPORT: 1,
    Kind.IMPATIENT: 1,
}
FAULTLESS = (Kind.FIRST_PAYMENT, Kind.PAYMENT, Kind.REFUND, Kind.REPORT)


@dataclass
class Request:
    kind: Kind
    order: Order
    status: int | None = None  # None: no answer came, or nobody waited for it


def plan(number: int) -> list[Request]:
    chance = random.Random(0)
    kinds = chance.choices(list(SHARES), list(SHARES.values()), k=number)
    return [Request(kind, _order(kind, f"{position}", chance)) for position, kind in enumerate(kinds)]


def _order(kind: Kind, key: str, chance: random.Random) -> Order:
    payer = f"payer {key}" if kind is Kind.FIRST_PAYMENT else chance.choice(REGULARS)
    account = max(ACCOUNTS) + 1 if kind is Kind.UNKNOWN_ACCOUNT else chance.choice(ACCOUNTS)
    amount = 2 * DEPOSIT if kind is Kind.LARGE_REFUND else chance.randint(1, LARGEST)
    return Order(key=key, payer=payer, account=account, amount=amount)


async def send(url: str, requests: list[Request], workers: int, answered: Callable[[], None]) -> None:
    """Each worker sends the next request when the last one is answered."""

    async def work(left: Iterator[Request]) -> None:
        for request in left:
            request.status = await _answer(client, request)
            answered()

    left = iter(requests)
    limits = httpx.Limits(max_keepalive_connections=0)  # each is a client of its own
    async with httpx.AsyncClient(base_url=url, timeout=30, limits=limits) as client, asyncio.TaskGroup() as group:
        for _ in range(workers):
            group.create_task(work(left))


async def _answer(client: httpx.AsyncClient, request: Request) -> int | None:
    body = request.order.model_dump()
    try:
        match request.kind:
            case Kind.REPORT:
                return (await client.get("/report")).status_code
            case Kind.REFUND | Kind.LARGE_REFUND:
                return (await client.post("/refunds", json=body)).status_code
            case Kind.IMPATIENT:
                return (await client.post("/payments", json=body, timeout=SOON)).status_code
            case _:
                return (await client.post("/payments", json=body)).status_code
    except httpx.TransportError:
        return None
