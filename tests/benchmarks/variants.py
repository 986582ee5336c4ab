"""Pieces of work, such as a read by primary key and a write of one row, in each library."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, NamedTuple

import asyncpg
from sqlalchemy import URL, func, select
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
# Row-level security does not bind a superuser.
APPLICATION = "application"  # a role
TENANTS = {"1": "of the first tenant", "2": "of the second one"}


class Base(DeclarativeBase):
    pass


class Item(Base):
    __tablename__ = "item"

    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str]


class Note(Base):
    __tablename__ = "note"

    tenant: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str]


Write = Callable[[str], Awaitable[int]]  # the id of a new item


class Work(NamedTuple):
    read: Callable[[int], Awaitable[str]]  # the text of an item
    write: Write
    # A transaction with a function that writes in a savepoint.
    savepoints: Callable[[], AbstractAsyncContextManager[Write]]
    # How many items one snapshot has, before and after this call.
    count_twice: Callable[[Callable[[], Awaitable[object]]], Awaitable[tuple[int, int]]]
    read_as: Callable[[str], Awaitable[str]]  # the only text that this tenant sees


async def text_of(session: AsyncSession, key: int) -> str:
    return (await session.get_one(Item, key)).text


async def text_of_tenant(session: AsyncSession) -> str:
    return (await session.scalars(select(Note.text))).one()


async def count(session: AsyncSession) -> int:
    return (await session.scalars(select(func.count()).select_from(Item))).one()


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
async def new_manager(
    url: URL,
    pool: PoolSettings,
    *,
    pipeline: bool = True,
    session_settings: Callable[[], dict[str, str]] | None = None,
) -> AsyncIterator[DatabaseSessionManager]:
    settings = DatabaseSettings(url=url, pool=pool, pipeline=pipeline)
    async with DatabaseSessionManager(settings, session_settings=session_settings) as manager:
        yield manager


@asynccontextmanager
async def raw_asyncpg(url: URL, pool: PoolSettings = POOL) -> AsyncIterator[Work]:
    async with new_asyncpg_pool(url, pool) as connections:

        async def read(key: int) -> str:
            async with connections.acquire() as connection:
                row = await connection.fetchrow("SELECT id, text FROM item WHERE id = $1", key)
                return str(row["text"])

        async def insert(connection: Any, text: str) -> int:
            async with connection.transaction():
                statement = "INSERT INTO item (text) VALUES ($1) RETURNING id"
                return int(await connection.fetchval(statement, text))

        async def write(text: str) -> int:
            async with connections.acquire() as connection:
                return await insert(connection, text)

        @asynccontextmanager
        async def savepoints() -> AsyncIterator[Write]:
            async with connections.acquire() as connection, connection.transaction():
                yield partial(insert, connection)

        async def count_twice(between: Callable[[], Awaitable[object]]) -> tuple[int, int]:
            async with (
                connections.acquire() as connection,
                connection.transaction(isolation="repeatable_read", readonly=True),
            ):
                before = await connection.fetchval("SELECT count(*) FROM item")
                await between()
                return before, await connection.fetchval("SELECT count(*) FROM item")

        async def read_as(tenant: str) -> str:
            async with connections.acquire() as connection, connection.transaction():
                await connection.fetchval("SELECT set_config('app.tenant', $1, true)", tenant)
                (row,) = await connection.fetch("SELECT text FROM note")
                return str(row["text"])

        yield Work(read, write, savepoints, count_twice, read_as)


NewSession = Callable[[], AbstractAsyncContextManager[AsyncSession]]


def _work_in(
    reading: NewSession,
    writing: NewSession,
    snapshot: NewSession,
    tenant_session: Callable[[str], AbstractAsyncContextManager[AsyncSession]],
    savepoint: Callable[[AsyncSession], AbstractAsyncContextManager[object]],
) -> Work:
    async def read(key: int) -> str:
        async with reading() as session:
            return await text_of(session, key)

    async def write(text: str) -> int:
        async with writing() as session:
            item = add(session, text)
        return item.id

    @asynccontextmanager
    async def savepoints() -> AsyncIterator[Write]:
        async with writing() as session:

            async def write_nested(text: str) -> int:
                async with savepoint(session):
                    item = add(session, text)
                return item.id

            yield write_nested

    async def count_twice(between: Callable[[], Awaitable[object]]) -> tuple[int, int]:
        async with snapshot() as session:
            before = await count(session)
            await between()
            return before, await count(session)

    async def read_as(tenant: str) -> str:
        async with tenant_session(tenant) as session:
            return await text_of_tenant(session)

    return Work(read, write, savepoints, count_twice, read_as)


@asynccontextmanager
async def _sqlalchemy(
    url: URL, pool: PoolSettings, for_reading: dict[str, Any] | None = None, **options: Any
) -> AsyncIterator[Work]:
    engine = new_engine(url, pool, **options)
    reading_engine = engine if for_reading is None else new_engine(url, pool, **for_reading)
    sessions = async_sessionmaker(engine, expire_on_commit=False)
    reading_sessions = async_sessionmaker(reading_engine, expire_on_commit=False)
    snapshots = async_sessionmaker(
        engine.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
    )

    @asynccontextmanager
    async def tenant_session(tenant: str) -> AsyncIterator[AsyncSession]:
        async with sessions.begin() as session:
            await session.execute(select(func.set_config("app.tenant", tenant, True)))
            yield session

    yield _work_in(
        reading_sessions, sessions.begin, snapshots, tenant_session, AsyncSession.begin_nested
    )
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
        reading = partial(manager.transaction, Propagation.SUPPORTS, read_only=True)
        snapshot = partial(manager.transaction, isolation="REPEATABLE READ", read_only=True)

        def tenant_session(tenant: str) -> AbstractAsyncContextManager[AsyncSession]:
            return reading(settings={"app.tenant": tenant})

        def savepoint(_session: AsyncSession) -> AbstractAsyncContextManager[object]:
            return manager.transaction(Propagation.NESTED)

        yield _work_in(reading, manager.transaction, snapshot, tenant_session, savepoint)


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

    @transactional(Propagation.NESTED)
    async def add_nested(self, text: str) -> Item:
        return add(self.session, text)

    @transactional(isolation="REPEATABLE READ", read_only=True)
    async def count_twice(self, between: Callable[[], Awaitable[object]]) -> tuple[int, int]:
        before = await count(self.session)
        await between()
        return before, await count(self.session)

    @read_only
    async def text_of_tenant(self) -> str:
        return await text_of_tenant(self.session)


@asynccontextmanager
async def service(
    url: URL, pool: PoolSettings = POOL, *, pipeline: bool = True
) -> AsyncIterator[Work]:
    current_tenant: ContextVar[str] = ContextVar("current_tenant")

    def settings_of_tenant() -> dict[str, str]:
        return {"app.tenant": current_tenant.get()}

    async with (
        new_manager(url, pool, pipeline=pipeline) as manager,
        new_manager(
            url, pool, pipeline=pipeline, session_settings=settings_of_tenant
        ) as tenants_manager,
    ):
        items = Items(CurrentSession(manager), manager.transaction)
        tenants_items = Items(CurrentSession(tenants_manager), tenants_manager.transaction)

        async def write(text: str) -> int:
            return (await items.add(text)).id

        async def write_nested(text: str) -> int:
            return (await items.add_nested(text)).id

        @asynccontextmanager
        async def savepoints() -> AsyncIterator[Write]:
            async with manager.transaction():
                yield write_nested

        async def read_as(tenant: str) -> str:
            current_tenant.set(tenant)
            return await tenants_items.text_of_tenant()

        yield Work(items.text, write, savepoints, items.count_twice, read_as)


BARE, EXPERT, ASYNCPG = "SQLAlchemy", "SQLAlchemy, by an expert", "asyncpg"
SERVICE = "sessionwire, a service"
WITHOUT_PIPELINE = "sessionwire, pipeline: false"
VARIANTS: dict[str, Callable[..., AbstractAsyncContextManager[Work]]] = {
    BARE: bare,
    "SQLAlchemy, pool_pre_ping": with_ping,
    EXPERT: by_an_expert,
    ASYNCPG: raw_asyncpg,
    "sessionwire, transaction()": blocks,
    SERVICE: service,
    WITHOUT_PIPELINE: partial(service, pipeline=False),
}


@asynccontextmanager
async def items(socket_directory: str) -> AsyncIterator[asyncpg.Connection[Any]]:
    """Create the tables, and yield a connection that is not measured."""
    connection = await asyncpg.connect(host=socket_directory, user="postgres", database="postgres")
    await connection.execute(
        # The disk takes the same time in each variant, and is not what is measured.
        "ALTER DATABASE postgres SET synchronous_commit = off;"
        "CREATE TABLE item (id serial PRIMARY KEY, text text NOT NULL) "
        "WITH (autovacuum_enabled = off);"
        "CREATE TABLE note (tenant integer PRIMARY KEY, text text NOT NULL);"
        "ALTER TABLE note ENABLE ROW LEVEL SECURITY;"
        "CREATE POLICY tenants ON note "
        "USING (tenant = nullif(current_setting('app.tenant', true), '')::integer);"
        f"CREATE ROLE {APPLICATION} LOGIN;"
        f"GRANT ALL ON item, item_id_seq, note TO {APPLICATION}"
    )
    await connection.execute("INSERT INTO item (text) VALUES ($1)", TEXT)
    await connection.executemany(
        "INSERT INTO note VALUES ($1, $2)", [(int(key), text) for key, text in TENANTS.items()]
    )
    try:
        yield connection
    finally:
        await connection.execute(
            f"DROP TABLE item, note; DROP ROLE {APPLICATION};"
            "ALTER DATABASE postgres RESET synchronous_commit"
        )
        await connection.close()
