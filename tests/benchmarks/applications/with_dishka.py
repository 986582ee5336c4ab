"""dishka: everything in the scope of the request, and `DishkaRoute`."""

from collections.abc import AsyncIterable, AsyncIterator
from contextlib import asynccontextmanager

from dishka import Provider, Scope, make_async_container, provide
from dishka.integrations.fastapi import DishkaRoute, FromDishka, setup_dishka
from fastapi import APIRouter, FastAPI
from sqlalchemy.ext.asyncio import AsyncSession

from .parts import Accounts, Answer, Books, Desk, Limits, Rates, new_sessions

sessions = new_sessions()


class Graph(Provider):
    scope = Scope.REQUEST

    @provide
    async def session(self) -> AsyncIterable[AsyncSession]:
        async with sessions() as session:
            yield session

    accounts = provide(Accounts)
    limits = provide(Limits)
    rates = provide(Rates)
    books = provide(Books)
    desk = provide(Desk)


router = APIRouter(route_class=DishkaRoute)


@router.get("/accounts/{number}")
async def read(number: int, desk: FromDishka[Desk]) -> Answer:
    return await desk.answer(number)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    yield
    await app.state.dishka_container.close()


app = FastAPI(lifespan=lifespan)
app.include_router(router)
setup_dishka(make_async_container(Graph()), app)
