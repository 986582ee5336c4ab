"""The documented recipe: a FastAPI dependency opens, commits and closes the session.

From the documentation of FastAPI: "Dependencies with yield", with the `scope` that ends
the dependency before the response is sent. From that of SQLAlchemy:
`async_sessionmaker`, `begin_nested()`, and the isolation level of a single transaction.
"""

import os
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Annotated

from fastapi import Depends, FastAPI, HTTPException
from sqlalchemy import func, insert, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

from .models import Order, Payer, Payment

engine = create_async_engine(os.environ["DATABASE_URL"])
sessions = async_sessionmaker(engine, expire_on_commit=False)
app = FastAPI()


async def get_session() -> AsyncIterator[AsyncSession]:
    async with sessions() as session:
        yield session
        await session.commit()


Session = Annotated[AsyncSession, Depends(get_session, scope="function")]


@app.post("/payments", status_code=201)
async def pay(order: Order, session: Session) -> None:
    session.add(Payment(**order.model_dump()))
    with suppress(IntegrityError):  # has paid before
        async with session.begin_nested():
            await session.execute(insert(Payer).values(name=order.payer))


@app.post("/refunds", status_code=201)
async def refund(order: Order, session: Session) -> None:
    await session.connection(execution_options={"isolation_level": "SERIALIZABLE"})
    session.add(Payment(**order.model_dump() | {"amount": -order.amount}))
    balance = await session.scalar(
        select(func.sum(Payment.amount)).where(Payment.payer == order.payer)
    )
    if balance is None or balance < 0:
        raise HTTPException(409, "more than was paid")


@app.get("/report")
async def report(session: Session) -> dict[str, int | None]:
    paid = await session.scalar(select(func.count()).select_from(Payment))
    payers = await session.scalar(select(func.count()).select_from(Payer))
    return {"payments": paid, "payers": payers}
