"""advanced-alchemy: its service over its repository, from `provide_service`.

The rest uses FastAPI's `Depends`.
"""

import os
from typing import Annotated

from advanced_alchemy.extensions.fastapi import (
    AdvancedAlchemy,
    AsyncSessionConfig,
    EngineConfig,
    SQLAlchemyAsyncConfig,
    repository,
    service,
)
from fastapi import Depends, FastAPI

from .parts import POOL, Account, Answer, Books, Desk, Limits, Rates

app = FastAPI()
alchemy = AdvancedAlchemy(
    config=SQLAlchemyAsyncConfig(
        connection_string=os.environ["DATABASE_URL"],
        engine_config=EngineConfig(**POOL),
        session_config=AsyncSessionConfig(expire_on_commit=False),
        commit_mode="autocommit",
    ),
    app=app,
)


class Accounts(service.SQLAlchemyAsyncRepositoryService[Account]):
    class Repository(repository.SQLAlchemyAsyncRepository[Account]):
        model_type = Account
        id_attribute = "number"

    repository_type = Repository

    async def owner(self, number: int) -> str:
        return (await self.get(number)).owner


async def make_desk(
    accounts: Annotated[Accounts, Depends(alchemy.provide_service(Accounts))],
) -> Desk:
    return Desk(Books(Rates(Limits(accounts))))


@app.get("/accounts/{number}")
async def read(number: int, desk: Annotated[Desk, Depends(make_desk)]) -> Answer:
    return await desk.answer(number)
