"""that-depends: a session as a `ContextResource` of the request, and factories over it.

Its middleware opens the context.
"""

from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import Depends, FastAPI
from sqlalchemy.ext.asyncio import AsyncSession
from that_depends import BaseContainer, providers
from that_depends.providers import DIContextMiddleware
from that_depends.providers.context_resources import ContextScopes

from .parts import Accounts, Answer, Books, Desk, Limits, Rates, new_sessions

sessions = new_sessions()


async def make_session() -> AsyncIterator[AsyncSession]:
    async with sessions() as session:
        yield session


class Container(BaseContainer):
    default_scope = ContextScopes.REQUEST

    session = providers.ContextResource(make_session)
    accounts = providers.Factory(Accounts, session=session.cast)
    limits = providers.Factory(Limits, accounts=accounts.cast)
    rates = providers.Factory(Rates, limits=limits.cast)
    books = providers.Factory(Books, rates=rates.cast)
    desk = providers.Factory(Desk, books=books.cast)


app = FastAPI()
app.add_middleware(DIContextMiddleware, Container, scope=ContextScopes.REQUEST)


@app.get("/accounts/{number}")
async def read(number: int, desk: Annotated[Desk, Depends(Container.desk)]) -> Answer:
    return await desk.answer(number)
