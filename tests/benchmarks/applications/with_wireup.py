"""wireup: everything `scoped`, and `WireupRoute`, which it recommends for speed."""

from collections.abc import AsyncIterator

import wireup
import wireup.integration.fastapi
from fastapi import APIRouter, FastAPI
from sqlalchemy.ext.asyncio import AsyncSession
from wireup import Injected, injectable
from wireup.integration.fastapi import WireupRoute

from .parts import Accounts, Answer, Books, Desk, Limits, Rates, new_sessions

sessions = new_sessions()
router = APIRouter(route_class=WireupRoute)


@injectable(lifetime="scoped")
async def make_session() -> AsyncIterator[AsyncSession]:
    async with sessions() as session:
        yield session


@router.get("/accounts/{number}")
async def read(number: int, desk: Injected[Desk]) -> Answer:
    return await desk.answer(number)


app = FastAPI()
app.include_router(router)
graph = [injectable(part, lifetime="scoped") for part in (Accounts, Limits, Rates, Books, Desk)]
wireup.integration.fastapi.setup(
    wireup.create_async_container(injectables=[make_session, *graph]), app
)
