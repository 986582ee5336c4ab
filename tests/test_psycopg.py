"""psycopg keeps the promises that asyncpg keeps; `--driver psycopg` runs the other tests on it."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import AsyncIterator
from contextlib import nullcontext
from typing import Any

import pytest
from sqlalchemy import insert, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError

from sessionwire import (
    CommitOutcomeUnknownError,
    ConfigurationError,
    ConnectionFailedError,
    CurrentSession,
    DatabaseSessionManager,
    DatabaseSettings,
    PoolSettings,
    Propagation,
    TransactionTimeoutError,
    UnexpectedRollbackError,
    read_only,
)
from sessionwire._config.url import ASYNC_DRIVERS
from sessionwire._database.driver_errors import is_retryable

from .conftest import Postgres, assert_all_returned, checked_out, notes
from .models import Note
from .postgres import FaultyNetwork, OnPostgres, kill, run_at_commit, running, through, until

SLEEP = text("SELECT pg_sleep(60)")
NOTIFY = text("NOTIFY changed")
WRITE = insert(Note).values(text="a")


@pytest.fixture(autouse=True)
def psycopg_for_postgresql(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ASYNC_DRIVERS, "postgresql", "postgresql+psycopg")


@pytest.fixture
async def remote(
    network: FaultyNetwork, manager: DatabaseSessionManager, postgres: Postgres, database_url: str
) -> AsyncIterator[DatabaseSessionManager]:
    """Open a manager that reaches the database through `network`."""
    pool = PoolSettings(size=1, max_overflow=0, ping_after=60)
    async with through(
        network, postgres, database_url, pool=pool, commit_timeout=0.2, rollback_timeout=0.5
    ) as remote:
        yield remote


@pytest.fixture
def network() -> FaultyNetwork:
    return FaultyNetwork()


class TestReads(OnPostgres):
    async def test_the_server_refuses_a_write_in_a_read_only_method(
        self, manager: DatabaseSessionManager
    ) -> None:
        class Report:
            transaction, session = manager.transaction, CurrentSession(manager)

            @read_only
            async def look(self) -> None:
                await self.session.execute(WRITE)

        assert manager.engine.dialect.driver == "psycopg"
        with pytest.raises(DBAPIError, match="read-only transaction"):
            await Report().look()
        assert await notes(manager) == []

    async def test_a_block_leaves_nothing_of_its_options_on_the_connection(
        self, remote: DatabaseSessionManager, manager: DatabaseSessionManager
    ) -> None:
        options = text(
            "SELECT current_setting('transaction_read_only'), "
            "current_setting('transaction_isolation')"
        )
        for propagation in (Propagation.REQUIRED, Propagation.SUPPORTS):
            async with remote.transaction(propagation, read_only=True) as session:
                assert tuple((await session.execute(options)).one()) == ("on", "read committed")
        async with remote.transaction(isolation="SERIALIZABLE") as session:
            assert tuple((await session.execute(options)).one()) == ("off", "serializable")
        async with remote.transaction(Propagation.NOT_SUPPORTED) as session:
            await session.execute(WRITE)
        async with remote.session() as session:
            assert tuple((await session.execute(options)).one()) == ("off", "read committed")
        assert await notes(manager) == ["a"]

    async def test_a_read_and_a_write_wait_for_three_answers_each(
        self, remote: DatabaseSessionManager, network: FaultyNetwork
    ) -> None:
        async with remote.transaction() as session:
            await session.execute(insert(Note).values(text="b"))
        network.round_trips = 0
        async with remote.transaction(Propagation.SUPPORTS, read_only=True) as session:
            await session.execute(select(1))
        assert network.round_trips == 3
        async with remote.transaction() as session:
            await session.execute(WRITE)
        assert network.round_trips == 7


class TestConnections(OnPostgres):
    async def test_settings_reach_the_server_and_the_socket(
        self, network: FaultyNetwork, postgres: Postgres, database_url: str
    ) -> None:
        settings: dict[str, Any] = {"application_name": "shop", "tcp_timeout": 12}
        async with (
            through(network, postgres, database_url, **settings) as manager,
            manager.connect() as connection,
        ):
            assert await connection.scalar(text("SHOW application_name")) == "shop"
            raw: Any = await connection.get_raw_connection()
            with socket.socket(fileno=os.dup(raw.driver_connection.fileno())) as same:
                timeout = same.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)
        assert timeout == 12_000

    async def test_open_gives_up_in_time_and_leaves_no_socket_open(self) -> None:
        hung_up = asyncio.Event()

        async def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read()
            writer.close()
            hung_up.set()

        async with await asyncio.start_server(say_nothing, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            url = f"postgresql://a@127.0.0.1:{port}/b"
            settings = DatabaseSettings(url=url, connect_timeout=0.2)
            with pytest.raises(ConnectionFailedError, match=r"0\.2 s"):
                await DatabaseSessionManager(settings).open()
            await asyncio.wait_for(hung_up.wait(), timeout=5)

    @pytest.mark.parametrize("ping_after", [0.0, 60.0])
    async def test_a_connection_that_was_killed_while_idle_is_replaced(
        self, settings: DatabaseSettings, postgres: Postgres, ping_after: float
    ) -> None:
        pool = PoolSettings(size=1, max_overflow=0, ping_after=ping_after)
        async with DatabaseSessionManager(settings.model_copy(update={"pool": pool})) as manager:
            for _ in range(2):
                async with manager.transaction() as session:
                    await session.execute(select(1))
                await kill(postgres, manager)

    async def test_a_silent_connection_is_replaced_after_the_liveness_check(
        self, manager: DatabaseSessionManager, postgres: Postgres, database_url: str
    ) -> None:
        network = FaultyNetwork()
        pool = PoolSettings(ping_after=0)
        async with through(
            network, postgres, database_url, pool=pool, connect_timeout=0.2, rollback_timeout=0.2
        ) as remote:
            network.swallow_what_is_open()
            async with remote.transaction() as session:
                assert await session.scalar(select(1)) == 1

    async def test_a_server_without_a_free_connection_is_retryable(
        self, manager: DatabaseSessionManager, postgres: Postgres, database_url: str
    ) -> None:
        await postgres.execute("CREATE ROLE crowded LOGIN CONNECTION LIMIT 0")
        try:
            crowded = DatabaseSessionManager()
            crowded.init(database_url.replace("postgres@", "crowded@"))
            with pytest.raises(DBAPIError, match="too many connections") as raised:
                async with crowded.transaction() as session:
                    await session.execute(select(1))
            assert is_retryable(raised.value)
            await crowded.close()
        finally:
            await postgres.execute("DROP ROLE crowded")

    async def test_a_statement_prepared_before_a_migration_is_prepared_anew_in_autocommit(
        self, manager: DatabaseSessionManager, remote: DatabaseSessionManager
    ) -> None:
        async def columns() -> list[str]:
            async with remote.transaction(Propagation.NOT_SUPPORTED) as session:
                return list((await session.execute(text("SELECT * FROM note"))).keys())

        for _ in range(7):  # psycopg prepares what runs more than five times
            before = await columns()
        async with manager.connect() as connection:
            await connection.execute(text("ALTER TABLE note ADD COLUMN colour text"))
        with pytest.raises(DBAPIError, match="cached plan") as raised:
            await columns()
        assert is_retryable(raised.value)
        assert await columns() == [*before, "colour"]


class TestCancellations(OnPostgres):
    async def test_a_cancelled_statement_is_stopped_in_the_server(
        self, manager: DatabaseSessionManager, postgres: Postgres
    ) -> None:
        async def work() -> None:
            async with manager.transaction() as session:
                await session.execute(WRITE)
                await session.execute(SLEEP)

        for times in (1, 2):
            task = asyncio.create_task(work())
            await until(lambda: running(postgres, manager, "%pg_sleep%"))
            for _ in range(times):
                task.cancel()
                await asyncio.sleep(0)
            with pytest.raises(asyncio.CancelledError):
                await task
            await assert_all_returned(manager)
            assert not await running(postgres, manager, "%pg_sleep%")
        assert await notes(manager) == []

    async def test_a_cancellation_in_a_dead_network_returns_at_once(
        self, remote: DatabaseSessionManager, network: FaultyNetwork
    ) -> None:
        with pytest.raises(TransactionTimeoutError):
            async with remote.transaction(timeout=0.1) as session:
                await session.execute(select(1))
                network.swallows = True
                before = time.monotonic()
                await session.execute(select(2))
        assert time.monotonic() - before < 0.6

    @pytest.mark.parametrize("kind", ["one", "many"])
    async def test_a_cancelled_statement_costs_only_its_savepoint(
        self, manager: DatabaseSessionManager, postgres: Postgres, kind: str
    ) -> None:
        statement = text("INSERT INTO note (text) SELECT :text FROM pg_sleep(60)")
        values = {"text": "never"}

        async def work() -> None:
            async with manager.transaction() as session:
                await session.execute(WRITE)
                with pytest.raises(TransactionTimeoutError):
                    async with manager.transaction(Propagation.NESTED, timeout=0.1):
                        await session.execute(statement, values if kind == "one" else [values] * 3)
                await session.execute(insert(Note).values(text="b"))

        await work()
        assert await notes(manager) == ["a", "b"]

    async def test_close_ends_a_statement_that_another_task_waits_for(
        self, settings: DatabaseSettings, postgres: Postgres
    ) -> None:
        manager = DatabaseSessionManager(settings.model_copy(update={"drain_timeout": 0}))

        async def work() -> None:
            async with manager.transaction() as session:
                await session.execute(SLEEP)

        await manager.open()
        task = asyncio.create_task(work())
        await until(lambda: running(postgres, manager, "%pg_sleep%"))
        engine = manager.engine
        async with asyncio.timeout(5):
            await manager.close()
            await asyncio.wait([task])
        assert isinstance(task.exception(), DBAPIError)
        assert engine.url.get_driver_name() == "psycopg"


class TestCommits(OnPostgres):
    async def test_a_commit_whose_answer_is_lost_is_looked_up(
        self, remote: DatabaseSessionManager, network: FaultyNetwork
    ) -> None:
        network.cuts_answer_to = b"COMMIT"
        async with remote.transaction() as session:
            await session.execute(WRITE)
        network.cuts_answer_to = None
        assert await notes(remote) == ["a"]
        assert remote.status().transactions.settled == 1

    @pytest.mark.parametrize("kind", ["transaction", "connect"])
    async def test_a_commit_that_never_reaches_the_server_is_looked_up(
        self, remote: DatabaseSessionManager, network: FaultyNetwork, kind: str
    ) -> None:
        network.cuts_at = b"COMMIT"
        with pytest.raises(DBAPIError, match="not committed") as raised:
            async with getattr(remote, kind)() as opened:
                await opened.execute(WRITE)
        assert is_retryable(raised.value)
        network.cuts_at = None
        assert await notes(remote) == []

    async def test_a_commit_without_an_answer_is_looked_up_in_vain(
        self, remote: DatabaseSessionManager, network: FaultyNetwork
    ) -> None:
        with pytest.raises(CommitOutcomeUnknownError, match="could not be asked") as raised:
            async with remote.transaction() as session:
                await session.execute(WRITE)
                network.swallows_after = b"pg_current_xact_id_if_assigned"
        assert raised.value.transaction_id
        assert remote.status().transactions.unknown == 1

    async def test_a_connection_that_is_lost_before_the_commit_has_committed_nothing(
        self, remote: DatabaseSessionManager, network: FaultyNetwork
    ) -> None:
        network.cuts_at = b"pg_current_xact_id_if_assigned"
        with pytest.raises(DBAPIError, match="lost before COMMIT") as raised:
            async with remote.transaction() as session:
                await session.execute(WRITE)
        assert is_retryable(raised.value)
        network.cuts_at = None
        assert await notes(remote) == []

    @pytest.mark.parametrize(("query", "is_known"), [(select(Note), True), (NOTIFY, False)])
    async def test_a_transaction_without_an_id_is_settled_if_it_has_only_read(
        self, remote: DatabaseSessionManager, network: FaultyNetwork, query: Any, is_known: bool
    ) -> None:
        with nullcontext() if is_known else pytest.raises(CommitOutcomeUnknownError):
            async with remote.transaction() as session:
                await session.execute(query)
                await session.execute(select(Note.id))
                network.cuts_answer_to = b"COMMIT"

    async def test_a_commit_on_a_connection_that_was_lost_before_is_known_to_have_failed(
        self, manager: DatabaseSessionManager, postgres: Postgres
    ) -> None:
        with pytest.raises(DBAPIError) as raised:
            async with manager.transaction() as session:
                await session.execute(WRITE)
                await kill(postgres, manager, "INSERT%")
        assert is_retryable(raised.value)
        assert checked_out(manager) == 0
        assert await notes(manager) == []

    async def test_a_commit_that_the_server_answers_with_a_rollback_raises(
        self, manager: DatabaseSessionManager
    ) -> None:
        with pytest.raises(UnexpectedRollbackError, match="answered the COMMIT with ROLLBACK"):
            async with manager.engine.begin() as connection:
                await connection.execute(WRITE)
                raw: Any = await connection.get_raw_connection()
                with pytest.raises(Exception, match="division by zero"):
                    await raw.driver_connection.execute("SELECT 1 / 0")
        assert await notes(manager) == []

    async def test_a_commit_that_a_trigger_refuses_is_no_unknown_outcome(
        self, manager: DatabaseSessionManager
    ) -> None:
        await run_at_commit(manager, "RAISE EXCEPTION 'no' USING ERRCODE = '23514'")
        with pytest.raises(IntegrityError, match="no"):
            async with manager.transaction() as session:
                await session.execute(WRITE)
        assert await notes(manager) == []


@pytest.mark.parametrize(
    ("query", "problem"),
    [
        ("aplication_name=x", "did you mean 'application_name'?"),
        ("connect_timeout=3", "set connect_timeout beside url"),
        ("sslmode=on", "disable, allow, prefer"),
        ("prepare_threshold=never", "a whole number"),
        ("row_factory=dict", "a Python object"),
    ],
)
def test_a_parameter_that_libpq_would_not_take_is_refused(query: str, problem: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        DatabaseSettings(url=f"postgresql+psycopg://db/shop?{query}")
    assert problem in str(refused.value)


async def test_parameters_of_libpq_and_several_hosts_are_taken_from_the_url(
    postgres: Postgres,
) -> None:
    hosts = f"host=/nowhere:5432&host={postgres.host}:5432"
    url = f"postgresql+psycopg_async://postgres@/postgres?{hosts}&options=-c%20work_mem%3D7MB"
    async with DatabaseSessionManager(url) as manager, manager.connect() as connection:
        assert await connection.scalar(text("SHOW work_mem")) == "7MB"


class TestSettings(OnPostgres):
    async def test_connections_begin_with_the_settings_of_the_server(
        self, settings: DatabaseSettings
    ) -> None:
        own = {
            "application_name": "a shop",
            "search_path": ["my schema", "public"],
            "statement_timeout": 7.5,
            "lock_timeout": 2,
        }
        given = DatabaseSettings.model_validate({"url": settings.url, **own})
        async with DatabaseSessionManager(given) as manager, manager.session() as session:
            query = text("SELECT name, setting FROM pg_settings WHERE name = ANY(:names)")
            rows = await session.execute(query, {"names": list(own)})
            assert {name: value for name, value in rows} == {
                "application_name": "a shop",
                "search_path": '"my schema", "public"',
                "statement_timeout": "7500",
                "lock_timeout": "2000",
            }

    async def test_a_function_gives_the_password_of_each_new_connection(
        self, settings: DatabaseSettings
    ) -> None:
        asked: list[str] = []

        async def password() -> str:
            asked.append("password")
            return "any"

        pool = PoolSettings(size=1, max_overflow=0, max_lifetime=60)
        given = settings.model_copy(update={"pool": pool})
        async with DatabaseSessionManager(given, credentials=password) as manager:
            assert asked == ["password"]
            assert await notes_exist(manager)

    @pytest.mark.parametrize("away", ["refuses", "closes", "has no address"])
    async def test_a_server_that_is_not_there_yet_is_waited_for(
        self, away: str, network: FaultyNetwork, postgres: Postgres, caplog: Any
    ) -> None:
        network.cuts_at = b"user\0"  # at the first message
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            refusing = unused.getsockname()[1]
        async with network.open(postgres.host) as closing:
            host = {
                "refuses": f"127.0.0.1:{refusing}",
                "closes": f"127.0.0.1:{closing}",
                "has no address": "shop.invalid",
            }[away]
            given = DatabaseSettings(
                url=f"postgresql://postgres@{host}/shop?sslmode=disable", wait_for_database=0.3
            )
            with pytest.raises(ConnectionFailedError, match=r"waited \d"):
                await DatabaseSessionManager(given).open()
        assert "waiting up to 0.3 s for the database" in caplog.text

    async def test_a_holder_is_named_with_its_last_statement(
        self, manager: DatabaseSessionManager
    ) -> None:
        async with manager.transaction() as session:
            await session.execute(text("SELECT 7"))
            (holder,) = manager.status().holders
            assert holder.statement == "SELECT 7"
            assert "test_a_holder_is_named" in holder.call_site


async def notes_exist(manager: DatabaseSessionManager) -> bool:
    async with manager.session() as session:
        return await session.scalar(text("SELECT true")) is True
