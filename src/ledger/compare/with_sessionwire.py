"""The service with sessionwire."""

import asyncio
import os
from contextlib import suppress
from typing import Annotated

from dependency_injector import containers, providers
from fastapi import FastAPI, HTTPException
from sqlalchemy import func, insert, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from sessionwire import (
    DatabaseContainer,
    DatabaseSettings,
    Lifespan,
    Propagation,
    TransactionManager,
    read_only,
    transactional,
)
from sessionwire.fastapi import Provide, inject

from .models import RETRIES, Order, Payer, Payment


class Payments:
    def __init__(self, session: AsyncSession, transaction: TransactionManager) -> None:
        self.session, self.transaction = session, transaction

    @transactional
    async def pay(self, order: Order) -> None:
        self.session.add(Payment(**order.model_dump()))
        with suppress(IntegrityError):  # has paid before
            async with self.transaction(Propagation.NESTED):
                await self.session.execute(insert(Payer).values(name=order.payer))

    @transactional(isolation="SERIALIZABLE", retries=RETRIES)
    async def refund(self, order: Order) -> None:
        self.session.add(Payment(**order.model_dump() | {"amount": -order.amount}))
        balance = await self.session.scalar(
            select(func.sum(Payment.amount)).where(Payment.payer == order.payer)
        )
        if balance is None or balance < 0:
            raise HTTPException(409, "more than was paid")

    @read_only
    async def count(self, what: type[Payment] | type[Payer]) -> int:
        return await self.session.scalar(select(func.count()).select_from(what)) or 0


class Container(containers.DeclarativeContainer):
    settings = providers.Object(DatabaseSettings(url=os.environ["DATABASE_URL"]))
    db = DatabaseContainer.nested(settings=settings)
    payments = providers.Factory(Payments, session=db.session, transaction=db.transaction)


container = Container()
app = FastAPI(lifespan=Lifespan(container))


@app.post("/payments", status_code=201)
@inject
async def pay(order: Order, payments: Annotated[Payments, Provide[Container.payments]]) -> None:
    await payments.pay(order)


@app.post("/refunds", status_code=201)
@inject
async def refund(order: Order, payments: Annotated[Payments, Provide[Container.payments]]) -> None:
    await payments.refund(order)


@app.get("/report")
@inject
async def report(payments: Annotated[Payments, Provide[Container.payments]]) -> dict[str, int]:
    paid, payers = await asyncio.gather(payments.count(Payment), payments.count(Payer))
    return {"payments": paid, "payers": payers}


container.wire(modules=[__name__])
