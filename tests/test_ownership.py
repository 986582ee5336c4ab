"""Event loops, threads and processes: who may use a manager, and who takes it over.

The tests of closed event loops run programs, because their warnings belong to the
answer.
"""

from __future__ import annotations

import asyncio
import contextvars
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from textwrap import dedent

import pytest
from sqlalchemy import select, text

from sessionwire import (
    CurrentSession,
    DatabaseSessionManager,
    NoSessionError,
    OwnershipError,
    Propagation,
)
from sessionwire._core.session_block import SessionBlock

from .conftest import DATABASE, Postgres, notes
from .models import Note
from .postgres import OnPostgres, until
from .test_manager import long_statement

CHECKOUT = Path(__file__).parents[1]
BEGIN = """
import asyncio, gc, os, signal, sys, time
from sqlalchemy import select, text
from sessionwire import *
from tests.models import Note

manager = DatabaseSessionManager(sys.argv[1])
kept = []


async def tables():
    async with manager.connect() as connection:
        await manager.create_all(connection)


async def write(note):
    async with manager.transaction() as session:
        session.add(Note(text=note))


async def texts():
    async with manager.session() as session:
        return list(await session.scalars(select(Note.text).order_by(Note.text)))


async def outcome(work):
    try:
        return await work
    except Exception as error:
        return type(error).__name__


def in_child(function):
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        try:
            function()
        finally:
            sys.stdout.flush()
            os._exit(0)
    os.waitpid(pid, 0)


"""


def run(program: str, database_url: str) -> list[str]:
    """Return the printed lines. The only warning may be that of fork() with threads."""
    code = BEGIN + dedent(program)
    warnings = ["-W", "always", "-W", "ignore:This process:DeprecationWarning"]
    command = [sys.executable, *warnings, "-c", code, database_url]
    environment = {**os.environ, "PYTHONPATH": f"{CHECKOUT / 'src'}{os.pathsep}{CHECKOUT}"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stderr == ""
    assert done.returncode == 0
    return done.stdout.splitlines()


@pytest.mark.long
class TestAfterItsLoop:
    """One manager of a module, and an event loop for each job."""

    def test_a_manager_can_be_used_in_the_next_event_loop(self, database_url: str) -> None:
        program = """
        manager.init(sys.argv[1])
        asyncio.run(tables())
        for note in "abc":
            asyncio.run(write(note))
            gc.collect()
        print(asyncio.run(texts()), manager.is_open)
        asyncio.run(manager.open())
        print(manager.is_open)
        asyncio.run(manager.close())
        gc.collect()
        """
        assert run(program, database_url) == ["['a', 'b', 'c'] False", "True"]

    def test_a_manager_can_be_closed_opened_and_initialized_in_the_next_loop(
        self, database_url: str
    ) -> None:
        program = """
        async def job():
            manager.init(sys.argv[1])
            await tables()

        for _ in range(3):
            asyncio.run(job())
            gc.collect()
        asyncio.run(manager.close())
        print(manager.is_initialized)
        asyncio.run(manager.open())
        asyncio.run(write("a"))
        asyncio.run(manager.close())
        gc.collect()
        """
        assert run(program, database_url) == ["False"]

    def test_blocks_and_connections_left_by_the_former_loop_are_dropped(
        self, database_url: str
    ) -> None:
        program = """
        async def leave():
            for block in (manager.session(), manager.transaction(read_only=True)):
                session = await block.__aenter__()
                await session.execute(select(1))
                kept.append(block)

        async def leave_written():
            block = manager.transaction()
            session = await block.__aenter__()
            session.add(Note(text="lost"))
            await session.flush()
            kept.append((block, session))

        async def leave_connected():
            block = manager.connect()
            connection = await block.__aenter__()
            await connection.execute(text("SELECT 1"))
            kept.append(block)

        asyncio.run(tables())
        for job in (leave, leave_written, leave_connected):
            asyncio.run(job())
            gc.collect()
            asyncio.run(write(job.__name__))
            kept.clear()
            gc.collect()
        print(asyncio.run(texts()))
        asyncio.run(manager.close())
        gc.collect()
        """
        program = program.replace(
            "async def leave()", "manager.init(sys.argv[1])\n\n        async def leave()", 1
        )
        assert run(program, database_url) == ["['leave', 'leave_connected', 'leave_written']"]

    def test_a_connection_with_writes_left_by_the_former_loop_is_reported(
        self, database_url: str
    ) -> None:
        program = """
        manager.init(sys.argv[1])

        async def leave_connected():
            asyncio.get_running_loop().set_exception_handler(
                lambda _, context: print(context["exception"])
            )
            block = manager.connect()
            connection = await block.__aenter__()
            await connection.execute(text("INSERT INTO note (text) VALUES ('lost')"))
            kept.append(block)

        asyncio.run(tables())
        asyncio.run(leave_connected())
        kept.clear()
        print(asyncio.run(texts()))
        asyncio.run(manager.close())
        gc.collect()
        """
        reported, kept = run(program, database_url)
        assert "rolled back" in reported
        assert kept == "[]"

    def test_a_block_running_when_its_loop_closed_is_dropped(self, database_url: str) -> None:
        program = """
        manager.init(sys.argv[1])
        asyncio.run(tables())

        async def work():
            async with manager.transaction() as session:
                session.add(Note(text="lost"))
                await session.flush()
                await asyncio.Event().wait()

        async def begin():
            task = asyncio.create_task(work())
            task._log_destroy_pending = False  # it would tell of itself
            kept.append(task)
            await asyncio.sleep(0.2)

        loop = asyncio.new_event_loop()
        loop.run_until_complete(begin())
        loop.close()
        asyncio.run(write("kept"))
        kept.clear()
        gc.collect()
        print(asyncio.run(texts()))
        asyncio.run(manager.close())
        gc.collect()
        """
        assert run(program, database_url) == ["['kept']"]

    @pytest.mark.parametrize("how", ["cancelled", "dropped"])
    def test_a_statement_running_when_its_loop_closed_does_not_block_the_next_loop(
        self, how: str, backend: str, database_url: str
    ) -> None:
        # a server doesn't look for its client before the end of a statement
        statement = "SELECT pg_sleep(1)" if backend == "postgresql" else long_statement(backend)
        program = f"""
        manager.init(sys.argv[1])
        asyncio.run(tables())

        async def work():
            async with manager.transaction() as session:
                session.add(Note(text="lost"))
                await session.flush()
                await session.execute(text({statement!r}))

        async def begin():
            task = asyncio.create_task(work())
            task._log_destroy_pending = False
            kept.append(task)
            await asyncio.sleep(0.3)

        if {how == "cancelled"}:
            asyncio.run(begin())
        else:
            loop = asyncio.new_event_loop()
            loop.run_until_complete(begin())
            loop.close()
        asyncio.run(write("kept"))
        kept.clear()
        gc.collect()
        print(asyncio.run(texts()))
        asyncio.run(manager.close())
        gc.collect()
        """
        assert run(program, database_url) == ["['kept']"]

    def test_a_temporary_database_survives_its_event_loop(self) -> None:
        program = """
        manager.init(sys.argv[1])
        asyncio.run(tables())
        asyncio.run(write("a"))
        print(asyncio.run(texts()))
        asyncio.run(manager.close())
        """
        assert run(program, "sqlite://") == ["['a']"]

    def test_a_block_left_by_the_former_loop_is_not_found_in_the_next(self, tmp_path: Path) -> None:
        manager = DatabaseSessionManager(f"sqlite:///{tmp_path / 'a.db'}")
        manager.init(manager.settings)

        async def leave() -> contextvars.Context:
            await manager.transaction().__aenter__()
            return contextvars.copy_context()

        async def use() -> None:
            with pytest.raises(NoSessionError):
                await CurrentSession(manager).execute(select(1))
            async with manager.transaction() as session:
                await session.execute(select(1))

        context = asyncio.run(leave())
        for _ in range(2):
            context.run(asyncio.run, use())
        asyncio.run(manager.close())

    def test_listeners_on_the_engine_survive_its_event_loop(self, database_url: str) -> None:
        program = """
        from sqlalchemy import event
        manager.init(sys.argv[1])
        event.listen(manager.engine.sync_engine, "connect", lambda *_: print("connected"))
        engine = manager.engine
        asyncio.run(tables())
        asyncio.run(write("a"))
        print(engine is manager.engine)
        asyncio.run(manager.close())
        """
        assert run(program, database_url) == ["connected", "connected", "True"]


class TestOnPostgres(OnPostgres):
    @pytest.mark.several_connections("each of the two blocks has its own")
    async def test_the_server_learns_that_connections_of_a_former_loop_are_closed(
        self, postgres: Postgres, database_url: str
    ) -> None:
        sessions = "SELECT 1 FROM pg_stat_activity WHERE datname = $1"

        session, connected = None, None

        def job(manager: DatabaseSessionManager) -> None:
            async def leave() -> None:
                # A block that nothing refers to would end at once.
                nonlocal session, connected
                session, connected = manager.session(), manager.connect()
                await (await session.__aenter__()).execute(select(1))
                await (await connected.__aenter__()).execute(select(1))

            asyncio.run(leave())

        manager = DatabaseSessionManager(database_url)
        manager.init(database_url)
        await asyncio.to_thread(job, manager)
        assert len(await postgres.execute(sessions, DATABASE)) == 2
        await manager.close()

        async def all_are_gone() -> bool:
            return not await postgres.execute(sessions, DATABASE)

        await until(all_are_gone)


class TestInAThread:
    """Threads of `asyncio.to_thread()` inherit a block, but cannot use its session."""

    @pytest.fixture(
        params=[
            *(Propagation),
            "session",
            "connect",
            "the session",
            "a current session",
            "a refresh",
            "close",
        ],
        ids=lambda param: getattr(param, "name", param),
    )
    def use(
        self, request: pytest.FixtureRequest, manager: DatabaseSessionManager
    ) -> Callable[..., Awaitable[object]]:
        kind = request.param

        async def use(session: object, note: Note) -> object:
            if isinstance(kind, Propagation):
                async with manager.transaction(kind) as joined:
                    return await joined.execute(select(1))
            if kind == "session":
                async with manager.session() as own:
                    return await own.execute(select(1))
            if kind == "connect":
                async with manager.connect() as connection:
                    return await connection.execute(select(1))
            if kind == "close":
                return await manager.close()
            if kind == "a refresh":
                return await CurrentSession(manager).refresh(note)
            current = session if kind == "the session" else CurrentSession(manager)
            return await current.execute(select(1))  # type: ignore[attr-defined]

        return use

    async def test_a_thread_that_uses_a_block_is_refused_and_the_block_goes_on(
        self, manager: DatabaseSessionManager, use: Callable[..., Awaitable[object]]
    ) -> None:
        async with manager.transaction() as session:
            note = Note(text="before")
            session.add(note)
            await session.flush()

            async def work() -> None:
                await use(session, note)

            with pytest.raises(OwnershipError, match="another event loop"):
                await asyncio.to_thread(asyncio.run, work())
            session.add(Note(text="after"))
        assert await notes(manager) == ["after", "before"]

    async def test_a_thread_that_uses_autocommit_or_a_session_is_refused(
        self, manager: DatabaseSessionManager
    ) -> None:
        async def work() -> None:
            async with manager.transaction():
                raise AssertionError

        for block in (manager.session(), manager.transaction(Propagation.SUPPORTS, read_only=True)):
            async with block as session:
                await session.execute(select(1))
                with pytest.raises(OwnershipError):
                    await asyncio.to_thread(asyncio.run, work())
                await session.execute(select(1))

    async def test_a_thread_can_use_its_own_manager(self, manager: DatabaseSessionManager) -> None:
        other = DatabaseSessionManager(manager.settings)

        async def work() -> list[str]:
            async with other, other.transaction(read_only=True) as session:
                return list(await session.scalars(select(Note.text)))

        async with manager.transaction() as session:
            await session.execute(select(1))
            assert await asyncio.to_thread(asyncio.run, work()) == []

    async def test_a_thread_can_send_work_to_the_loop_of_the_block(
        self, manager: DatabaseSessionManager
    ) -> None:
        session, loop = CurrentSession(manager), asyncio.get_running_loop()

        async def work() -> int:
            return (await session.scalars(text("SELECT 1"))).one()

        async with manager.transaction():
            done = await asyncio.to_thread(
                lambda: asyncio.run_coroutine_threadsafe(work(), loop).result()
            )
            assert done == 1

    async def test_a_block_cannot_end_in_another_event_loop(
        self, manager: DatabaseSessionManager
    ) -> None:
        for block in (manager.session(), manager.transaction()):
            session = await block.__aenter__()
            session.add(Note(text=str(block)))

            async def end(block: AbstractAsyncContextManager[object] = block) -> None:
                await block.__aexit__(None, None, None)

            with pytest.raises(OwnershipError):
                await asyncio.to_thread(asyncio.run, end())
            await session.flush()
            await session.rollback() if isinstance(block, SessionBlock) else None
            await block.__aexit__(None, None, None)
        assert len(await notes(manager)) == 1


@pytest.mark.long
class TestInAForkedProcess:
    """The parent keeps what it has open: the child begins anew, and sends nothing."""

    def test_a_manager_works_in_a_forked_child_and_in_its_parent(self, database_url: str) -> None:
        program = """
        manager.init(sys.argv[1])
        asyncio.run(tables())

        def child():
            asyncio.run(write("child"))
            asyncio.run(manager.close())
            asyncio.run(manager.open())
            asyncio.run(write("again"))
            asyncio.run(manager.close())
            gc.collect()

        async def parent():
            await write("before")
            in_child(child)
            await write("after")
            print(await texts())
            await manager.close()

        asyncio.run(parent())
        gc.collect()
        """
        assert run(program, database_url) == ["['after', 'again', 'before', 'child']"]

    def test_a_manager_whose_loop_was_closed_works_in_a_forked_child(
        self, database_url: str
    ) -> None:
        program = """
        manager.init(sys.argv[1])
        asyncio.run(tables())
        for note in "ab":
            in_child(lambda: (asyncio.run(write(note)), asyncio.run(manager.close()), gc.collect()))
        print(asyncio.run(texts()))
        asyncio.run(manager.close())
        gc.collect()
        """
        assert run(program, database_url) == ["['a', 'b']"]

    def test_a_forked_child_does_not_find_the_blocks_of_its_parent(self, database_url: str) -> None:
        program = """
        manager.init(sys.argv[1])
        asyncio.run(tables())

        async def child():
            print(await outcome(CurrentSession(manager).execute(select(1))))
            async with manager.transaction(read_only=True) as session:
                print(list(await session.scalars(select(Note.text))))
            await manager.close()

        async def parent():
            async with manager.transaction() as session, manager.session() as other:
                session.add(Note(text="parent"))
                await session.flush()
                await other.execute(select(1))
                in_child(lambda: (asyncio.run(child()), gc.collect()))
                await session.execute(select(1))
            print(await texts())
            await manager.close()

        asyncio.run(parent())
        gc.collect()
        """
        assert run(program, database_url) == ["NoSessionError", "[]", "['parent']"]

    def test_a_forked_child_that_leaves_its_parents_block_rolls_nothing_back(
        self, database_url: str
    ) -> None:
        program = """
        manager.init(sys.argv[1])
        asyncio.run(tables())

        async def parent(kind):
            async with getattr(manager, kind)() as opened:
                await opened.execute(text(f"INSERT INTO note (text) VALUES ('{kind}')"))
                pid = os.fork()
                if pid == 0:
                    if kind != "connect":
                        print(await outcome(opened.execute(select(1))))
                    print(await outcome(write("child")))
                    raise OSError
                os.waitpid(pid, 0)
                if kind == "session":
                    await opened.commit()

        async def leave(kind):
            try:
                await parent(kind)
            except OSError:
                sys.stdout.flush()
                os._exit(0)  # the parent's event loop is not the child's to end

        for kind in ("transaction", "session", "connect"):
            asyncio.run(leave(kind))
        print(asyncio.run(texts()))
        asyncio.run(manager.close())
        """
        assert run(program, database_url) == ["OwnershipError"] * 5 + [
            "['connect', 'session', 'transaction']"
        ]
