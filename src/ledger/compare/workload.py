"""The requests: payments, refunds and reports. Every service gets equal ones."""

import asyncio
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum

import httpx

from .models import ACCOUNT_IDS, DEPOSIT, Order

MAX_AMOUNT = 100  # of an ordinary request
KNOWN_PAYERS = [f"regular {number}" for number in range(5)]
IMPATIENT_TIMEOUT = 0.003  # seconds until an impatient client disconnects


class RequestKind(Enum):
    """The kinds of requests."""

    FIRST_PAYMENT = "payment by a new payer"
    PAYMENT = "payment by a known payer"
    UNKNOWN_ACCOUNT = "payment to an unknown account"
    REFUND = "refund"
    LARGE_REFUND = "refund of more than was paid"
    REPORT = "report"
    CLIENT_DISCONNECT = "payment, the client disconnects"


SHARES = {
    RequestKind.FIRST_PAYMENT: 8,
    RequestKind.PAYMENT: 4,
    RequestKind.UNKNOWN_ACCOUNT: 1,
    RequestKind.REFUND: 4,
    RequestKind.LARGE_REFUND: 1,
    RequestKind.REPORT: 1,
    RequestKind.CLIENT_DISCONNECT: 1,
}
# A service that answers one of these with an error has a fault.
VALID_KINDS = (
    RequestKind.FIRST_PAYMENT,
    RequestKind.PAYMENT,
    RequestKind.REFUND,
    RequestKind.REPORT,
)


@dataclass
class Request:
    """A request and its answer. `status` is None if the client got no answer."""

    kind: RequestKind
    order: Order
    status: int | None = None


def generate_requests(count: int) -> list[Request]:
    """Generate requests, equal ones at every call with this count."""
    generator = random.Random(0)
    kinds = generator.choices(list(SHARES), list(SHARES.values()), k=count)
    return [
        Request(kind, _generate_order(kind, f"{position}", generator))
        for position, kind in enumerate(kinds)
    ]


def _generate_order(kind: RequestKind, key: str, generator: random.Random) -> Order:
    payer = f"payer {key}" if kind is RequestKind.FIRST_PAYMENT else generator.choice(KNOWN_PAYERS)
    account = (
        max(ACCOUNT_IDS) + 1
        if kind is RequestKind.UNKNOWN_ACCOUNT
        else generator.choice(ACCOUNT_IDS)
    )
    amount = 2 * DEPOSIT if kind is RequestKind.LARGE_REFUND else generator.randint(1, MAX_AMOUNT)
    return Order(key=key, payer=payer, account=account, amount=amount)


async def send_all(
    url: str, requests: list[Request], workers: int, on_answer: Callable[[], None]
) -> None:
    """Send all requests from concurrent workers, and note the answers on them."""

    async def work(remaining: Iterator[Request]) -> None:
        for request in remaining:
            request.status = await _send(client, request)
            on_answer()

    remaining = iter(requests)
    limits = httpx.Limits(max_keepalive_connections=0)  # every request comes from a new client
    async with (
        httpx.AsyncClient(base_url=url, timeout=30, limits=limits) as client,
        asyncio.TaskGroup() as group,
    ):
        for _ in range(workers):
            group.create_task(work(remaining))


async def _send(client: httpx.AsyncClient, request: Request) -> int | None:
    body = request.order.model_dump()
    try:
        match request.kind:
            case RequestKind.REPORT:
                return (await client.get("/report")).status_code
            case RequestKind.REFUND | RequestKind.LARGE_REFUND:
                return (await client.post("/refunds", json=body)).status_code
            case RequestKind.CLIENT_DISCONNECT:
                return (
                    await client.post("/payments", json=body, timeout=IMPATIENT_TIMEOUT)
                ).status_code
            case _:
                return (await client.post("/payments", json=body)).status_code
    except httpx.TransportError:
        return None
