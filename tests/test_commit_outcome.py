"""What a block makes of the answer to its COMMIT, and of no answer."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from functools import partial

import pytest
from sqlalchemy import event, func, insert, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError

from sessionwire import (
    CommitOutcomeUnknownError,
    CurrentSession,
    DatabaseSessionManager,
    DatabaseSettings,
    PoolSettings,
    Propagation,
    is_retryable,
)

from .cluster import cluster
from .conftest import Postgres, assert_all_returned, checked_out, notes
from .models import Note
from .postgres import (
    FaultyNetwork,
    OnFaultyNetwork,
    OnPostgres,
    kill,
    run_at_commit,
    running,
    until,
)
from .proxy import ClientConnection


class TestRefusedCommit:
    """A deferred constraint is checked by the commit."""

    @pytest.fixture(autouse=True)
    async def parts(self, manager: DatabaseSessionManager) -> None:
        async with manager.connect() as connection:
            await connection.execute(
                text(
                    "CREATE TABLE part (id INTEGER PRIMARY KEY, "
                    "whole INTEGER REFERENCES part (id) DEFERRABLE INITIALLY DEFERRED)"
                )
            )

    @staticmethod
    async def parts_in(manager: DatabaseSessionManager) -> object:
        async with manager.connect() as connection:
            return await connection.scalar(text("SELECT count(*) FROM part"))

    @pytest.mark.parametrize("kind", ["transaction", "connect", "session"])
    async def test_a_refused_commit_raises_the_servers_error_and_keeps_nothing(
        self, manager: DatabaseSessionManager, kind: str
    ) -> None:
        with pytest.raises(IntegrityError):
            async with getattr(manager, kind)() as opened:
                await opened.execute(text("INSERT INTO part VALUES (1, 99)"))
                if kind == "session":
                    await opened.commit()
        assert checked_out(manager) == 0
        assert await self.parts_in(manager) == 0

    @pytest.mark.parametrize("kind", ["transaction", "connect", "session"])
    @pytest.mark.parametrize("next_kind", ["transaction", "connect", "session"])
    async def test_a_connection_is_clean_after_a_refused_commit(
        self, manager: DatabaseSessionManager, kind: str, next_kind: str
    ) -> None:
        with pytest.raises(IntegrityError):
            async with getattr(manager, kind)() as opened:
                await opened.execute(text("INSERT INTO part VALUES (1, 99)"))
                if kind == "session":
                    await opened.commit()
        async with getattr(manager, next_kind)() as opened:
            assert await opened.scalar(text("SELECT count(*) FROM part")) == 0
            await opened.execute(text("INSERT INTO part VALUES (99, NULL)"))
            if next_kind == "session":
                await opened.commit()
        assert await self.parts_in(manager) == 1

    async def test_a_session_can_continue_after_a_refused_commit(
        self, manager: DatabaseSessionManager
    ) -> None:
        async with manager.session() as session:
            await session.execute(text("INSERT INTO part VALUES (1, 99)"))
            with pytest.raises(IntegrityError):
                await session.commit()
            await session.rollback()
            await session.execute(text("INSERT INTO part VALUES (2, NULL)"))
            await session.commit()
        assert await self.parts_in(manager) == 1

    async def test_a_session_can_continue_after_a_transaction_whose_commit_was_refused(
        self, manager: DatabaseSessionManager
    ) -> None:
        async with manager.session() as session:
            with pytest.raises(IntegrityError):
                async with manager.transaction():
                    await session.execute(text("INSERT INTO part VALUES (1, 99)"))
            async with manager.transaction():
                await session.execute(text("INSERT INTO part VALUES (2, NULL)"))
        assert await self.parts_in(manager) == 1

    async def test_a_refused_commit_runs_the_on_rollback_hooks(
        self, manager: DatabaseSessionManager
    ) -> None:
        ran: list[str] = []
        with pytest.raises(IntegrityError):
            async with manager.transaction() as session:
                manager.transaction.on_commit(partial(ran.append, "committed"))
                manager.transaction.on_rollback(partial(ran.append, "rolled back"))
                await session.execute(text("INSERT INTO part VALUES (1, 99)"))
        assert ran == ["rolled back"]


# With asyncpg the id is lost together with the answer.
psycopg_looks_it_up = pytest.mark.asyncpg_only("psycopg has asked for the id, and looks it up")


def looks_up(manager: DatabaseSessionManager, settings: DatabaseSettings) -> bool:
    return settings.pipeline or manager.engine.dialect.driver == "psycopg"


class TestErrors(OnPostgres):
    @pytest.mark.parametrize("kind", ["transaction", "connect"])
    @pytest.mark.parametrize("sqlstate", ["40003", "08007"])
    async def test_an_error_that_leaves_the_commit_open_is_an_unknown_outcome(
        self,
        manager: DatabaseSessionManager,
        settings: DatabaseSettings,
        sqlstate: str,
        kind: str,
    ) -> None:
        await run_at_commit(manager, f"RAISE EXCEPTION 'no idea' USING ERRCODE = '{sqlstate}'")
        with pytest.raises(CommitOutcomeUnknownError, match="the server doesn't know") as raised:
            async with getattr(manager, kind)() as opened:
                await opened.execute(insert(Note).values(text="who knows"))
        cause = raised.value.__cause__
        # If nobody has asked for the id, it is SQLAlchemy's error.
        assert getattr(getattr(cause, "orig", cause), "sqlstate", None) == sqlstate
        assert bool(raised.value.transaction_id) == looks_up(manager, settings)

    async def test_a_commit_with_an_unknown_outcome_is_not_retried_and_runs_no_hook(
        self, manager: DatabaseSessionManager
    ) -> None:
        await run_at_commit(manager, "RAISE EXCEPTION 'no idea' USING ERRCODE = '40003'")
        ran: list[str] = []

        async def work() -> None:
            ran.append("work")
            manager.transaction.on_commit(lambda: ran.append("committed"))
            manager.transaction.on_rollback(lambda: ran.append("rolled back"))
            await CurrentSession(manager).execute(insert(Note).values(text="who knows"))

        with pytest.raises(CommitOutcomeUnknownError):
            await manager.transaction.run(work, retries=2)
        assert ran == ["work"]

    async def test_any_other_error_of_a_commit_is_a_refusal(
        self, manager: DatabaseSessionManager
    ) -> None:
        await run_at_commit(manager, "RAISE EXCEPTION 'no' USING ERRCODE = '08006'")
        with pytest.raises(DBAPIError, match="no"):
            async with manager.transaction() as session:
                await session.execute(insert(Note).values(text="lost"))
        assert await notes(manager) == []

    async def test_a_warning_during_a_commit_is_no_error(
        self, manager: DatabaseSessionManager
    ) -> None:
        await run_at_commit(
            manager,
            "RAISE WARNING 'canceling wait for synchronous replication due to user request'",
        )
        async with manager.transaction() as session:
            await session.execute(insert(Note).values(text="kept"))
        assert await notes(manager) == ["kept"]


class Holding(FaultyNetwork):
    """It can hold answers back."""

    def __init__(self) -> None:
        super().__init__()
        self.holds = False
        self.held: list[tuple[bytes, ClientConnection]] = []

    def answer(self, data: bytes, client: ClientConnection) -> None:
        if self.holds:
            self.held.append((data, client))
        else:
            super().answer(data, client)

    def release(self) -> None:
        self.holds = False
        for data, client in self.held:
            super().answer(data, client)

    async def _carry_answers(self, reader: asyncio.StreamReader, client: ClientConnection) -> None:
        try:
            with suppress(ConnectionError):
                while data := await reader.read(65536):
                    self.answer(data, client)
            while self.holds:
                await asyncio.sleep(0.01)
        finally:
            self.clients.discard(client)
            client.to_client.close()


class TestLostAnswers(OnFaultyNetwork):
    timeout = 0.3

    @pytest.fixture
    def network(self) -> Holding:
        return Holding()

    @pytest.mark.parametrize(
        ("how", "cancelled"), [("cut", False), ("swallowed", False), ("swallowed", True)]
    )
    async def test_a_read_only_transaction_ignores_a_lost_answer_to_its_commit(
        self, remote: DatabaseSessionManager, network: Holding, how: str, cancelled: bool
    ) -> None:
        ran: list[str] = []

        async def work() -> int | None:
            async with remote.transaction(read_only=True) as session:
                remote.transaction.on_commit(lambda: ran.append("committed"))
                count = await session.scalar(select(func.count(Note.id)))
                if how == "cut":
                    network.cuts_answer_to = b"COMMIT"
                else:
                    network.swallows = True
            return count

        async def sent() -> bool:
            return b"COMMIT" in network.asked

        task = asyncio.create_task(work())
        if cancelled:
            await until(sent)
            task.cancel()
            with pytest.raises(asyncio.CancelledError) as raised:
                await task
            assert raised.value.__cause__ is None
        else:
            assert await task == 0
        assert ran == ["committed"]
        network.cuts_answer_to, network.swallows = None, False
        assert await notes(remote) == []

    @psycopg_looks_it_up
    async def test_a_writing_transaction_that_only_read_has_an_unknown_outcome_without_an_answer(
        self, remote: DatabaseSessionManager, network: Holding
    ) -> None:
        """A function that the query called may have written."""
        with pytest.raises(CommitOutcomeUnknownError):
            async with remote.transaction() as session:
                await session.execute(select(func.count(Note.id)))
                network.cuts_answer_to = b"COMMIT"

    async def test_a_transaction_that_the_server_ended_for_idling_is_not_committed(
        self, remote: DatabaseSessionManager, network: Holding, manager: DatabaseSessionManager
    ) -> None:
        """The client may learn that only from the answer to the COMMIT."""

        async def ended() -> bool:
            return any(b"25P03" in data for data, _ in network.held)

        with pytest.raises(DBAPIError, match="idle-in-transaction timeout") as raised:
            async with remote.transaction() as session:
                await session.execute(insert(Note).values(text="lost"))
                await session.execute(
                    text("SET LOCAL idle_in_transaction_session_timeout = '50ms'")
                )
                network.holds = True
                await until(ended)

                @event.listens_for(session.sync_session, "before_commit")
                def sent_soon(_session: object) -> None:
                    asyncio.get_running_loop().call_later(0.1, network.release)

        assert raised.value.connection_invalidated
        assert await notes(manager) == []


class TestPostgres(OnPostgres):
    @pytest.fixture
    def server(self, postgres: Postgres) -> Postgres:
        return postgres

    @pytest.mark.parametrize("kind", ["transaction", "connect"])
    async def test_a_connection_killed_before_the_commit_has_a_known_outcome(
        self, manager: DatabaseSessionManager, server: Postgres, kind: str
    ) -> None:
        with pytest.raises(DBAPIError):
            async with getattr(manager, kind)() as opened:
                await opened.execute(insert(Note).values(text="lost"))
                connection = opened if kind == "connect" else await opened.connection()
                driver = (await connection.get_raw_connection()).driver_connection

                async def noticed() -> bool:
                    return bool(driver.is_closed())

                await kill(server, manager, "INSERT%")
                await until(noticed)
        assert checked_out(manager) == 0
        assert await notes(manager) == []

    @pytest.mark.parametrize("kind", ["transaction", "connect"])
    async def test_a_connection_killed_during_the_commit_has_committed_nothing(
        self,
        manager: DatabaseSessionManager,
        settings: DatabaseSettings,
        server: Postgres,
        kind: str,
    ) -> None:
        """With asyncpg it is not looked up without the pipeline."""

        async def work() -> None:
            async with getattr(manager, kind)() as opened:
                await opened.execute(insert(Note).values(text="lost"))

        await run_at_commit(manager, "PERFORM pg_sleep(60)")
        task = asyncio.create_task(work())
        await until(lambda: running(server, manager, "COMMIT%"))
        await kill(server, manager, "COMMIT%")
        if looks_up(manager, settings):
            with pytest.raises(DBAPIError, match="not committed") as raised:
                await task
            assert raised.value.connection_invalidated
            assert is_retryable(raised.value)
        else:
            with pytest.raises(CommitOutcomeUnknownError, match="look in the database"):
                await task
        assert checked_out(manager) == 0
        assert await notes(manager) == []

    async def test_a_connection_killed_after_the_commit_causes_no_error(
        self, manager: DatabaseSessionManager, server: Postgres
    ) -> None:
        async with manager.transaction() as session:
            session.add(Note(text="kept"))
            manager.transaction.on_commit(lambda: kill(server, manager))
        assert await notes(manager) == ["kept"]

    @pytest.mark.several_connections("REQUIRES_NEW takes another")
    async def test_a_serialization_failure_in_the_commit_raises_the_servers_error(
        self, manager: DatabaseSessionManager
    ) -> None:
        async def count(session: CurrentSession) -> int | None:
            return await session.scalar(select(func.count()).select_from(Note))

        session = CurrentSession(manager)
        ran: list[str] = []
        with pytest.raises(DBAPIError) as raised:
            async with manager.transaction(isolation="SERIALIZABLE"):
                manager.transaction.on_rollback(partial(ran.append, "rolled back"))
                session.add(Note(text=f"outer saw {await count(session)}"))
                await session.flush()
                async with manager.transaction(Propagation.REQUIRES_NEW, isolation="SERIALIZABLE"):
                    session.add(Note(text=f"inner saw {await count(session)}"))
                ran.append("ended well")
        assert getattr(raised.value.orig, "sqlstate", None) == "40001"
        assert ran == ["ended well", "rolled back"]
        assert await notes(manager) == ["inner saw 0"]


class TestNetwork(OnFaultyNetwork):
    @pytest.mark.parametrize("kind", ["transaction", "connect"])
    async def test_a_commit_without_an_answer_has_an_unknown_outcome(
        self, remote: DatabaseSessionManager, network: FaultyNetwork, kind: str
    ) -> None:
        with pytest.raises(CommitOutcomeUnknownError, match="ook in the database"):
            async with getattr(remote, kind)() as opened:
                await opened.execute(insert(Note).values(text="who knows"))
                network.swallows = True

    @psycopg_looks_it_up
    @pytest.mark.parametrize("kind", ["transaction", "connect"])
    async def test_a_commit_whose_answer_is_lost_has_an_unknown_outcome(
        self,
        manager: DatabaseSessionManager,
        remote: DatabaseSessionManager,
        network: FaultyNetwork,
        kind: str,
    ) -> None:
        network.cuts_answer_to = b"COMMIT"
        with pytest.raises(CommitOutcomeUnknownError):
            async with getattr(remote, kind)() as opened:
                await opened.execute(insert(Note).values(text="kept, as it happens"))
        assert await notes(manager) == ["kept, as it happens"]

    @psycopg_looks_it_up
    @pytest.mark.parametrize("kind", ["transaction", "connect"])
    async def test_a_commit_that_never_reaches_the_server_has_an_unknown_outcome(
        self,
        manager: DatabaseSessionManager,
        remote: DatabaseSessionManager,
        network: FaultyNetwork,
        kind: str,
    ) -> None:
        network.cuts_at = b"COMMIT"
        with pytest.raises(CommitOutcomeUnknownError):
            async with getattr(remote, kind)() as opened:
                await opened.execute(insert(Note).values(text="lost, as it happens"))
        assert await notes(manager) == []

    async def test_a_statement_that_never_reaches_the_server_has_a_known_outcome(
        self,
        manager: DatabaseSessionManager,
        remote: DatabaseSessionManager,
        network: FaultyNetwork,
    ) -> None:
        network.cuts_at = b"INSERT"
        with pytest.raises(DBAPIError):
            async with remote.transaction() as session:
                await session.execute(insert(Note).values(text="lost"))
        assert await notes(manager) == []

    async def test_a_final_flush_that_never_reaches_the_server_has_a_known_outcome(
        self,
        manager: DatabaseSessionManager,
        remote: DatabaseSessionManager,
        network: FaultyNetwork,
    ) -> None:
        network.cuts_at = b"INSERT"
        with pytest.raises(DBAPIError):
            async with remote.transaction() as session:
                session.add(Note(text="lost"))
        assert await notes(manager) == []


async def in_a_transaction(manager: DatabaseSessionManager, note: str) -> None:
    async with manager.transaction() as session:
        await session.execute(insert(Note).values(text=note))


async def in_a_connection(manager: DatabaseSessionManager, note: str) -> None:
    async with manager.connect() as connection:
        await connection.execute(insert(Note).values(text=note))


async def in_a_session(manager: DatabaseSessionManager, note: str) -> None:
    async with manager.session() as session:
        await session.execute(insert(Note).values(text=note))
        await session.commit()


async def in_a_session_that_goes_on(manager: DatabaseSessionManager, note: str) -> None:
    async with manager.session() as session:
        await session.execute(insert(Note).values(text=note))
        try:
            await session.commit()
        finally:
            await session.rollback()
            assert await session.scalar(select(Note.text).where(Note.text == note)) == note


async def without_a_transaction(manager: DatabaseSessionManager, note: str) -> None:
    async with manager.transaction(Propagation.NOT_SUPPORTED) as session:
        await session.execute(insert(Note).values(text=note))


async def without_a_transaction_many(manager: DatabaseSessionManager, note: str) -> None:
    async with manager.transaction(Propagation.NOT_SUPPORTED) as session:
        await session.execute(
            text("INSERT INTO note (text) VALUES (:text)"), [{"text": note}, {"text": f"{note} 2"}]
        )


async def test_a_commit_that_stops_waiting_for_its_standby_has_an_unknown_outcome() -> None:
    async with cluster(synchronous=True) as servers:
        primary = servers.primary
        async with DatabaseSessionManager(
            DatabaseSettings(url=primary.url("postgres"), pool=PoolSettings(size=1, max_overflow=0))
        ) as manager:
            async with manager.connect() as connection:
                await manager.create_all(connection)
            servers.standby.pause()
            kept = []
            for number, work in enumerate(
                (
                    in_a_transaction,
                    in_a_connection,
                    in_a_session,
                    in_a_session_that_goes_on,
                    without_a_transaction,
                    without_a_transaction_many,
                )
            ):
                kept.append(note := f"{number}")
                task = asyncio.create_task(work(manager, note))
                await until(lambda: primary.execute(WAITING))
                await primary.execute(f"SELECT pg_cancel_backend(pid) FROM ({WAITING}) AS waiting")
                with pytest.raises(
                    CommitOutcomeUnknownError, match="committed here, perhaps not replicated"
                ):
                    await task
                await assert_all_returned(manager)
            assert await notes(manager) == [*kept, "5 2"]

            ran: list[str] = []

            async def with_hooks() -> None:
                ran.append("work")
                manager.transaction.on_commit(lambda: ran.append("committed"))
                manager.transaction.on_rollback(lambda: ran.append("rolled back"))
                await CurrentSession(manager).execute(
                    insert(Note).values(text=f"with hooks {len(ran)}")
                )

            for cancelled in (False, True):
                task = asyncio.create_task(manager.transaction.run(with_hooks, retries=2))
                await until(lambda: primary.execute(WAITING))
                if cancelled:
                    task.cancel()
                await primary.execute(f"SELECT pg_cancel_backend(pid) FROM ({WAITING}) AS waiting")
                with pytest.raises(
                    asyncio.CancelledError if cancelled else CommitOutcomeUnknownError
                ) as raised:
                    await task
                assert not cancelled or isinstance(
                    raised.value.__cause__, CommitOutcomeUnknownError
                )
            assert ran == ["work", "work"]
            servers.standby.resume()


WAITING = "SELECT pid FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
