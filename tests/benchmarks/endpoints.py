"""Measure what a graph of five objects costs a FastAPI endpoint.

Run it with `python -m tests.benchmarks.endpoints`. Each form of the same endpoint is
called as a server would call it, in turns. Each has an application of its own, because
FastAPI looks at one route after the other. The table has the median processor times,
relative to the endpoint written by hand, and the lowest and highest.
"""

import asyncio
import sys
from collections.abc import Awaitable, Callable
from statistics import median
from time import process_time
from typing import Annotated

from dependency_injector import containers, providers, wiring
from fastapi import Depends, FastAPI

from sessionwire import fastapi
from tests.asgi_requests import get

from .report import rotated

ROUNDS, CALLS = 100, 100


class Part:
    def __init__(self, *parts: "Part") -> None:
        self.parts = parts


class Container(containers.DeclarativeContainer):
    first = providers.Factory(Part)
    second = providers.Factory(Part, first)
    third = providers.Factory(Part, second)
    fourth = providers.Factory(Part, third)
    whole = providers.Factory(Part, fourth)


async def by_hand() -> int:
    return len(Part(Part(Part(Part(Part())))).parts)


@fastapi.inject
async def short(whole: Annotated[Part, fastapi.Provide[Container.whole]]) -> int:
    return len(whole.parts)


@fastapi.inject
async def depends(whole: Annotated[Part, Depends(fastapi.Provide[Container.whole])]) -> int:
    return len(whole.parts)


@wiring.inject
async def depends_stock_inject(
    whole: Annotated[Part, Depends(fastapi.Provide[Container.whole])],
) -> int:
    return len(whole.parts)


@wiring.inject
async def stock(whole: Annotated[Part, Depends(wiring.Provide[Container.whole])]) -> int:
    return len(whole.parts)


async def nothing() -> None:
    pass


async def depends_on_nothing(_: Annotated[None, Depends(nothing)]) -> int:
    return await by_hand()


FORMS = {
    "by hand": by_hand,
    "sessionwire's inject, no Depends": short,
    "sessionwire's inject, Depends(Provide[…])": depends,
    "by hand, beside a Depends of FastAPI's that does nothing": depends_on_nothing,
    "dependency-injector's inject, Depends(sessionwire's Provide[…])": depends_stock_inject,
    "dependency-injector's inject and Provide": stock,
}


def app_with(endpoint: Callable[..., Awaitable[int]]) -> FastAPI:
    app = FastAPI()
    app.get("/")(endpoint)
    return app


async def seconds(app: FastAPI) -> float:
    started = process_time()
    for _ in range(CALLS):
        assert await get(app, "/") == (200, b"1")
    return process_time() - started


async def main() -> None:
    apps = {form: app_with(endpoint) for form, endpoint in FORMS.items()}
    ratios: dict[str, list[float]] = {form: [] for form in FORMS}
    for turn in range(ROUNDS + 1):
        taken = {form: await seconds(apps[form]) for form in rotated(list(apps), turn)}
        if turn:  # the first one warms up
            for form, measured in ratios.items():
                measured.append(taken[form] / taken["by hand"])
    print("against the endpoint written by hand, medians of", ROUNDS, "rounds, lowest, highest")
    for form, measured in ratios.items():
        print(f"{median(measured):6.2f} {min(measured):6.2f} {max(measured):6.2f}  {form}")


Container().wire(modules=[sys.modules[__name__]])

if __name__ == "__main__":
    asyncio.run(main())
