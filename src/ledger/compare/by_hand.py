"""The service by hand: it commits before the response, and retries conflicts."""

import asyncio
import os
import random
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

from fastapi import FastAPI, HTTPException
from sqlalchemy import func, insert, select
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

from .models import RETRIES, Order, Payer, Payment

engine = create_async_engine(os.environ["DATABASE_URL"], pool_pre_ping=True)
sessions = async_sessionmaker(engine, expire_on_commit=False)
serial = async_sessionmaker(
    engine.execution_options(isolation_level="SERIALIZABLE"), expire_on_commit=False
)


@asynccontextmanager
async def lifespan(_app: FastAPI) -> AsyncGenerator[None]:
    yield
    await engine.dispose()


app = FastAPI(lifespan=lifespan)


async def serializable(work: Callable[[AsyncSession], Awaitable[None]]) -> None:
    for attempt in range(RETRIES + 1):
        try:
            async with serial.begin() as session:
                return await work(session)
        except DBAPIError as error:
            if attempt == RETRIES or getattr(error.orig, "sqlstate", None) not in (
                "40001",
                "40P01",
            ):
                raise
        await asyncio.sleep(random.uniform(0, min(1.0, 0.01 * 2**attempt)))


@app.post("/payments", status_code=201)
async def pay(order: Order) -> None:
    async with sessions.begin() as session:
        session.add(Payment(**order.model_dump()))
        with suppress(IntegrityError):  # has paid before
            async with session.begin_nested():
                await session.execute(insert(Payer).values(name=order.payer))


@app.post("/refunds", status_code=201)
async def refund(order: Order) -> None:
    async def work(session: AsyncSession) -> None:
        session.add(Payment(**order.model_dump() | {"amount": -order.amount}))
        balance = await session.scalar(
            select(func.sum(Payment.amount)).where(Payment.payer == order.payer)
        )
        if balance is None or balance < 0:
            raise HTTPException(409, "more than was paid")

    await serializable(work)


@app.get("/report")
async def report() -> dict[str, int]:
    paid, payers = await asyncio.gather(count(Payment), count(Payer))
    return {"payments": paid, "payers": payers}


async def count(what: type[Payment] | type[Payer]) -> int:
    async with sessions() as session:  # one for each query, because they run concurrently
        return await session.scalar(select(func.count()).select_from(what)) or 0
