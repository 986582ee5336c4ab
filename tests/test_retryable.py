"""Retryable errors: wrapped conflicts, unreachable servers, migrations, standbys."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress

import pytest
from sqlalchemy import insert, select, text
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.ext.asyncio import AsyncSession

from sessionwire import (
    CommitOutcomeUnknownError,
    DatabaseSessionManager,
    DatabaseSettings,
    Propagation,
    TransactionTimeoutError,
)
from sessionwire._database.driver_errors import is_retryable, sqlstate

from . import cluster
from .conftest import Postgres, notes
from .models import Note
from .postgres import FaultyNetwork, OnPostgres, at_port, kill, through

CONFLICT = text("DO $$ BEGIN RAISE EXCEPTION 'conflict' USING ERRCODE = '40001'; END $$")
Work = Callable[[AsyncSession], Awaitable[object]]


class StorageError(Exception):
    """An application's own."""


class Attempts:
    """Runs work in transactions with retries, and counts how often it was tried."""

    def __init__(self, manager: DatabaseSessionManager) -> None:
        self.manager = manager
        self.count = 0

    async def run(self, work: Work, retries: int = 3) -> None:
        await self.manager.transaction.run(self._attempt, work, retries=retries)

    async def _attempt(self, work: Work) -> None:
        self.count += 1
        async with self.manager.transaction() as session:
            await work(session)


@pytest.fixture
def attempts(manager: DatabaseSessionManager) -> Attempts:
    return Attempts(manager)


async def conflict_once(attempts: Attempts, session: AsyncSession) -> None:
    if attempts.count == 1:
        await session.execute(CONFLICT)


class TestWrappedConflicts(OnPostgres):
    async def test_a_conflict_wrapped_in_an_error_of_the_application_is_retried(
        self, attempts: Attempts
    ) -> None:
        async def work(session: AsyncSession) -> None:
            try:
                await conflict_once(attempts, session)
            except DBAPIError as error:
                try:
                    raise StorageError("first") from error
                except StorageError as first:
                    raise StorageError("second") from first

        await attempts.run(work)
        assert attempts.count == 2

    async def test_a_conflict_in_an_exception_group_is_retried(self, attempts: Attempts) -> None:
        async def work(session: AsyncSession) -> None:
            async with asyncio.TaskGroup() as group:
                group.create_task(conflict_once(attempts, session))

        await attempts.run(work)
        assert attempts.count == 2

    async def test_an_error_of_the_application_without_a_conflict_is_not_retried(
        self, attempts: Attempts
    ) -> None:
        async def work(session: AsyncSession) -> None:
            raise StorageError

        with pytest.raises(StorageError):
            await attempts.run(work)
        assert attempts.count == 1

    async def test_a_conflict_that_caused_a_cancellation_is_not_retried(
        self, attempts: Attempts
    ) -> None:
        async def work(session: AsyncSession) -> None:
            try:
                await session.execute(CONFLICT)
            except DBAPIError as error:
                raise asyncio.CancelledError from error

        with pytest.raises(asyncio.CancelledError):
            await attempts.run(work)
        assert attempts.count == 1


@pytest.mark.parametrize(
    "final", [CommitOutcomeUnknownError("unknown"), TransactionTimeoutError("late")]
)
def test_an_error_caused_by_an_unknown_outcome_or_a_deadline_is_not_retryable(
    final: Exception,
) -> None:
    lost = DBAPIError("COMMIT", None, OSError("gone"), connection_invalidated=True)
    assert is_retryable(lost)
    final.__cause__ = lost
    assert not is_retryable(final)
    wrapped = StorageError()
    wrapped.__cause__ = final
    assert not is_retryable(wrapped)
    assert not is_retryable(ExceptionGroup("both", [lost, wrapped]))


def test_an_error_that_is_its_own_cause_is_examined_once() -> None:
    error = StorageError()
    error.__cause__ = error
    assert not is_retryable(error)


class TestLostConnections(OnPostgres):
    async def test_a_connection_lost_in_a_savepoint_whose_error_was_swallowed_is_retried(
        self, manager: DatabaseSessionManager, attempts: Attempts, postgres: Postgres
    ) -> None:
        async def work(session: AsyncSession) -> None:
            session.add(Note(text=f"attempt {attempts.count}"))
            await session.flush()
            with suppress(DBAPIError):
                async with manager.transaction(Propagation.NESTED):
                    if attempts.count == 1:
                        await kill(postgres, manager)
                    await session.execute(text("SELECT 1"))

        await attempts.run(work)
        assert attempts.count == 2
        assert await notes(manager) == ["attempt 2"]


class TestConnecting(OnPostgres):
    async def test_a_refused_connection_is_an_sqlalchemy_error_and_is_retried(
        self, postgres: Postgres, database_url: str
    ) -> None:
        network = FaultyNetwork()
        async with network.open(postgres.host) as port:
            manager = DatabaseSessionManager(at_port(port, database_url))
            await manager.open()
            await manager.engine.dispose()
        attempts = Attempts(manager)

        with pytest.raises(OperationalError, match=r"ConnectionRefused|Connection refused"):
            await attempts.run(lambda session: session.execute(text("SELECT 1")), retries=2)
        assert attempts.count == 3
        await manager.close()

    async def test_a_connection_reset_while_connecting_is_retried(
        self, postgres: Postgres, database_url: str
    ) -> None:
        class Resetting(FaultyNetwork):
            resets = 0

            def ask(self, data: bytes, line: object) -> None:
                if self.resets and not data.startswith(b"X"):  # the goodbye of a former one
                    self.resets -= 1
                    line.to_client.transport.abort()  # type: ignore[attr-defined]
                else:
                    super().ask(data, line)  # type: ignore[arg-type]

        network = Resetting()
        async with through(network, postgres, database_url) as manager:
            await manager.engine.dispose()
            network.resets = 2
            attempts = Attempts(manager)
            await attempts.run(lambda session: session.execute(text("SELECT 1")))
            assert attempts.count == 3

    async def test_a_server_without_free_connections_is_retried(
        self, postgres: Postgres, database_url: str
    ) -> None:
        await postgres.execute("CREATE ROLE crowded LOGIN")
        try:
            url = database_url.replace("postgres@", "crowded@")
            async with DatabaseSessionManager(url) as manager:
                await manager.engine.dispose()
                await postgres.execute("ALTER ROLE crowded CONNECTION LIMIT 0")
                attempts = Attempts(manager)
                with pytest.raises(OperationalError, match=r"(?i)too ?many ?conn") as caught:
                    await attempts.run(lambda session: session.execute(text("SELECT 1")), retries=1)
                assert attempts.count == 2
                assert is_retryable(caught.value)
        finally:
            await postgres.execute("DROP ROLE crowded")

    async def test_a_server_that_is_starting_is_retried(self) -> None:
        async with cluster.server() as server:
            manager = DatabaseSessionManager(server.url("postgres"))
            await manager.open()
            await server.stop()
            with (server.data / "postgresql.conf").open("a") as file:
                file.write("hot_standby = off\n")  # it starts, and takes no connections
            (server.data / "standby.signal").touch()
            server.begin_to_start()
            error: Exception = AssertionError()
            async with asyncio.timeout(30):
                while sqlstate(error) != "57P03":
                    with pytest.raises(DBAPIError) as caught:
                        async with manager.transaction() as session:
                            await session.execute(text("SELECT 1"))
                    error = caught.value
                    assert is_retryable(error), error
            await manager.close()

    async def test_a_wrong_password_is_not_retried(
        self, postgres: Postgres, database_url: str
    ) -> None:
        await postgres.execute("CREATE ROLE nobody")  # NOLOGIN: 28000
        try:
            manager = DatabaseSessionManager(database_url.replace("postgres@", "nobody@"))
            manager.init(database_url.replace("postgres@", "nobody@"))
            attempts = Attempts(manager)
            with pytest.raises(OperationalError, match="not permitted to log in"):
                await attempts.run(lambda session: session.execute(text("SELECT 1")))
            assert attempts.count == 1
            await manager.close()
        finally:
            await postgres.execute("DROP ROLE nobody")


class TestMigrations(OnPostgres):
    """Another process changes the schema while the service has prepared statements."""

    @pytest.fixture
    def migration(self, postgres: Postgres, database_url: str) -> Callable[[str], Awaitable[None]]:
        name = database_url.partition("?")[0].rpartition("/")[2]
        return lambda sql: postgres.run(sql, name)

    async def test_a_prepared_statement_whose_result_type_changed_is_prepared_again(
        self, attempts: Attempts, migration: Callable[[str], Awaitable[None]]
    ) -> None:
        columns: list[str] = []

        async def read(session: AsyncSession) -> None:
            columns[:] = (await session.execute(text("SELECT * FROM note"))).keys()

        for _ in range(6):  # so that psycopg prepares it too
            await attempts.run(read)
        await migration("ALTER TABLE note ADD COLUMN colour text")
        attempts.count = 0
        await attempts.run(read)
        assert attempts.count == 2
        assert "colour" in columns

    async def test_a_recreated_type_is_looked_up_again(
        self, attempts: Attempts, migration: Callable[[str], Awaitable[None]]
    ) -> None:
        await migration("CREATE TYPE mood AS ENUM ('glad'); CREATE TABLE moods (mood mood)")
        statement = text(
            "INSERT INTO moods VALUES (CAST(CAST(:mood AS TEXT) AS mood)) "
            "RETURNING ARRAY[mood], ROW(mood)"
        )

        async def write(session: AsyncSession) -> None:
            await session.execute(statement, {"mood": "glad"})

        await attempts.run(write)
        await migration(
            "DROP TABLE moods; DROP TYPE mood; "
            "CREATE TYPE mood AS ENUM ('glad'); CREATE TABLE moods (mood mood)"
        )
        attempts.count = 0
        await attempts.run(write)
        assert attempts.count <= 2

    @pytest.mark.asyncpg_only("psycopg knows no row types unless they are registered")
    async def test_an_altered_row_type_is_looked_up_again(
        self, attempts: Attempts, migration: Callable[[str], Awaitable[None]]
    ) -> None:
        await migration(
            "CREATE TYPE point AS (x int, y int); CREATE TABLE points (point public.point)"
        )
        await migration("INSERT INTO points VALUES (ROW(1, 2)::public.point)")
        found: list[object] = []

        async def read(session: AsyncSession) -> None:
            found[:] = await session.scalars(text("SELECT point FROM points"))

        await attempts.run(read)
        await migration("ALTER TYPE public.point ADD ATTRIBUTE z int")
        attempts.count = 0
        await attempts.run(read)
        assert attempts.count == 2
        assert len(found[0]) == 3  # type: ignore[arg-type]


class TestAStandby(OnPostgres):
    """A connection made to a primary leads to a server that refuses to write."""

    async def test_a_writing_transaction_on_a_standby_drops_the_connection_and_is_retried(
        self, manager: DatabaseSessionManager, postgres: Postgres, database_url: str
    ) -> None:
        attempts = Attempts(manager)
        await manager.engine.dispose()
        database = manager.engine.url.database
        await postgres.execute(f"ALTER DATABASE {database} SET default_transaction_read_only = on")
        try:
            async with manager.transaction() as session:
                before = await session.scalar(text("SELECT pg_backend_pid()"))
        finally:
            await postgres.execute(f"ALTER DATABASE {database} RESET default_transaction_read_only")

        await attempts.run(lambda session: session.execute(insert(Note).values(text="a")))

        assert attempts.count == 2
        assert await notes(manager) == ["a"]
        async with manager.transaction() as session:
            assert await session.scalar(text("SELECT pg_backend_pid()")) != before

    @pytest.mark.parametrize("propagation", [Propagation.REQUIRED, Propagation.SUPPORTS])
    async def test_a_refused_write_in_a_read_only_block_keeps_its_connection(
        self, manager: DatabaseSessionManager, propagation: Propagation
    ) -> None:
        pids: set[object] = set()
        for _ in range(2):
            with pytest.raises(DBAPIError) as caught:
                async with manager.transaction(propagation, read_only=True) as session:
                    pids.add(await session.scalar(text("SELECT pg_backend_pid()")))
                    await session.execute(insert(Note).values(text="a"))
            assert not is_retryable(caught.value)
        assert len(pids) == 1


async def test_a_schema_translate_map_is_compared_as_it_was_given(
    manager: DatabaseSessionManager,
) -> None:
    """SQLAlchemy adds to the map of a connection."""

    def schemas() -> dict[str, dict[str | None, str | None]]:
        return {
            "schema_translate_map": {
                None: "main" if manager.engine.dialect.name == "sqlite" else "public"
            }
        }

    given = schemas()
    async with manager.transaction(execution_options=given) as session:
        await session.execute(select(Note))
        async with manager.transaction(execution_options=schemas()):
            await session.execute(select(Note))
    assert given == schemas()


async def test_settings_of_a_whole_url_open_its_database(database_url: str) -> None:
    settings = DatabaseSettings(url=database_url)
    async with DatabaseSessionManager(settings) as manager, manager.session() as session:
        assert await session.scalar(text("SELECT 1")) == 1
