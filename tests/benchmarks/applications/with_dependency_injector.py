"""dependency-injector's example with FastAPI: repositories hold a session factory."""

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Annotated

from dependency_injector import containers, providers
from dependency_injector.wiring import Provide, inject
from fastapi import Depends, FastAPI
from sqlalchemy.ext.asyncio import AsyncSession

from .parts import Account, Answer, Books, Desk, Limits, Rates, new_sessions


class Database:
    def __init__(self) -> None:
        self.sessions = new_sessions()

    @asynccontextmanager
    async def session(self) -> AsyncIterator[AsyncSession]:
        session = self.sessions()
        try:
            yield session
        except Exception:
            await session.rollback()
            raise
        finally:
            await session.close()


class Accounts:
    def __init__(
        self, session_factory: Callable[[], AbstractAsyncContextManager[AsyncSession]]
    ) -> None:
        self.session_factory = session_factory

    async def owner(self, number: int) -> str:
        async with self.session_factory() as session:
            return (await session.get_one(Account, number)).owner


class Container(containers.DeclarativeContainer):
    db = providers.Singleton(Database)
    accounts = providers.Factory(Accounts, session_factory=db.provided.session)
    limits = providers.Factory(Limits, accounts=accounts)
    rates = providers.Factory(Rates, limits=limits)
    books = providers.Factory(Books, rates=rates)
    desk = providers.Factory(Desk, books=books)


app = FastAPI()


@app.get("/accounts/{number}")
@inject
async def read(number: int, desk: Annotated[Desk, Depends(Provide[Container.desk])]) -> Answer:
    return await desk.answer(number)


container = Container()
container.wire(modules=[__name__])
