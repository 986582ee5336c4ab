"""Blocks open in an async generator, which the code finds that iterates over it."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager, suppress
from typing import Any

import pytest
from sqlalchemy import func, insert, select, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from sessionwire import (
    CurrentSession,
    DatabaseSessionManager,
    IncompatibleTransactionError,
    Propagation,
    TransactionTimeoutError,
    UncommittedChangesWarning,
    UnexpectedRollbackError,
    read_only,
    transactional,
)
from sessionwire._database.runtime import database_of

from .conftest import assert_all_returned, checked_out, notes
from .models import Note
from .postgres import OnPostgres, until

Rows = AsyncGenerator[int, None]


class Notes:
    def __init__(self, manager: DatabaseSessionManager) -> None:
        self.manager, self.transaction, self.session = (
            manager,
            manager.transaction,
            CurrentSession(manager),
        )

    async def numbers(
        self, propagation: Propagation = Propagation.REQUIRED, **options: Any
    ) -> Rows:
        async with self.transaction(propagation, **options):
            for number in (1, 2, 3):
                yield int(await self.session.scalar(select(number)) or 0)

    async def in_session(
        self, work: Callable[[AsyncSession], Awaitable[object]] | None = None
    ) -> Rows:
        async with self.manager.session() as session:
            for number in (1, 2, 3):
                if work is not None:
                    await work(session)
                yield int(await session.scalar(select(number)) or 0)

    async def in_connection(self, sql: str = "SELECT 1") -> Rows:
        async with self.manager.connect() as connection:
            await connection.execute(text(sql))
            yield 1
            yield 2

    @transactional
    async def add(self, line: str) -> None:
        await self.session.execute(insert(Note).values(text=line))

    @transactional
    async def add_then_fail(self, line: str) -> None:
        await self.session.execute(insert(Note).values(text=line))
        raise ZeroDivisionError

    @read_only
    async def count(self) -> int:
        return int(await self.session.scalar(select(func.count(Note.id))) or 0)


@pytest.fixture
def service(manager: DatabaseSessionManager) -> Notes:
    return Notes(manager)


async def first_of(rows: Rows, work: Callable[[], Awaitable[object]] | None = None) -> None:
    """Do the work with the first item, and leave the rest."""
    async with aclosing(rows):
        async for _ in rows:
            if work is not None:
                await work()
            break


def insert_note(session: AsyncSession) -> Awaitable[object]:
    return session.execute(insert(Note).values(text="lost"))


async def add_note(session: AsyncSession) -> None:
    session.add(Note(text="lost"))


class TestLeftEarly:
    """No block whose generator is left ends quietly with something lost."""

    async def test_leaving_a_generator_early_reports_lost_work_of_a_joined_block(
        self, manager: DatabaseSessionManager, service: Notes
    ) -> None:
        with pytest.raises(
            UnexpectedRollbackError, match=r"left before its end.* let the generator only read"
        ):
            await first_of(service.numbers(), lambda: service.add("lost"))
        assert await notes(manager) == []
        assert checked_out(manager) == 0

    @pytest.mark.parametrize("write", [insert_note, add_note])
    async def test_leaving_a_generator_early_reports_lost_writes_of_the_loop(
        self,
        manager: DatabaseSessionManager,
        service: Notes,
        write: Callable[[AsyncSession], Awaitable[object]],
    ) -> None:
        with pytest.raises(UnexpectedRollbackError):
            await first_of(service.numbers(), lambda: write(service.session))
        assert await notes(manager) == []

    @pytest.mark.parametrize("write", [insert_note, add_note])
    async def test_leaving_a_generator_early_reports_lost_writes_of_the_generator(
        self, manager: DatabaseSessionManager, write: Callable[[AsyncSession], Awaitable[object]]
    ) -> None:
        async def rows() -> Rows:
            async with manager.transaction() as session:
                await write(session)
                yield 1

        with pytest.raises(UnexpectedRollbackError):
            await first_of(rows())
        assert await notes(manager) == []

    @pytest.mark.parametrize("write", [insert_note, add_note])
    async def test_leaving_a_generator_early_reports_uncommitted_work_of_a_session(
        self,
        manager: DatabaseSessionManager,
        service: Notes,
        write: Callable[[AsyncSession], Awaitable[object]],
    ) -> None:
        with pytest.raises(UnexpectedRollbackError):
            await first_of(service.in_session(write))
        assert await notes(manager) == []

    async def test_leaving_a_generator_early_reports_lost_work_of_a_connection(
        self, manager: DatabaseSessionManager, service: Notes
    ) -> None:
        with pytest.raises(UnexpectedRollbackError):
            await first_of(service.in_connection("INSERT INTO note (text) VALUES ('lost')"))
        assert await notes(manager) == []
        assert checked_out(manager) == 0

    async def test_leaving_a_generator_early_reports_pending_objects_in_autocommit(
        self, manager: DatabaseSessionManager, service: Notes
    ) -> None:
        with pytest.raises(UnexpectedRollbackError):
            await first_of(service.numbers(Propagation.SUPPORTS), lambda: add_note(service.session))
        assert await notes(manager) == []

    async def test_a_savepoint_of_a_generator_left_early_rolls_back_alone(
        self, manager: DatabaseSessionManager, service: Notes
    ) -> None:
        async with manager.transaction():
            await service.add("kept")
            with pytest.raises(UnexpectedRollbackError):
                await first_of(service.numbers(Propagation.NESTED), lambda: service.add("lost"))
        assert await notes(manager) == ["kept"]

    async def test_leaving_a_generator_early_rolls_back_a_savepoint_that_was_kept_inside(
        self, manager: DatabaseSessionManager, service: Notes
    ) -> None:
        async def nested() -> None:
            async with manager.transaction(Propagation.NESTED):
                await insert_note(service.session)

        with pytest.raises(UnexpectedRollbackError):
            await first_of(service.numbers(), nested)
        assert await notes(manager) == []

    async def test_a_generator_left_early_that_joined_and_wrote_rolls_the_outer_block_back(
        self, manager: DatabaseSessionManager, service: Notes
    ) -> None:
        with pytest.raises(UnexpectedRollbackError) as raised:
            async with manager.transaction():
                with suppress(UnexpectedRollbackError):
                    await first_of(service.numbers(), lambda: service.add("lost"))
        assert isinstance(raised.value.__cause__, UnexpectedRollbackError)
        assert await notes(manager) == []

    async def test_leaving_a_generator_early_reports_an_earlier_failure_as_the_cause(
        self, manager: DatabaseSessionManager, service: Notes
    ) -> None:
        async def swallow() -> None:
            with suppress(ZeroDivisionError):
                await service.add_then_fail("lost")

        with pytest.raises(UnexpectedRollbackError) as raised:
            await first_of(service.numbers(), swallow)
        assert isinstance(raised.value.__cause__, ZeroDivisionError)

    async def test_leaving_a_generator_early_runs_the_on_rollback_hooks(
        self, service: Notes
    ) -> None:
        ran: list[str] = []

        async def work() -> None:
            service.transaction.on_commit(lambda: ran.append("commit"))
            service.transaction.on_rollback(lambda: ran.append("rollback"))
            await service.add("lost")

        with pytest.raises(UnexpectedRollbackError):
            await first_of(service.numbers(), work)
        assert ran == ["rollback"]

    async def test_leaving_a_generator_early_reports_lost_work_inside_a_context_manager(
        self, manager: DatabaseSessionManager, service: Notes
    ) -> None:
        @asynccontextmanager
        async def unit() -> AsyncIterator[None]:
            async with manager.transaction():
                yield

        async def rows() -> Rows:
            async with unit():
                yield 1

        with pytest.raises(UnexpectedRollbackError):
            await first_of(rows(), lambda: service.add("lost"))
        assert await notes(manager) == []

    @pytest.mark.parametrize("kind", ["transaction", "session", "connect"])
    async def test_a_dropped_generator_reports_lost_work_to_the_event_loop(
        self, manager: DatabaseSessionManager, service: Notes, kind: str
    ) -> None:
        told: list[BaseException] = []
        asyncio.get_running_loop().set_exception_handler(
            lambda _, context: told.append(context["exception"])
        )
        try:
            if kind == "transaction":
                async for _ in service.numbers():
                    await service.add("lost")
                    break
            elif kind == "session":
                async for _ in service.in_session(insert_note):
                    break
            else:
                async for _ in service.in_connection("INSERT INTO note (text) VALUES ('lost')"):
                    break

            async def is_told() -> bool:
                gc.collect()
                return bool(told)

            await until(is_told)
        finally:
            asyncio.get_running_loop().set_exception_handler(None)
        assert [type(error) for error in told] == [UnexpectedRollbackError]
        assert await notes(manager) == []
        assert checked_out(manager) == 0


class TestLeftEarlyWithNothingLost:
    @pytest.mark.several_connections("the generator has its own")
    @pytest.mark.parametrize(
        "rows",
        [
            lambda service: service.numbers(),
            lambda service: service.numbers(read_only=True),
            lambda service: service.numbers(Propagation.SUPPORTS, read_only=True),
            lambda service: service.numbers(Propagation.SUPPORTS),
            lambda service: service.in_session(),
            lambda service: service.in_session(AsyncSession.commit),
            lambda service: service.in_connection(),
        ],
    )
    async def test_a_generator_left_early_that_only_read_ends_silently(
        self, manager: DatabaseSessionManager, service: Notes, rows: Callable[[Notes], Rows]
    ) -> None:
        await first_of(rows(service), service.count)
        assert checked_out(manager) == 0

    async def test_a_generator_left_early_keeps_what_its_session_committed(
        self, manager: DatabaseSessionManager, service: Notes
    ) -> None:
        async def work(session: AsyncSession) -> None:
            session.add(Note(text="kept"))
            await session.commit()

        await first_of(service.in_session(work))
        assert await notes(manager) == ["kept"]

    async def test_a_generator_left_early_keeps_what_autocommit_wrote(
        self, manager: DatabaseSessionManager, service: Notes
    ) -> None:
        kept = insert(Note).values(text="kept")
        await first_of(service.numbers(Propagation.SUPPORTS), lambda: service.session.execute(kept))
        assert await notes(manager) == ["kept"]

    @pytest.mark.parametrize(
        "propagation", [Propagation.REQUIRED, Propagation.NESTED, Propagation.SUPPORTS]
    )
    async def test_a_generator_left_early_that_read_leaves_the_outer_transaction_alone(
        self, manager: DatabaseSessionManager, service: Notes, propagation: Propagation
    ) -> None:
        async with manager.transaction():
            await service.add("before")
            await first_of(service.numbers(propagation))
            await service.add("behind")
        assert await notes(manager) == ["before", "behind"]

    async def test_a_generator_left_early_does_not_report_a_savepoint_rolled_back_before(
        self, manager: DatabaseSessionManager, service: Notes
    ) -> None:
        await service.add("there")

        async def nested() -> None:
            with suppress(IntegrityError):
                async with manager.transaction(Propagation.NESTED):
                    await insert_note(service.session)
                    await service.session.execute(insert(Note).values(text="there"))

        await first_of(service.numbers(), nested)
        assert await notes(manager) == ["there"]

    async def test_a_generator_that_runs_to_its_end_commits(
        self, manager: DatabaseSessionManager, service: Notes
    ) -> None:
        async for number in service.numbers():
            await service.add(str(number))
        assert await notes(manager) == ["1", "2", "3"]


class TestLeftByAnError:
    """An error or a cancellation is not replaced: it reports that work is lost."""

    async def test_a_generator_exit_raised_by_hand_is_an_ordinary_error(
        self, manager: DatabaseSessionManager, service: Notes
    ) -> None:
        with pytest.raises(GeneratorExit):
            async with manager.transaction():
                await service.add("lost")
                raise GeneratorExit
        assert await notes(manager) == []

    @pytest.mark.parametrize("kind", ["transaction", "session", "connect"])
    async def test_an_error_in_the_loop_over_a_generator_goes_on_with_a_note(
        self, manager: DatabaseSessionManager, service: Notes, kind: str
    ) -> None:
        rows = {
            "transaction": service.numbers,
            "session": lambda: service.in_session(insert_note),
            "connect": lambda: service.in_connection("INSERT INTO note (text) VALUES ('lost')"),
        }[kind]()

        async def fail() -> None:
            if kind == "transaction":
                await service.add("lost")
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError) as raised:
            await first_of(rows, fail)
        assert "left before its end" in raised.value.__notes__[0]
        assert await notes(manager) == []

    async def test_an_error_in_the_loop_goes_on_through_an_outer_generator(
        self, manager: DatabaseSessionManager, service: Notes
    ) -> None:
        async def doubled() -> Rows:
            async with aclosing(service.numbers()) as rows:
                async for number in rows:
                    yield 2 * number

        with pytest.raises(ZeroDivisionError):
            await first_of(doubled(), lambda: service.add_then_fail("lost"))
        with pytest.raises(UnexpectedRollbackError):
            await first_of(doubled(), lambda: service.add("lost"))
        assert await notes(manager) == []

    async def test_a_cancellation_of_the_loop_goes_on_however_the_generator_is_closed(
        self, manager: DatabaseSessionManager, service: Notes
    ) -> None:
        async def work() -> None:
            rows = service.numbers()
            try:
                async for _ in rows:
                    await service.add("lost")
                    written.set()
                    await asyncio.sleep(60)
            finally:
                await rows.aclose()

        written = asyncio.Event()
        task = asyncio.create_task(work())
        await written.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await notes(manager) == []

    async def test_a_deadline_around_the_loop_goes_on_however_the_generator_is_closed(
        self, manager: DatabaseSessionManager, service: Notes
    ) -> None:
        async def wait() -> None:
            await service.add("lost")
            await asyncio.sleep(60)

        with pytest.raises(TransactionTimeoutError):
            async with manager.transaction(timeout=0.1):
                await first_of(service.numbers(), wait)
        assert await notes(manager) == []


class TestWritesInsideATransaction:
    """The session of a generator is not the transaction around the loop."""

    @staticmethod
    async def join(service: Notes, propagation: Propagation) -> None:
        async with service.transaction(propagation):
            pass

    WRITES: tuple[Callable[[Notes], Awaitable[object]], ...] = (
        lambda service: service.add("lost"),
        lambda service: service.session.execute(insert(Note).values(text="lost")),
        lambda service: service.session.execute(text("INSERT INTO note (text) VALUES ('lost')")),
        lambda service: service.session.scalars(
            insert(Note).values(text="lost").returning(Note.id)
        ),
        lambda service: add_note(service.session),
        lambda service: asyncio.sleep(0, service.session.add_all([Note(text="lost")])),
        lambda service: service.session.merge(Note(id=1, text="lost")),
        lambda service: service.session.delete(Note(id=1, text="lost")),
        lambda service: service.session.run_sync(
            lambda session: session.execute(insert(Note).values(text="lost"))
        ),
        lambda service: TestWritesInsideATransaction.join(service, Propagation.NESTED),
        lambda service: TestWritesInsideATransaction.join(service, Propagation.SUPPORTS),
        lambda service: asyncio.create_task(service.add("lost")),  # type: ignore[arg-type]
    )

    @pytest.mark.parametrize("write", WRITES)
    async def test_a_write_in_a_generators_session_inside_a_transaction_is_refused(
        self,
        manager: DatabaseSessionManager,
        service: Notes,
        write: Callable[[Notes], Awaitable[object]],
    ) -> None:
        async with manager.transaction() as session:
            async for _ in service.in_session():
                with pytest.raises(
                    IncompatibleTransactionError, match="not to the transaction around the loop"
                ):
                    await write(service)
            # The refused write did nothing to the transaction.
            session.add(Note(text="kept"))
        assert await notes(manager) == ["kept"]

    @pytest.mark.several_connections("each of the generators has its own")
    async def test_a_write_is_refused_in_a_comprehension_and_through_other_generators(
        self, manager: DatabaseSessionManager, service: Notes
    ) -> None:
        async def doubled() -> Rows:
            async for number in service.in_session():
                yield 2 * number

        async with manager.transaction():
            with pytest.raises(IncompatibleTransactionError):
                _ = [await service.add(str(number)) async for number in service.in_session()]
            with pytest.raises(IncompatibleTransactionError):
                async for number in doubled():
                    await service.add(str(number))
            with pytest.raises(IncompatibleTransactionError):
                async for number in (number async for number in service.in_session()):
                    await service.add(str(number))
        assert await notes(manager) == []
        gc.collect()  # the errors refer to the generators that they left
        await assert_all_returned(manager)

    async def test_a_loop_can_read_in_a_generators_session_and_write_elsewhere(
        self, manager: DatabaseSessionManager, service: Notes
    ) -> None:
        async with manager.transaction() as session:
            async for number in service.in_session():
                assert await service.session.scalar(select(number)) == number
                assert await service.count() == 0
                assert service.session.in_transaction()
                session.add(Note(text=str(number)))
            await service.add("behind")
        assert await notes(manager) == ["1", "2", "3", "behind"]

    async def test_a_generator_that_joins_shares_the_transaction_of_the_loop(
        self, manager: DatabaseSessionManager, service: Notes
    ) -> None:
        async with manager.transaction():
            async for number in service.numbers():
                await service.add(str(number))
        assert await notes(manager) == ["1", "2", "3"]

    async def test_a_loop_without_a_transaction_can_write_in_a_generators_session(
        self, manager: DatabaseSessionManager, service: Notes
    ) -> None:
        async with manager.session():
            async for number in service.in_session():
                await service.add(str(number))
        assert await notes(manager) == ["1", "2", "3"]

    async def test_a_loop_can_write_in_a_session_that_the_generator_yields(
        self, manager: DatabaseSessionManager
    ) -> None:
        async def sessions() -> AsyncGenerator[AsyncSession, None]:
            async with manager.session() as session:
                yield session

        async with manager.transaction():
            async for session in sessions():
                session.add(Note(text="kept"))
                await session.commit()
        assert await notes(manager) == ["kept"]

    async def test_code_that_opens_a_session_inside_a_transaction_can_write_in_it(
        self, manager: DatabaseSessionManager, service: Notes
    ) -> None:
        async with manager.transaction(), manager.session() as session:
            await service.session.execute(insert(Note).values(text="first"))
            await session.commit()
            await service.add("second")
        assert await notes(manager) == ["first", "second"]

    async def test_a_generator_can_write_in_the_session_that_it_opened(
        self, manager: DatabaseSessionManager, service: Notes
    ) -> None:
        async def rows() -> Rows:
            async with manager.session() as session:
                await service.session.execute(insert(Note).values(text="itself"))
                yield 1
                await asyncio.create_task(service.add("in a task"))  # type: ignore[arg-type]
                await session.commit()
                yield 2

        async with manager.transaction():
            assert [number async for number in rows()] == [1, 2]
        assert await notes(manager) == ["in a task", "itself"]

    async def test_code_inside_a_context_manager_or_a_fixture_can_write_in_its_session(
        self, manager: DatabaseSessionManager, service: Notes
    ) -> None:
        async def unit() -> AsyncIterator[AsyncSession]:
            async with manager.session() as session:
                yield session
                await session.commit()

        async def set_up(fixture: AsyncIterator[AsyncSession]) -> None:
            await anext(fixture)

        async with manager.transaction():
            async with asynccontextmanager(unit)():
                await service.session.execute(insert(Note).values(text="context manager"))
            fixture = unit()
            await set_up(fixture)
            await service.session.execute(insert(Note).values(text="fixture"))
            await anext(fixture, None)
        assert await notes(manager) == ["context manager", "fixture"]

    async def test_a_function_called_by_a_generator_can_open_its_own_session(
        self, manager: DatabaseSessionManager, service: Notes
    ) -> None:
        async def beside() -> None:
            async with manager.session() as session:
                await service.session.execute(insert(Note).values(text="beside"))
                await session.commit()

        async def rows() -> Rows:
            await beside()
            yield 1

        async with manager.transaction():
            async for _ in rows():
                pass
        assert await notes(manager) == ["beside"]

    async def test_the_check_of_writes_keeps_no_generator_alive(
        self, manager: DatabaseSessionManager, service: Notes
    ) -> None:
        async with manager.transaction():
            async for _ in service.in_session():
                (scope,) = [
                    scope
                    for scope in database_of(manager).open_units
                    if getattr(scope, "generator", None)
                ]
                break
            gc.collect()
            async with asyncio.timeout(5):
                while scope in database_of(manager).open_units:
                    await asyncio.sleep(0.01)
        assert getattr(scope, "generator", 0) is None

    async def test_changes_to_objects_of_a_generators_session_cause_a_warning(
        self, manager: DatabaseSessionManager, service: Notes
    ) -> None:
        async def change() -> None:
            async with manager.transaction():
                async for _ in service.in_session():
                    note = await service.session.scalar(select(Note))
                    assert note is not None
                    note.text = "changed"

        await service.add("as it was")
        with pytest.warns(UncommittedChangesWarning):
            await change()
        assert await notes(manager) == ["as it was"]


class TestWritesInsideATransactionOnPostgres(OnPostgres):
    @pytest.mark.several_connections("REQUIRES_NEW takes another")
    @pytest.mark.parametrize("propagation", [Propagation.REQUIRES_NEW, Propagation.NOT_SUPPORTED])
    async def test_a_write_is_refused_in_every_kind_of_separate_session(
        self, manager: DatabaseSessionManager, service: Notes, propagation: Propagation
    ) -> None:
        async with manager.transaction():
            async for number in service.numbers(propagation):
                with pytest.raises(IncompatibleTransactionError):
                    await service.add("lost")
                with pytest.raises(IncompatibleTransactionError):
                    await insert_note(service.session)
                async with manager.transaction(Propagation.REQUIRES_NEW):
                    await service.add(str(number))
        assert await notes(manager) == ["1", "2", "3"]
