"""Measure what a graph of five objects costs a FastAPI endpoint.

Run it with `python -m tests.benchmarks.endpoints`. Each form of the same endpoint is
called as a server would call it, in turns. The table has the median times, relative to
the endpoint written by hand.
"""

import asyncio
import sys
from collections.abc import Awaitable, Callable
from statistics import median
from time import perf_counter
from typing import Annotated

from dependency_injector import containers, providers, wiring
from fastapi import Depends, FastAPI

from sessionwire import fastapi
from tests.asgi_requests import get

ROUNDS, CALLS = 15, 400


class Part:
    def __init__(self, *parts: "Part") -> None:
        self.parts = parts


class Container(containers.DeclarativeContainer):
    first = providers.Factory(Part)
    second = providers.Factory(Part, first)
    third = providers.Factory(Part, second)
    fourth = providers.Factory(Part, third)
    whole = providers.Factory(Part, fourth)


app = FastAPI()


@app.get("/hand")
async def by_hand() -> int:
    return len(Part(Part(Part(Part(Part())))).parts)


@app.get("/short")
@fastapi.inject
async def short(whole: Annotated[Part, fastapi.Provide[Container.whole]]) -> int:
    return len(whole.parts)


@app.get("/depends")
@fastapi.inject
async def depends(whole: Annotated[Part, Depends(fastapi.Provide[Container.whole])]) -> int:
    return len(whole.parts)


@app.get("/stock-inject")
@wiring.inject
async def depends_stock_inject(
    whole: Annotated[Part, Depends(fastapi.Provide[Container.whole])],
) -> int:
    return len(whole.parts)


@app.get("/stock")
@wiring.inject
async def stock(whole: Annotated[Part, Depends(wiring.Provide[Container.whole])]) -> int:
    return len(whole.parts)


FORMS = {
    "/short": "sessionwire's inject, no Depends",
    "/depends": "sessionwire's inject, Depends(Provide[…])",
    "/stock-inject": "dependency-injector's inject, Depends(sessionwire's Provide[…])",
    "/stock": "dependency-injector's inject and Provide",
}


async def call(path: str) -> bytes:
    _, body = await get(app, path)
    return body


async def seconds(work: Callable[[], Awaitable[bytes]]) -> float:
    started = perf_counter()
    for _ in range(CALLS):
        assert await work() == b"1"
    return perf_counter() - started


async def main() -> None:
    ratios: dict[str, list[float]] = {path: [] for path in FORMS}
    for turn in range(ROUNDS + 1):
        base = await seconds(lambda: call("/hand"))
        for path, measured in ratios.items():
            taken = await seconds(lambda path=path: call(path))
            if turn:  # the first one warms up
                measured.append(taken / base)
    print("against the endpoint written by hand, medians of", ROUNDS, "rounds")
    for path, measured in ratios.items():
        print(f"{median(measured):6.2f}  {FORMS[path]}")


Container().wire(modules=[sys.modules[__name__]])

if __name__ == "__main__":
    asyncio.run(main())
