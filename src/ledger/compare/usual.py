"""The usual recipe: FastAPI's dependency with `yield`, and dependency-injector's `Resource` with `Closing`."""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Annotated

from dependency_injector import containers, providers
from dependency_injector.wiring import Closing, Provide, inject
from fastapi import Depends, FastAPI, HTTPException
from sqlalchemy import func, insert, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

from .books import LARGEST_REFUND, Order, Payer, Payment

engine = create_async_engine(os.environ["DATABASE_URL"])
sessions = async_sessionmaker(engine, expire_on_commit=False)
app = FastAPI()


async def get_session() -> AsyncIterator[AsyncSession]:
    async with sessions() as session:
        yield session
        await session.commit()


class Container(containers.DeclarativeContainer):
    session = providers.Resource(get_session)


@app.post("/payments", status_code=201)
async def pay(order: Order, session: Annotated[AsyncSession, Depends(get_session)]) -> None:
    session.add(Payment(**order.model_dump()))
    await session.flush()
    with suppress(IntegrityError):  # has paid before
        async with session.begin_nested():
            await session.execute(insert(Payer).values(name=order.payer))


@app.post("/refunds", status_code=201)
@inject
async def refund(order: Order, session: Annotated[AsyncSession, Depends(Closing[Provide[Container.session]])]) -> None:
    session.add(Payment(**order.model_dump() | {"amount": -order.amount}))
    await session.flush()
    if order.amount > LARGEST_REFUND:
        raise HTTPException(409, "too much to give back at once")


@app.get("/report")
async def report(session: Annotated[AsyncSession, Depends(get_session)]) -> dict[str, int | None]:
    payments, payers = await asyncio.gather(
        session.scalar(select(func.count(Payment.key))), session.scalar(select(func.count(Payer.name)))
    )
    return {"payments": payments, "payers": payers}


Container().wire(modules=[__name__])
