"""The manager, from init to close."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import socket
from pathlib import Path

import pytest
from sqlalchemy import MetaData, inspect, make_url, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError

from sessionwire import (
    AlreadyInitializedError,
    ConfigurationError,
    ConnectionFailedError,
    DatabaseSessionManager,
    DatabaseSettings,
    NoSessionError,
    NotInitializedError,
    OwnershipError,
    PoolSettings,
    UnexpectedRollbackError,
    sessionmanager,
)

from .conftest import notes
from .models import Note


async def use_session(manager: DatabaseSessionManager) -> None:
    async with manager.session() as session:
        await session.execute(select(1))


async def use_transaction(manager: DatabaseSessionManager) -> None:
    async with manager.transaction() as session:
        await session.execute(select(1))


async def use_connection(manager: DatabaseSessionManager) -> None:
    async with manager.connect() as connection:
        await connection.execute(select(1))


USES = [use_session, use_transaction, use_connection]
every_use = pytest.mark.parametrize("use", USES)
SLEEP = {
    "sqlite": "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) "
    "SELECT count(*) FROM n"
}


def long_statement(backend: str) -> str:
    """Return a statement that runs for a minute or more, unless it is stopped."""
    return SLEEP.get(backend, "SELECT pg_sleep(60)")


class TestInit:
    async def test_a_session_needs_four_lines_and_no_container(self, database_url: str) -> None:
        sessionmanager.init(database_url)
        async with sessionmanager.session() as session:
            assert await session.scalar(select(1)) == 1
        await sessionmanager.close()

    @pytest.mark.parametrize("kind", [str, make_url, lambda url: DatabaseSettings(url=url)])
    async def test_init_accepts_a_string_a_url_and_settings(
        self, database_url: str, kind: object
    ) -> None:
        manager = DatabaseSessionManager()
        manager.init(kind(database_url))  # type: ignore[operator]
        await use_session(manager)
        await manager.close()

    def test_init_needs_no_event_loop_and_no_database(self, tmp_path: Path) -> None:
        manager = DatabaseSessionManager()
        manager.init(f"sqlite:///{tmp_path / 'not' / 'there.db'}")
        manager = DatabaseSessionManager()
        manager.init("postgresql://nobody@nowhere.invalid/nothing")
        assert list(tmp_path.iterdir()) == []

    async def test_init_is_refused_while_the_manager_has_an_engine(
        self, manager: DatabaseSessionManager
    ) -> None:
        engine = manager.engine
        with pytest.raises(AlreadyInitializedError, match="already initialized") as raised:
            manager.init("sqlite://")
        assert "close() it first" in raised.value.__notes__[0]
        assert manager.engine is engine

    def test_init_refuses_an_invalid_url(self) -> None:
        with pytest.raises(ConfigurationError, match="not a database URL"):
            DatabaseSessionManager().init("my password is not shown")


class TestNotInitialized:
    MESSAGE = r"^DatabaseSessionManager is not initialized(\n|$)"

    @every_use
    async def test_a_manager_cannot_be_used_before_init(self, use: object) -> None:
        with pytest.raises(NotInitializedError, match=self.MESSAGE) as raised:
            await use(DatabaseSessionManager())  # type: ignore[operator]
        assert "init(url)" in raised.value.__notes__[0]

    @every_use
    async def test_a_manager_cannot_be_used_after_close(
        self, database_url: str, use: object
    ) -> None:
        manager = DatabaseSessionManager()
        manager.init(database_url)
        await use(manager)  # type: ignore[operator]
        await manager.close()
        with pytest.raises(NotInitializedError, match=self.MESSAGE):
            await use(manager)  # type: ignore[operator]

    async def test_close_and_engine_are_refused_before_init(self) -> None:
        manager = DatabaseSessionManager(DatabaseSettings(url="sqlite://"))
        with pytest.raises(NotInitializedError, match=self.MESSAGE):
            await manager.close()
        with pytest.raises(NotInitializedError, match=self.MESSAGE):
            _ = manager.engine

    async def test_open_without_settings_says_what_to_pass(self) -> None:
        with pytest.raises(NotInitializedError) as raised:
            await DatabaseSessionManager().open()
        assert "give it settings" in raised.value.__notes__[0]


class TestOpen:
    async def test_a_manager_can_be_opened_and_closed_repeatedly(
        self, settings: DatabaseSettings
    ) -> None:
        manager = DatabaseSessionManager(settings)
        for _ in range(2):
            async with manager as opened:
                assert opened is manager
                await use_session(manager)
            with pytest.raises(NotInitializedError):
                await manager.close()

    async def test_a_manager_can_be_closed_inside_its_block(
        self, settings: DatabaseSettings
    ) -> None:
        async with DatabaseSessionManager(settings) as manager:
            await manager.close()

    async def test_two_concurrent_opens_open_once(self, settings: DatabaseSettings) -> None:
        manager = DatabaseSessionManager(settings)
        engines = []

        async def open_it() -> None:
            await manager.open()
            engines.append(manager.engine)

        await asyncio.gather(open_it(), open_it(), open_it())
        assert len(set(map(id, engines))) == 1
        await manager.close()

    async def test_a_failed_open_says_what_was_tried_and_why_but_no_password(self) -> None:
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            port = unused.getsockname()[1]
        manager = DatabaseSessionManager(
            DatabaseSettings(url=f"postgresql://alice:s3cret@127.0.0.1:{port}/shop")
        )
        with pytest.raises(ConnectionFailedError) as raised:
            await manager.open()
        message = str(raised.value)
        for told in ("127.0.0.1", str(port), "'shop'", "user alice", "refused"):
            assert told in message.lower()
        assert "s3cret" not in message
        with pytest.raises(NotInitializedError):
            await manager.close()

    async def test_open_gives_up_in_time_if_the_server_does_not_answer(self) -> None:
        hung_up = asyncio.Event()

        async def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read()
            writer.close()
            hung_up.set()

        async with await asyncio.start_server(say_nothing, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            settings = DatabaseSettings(
                url=f"postgresql://a@127.0.0.1:{port}/b", connect_timeout=0.2
            )
            with pytest.raises(ConnectionFailedError, match=r"0\.2 s"):
                await DatabaseSessionManager(settings).open()
            await asyncio.wait_for(hung_up.wait(), timeout=5)

    async def test_open_can_be_repeated_after_it_failed(self, tmp_path: Path) -> None:
        (tmp_path / "taken").write_text(
            "this is no database, and long enough for SQLite to see that it is none"
        )
        manager = DatabaseSessionManager()
        manager.init(f"sqlite:///{tmp_path / 'taken'}")
        with pytest.raises(ConnectionFailedError, match="not a database"):
            await manager.open()
        (tmp_path / "taken").unlink()
        await manager.open()
        await use_session(manager)
        await manager.close()

    async def test_a_cancelled_open_leaves_nothing_open_and_can_be_repeated(
        self, settings: DatabaseSettings
    ) -> None:
        manager = DatabaseSessionManager(settings)
        for suspensions in range(3):
            task = asyncio.create_task(manager.open())
            for _ in range(suspensions + 1):
                await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            with pytest.raises(NotInitializedError):
                await manager.close()
        async with manager:
            await use_session(manager)


class TestClose:
    @pytest.mark.several_connections("each of the two blocks has its own")
    async def test_close_waits_for_open_scopes_and_for_blocks_inside_them(
        self, manager: DatabaseSessionManager
    ) -> None:
        inside, go_on = asyncio.Event(), asyncio.Event()

        async def work() -> None:
            async with manager.session() as session:
                inside.set()
                await go_on.wait()
                async with manager.session() as nested, manager.connect() as connection:
                    assert await nested.scalar(select(1)) == await connection.scalar(select(1))
                session.add(Note(text="outer"))
                await session.commit()

        async def close_and_look() -> None:
            await manager.close()
            await manager.open()

        manager.metadata = Note.metadata
        async with asyncio.TaskGroup() as group:
            group.create_task(work())
            await inside.wait()
            closing = group.create_task(close_and_look())
            await asyncio.sleep(0)
            for use in USES:
                with pytest.raises(NotInitializedError) as raised:
                    await use(manager)
                assert "is closing" in raised.value.__notes__[0]
            assert not closing.done()
            go_on.set()
        assert await notes(manager) == ["outer"]

    @pytest.mark.parametrize("where", ["between statements", "in a statement"])
    async def test_close_aborts_open_scopes_after_the_drain_timeout(
        self, settings: DatabaseSettings, backend: str, where: str
    ) -> None:
        manager = DatabaseSessionManager(settings.model_copy(update={"drain_timeout": 0.05}))
        async with manager, manager.connect() as connection:
            await manager.create_all(connection)
        await manager.open()
        inside, go_on = asyncio.Event(), asyncio.Event()

        async def work() -> None:
            async with manager.transaction() as session:
                session.add(Note(text="late"))
                await session.flush()
                inside.set()
                if where == "in a statement":
                    await session.execute(text(long_statement(backend)))
                await go_on.wait()

        task = asyncio.create_task(work())
        await inside.wait()
        async with asyncio.timeout(5):
            await manager.close()
        go_on.set()
        with pytest.raises(
            UnexpectedRollbackError if where == "between statements" else DBAPIError
        ):
            await task
        async with manager:
            assert await notes(manager) == []

    async def test_a_session_that_close_aborted_refuses_use(
        self, settings: DatabaseSettings
    ) -> None:
        manager = DatabaseSessionManager(settings.model_copy(update={"drain_timeout": 0}))
        await manager.open()
        async with manager.session() as session:
            await asyncio.create_task(manager.close())
            with pytest.raises(NoSessionError, match="cut off by close"):
                await session.execute(select(1))

    async def test_close_does_not_wait_for_the_scope_around_its_call(
        self, settings: DatabaseSettings
    ) -> None:
        manager = DatabaseSessionManager(settings)
        await manager.open()
        async with asyncio.timeout(5):
            async with manager.session() as session:
                await session.execute(select(1))
                await manager.close()

    async def test_two_concurrent_closes_close_once(self, settings: DatabaseSettings) -> None:
        manager = DatabaseSessionManager(settings)
        await manager.open()
        await asyncio.gather(manager.close(), manager.close())
        with pytest.raises(NotInitializedError):
            await manager.close()

    async def test_a_cancelled_close_still_disposes_the_engine(
        self, settings: DatabaseSettings
    ) -> None:
        manager = DatabaseSessionManager(settings)
        await manager.open()
        leave = asyncio.Event()

        async def hold() -> None:
            async with manager.session() as session:
                await session.execute(select(1))
                await leave.wait()

        holder = asyncio.create_task(hold())
        await asyncio.sleep(0.05)
        closing = asyncio.create_task(manager.close())
        await asyncio.sleep(0)
        closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closing
        with pytest.raises(NotInitializedError):
            await use_session(manager)
        leave.set()
        await holder

    async def test_a_wait_for_a_connection_that_close_ended_commits_nothing(
        self, settings: DatabaseSettings, manager: DatabaseSessionManager
    ) -> None:
        async def write() -> None:
            async with narrow.connect() as connection:
                await connection.execute(text("INSERT INTO note (text) VALUES ('after close')"))

        pool = PoolSettings(size=1, max_overflow=0, timeout=0.5)
        narrow = DatabaseSessionManager(
            settings.model_copy(update={"pool": pool, "drain_timeout": 0.1})
        )
        await narrow.open()
        with pytest.raises(UnexpectedRollbackError):
            async with narrow.transaction() as session:
                session.add(Note(text="cut off"))
                await session.flush()
                waiting = asyncio.create_task(narrow.transaction.detached(write()))
                await asyncio.sleep(0)
                closing = asyncio.create_task(narrow.transaction.detached(narrow.close()))
                await asyncio.wait([waiting, closing])
        await closing
        with pytest.raises(NotInitializedError) as raised:
            await waiting
        assert "the manager was closed while" in raised.value.__notes__[0]
        assert await notes(manager) == []


class TestConnect:
    async def test_connect_commits_if_the_block_ends_normally(
        self, manager: DatabaseSessionManager
    ) -> None:
        async with manager.connect() as connection:
            await connection.execute(Note.__table__.insert().values(text="kept"))  # type: ignore[attr-defined]
        assert await notes(manager) == ["kept"]

    @pytest.mark.parametrize("error", [ValueError, asyncio.CancelledError, KeyboardInterrupt])
    async def test_connect_rolls_back_on_any_error(
        self, manager: DatabaseSessionManager, error: type[BaseException]
    ) -> None:
        with pytest.raises(error):
            async with manager.connect() as connection:
                await connection.execute(Note.__table__.insert().values(text="lost"))  # type: ignore[attr-defined]
                raise error
        assert await notes(manager) == []

    @pytest.mark.parametrize("kind", ["connect", "transaction"])
    async def test_connect_raises_if_its_commit_is_refused_and_leaves_a_clean_connection(
        self, manager: DatabaseSessionManager, backend: str, kind: str
    ) -> None:
        if backend == "postgresql":
            defer = (
                "ALTER TABLE note ALTER CONSTRAINT fk_note_parent_id_note "
                "DEFERRABLE INITIALLY DEFERRED"
            )
        else:
            defer = "PRAGMA defer_foreign_keys = ON"
        with pytest.raises(IntegrityError):
            async with getattr(manager, kind)() as opened:
                await opened.execute(text(defer))
                await opened.execute(
                    text("INSERT INTO note (text, parent_id) VALUES ('orphan', 99)")
                )
        async with manager.transaction() as session:
            session.add(Note(id=99, text="too late a parent"))
        assert await notes(manager) == ["too late a parent"]

    async def test_create_all_and_drop_all_create_and_drop_the_tables(
        self, settings: DatabaseSettings
    ) -> None:
        metadata = MetaData()
        Note.__table__.to_metadata(metadata, name="other")  # type: ignore[attr-defined]
        async with (
            DatabaseSessionManager(settings, metadata=metadata) as manager,
            manager.connect() as connection,
        ):
            await manager.create_all(connection)
            assert await connection.run_sync(lambda sync: inspect(sync).get_table_names()) == [
                "other"
            ]
            await manager.drop_all(connection)
            assert await connection.run_sync(lambda sync: inspect(sync).get_table_names()) == []


class TestOwnership:
    def test_a_manager_open_in_another_event_loop_is_refused_without_hanging(
        self, tmp_path: Path
    ) -> None:
        manager = DatabaseSessionManager()
        manager.init(f"sqlite:///{tmp_path / 'a.db'}")
        with asyncio.Runner() as first, asyncio.Runner() as second:
            first.run(use_session(manager))
            for use in (*USES, DatabaseSessionManager.close, DatabaseSessionManager.open):
                with pytest.raises(OwnershipError, match="another event loop"):
                    second.run(use(manager))
            first.run(manager.close())
            with pytest.raises(NotInitializedError):
                second.run(manager.close())

    def test_another_event_loop_can_open_a_closed_manager(self, tmp_path: Path) -> None:
        manager = DatabaseSessionManager(f"sqlite:///{tmp_path / 'a.db'}")

        async def once() -> None:
            async with manager:
                await asyncio.gather(use_session(manager), manager.open(), manager.open())

        asyncio.run(once())
        asyncio.run(once())

    def test_another_event_loop_can_open_a_manager_after_a_failed_open(
        self, tmp_path: Path
    ) -> None:
        manager = DatabaseSessionManager()
        with asyncio.Runner() as first, asyncio.Runner() as second:
            with pytest.raises(NotInitializedError):
                first.run(manager.open())
            (tmp_path / "a.db").mkdir()
            manager.init(f"sqlite:///{tmp_path / 'a.db'}")
            with pytest.raises(ConnectionFailedError):
                first.run(manager.open())
            (tmp_path / "a.db").rmdir()
            second.run(manager.open())
            second.run(use_session(manager))
            second.run(manager.close())

    async def test_a_coroutine_that_continues_in_a_forked_process_is_refused(
        self, manager: DatabaseSessionManager
    ) -> None:
        receiver, sender = multiprocessing.Pipe()
        pid = os.fork()
        if pid == 0:
            try:
                async with manager.session():
                    sender.send("no error")
            except BaseException as error:
                sender.send(f"{type(error).__name__}: {error}")
            os._exit(0)
        os.waitpid(pid, 0)
        assert "OwnershipError" in receiver.recv()
