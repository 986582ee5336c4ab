"""Two pieces of work, a read by primary key and a write of one row, in each library."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from typing import Any, NamedTuple

import asyncpg
from sqlalchemy import URL
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from sessionwire import (
    CurrentSession,
    DatabaseSessionManager,
    DatabaseSettings,
    PoolSettings,
    Propagation,
    TransactionManager,
    read_only,
    transactional,
)

KEY, TEXT = 1, "the one that is read"
POOL = PoolSettings()  # as large as SQLAlchemy's default


class Base(DeclarativeBase):
    pass


class Item(Base):
    __tablename__ = "item"

    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str]


class Work(NamedTuple):
    read: Callable[[int], Awaitable[str]]  # the text of an item
    write: Callable[[str], Awaitable[int]]  # the id of a new one


async def text_of(session: AsyncSession, key: int) -> str:
    return (await session.get_one(Item, key)).text


def add(session: AsyncSession, text: str) -> Item:
    session.add(item := Item(text=text))
    return item


def new_asyncpg_pool(url: URL, pool: PoolSettings) -> asyncpg.Pool[Any]:
    address = {"host": url.query.get("host", url.host), "port": url.port, "database": url.database}
    return asyncpg.create_pool(
        **address, user=url.username, min_size=0, max_size=pool.size + pool.max_overflow
    )


def new_engine(url: URL, pool: PoolSettings, **options: Any) -> AsyncEngine:
    sizes = {
        "pool_size": pool.size,
        "max_overflow": pool.max_overflow,
        "pool_timeout": pool.timeout,
    }
    return create_async_engine(url, **sizes, **options)


@asynccontextmanager
async def new_manager(url: URL, pool: PoolSettings) -> AsyncIterator[DatabaseSessionManager]:
    manager = DatabaseSessionManager()
    manager.init(
        DatabaseSettings(url=url, pool=pool)
    )  # and not open(), which would connect: the others haven't either
    yield manager
    await manager.close()


@asynccontextmanager
async def raw_asyncpg(url: URL, pool: PoolSettings = POOL) -> AsyncIterator[Work]:
    async with new_asyncpg_pool(url, pool) as connections:

        async def read(key: int) -> str:
            async with connections.acquire() as connection:
                return str(
                    (await connection.fetchrow("SELECT id, text FROM item WHERE id = $1", key))[
                        "text"
                    ]
                )

        async def write(text: str) -> int:
            async with connections.acquire() as connection, connection.transaction():
                return int(
                    await connection.fetchval(
                        "INSERT INTO item (text) VALUES ($1) RETURNING id", text
                    )
                )

        yield Work(read, write)


def _work_in(
    reading: Callable[[], AbstractAsyncContextManager[AsyncSession]],
    writing: Callable[[], AbstractAsyncContextManager[AsyncSession]],
) -> Work:
    async def read(key: int) -> str:
        async with reading() as session:
            return await text_of(session, key)

    async def write(text: str) -> int:
        async with writing() as session:
            item = add(session, text)
        return item.id

    return Work(read, write)


@asynccontextmanager
async def _sqlalchemy(
    url: URL, pool: PoolSettings, for_reading: dict[str, Any] | None = None, **options: Any
) -> AsyncIterator[Work]:
    engine = new_engine(url, pool, **options)
    reading_engine = engine if for_reading is None else new_engine(url, pool, **for_reading)
    sessions = async_sessionmaker(engine, expire_on_commit=False)
    reading_sessions = async_sessionmaker(reading_engine, expire_on_commit=False)
    yield _work_in(reading_sessions, sessions.begin)
    await engine.dispose()
    await reading_engine.dispose()


def bare(url: URL, pool: PoolSettings = POOL) -> AbstractAsyncContextManager[Work]:
    return _sqlalchemy(url, pool)


def with_ping(url: URL, pool: PoolSettings = POOL) -> AbstractAsyncContextManager[Work]:
    return _sqlalchemy(url, pool, pool_pre_ping=True)


def by_an_expert(url: URL, pool: PoolSettings = POOL) -> AbstractAsyncContextManager[Work]:
    """Read without a transaction, without a reset, and without a liveness check."""
    return _sqlalchemy(
        url, pool, for_reading={"isolation_level": "AUTOCOMMIT", "pool_reset_on_return": None}
    )


@asynccontextmanager
async def blocks(url: URL, pool: PoolSettings = POOL) -> AsyncIterator[Work]:
    async with new_manager(url, pool) as manager:
        yield _work_in(
            partial(manager.transaction, Propagation.SUPPORTS, read_only=True), manager.transaction
        )


class Items:
    def __init__(self, session: AsyncSession, transaction: TransactionManager) -> None:
        self.session = session
        self.transaction = transaction

    @read_only
    async def text(self, key: int) -> str:
        return await text_of(self.session, key)

    @transactional
    async def add(self, text: str) -> Item:
        return add(self.session, text)


@asynccontextmanager
async def service(url: URL, pool: PoolSettings = POOL) -> AsyncIterator[Work]:
    async with new_manager(url, pool) as manager:
        items = Items(CurrentSession(manager), manager.transaction)

        async def write(text: str) -> int:
            return (await items.add(text)).id

        yield Work(items.text, write)


BARE, EXPERT, ASYNCPG = "SQLAlchemy", "SQLAlchemy, by an expert", "asyncpg"
SERVICE = "sessionwire, a service"
VARIANTS: dict[str, Callable[..., AbstractAsyncContextManager[Work]]] = {
    BARE: bare,
    "SQLAlchemy, pool_pre_ping": with_ping,
    EXPERT: by_an_expert,
    ASYNCPG: raw_asyncpg,
    "sessionwire, transaction()": blocks,
    SERVICE: service,
}


@asynccontextmanager
async def items(socket_directory: str) -> AsyncIterator[asyncpg.Connection[Any]]:
    """Create the table `item`, and yield a connection that is not measured."""
    connection = await asyncpg.connect(host=socket_directory, user="postgres", database="postgres")
    await connection.execute(
        # The disk takes the same time in each variant, and is not what is measured.
        "ALTER DATABASE postgres SET synchronous_commit = off;"
        "CREATE TABLE item (id serial PRIMARY KEY, text text NOT NULL) "
        "WITH (autovacuum_enabled = off);"
    )
    await connection.execute("INSERT INTO item (text) VALUES ($1)", TEXT)
    try:
        yield connection
    finally:
        await connection.execute(
            "DROP TABLE item; ALTER DATABASE postgres RESET synchronous_commit"
        )
        await connection.close()
