"""With an on_begin hook, every statement reaches the database after the hook."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext

import pytest
from sqlalchemy import Executable, insert, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession

from sessionwire import (
    CurrentSession,
    DatabaseSessionManager,
    DatabaseSettings,
    IncompatibleTransactionError,
    Propagation,
)
from sessionwire._database.runtime import database_of
from sessionwire.testing import sandbox

from .conftest import Postgres, checked_out, notes
from .models import Note
from .postgres import OnPostgres, kill, running, until

Execute = Callable[[Executable], Awaitable[object]]
Way = Callable[[DatabaseSessionManager], AbstractAsyncContextManager[Execute]]

MODES = list(Propagation)
WITHOUT = [Propagation.SUPPORTS, Propagation.NOT_SUPPORTED, Propagation.NEVER]


def in_mode(mode: Propagation, *, read_only: bool = False) -> Way:
    @asynccontextmanager
    async def way(manager: DatabaseSessionManager) -> AsyncIterator[Execute]:
        around = (
            manager.transaction(read_only=read_only)
            if mode is Propagation.MANDATORY
            else nullcontext()
        )
        async with around, manager.transaction(mode, read_only=read_only) as session:
            yield session.scalar

    return way


@asynccontextmanager
async def without_inside_a_transaction(manager: DatabaseSessionManager) -> AsyncIterator[Execute]:
    async with manager.transaction() as outer:
        await outer.scalar(select(1))
        async with manager.transaction(Propagation.NOT_SUPPORTED) as session:
            yield session.scalar


@asynccontextmanager
async def the_connection_of_a_block(manager: DatabaseSessionManager) -> AsyncIterator[Execute]:
    async with manager.transaction(Propagation.NOT_SUPPORTED) as session:
        yield (await session.connection()).scalar


@asynccontextmanager
async def a_session(manager: DatabaseSessionManager) -> AsyncIterator[Execute]:
    async with manager.session() as session:
        yield session.scalar


@asynccontextmanager
async def a_session_after_its_commit(manager: DatabaseSessionManager) -> AsyncIterator[Execute]:
    async with manager.session() as session:
        await session.scalar(select(1))
        await session.commit()
        yield session.scalar


@asynccontextmanager
async def the_engine_of_a_session(manager: DatabaseSessionManager) -> AsyncIterator[Execute]:
    async with manager.session() as session:
        engine = session.bind
        assert isinstance(engine, AsyncEngine)
        async with engine.connect() as connection:
            yield connection.scalar


@asynccontextmanager
async def a_connection(manager: DatabaseSessionManager) -> AsyncIterator[Execute]:
    async with manager.connect() as connection:
        yield connection.scalar


@asynccontextmanager
async def a_connection_after_its_commit(manager: DatabaseSessionManager) -> AsyncIterator[Execute]:
    async with manager.engine.connect() as connection:
        await connection.scalar(select(1))
        await connection.commit()
        yield connection.scalar


@asynccontextmanager
async def the_engine(manager: DatabaseSessionManager) -> AsyncIterator[Execute]:
    async with manager.engine.connect() as connection:
        yield connection.scalar


@asynccontextmanager
async def begin_of_the_engine(manager: DatabaseSessionManager) -> AsyncIterator[Execute]:
    async with manager.engine.begin() as connection:
        yield connection.scalar


@asynccontextmanager
async def a_savepoint_of_the_engine(manager: DatabaseSessionManager) -> AsyncIterator[Execute]:
    async with manager.engine.connect() as connection, connection.begin_nested():
        yield connection.scalar


@asynccontextmanager
async def a_derived_engine(manager: DatabaseSessionManager) -> AsyncIterator[Execute]:
    derived = manager.engine.execution_options(isolation_level="SERIALIZABLE").execution_options(
        answer=42
    )
    async with derived.connect() as connection:
        yield connection.scalar


@asynccontextmanager
async def run_sync(manager: DatabaseSessionManager) -> AsyncIterator[Execute]:
    async with manager.engine.connect() as connection:
        yield lambda statement: connection.run_sync(lambda sync: sync.scalar(statement))


@asynccontextmanager
async def a_session_on_the_engine(manager: DatabaseSessionManager) -> AsyncIterator[Execute]:
    async with AsyncSession(manager.engine) as session:
        yield session.scalar


WAYS = [
    *(pytest.param(in_mode(mode), id=mode.name) for mode in MODES),
    *(pytest.param(in_mode(mode, read_only=True), id=f"{mode.name} read-only") for mode in MODES),
    pytest.param(
        without_inside_a_transaction,
        marks=pytest.mark.several_connections("each of the two blocks has its own"),
    ),
    the_connection_of_a_block,
    a_session,
    a_session_after_its_commit,
    the_engine_of_a_session,
    a_connection,
    a_connection_after_its_commit,
    the_engine,
    begin_of_the_engine,
    a_savepoint_of_the_engine,
    a_derived_engine,
    run_sync,
    a_session_on_the_engine,
]
SENDING_BEFORE = (
    without_inside_a_transaction,
    a_session_after_its_commit,
    a_connection_after_its_commit,
)


class TestEveryWay(OnPostgres):
    @pytest.mark.parametrize("in_sandbox", [False, True], ids=["database", "sandbox"])
    @pytest.mark.parametrize("way", WAYS)
    async def test_each_statement_runs_in_a_transaction_with_the_on_begin_hook(
        self, manager: DatabaseSessionManager, way: Way, in_sandbox: bool
    ) -> None:
        @manager.transaction.on_begin
        async def limit(connection: AsyncConnection) -> None:
            await connection.execute(
                text("SELECT set_config('app.begun', :id, true)"), {"id": str(uuid.uuid4())}
            )

        ask = select(text("current_setting('app.begun', true)"))
        async with sandbox(manager) if in_sandbox else nullcontext(), way(manager) as execute:
            assert await execute(ask)
            assert await execute(ask)

    @pytest.mark.parametrize("way", WAYS)
    async def test_no_statement_is_sent_if_the_on_begin_hook_fails(
        self, manager: DatabaseSessionManager, way: Way
    ) -> None:
        failures: list[Exception] = []

        @manager.transaction.on_begin
        async def fail(connection: AsyncConnection) -> None:
            await connection.scalar(select(1))
            if fails:
                raise PermissionError

        fails = way not in SENDING_BEFORE
        with pytest.raises(PermissionError):
            async with way(manager) as execute:
                fails = True
                for _ in range(2):
                    try:
                        await execute(insert(Note).values(text="never"))
                    except Exception as error:
                        failures.append(error)
                raise failures[0]
        assert len(failures) in (0, 2)  # none where it can't even be opened
        database_of(manager).begin_hooks.clear()
        assert await notes(manager) == []
        assert checked_out(manager) == 0


class TestEachStatementAlone:
    """In a mode that goes without a transaction, a statement is one with the hook."""

    @pytest.fixture
    def begun(self, manager: DatabaseSessionManager) -> list[int]:
        begun: list[int] = []

        @manager.transaction.on_begin
        async def note(connection: AsyncConnection) -> None:
            begun.append(await connection.scalar(select(1)) or 0)

        return begun

    @pytest.mark.parametrize("mode", WITHOUT)
    async def test_a_failed_statement_in_autocommit_with_a_hook_undoes_only_itself(
        self, manager: DatabaseSessionManager, mode: Propagation, begun: list[int]
    ) -> None:
        with pytest.raises(ZeroDivisionError):
            async with manager.transaction(mode) as session:
                await session.execute(insert(Note).values(text="a"))
                assert await session.scalar(select(Note.text)) == "a"
                assert len(begun) == 2
                with pytest.raises(IntegrityError):
                    await session.execute(insert(Note), [{"text": "b"}, {"text": "a"}])
                session.add(Note(text="c"))
                await session.flush()
                await session.rollback()
                await session.execute(select(Note))
                await session.commit()
                await session.execute(insert(Note).values(text="d"))
                raise ZeroDivisionError
        database_of(manager).begin_hooks.clear()
        assert await notes(manager) == ["a", "c", "d"]
        assert checked_out(manager) == 0

    @pytest.mark.several_connections("each of the two blocks has its own")
    @pytest.mark.parametrize("mode", WITHOUT)
    async def test_a_statement_in_autocommit_with_a_hook_releases_its_lock(
        self, manager: DatabaseSessionManager, mode: Propagation, begun: list[int]
    ) -> None:
        async with manager.transaction(mode) as session:
            session.add(Note(text="a"))
            await session.flush()
            with pytest.raises(IntegrityError):
                await session.execute(insert(Note).values(text="a"))
            async with asyncio.timeout(3), manager.transaction(Propagation.REQUIRES_NEW) as other:
                note = await other.scalar(select(Note))
                assert note is not None
                note.text = "b"
            assert await session.scalar(select(Note.text)) == "b"

    async def test_an_on_begin_hook_that_failed_once_runs_for_the_next_statement(
        self, manager: DatabaseSessionManager
    ) -> None:
        failures = [PermissionError("not yet")]

        @manager.transaction.on_begin
        async def fail(connection: AsyncConnection) -> None:
            await connection.execute(insert(Note).values(text=f"hook {len(failures)}"))
            if failures:
                raise failures.pop()

        async with manager.transaction(Propagation.NOT_SUPPORTED) as session:
            with pytest.raises(PermissionError):
                await session.execute(insert(Note).values(text="never"))
            await session.execute(insert(Note).values(text="a"))
        database_of(manager).begin_hooks.clear()
        assert await notes(manager) == ["a", "hook 0"]

    async def test_autocommit_with_a_hook_refuses_operations_that_need_a_transaction(
        self, manager: DatabaseSessionManager, begun: list[int]
    ) -> None:
        async with manager.transaction(Propagation.NOT_SUPPORTED) as session:
            with pytest.raises(IncompatibleTransactionError, match="savepoint needs a transaction"):
                async with session.begin_nested():
                    await session.execute(insert(Note).values(text="never"))
        async with manager.transaction(Propagation.NOT_SUPPORTED) as session:
            with pytest.raises(IncompatibleTransactionError, match=r"cursor.*read_only=True"):
                await session.stream(select(Note))
            await session.execute(insert(Note).values(text="a"))
        database_of(manager).begin_hooks.clear()
        assert await notes(manager) == ["a"]

    async def test_an_on_begin_hook_in_autocommit_can_set_a_savepoint(
        self, manager: DatabaseSessionManager
    ) -> None:
        @manager.transaction.on_begin
        async def try_it(connection: AsyncConnection) -> None:
            with pytest.raises(ZeroDivisionError):
                async with connection.begin_nested():
                    await connection.execute(insert(Note).values(text="undone"))
                    raise ZeroDivisionError

        for mode in (Propagation.REQUIRED, Propagation.NOT_SUPPORTED):
            async with manager.transaction(mode) as session:
                session.add(Note(text=mode.name))
                await session.flush()
        async with manager.engine.begin() as connection:
            await connection.execute(insert(Note).values(text="by the engine"))
        database_of(manager).begin_hooks.clear()
        assert await notes(manager) == ["NOT_SUPPORTED", "REQUIRED", "by the engine"]

    @pytest.mark.several_connections("each of the two blocks has its own")
    async def test_a_transaction_inside_autocommit_with_a_hook_is_separate(
        self, manager: DatabaseSessionManager, begun: list[int]
    ) -> None:
        async with manager.transaction(Propagation.SUPPORTS) as session:
            await session.scalar(select(1))
            async with manager.transaction(Propagation.SUPPORTS) as joined:
                assert joined is session
            async with manager.transaction() as own:
                assert own is not session
                assert CurrentSession(manager).sync_session is own.sync_session
                own.add(Note(text="a"))
        assert len(begun) == 2

    async def test_a_block_in_autocommit_opened_before_the_first_hook_is_refused(
        self, manager: DatabaseSessionManager, settings: DatabaseSettings
    ) -> None:
        begun: list[object] = []
        is_sqlite = database_of(manager).is_sqlite
        for read_only in (False, True):
            # Without the pipeline, a read on a server has a READ ONLY transaction.
            begins = read_only and not is_sqlite and not settings.pipeline
            async with manager.transaction(
                Propagation.NOT_SUPPORTED, read_only=read_only
            ) as session:
                manager.transaction.on_begin(begun.append)
                if begins:
                    await session.scalar(select(1))
                else:
                    with pytest.raises(IncompatibleTransactionError, match="AUTOCOMMIT"):
                        await session.scalar(select(1))
            assert len(begun) == begins
            database_of(manager).begin_hooks.clear()
            begun.clear()


class TestAutocommitOnTheEngine:
    async def test_autocommit_on_the_engine_is_refused_with_hooks_unless_it_opts_out(
        self, manager: DatabaseSessionManager
    ) -> None:
        begun: list[object] = []
        engine = manager.engine.execution_options(isolation_level="AUTOCOMMIT")
        async with engine.connect() as connection:
            assert await connection.scalar(select(1)) == 1
        manager.transaction.on_begin(begun.append)
        async with engine.connect() as connection:
            for _ in range(2):
                with pytest.raises(
                    IncompatibleTransactionError, match="sessionwire_without_hooks=True"
                ):
                    await connection.execute(insert(Note).values(text="never"))
        async with manager.engine.connect() as connection:
            await connection.execution_options(isolation_level="AUTOCOMMIT")
            with pytest.raises(IncompatibleTransactionError):
                await connection.execute(insert(Note).values(text="never"))
        async with manager.session() as session:
            with pytest.raises(IncompatibleTransactionError):
                await session.connection(execution_options={"isolation_level": "AUTOCOMMIT"})
        async with engine.execution_options(sessionwire_without_hooks=True).connect() as connection:
            await connection.execute(insert(Note).values(text="a"))
            await connection.commit()  # as far as SQLAlchemy knows
        assert begun == []
        assert await notes(manager) == ["a"]
        assert len(begun) == 1

    async def test_a_block_can_opt_out_of_on_begin_hooks(
        self, manager: DatabaseSessionManager
    ) -> None:
        begun: list[object] = []
        manager.transaction.on_begin(begun.append)
        for mode in MODES:
            if mode is not Propagation.MANDATORY:
                async with manager.transaction(
                    mode, execution_options={"sessionwire_without_hooks": True}
                ) as session:
                    await session.scalar(select(1))
        assert begun == []


class TestVacuum(OnPostgres):
    async def test_vacuum_is_possible_without_the_hooks(
        self, manager: DatabaseSessionManager
    ) -> None:
        manager.transaction.on_begin(lambda _: None)
        marked = {"sessionwire_without_hooks": True}
        async with manager.transaction(
            Propagation.NOT_SUPPORTED, execution_options=marked
        ) as session:
            await session.execute(text("VACUUM"))


class TestOpening:
    async def test_opening_a_manager_or_a_sandbox_runs_no_on_begin_hook(
        self, manager: DatabaseSessionManager
    ) -> None:
        begun: list[object] = []
        await manager.close()
        manager.transaction.on_begin(begun.append)
        await manager.open()
        async with sandbox(manager):
            assert begun == []
            await notes(manager)
            assert len(begun) == 1

    async def test_a_connection_older_than_the_hook_runs_it_in_its_next_transaction(
        self, manager: DatabaseSessionManager
    ) -> None:
        begun: list[object] = []
        async with manager.engine.connect() as connection:
            await connection.scalar(select(1))
            manager.transaction.on_begin(begun.append)
            await connection.rollback()
            await connection.scalar(select(1))
            assert len(begun) == 1


class TestBatches(OnPostgres):
    async def test_each_batch_of_a_large_insert_runs_with_the_hook(
        self, manager: DatabaseSessionManager
    ) -> None:
        @manager.transaction.on_begin
        async def limit(connection: AsyncConnection) -> None:
            await connection.execute(text("SELECT set_config('app.begun', 'yes', true)"))

        async with manager.connect() as connection:
            # refuses what comes without the hook
            await connection.execute(
                text("ALTER TABLE note ADD CHECK (current_setting('app.begun') = 'yes')")
            )
        async with manager.transaction(Propagation.NOT_SUPPORTED) as session:
            rows = [{"text": str(n)} for n in range(2500)]
            assert len((await session.scalars(insert(Note).returning(Note.id), rows)).all()) == 2500
        assert len(await notes(manager)) == 2500


class TestLostConnection(OnPostgres):
    async def test_a_statement_in_autocommit_after_a_lost_connection_gets_a_new_one(
        self, manager: DatabaseSessionManager, postgres: Postgres
    ) -> None:
        begun: list[object] = []
        manager.transaction.on_begin(begun.append)
        async with manager.transaction(Propagation.NOT_SUPPORTED) as session:
            await session.execute(insert(Note).values(text="a"))
            await kill(postgres, manager)
            with pytest.raises(DBAPIError):
                await session.execute(insert(Note).values(text="lost"))
            await session.execute(insert(Note).values(text="b"))
        assert len(begun) == 3
        assert await notes(manager) == ["a", "b"]


class TestCancellation(OnPostgres):
    async def test_a_cancelled_statement_in_autocommit_with_a_hook_is_rolled_back(
        self, manager: DatabaseSessionManager, postgres: Postgres
    ) -> None:
        async def work() -> None:
            async with manager.transaction(Propagation.NOT_SUPPORTED) as session:
                await session.execute(
                    text("INSERT INTO note (text) SELECT 'never' FROM pg_sleep(60)")
                )

        manager.transaction.on_begin(lambda _: None)
        task = asyncio.create_task(work())
        await until(lambda: running(postgres, manager, "INSERT%"))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: _none_runs(postgres, manager))
        database_of(manager).begin_hooks.clear()
        assert await notes(manager) == []


async def _none_runs(postgres: Postgres, manager: DatabaseSessionManager) -> bool:
    return not await running(postgres, manager, "INSERT%")
