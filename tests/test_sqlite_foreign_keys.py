"""SQLite's foreign keys are on, except while a table is rebuilt; and its autocommit."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from alembic.migration import MigrationContext
from alembic.operations import Operations
from sqlalchemy import Column, Connection, String, text
from sqlalchemy.exc import IntegrityError

from sessionwire import (
    DatabaseSessionManager,
    DatabaseSettings,
    IncompatibleTransactionError,
    PoolSettings,
    Propagation,
    SandboxError,
)
from sessionwire.testing import sandbox

FAMILY = (
    "CREATE TABLE parent (id INTEGER PRIMARY KEY)",
    "CREATE TABLE child (id INTEGER REFERENCES parent ON DELETE CASCADE)",
    "INSERT INTO parent VALUES (1)",
    "INSERT INTO child VALUES (1)",
)
REBUILD = (
    "CREATE TABLE new (id INTEGER PRIMARY KEY, name VARCHAR)",
    "INSERT INTO new (id) SELECT id FROM parent",
    "DROP TABLE parent",
    "ALTER TABLE new RENAME TO parent",
)
OFF, ON = "PRAGMA foreign_keys = OFF", "PRAGMA foreign_keys=ON"


@pytest.fixture
def backend() -> str:
    return "sqlite"


@pytest.fixture
def settings(database_url: str) -> DatabaseSettings:
    return DatabaseSettings(
        url=database_url, pool=PoolSettings(size=1, max_overflow=1)
    )  # so each is used again


@pytest.fixture
async def family(manager: DatabaseSessionManager) -> AsyncIterator[DatabaseSessionManager]:
    """Make a parent with its child. Finally, check that foreign keys are on again."""
    async with manager.connect() as connection:
        await run(connection, *FAMILY)
    yield manager
    async with manager.engine.connect() as connection:
        assert await connection.scalar(text("PRAGMA foreign_keys")) == 1
    with pytest.raises(IntegrityError, match="FOREIGN KEY"):
        async with manager.transaction() as session:
            await session.execute(text("INSERT INTO child VALUES (7)"))


async def run(connection: Any, *statements: str) -> None:
    for statement in statements:
        await connection.execute(text(statement))


async def children(manager: DatabaseSessionManager) -> int | None:
    async with manager.engine.connect() as connection:
        return await connection.scalar(text("SELECT count(*) FROM child"))


@pytest.mark.parametrize("off", [OFF, "pragma main.foreign_keys(0)", " PRAGMA foreign_keys='off'"])
async def test_a_table_can_be_rebuilt_with_foreign_keys_off_in_one_transaction(
    family: DatabaseSessionManager, off: str
) -> None:
    async with family.connect() as connection:
        await run(connection, off, *REBUILD, ON)
        assert (await connection.execute(text("PRAGMA foreign_key_check"))).all() == []
    assert await children(family) == 1


async def test_a_failed_rebuild_of_a_table_is_rolled_back(family: DatabaseSessionManager) -> None:
    with pytest.raises(ZeroDivisionError):
        async with family.connect() as connection:
            await run(connection, OFF, *REBUILD[:3])
            raise ZeroDivisionError
    async with family.transaction() as session:
        assert await session.scalar(text("SELECT count(*) FROM parent")) == 1
    assert await children(family) == 1


@pytest.mark.parametrize("where", ["before", "in the migration"])
async def test_alembic_rebuilds_a_table_in_its_batch_mode(
    family: DatabaseSessionManager, where: str
) -> None:
    def migrate(connection: Connection) -> None:
        if where == "before":
            connection.execute(text(OFF))
        context = MigrationContext.configure(connection)
        assert context.get_current_revision() is None
        operations = Operations(context)
        with context.begin_transaction():
            if where == "in the migration":
                operations.execute(OFF)
            with operations.batch_alter_table("parent", recreate="always") as batch:
                batch.add_column(Column("name", String))

    async with family.connect() as connection:
        await connection.run_sync(migrate)
    assert await children(family) == 1
    async with family.transaction() as session:
        assert await session.scalar(text("SELECT count(name) FROM parent")) == 0


async def test_foreign_keys_stay_off_until_the_connection_is_released(
    family: DatabaseSessionManager,
) -> None:
    async with family.engine.connect() as connection:
        await run(connection, OFF)
        await connection.commit()
        await run(connection, *REBUILD)
        await connection.commit()
        assert await connection.scalar(text("PRAGMA foreign_keys")) == 0
        await connection.commit()
        await run(connection, ON, "SELECT 1")
        with pytest.raises(IntegrityError, match="FOREIGN KEY"):
            await run(connection, "INSERT INTO child VALUES (7)")
    assert await children(family) == 1


async def test_turning_foreign_keys_off_after_a_write_is_refused(
    family: DatabaseSessionManager,
) -> None:
    async with family.connect() as connection:
        await run(connection, "INSERT INTO parent VALUES (2)")
        with pytest.raises(IncompatibleTransactionError, match="before the first write"):
            await run(connection, OFF)
        await run(connection, ON, "INSERT INTO child VALUES (2)")
    assert await children(family) == 2


async def test_turning_foreign_keys_off_is_refused_if_earlier_reads_are_outdated(
    family: DatabaseSessionManager,
) -> None:
    async def write() -> None:
        async with family.transaction() as session:
            await session.execute(text("INSERT INTO parent VALUES (3)"))

    with pytest.raises(IncompatibleTransactionError, match="before the first query"):
        async with family.session() as session:
            await session.execute(text("SELECT * FROM parent"))
            await asyncio.create_task(family.transaction.detached(write()))
            await session.execute(text(OFF))


async def test_a_sandbox_refuses_to_turn_foreign_keys_off(family: DatabaseSessionManager) -> None:
    async with sandbox(family), family.connect() as connection:
        with pytest.raises(SandboxError, match="foreign keys can't be switched off"):
            await run(connection, OFF)


class TestAutocommit:
    async def test_autocommit_of_the_engine_is_respected_on_sqlite(
        self, family: DatabaseSessionManager
    ) -> None:
        async with family.engine.connect() as connection:
            connection = await connection.execution_options(isolation_level="AUTOCOMMIT")
            await run(connection, "INSERT INTO parent VALUES (4)")
            async with family.transaction() as session:
                assert await session.scalar(text("SELECT count(*) FROM parent WHERE id = 4")) == 1
                await session.execute(text("INSERT INTO parent VALUES (5)"))
            await run(connection, "VACUUM", OFF)
            assert await connection.scalar(text("PRAGMA foreign_keys")) == 0
            await connection.rollback()
        async with family.engine.execution_options(
            isolation_level="AUTOCOMMIT"
        ).connect() as connection:
            await run(connection, "INSERT INTO parent VALUES (6)")
        assert await self.parents(family) == [1, 4, 5, 6]

    @pytest.mark.parametrize("level", ["AUTOCOMMIT", "READ UNCOMMITTED", "SERIALIZABLE"])
    async def test_autocommit_of_the_engine_leaves_no_trace_on_the_connection(
        self, family: DatabaseSessionManager, level: Any
    ) -> None:
        async with family.engine.connect() as connection:
            connection = await connection.execution_options(isolation_level=level)
            assert await connection.scalar(text("SELECT 1")) == 1
        async with family.transaction(Propagation.NOT_SUPPORTED) as session:
            await session.execute(text("INSERT INTO parent VALUES (2)"))
        async with family.engine.connect() as connection:
            await run(connection, "INSERT INTO parent VALUES (3)")  # and rolled back
        assert await self.parents(family) == [1, 2]

    async def parents(self, manager: DatabaseSessionManager) -> list[int]:
        async with manager.engine.connect() as connection:
            return list(await connection.scalars(text("SELECT id FROM parent ORDER BY id")))
