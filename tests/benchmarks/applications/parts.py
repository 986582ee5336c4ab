"""The parts that all applications share: table, five objects, response and pool."""

import os

from pydantic import BaseModel
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

POOL = {"pool_size": 10, "max_overflow": 0}


class Base(DeclarativeBase):
    pass


class Account(Base):
    __tablename__ = "account"

    number: Mapped[int] = mapped_column(primary_key=True)
    owner: Mapped[str]


class Answer(BaseModel):
    number: int
    owner: str


class Accounts:
    def __init__(self, session: AsyncSession) -> None:
        self.session = session

    async def owner(self, number: int) -> str:
        return (await self.session.get_one(Account, number)).owner


class Limits:
    def __init__(self, accounts: Accounts) -> None:
        self.accounts = accounts


class Rates:
    def __init__(self, limits: Limits) -> None:
        self.limits = limits


class Books:
    def __init__(self, rates: Rates) -> None:
        self.rates = rates


class Desk:
    def __init__(self, books: Books) -> None:
        self.books = books

    async def answer(self, number: int) -> Answer:
        return Answer(number=number, owner=await self.books.rates.limits.accounts.owner(number))


def new_sessions() -> async_sessionmaker[AsyncSession]:
    return async_sessionmaker(
        create_async_engine(os.environ["DATABASE_URL"], **POOL), expire_on_commit=False
    )
