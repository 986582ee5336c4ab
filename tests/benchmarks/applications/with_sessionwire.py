"""sessionwire: the short form of `inject`, and a service that is `@read_only`."""

import os
from typing import Annotated

from dependency_injector import containers, providers
from fastapi import FastAPI

from sessionwire import (
    DatabaseContainer,
    DatabaseSettings,
    Lifespan,
    PoolSettings,
    TransactionManager,
    read_only,
)
from sessionwire.fastapi import Provide, inject

from . import parts
from .parts import POOL, Accounts, Answer, Books, Limits, Rates


class Desk(parts.Desk):
    def __init__(self, books: Books, transaction: TransactionManager) -> None:
        super().__init__(books)
        self.transaction = transaction

    @read_only
    async def answer(self, number: int) -> Answer:
        return await super().answer(number)


class Container(containers.DeclarativeContainer):
    pool = PoolSettings(size=POOL["pool_size"], max_overflow=POOL["max_overflow"])
    settings = providers.Object(DatabaseSettings(url=os.environ["DATABASE_URL"], pool=pool))
    db = DatabaseContainer.nested(settings=settings)
    accounts = providers.Factory(Accounts, session=db.session)
    limits = providers.Factory(Limits, accounts=accounts)
    rates = providers.Factory(Rates, limits=limits)
    books = providers.Factory(Books, rates=rates)
    desk = providers.Factory(Desk, books=books, transaction=db.transaction)


container = Container()
app = FastAPI(lifespan=Lifespan(container))


@app.get("/accounts/{number}")
@inject
async def read(number: int, desk: Annotated[Desk, Provide[Container.desk]]) -> Answer:
    return await desk.answer(number)


container.wire(modules=[__name__])
