"""context-async-sqlalchemy: the request's session, from a context variable.

Its middleware for FastAPI sets the variable. Its documentation shows an engine with
`pool_pre_ping`, which would send three more messages; no variant has that.
"""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from context_async_sqlalchemy import DBConnect, db_session
from context_async_sqlalchemy.fastapi_utils import add_fastapi_http_db_session_middleware
from fastapi import FastAPI
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine

from .parts import POOL, Account, Answer, Books, Desk, Limits, Rates

connection = DBConnect(
    host=os.environ["DATABASE_URL"],
    engine_creator=lambda url: create_async_engine(url, **POOL),
    session_maker_creator=lambda engine: async_sessionmaker(engine, expire_on_commit=False),
)


class Accounts:
    async def owner(self, number: int) -> str:
        session = await db_session(connection)
        return (await session.get_one(Account, number)).owner


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    yield
    await connection.close()


app = FastAPI(lifespan=lifespan)
add_fastapi_http_db_session_middleware(app)


@app.get("/accounts/{number}")
async def read(number: int) -> Answer:
    return await Desk(Books(Rates(Limits(Accounts())))).answer(number)
