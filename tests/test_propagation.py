"""Every propagation mode in every enclosing state, with every way out of both."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, nullcontext, suppress
from time import monotonic
from typing import Any, NamedTuple

import pytest
from sqlalchemy import delete, insert, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError, PendingRollbackError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncSession

from sessionwire import (
    ConcurrentSessionError,
    CurrentSession,
    DatabaseSessionManager,
    DatabaseSettings,
    IncompatibleTransactionError,
    PoolSettings,
    Propagation,
    UncommittedChangesWarning,
    UnexpectedRollbackError,
    read_only,
    transactional,
)
from sessionwire.testing import sandbox

from .conftest import Postgres, checked_out, notes
from .models import Note

# What a block is, by its mode and by what is around it.
MODES = """
             | nothing | transaction| savepoint| session   | autocommit| read scope  | read-only
REQUIRED     | begins  | joins      | joins    | takes over| begins    | incompatible| incompatible
REQUIRES_NEW | begins  | begins     | begins   | begins    | begins    | begins      | begins
NESTED       | begins  | savepoint  | savepoint| takes over| begins    | incompatible| incompatible
MANDATORY    | required| joins      | joins    | required  | required  | required    | incompatible
SUPPORTS     | without | joins      | joins    | shares    | without   | incompatible| incompatible
NOT_SUPPORTED| without | without    | without  | without   | without   | without     | without
NEVER        | without | forbidden  | forbidden| shares    | without   | incompatible| forbidden
"""

# The differences on SQLite, if the enclosing block has written: it allows one writer.
ON_SQLITE = """
                | transaction  | savepoint    | session
REQUIRES_NEW    | incompatible | incompatible | incompatible
NOT_SUPPORTED   | incompatible | incompatible | incompatible
"""

# The end of the block, by what happens in it. Its row is kept, is rolled back, or
# shares the fate of the enclosing rows. `unexpected` is rolled back too, and the block
# itself reports it; `dooms` is reported by the enclosing block, and rolls all of it
# back.
ENDS = """
                | all is well | it fails | a statement fails | a flush fails | set_rollback_only
begins          | kept        | undone   | unexpected        | unexpected    | undone
takes over      | kept        | undone   | unexpected        | unexpected    | undone
savepoint       | shared      | undone   | unexpected        | unexpected    | undone
joins           | shared      | dooms    | dooms             | dooms         | dooms
shares          | shared      | shared   | dooms             | dooms         | required, shared
without         | kept        | kept     | kept              | kept          | required, kept
incompatible    | refused     | refused  | refused           | refused       | refused
required        | refused     | refused  | refused           | refused       | refused
forbidden       | refused     | refused  | refused           | refused       | refused
"""

AROUND: dict[
    str, Callable[[DatabaseSessionManager], AbstractAsyncContextManager[AsyncSession | None]]
] = {
    "nothing": lambda _: nullcontext(),
    "transaction": lambda manager: manager.transaction(),
    "savepoint": lambda manager: manager.transaction(
        Propagation.NESTED
    ),  # in a transaction with a row of its own
    "session": lambda manager: manager.session(),  # committed at its end
    "autocommit": lambda manager: manager.transaction(Propagation.NOT_SUPPORTED),
    "read scope": lambda manager: manager.transaction(Propagation.SUPPORTS, read_only=True),
    "read-only": lambda manager: manager.transaction(read_only=True),
}
SEPARATE = ("begins", "without")
WRITING = ("transaction", "savepoint", "session", "autocommit")

REFUSALS = {
    "incompatible": "IncompatibleTransactionError",
    "required": "TransactionRequiredError",
    "forbidden": "TransactionForbiddenError",
}
FAILURES = {
    "it fails": "ValueError",
    "a statement fails": "IntegrityError",
    "a flush fails": "IntegrityError",
    "set_rollback_only": "TransactionError",
}


class Case(NamedTuple):
    around: str
    happens: str  # in the inner block
    caught: bool  # whether the outer block catches its error
    outer_fails: bool


class Seen(NamedTuple):
    rows: list[str]
    inner: str | None  # the error that came out of it
    outer: str | None


def table(drawn: str) -> dict[tuple[str, str], str]:
    """Return the cells, by the names of row and column."""
    head, *rows = (
        [cell.strip() for cell in line.split("|")] for line in drawn.strip("\n").splitlines()
    )
    return {
        (row[0], column): cell
        for row in rows
        for column, cell in zip(head[1:], row[1:], strict=True)
    }


CASES = [
    Case(around, happens, caught, outer_fails)
    for around in AROUND
    for happens in ("all is well", *FAILURES)
    for caught in (True, False)
    for outer_fails in (False, True)
    if caught or (happens == "it fails" and not outer_fails)
]


def kind_of(mode: Propagation, case: Case, backend: str) -> str:
    cells = table(MODES) | (table(ON_SQLITE) if backend == "sqlite" else {})
    return cells[mode.name, case.around]


def expected(mode: Propagation, case: Case, backend: str) -> Seen:
    """Return the result according to the tables."""
    kind = kind_of(mode, case, backend)
    fate = table(ENDS)[kind, case.happens]

    inner = "ValueError" if case.happens == "it fails" else None
    if fate == "refused":
        inner = REFUSALS[kind]
    elif fate == "unexpected":
        inner = f"UnexpectedRollbackError from {FAILURES[case.happens]}"
    elif fate.startswith("required"):
        inner = "TransactionRequiredError"

    outer = None
    if inner is not None and not case.caught:
        outer = inner
    elif case.outer_fails and case.around != "nothing":
        outer = "RuntimeError"
    elif fate == "dooms":
        outer = f"UnexpectedRollbackError from {FAILURES[case.happens]}"

    before = after = case.around in WRITING and outer is None
    if case.around == "autocommit":
        before, after = True, case.caught
    elif kind == "takes over":  # and ends what was done before with itself
        before = fate == "kept"
    rows = {
        "root": case.around == "savepoint",
        "before": before,
        "inner": fate.endswith("kept") or (fate.endswith("shared") and outer is None),
        "after": after,
    }
    return Seen(sorted(row for row, is_kept in rows.items() if is_kept), inner, outer)


async def seen(manager: DatabaseSessionManager, mode: Propagation, case: Case) -> Seen:
    """Return the result in the library."""
    if case.around == "savepoint":
        async with manager.transaction() as session:
            await write(session, "root")
            inner, outer = await outer_block(manager, mode, case)
    else:
        inner, outer = await outer_block(manager, mode, case)
    async with manager.connect() as connection:
        rows = await connection.scalars(
            delete(Note).where(Note.text != "taken").returning(Note.text)
        )
        return Seen(sorted(rows), told(inner), told(outer))


async def outer_block(
    manager: DatabaseSessionManager, mode: Propagation, case: Case
) -> tuple[Exception | None, Exception | None]:
    """Run the two blocks, and return the outcome of each."""
    inner: Exception | None = None
    try:
        async with AROUND[case.around](manager) as session:
            if session is not None:
                await write(session, "before") if case.around in WRITING else await session.execute(
                    select(Note)
                )
            try:
                await inner_block(manager, mode, case.happens)
            except Exception as error:
                inner = error
                if not case.caught:
                    raise
            if session is not None and case.around in WRITING:
                with suppress(
                    DBAPIError, PendingRollbackError
                ):  # Nothing more can be done after a failure.
                    await write(session, "after")
            if session is not None and case.outer_fails:
                raise RuntimeError("outer")
            if session is not None and case.around == "session":
                await session.commit()
    except Exception as error:
        return inner, error
    return inner, None


async def inner_block(manager: DatabaseSessionManager, mode: Propagation, happens: str) -> None:
    async with manager.transaction(mode) as session:
        await write(session, "inner")
        if happens == "it fails":
            raise ValueError("inner")
        if happens == "a statement fails":
            with pytest.raises(IntegrityError):
                await session.execute(insert(Note).values(text="taken"))
        if happens == "a flush fails":
            with pytest.raises(IntegrityError):
                session.add(Note(text="taken"))
                await session.flush()
        if happens == "set_rollback_only":
            manager.transaction.set_rollback_only()


async def write(session: AsyncSession, text: str) -> None:
    await session.execute(insert(Note).values(text=text))


def told(error: BaseException | None) -> str | None:
    if isinstance(error, UnexpectedRollbackError):
        return f"UnexpectedRollbackError from {type(error.__cause__).__name__}"
    return None if error is None else type(error).__name__


@pytest.mark.parametrize("mode", Propagation, ids=lambda mode: mode.name)
async def test_each_propagation_mode_behaves_as_its_table_says(
    manager: DatabaseSessionManager, settings: DatabaseSettings, backend: str, mode: Propagation
) -> None:
    async with manager.transaction() as session:
        await write(session, "taken")
    cases = CASES
    if settings.pool.size + settings.pool.max_overflow == 1:
        # A separate block needs a connection beside that of the enclosing one.
        cases = [
            case
            for case in CASES
            if case.around == "nothing" or kind_of(mode, case, backend) not in SEPARATE
        ]
    wrong = []
    for case in cases:
        is_so, should_be = await seen(manager, mode, case), expected(mode, case, backend)
        if is_so != should_be:
            wrong.append(f"{case}:\n  {is_so}, not\n  {should_be}")
    assert not wrong, "\n".join(wrong)


class TestSavepoints:
    async def test_a_failed_joined_block_rolls_back_to_the_innermost_savepoint(
        self, manager: DatabaseSessionManager
    ) -> None:
        transaction = manager.transaction
        async with transaction() as session:
            await write(session, "transaction")
            async with transaction(Propagation.NESTED):
                await write(session, "savepoint")
                with pytest.raises(UnexpectedRollbackError, match="ValueError: deep"):
                    async with transaction(Propagation.NESTED), transaction():
                        await write(session, "lost")
                        with pytest.raises(ValueError, match="deep"):
                            async with transaction():
                                raise ValueError("deep")
        assert await notes(manager) == ["savepoint", "transaction"]

    async def test_set_rollback_only_from_a_joined_block_reaches_the_innermost_savepoint(
        self, manager: DatabaseSessionManager
    ) -> None:
        transaction = manager.transaction
        async with transaction() as session:
            await write(session, "kept")
            with pytest.raises(UnexpectedRollbackError, match=r"set_rollback_only\(\)"):
                async with transaction(Propagation.NESTED):
                    await write(session, "lost")
                    async with transaction():
                        transaction.set_rollback_only()
        assert await notes(manager) == ["kept"]

    @pytest.mark.parametrize(
        "mode", [Propagation.NESTED, Propagation.REQUIRED], ids=lambda mode: mode.name
    )
    async def test_a_savepoint_that_ends_before_a_block_of_another_task_ends_that_block(
        self, manager: DatabaseSessionManager, mode: Propagation
    ) -> None:
        transaction = manager.transaction
        inside, go_on = asyncio.Event(), asyncio.Event()

        async def work() -> None:
            async with transaction(mode) as session:
                await write(session, "child")
                inside.set()
                await go_on.wait()
                await write(session, "child, half")

        ran: list[str] = []
        with pytest.raises(UnexpectedRollbackError):
            async with transaction() as session:
                await write(session, "outer")
                with pytest.raises(ZeroDivisionError):
                    async with transaction(Propagation.NESTED):
                        child = asyncio.create_task(work())
                        await inside.wait()
                        raise ZeroDivisionError
                go_on.set()
                with pytest.raises(UnexpectedRollbackError, match="ended before"):
                    await child
                transaction.on_rollback(lambda: ran.append("told"))
        assert ran == ["told"]
        assert await notes(manager) == []

    async def test_savepoints_can_end_in_any_order_and_none_loses_work_silently(
        self, manager: DatabaseSessionManager
    ) -> None:
        transaction = manager.transaction
        with pytest.raises(UnexpectedRollbackError):
            async with transaction():
                outer, inner = transaction(Propagation.NESTED), transaction(Propagation.NESTED)
                await write(await outer.__aenter__(), "outer")
                await write(await inner.__aenter__(), "inner")
                with pytest.raises(UnexpectedRollbackError):
                    await outer.__aexit__(None, None, None)
                with pytest.raises(UnexpectedRollbackError):
                    await inner.__aexit__(None, None, None)
        assert await notes(manager) == []

    async def test_a_task_cannot_give_hooks_to_the_savepoint_of_another_task(
        self, manager: DatabaseSessionManager
    ) -> None:
        transaction = manager.transaction
        inside, go_on = asyncio.Event(), asyncio.Event()

        async def work() -> None:
            async with transaction(Propagation.NESTED):
                inside.set()
                await go_on.wait()

        async with transaction() as session:
            await write(session, "lost")
            child = asyncio.create_task(work())
            await inside.wait()
            for act in (
                transaction.set_rollback_only,
                lambda: transaction.on_commit(print),
                lambda: transaction.on_rollback(print),
            ):
                with pytest.raises(ConcurrentSessionError):
                    act()
            go_on.set()
            await child
            transaction.set_rollback_only()
        assert await notes(manager) == []

    async def test_a_failure_that_a_savepoint_rolled_back_does_not_affect_the_transaction(
        self, manager: DatabaseSessionManager
    ) -> None:
        async with manager.transaction() as session:
            for name in ("taken", "taken", "free"):
                with suppress(IntegrityError):
                    async with manager.transaction(Propagation.NESTED):
                        await write(session, name)
        assert await notes(manager) == ["free", "taken"]


class TestRefusedAtEntry:
    """A block that cannot be joined dooms nothing, whoever catches its error."""

    @pytest.mark.parametrize(
        ("terms", "refused"),
        [
            ({"isolation": "SERIALIZABLE"}, {"isolation": "READ COMMITTED"}),
            ({}, {"isolation": "SERIALIZABLE"}),
            ({}, {"execution_options": {"logging_token": "a"}}),
            (
                {"execution_options": {"logging_token": "a"}},
                {"execution_options": {"logging_token": "b"}},
            ),
        ],
        ids=str,
    )
    @pytest.mark.parametrize(
        "mode", [Propagation.REQUIRED, Propagation.NESTED, Propagation.MANDATORY]
    )
    async def test_a_block_is_refused_if_it_requests_options_that_the_transaction_lacks(
        self,
        manager: DatabaseSessionManager,
        mode: Propagation,
        terms: dict[str, Any],
        refused: dict[str, Any],
    ) -> None:
        (name,) = refused
        async with manager.transaction(**terms) as session:
            await write(session, "kept")
            with pytest.raises(IncompatibleTransactionError, match=f"{name}=.*REQUIRES_NEW"):
                async with manager.transaction(mode, **refused):
                    raise AssertionError("it was let in")
        assert await notes(manager) == ["kept"]

    @pytest.mark.parametrize(
        ("terms", "joining"),
        [
            ({"isolation": "SERIALIZABLE"}, {"isolation": "serializable"}),
            ({"isolation": "SERIALIZABLE", "execution_options": {"logging_token": "a"}}, {}),
            (
                {"execution_options": {"logging_token": "a"}},
                {"execution_options": {"logging_token": "a"}},
            ),
            (
                {"execution_options": {"schema_translate_map": {"shop": None}}},
                {"execution_options": {"schema_translate_map": {"shop": None}}},
            ),
            ({}, {"read_only": True}),
        ],
        ids=str,
    )
    async def test_a_block_joins_if_the_transaction_has_the_requested_options(
        self, manager: DatabaseSessionManager, terms: dict[str, Any], joining: dict[str, Any]
    ) -> None:
        async with manager.transaction(**terms) as outer:
            await outer.execute(select(Note))
            async with manager.transaction(**joining) as inner:
                assert inner is outer

    async def test_a_writing_block_is_refused_inside_a_read_only_block(
        self, manager: DatabaseSessionManager
    ) -> None:
        class Service:
            transaction = manager.transaction

            @transactional
            async def write(self) -> None: ...

            @read_only
            async def read(self) -> None:
                await self.write()

        with pytest.raises(IncompatibleTransactionError, match="make the outer call transactional"):
            await Service().read()

    async def test_a_block_is_refused_while_another_task_has_a_block_open_inside(
        self, manager: DatabaseSessionManager
    ) -> None:
        joined, leave = asyncio.Event(), asyncio.Event()

        async def join() -> None:
            async with manager.transaction():
                joined.set()
                await leave.wait()

        async with manager.transaction() as session:
            await write(session, "kept")
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(join())
                await joined.wait()
                with pytest.raises(ConcurrentSessionError):
                    await manager.transaction().__aenter__()
                leave.set()
        assert await notes(manager) == ["kept"]


class TestIsolation:
    @pytest.mark.parametrize("backend", ["sqlite"])
    async def test_a_second_writer_inside_a_writer_is_refused_at_once_on_sqlite(
        self, manager: DatabaseSessionManager
    ) -> None:
        start = monotonic()
        async with manager.transaction() as session:
            await write(session, "kept")
            with pytest.raises(IncompatibleTransactionError, match="SQLite allows one writer"):
                async with manager.transaction(Propagation.REQUIRES_NEW):
                    raise AssertionError("it was let in")
        assert monotonic() - start < 1
        assert await notes(manager) == ["kept"]

    @pytest.mark.parametrize("backend", ["sqlite"])
    @pytest.mark.parametrize("by", ["transaction", "session"])
    async def test_a_connection_or_session_that_writes_inside_a_writer_is_refused_on_sqlite(
        self, manager: DatabaseSessionManager, by: str
    ) -> None:
        async with getattr(manager, by)() as session:
            await write(session, "lost")
            with pytest.raises(IncompatibleTransactionError, match="SQLite allows one writer"):
                async with manager.connect():
                    raise AssertionError("it was let in")
            async with manager.session() as another:
                with pytest.raises(IncompatibleTransactionError, match="SQLite allows one writer"):
                    await write(another, "lost")
                with pytest.raises(IncompatibleTransactionError, match="SQLite allows one writer"):
                    another.add(Note(text="lost"))
                    await another.flush()
                another.expunge_all()
            await session.rollback() if by == "session" else manager.transaction.set_rollback_only()
        assert await notes(manager) == []

    async def test_an_isolation_level_weaker_than_those_of_the_database_is_accepted(
        self, manager: DatabaseSessionManager
    ) -> None:
        async with manager.transaction(isolation="read uncommitted") as session:
            await write(session, "kept")
        assert await notes(manager) == ["kept"]

    @pytest.mark.parametrize("backend", ["postgresql"])
    @pytest.mark.parametrize("level", ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"])
    async def test_an_isolation_level_holds_in_the_server_for_one_transaction_only(
        self, manager: DatabaseSessionManager, level: str
    ) -> None:
        async def shown(session: AsyncSession, setting: str) -> object:
            return await session.scalar(text(f"SHOW {setting}"))

        async with manager.transaction(isolation=level, read_only=True) as session:
            assert await shown(session, "transaction_isolation") == level.lower()
            assert await shown(session, "transaction_read_only") == "on"
        async with manager.transaction() as session:
            assert await shown(session, "transaction_isolation") == "read committed"
            assert await shown(session, "transaction_read_only") == "off"


class TestReading:
    @pytest.mark.parametrize(
        "mode", [Propagation.REQUIRED, Propagation.SUPPORTS], ids=["transaction", "scope"]
    )
    @pytest.mark.parametrize("sql", ["INSERT INTO note (text) VALUES ('lost')", "DROP TABLE note"])
    async def test_the_database_refuses_a_write_in_a_read_only_block(
        self, manager: DatabaseSessionManager, mode: Propagation, sql: str
    ) -> None:
        with pytest.raises(DBAPIError, match=r"read-?only"):
            async with manager.transaction(mode, read_only=True) as session:
                await session.execute(text(sql))
        # This may get the same connection.
        async with manager.transaction() as session:
            await write(session, "kept")
        assert await notes(manager) == ["kept"]

    @pytest.mark.parametrize(
        "mode", [Propagation.REQUIRED, Propagation.SUPPORTS], ids=["transaction", "scope"]
    )
    async def test_the_database_refuses_a_flush_in_a_read_only_block(
        self, manager: DatabaseSessionManager, mode: Propagation
    ) -> None:
        with pytest.raises(DBAPIError, match=r"read-?only"):
            async with manager.transaction(mode, read_only=True) as session:
                session.add(Note(text="lost"))
        assert await notes(manager) == []

    @pytest.mark.several_connections("each of the calls has its own")
    async def test_concurrent_read_only_calls_each_have_a_session(
        self, manager: DatabaseSessionManager
    ) -> None:
        together = asyncio.Barrier(3)

        class Service:
            transaction = manager.transaction
            session = CurrentSession(manager)

            @read_only
            async def count(self) -> object:
                await self.session.scalar(select(1))
                await together.wait()  # all of them are inside at the same moment
                return self.session.sync_session

            @read_only
            async def report(self) -> list[object]:
                await self.session.scalar(select(1))
                counted = await asyncio.gather(*(self.count() for _ in range(3)))
                return [self.session.sync_session, *counted]

        sessions = await Service().report()
        assert len({id(session) for session in sessions}) == 4

    @pytest.mark.pipeline_only("a read begins a READ ONLY transaction")
    @pytest.mark.parametrize("backend", ["postgresql"])
    async def test_a_read_only_scope_sends_no_begin_and_no_commit(
        self, manager: DatabaseSessionManager, postgres: Postgres
    ) -> None:
        async def activity(pid: object) -> tuple[str, str]:
            (row,) = await postgres.execute(
                "SELECT state, query FROM pg_stat_activity WHERE pid = $1", pid
            )
            return row["state"], row["query"]

        ask = "SELECT pg_backend_pid()"
        async with manager.transaction() as session:
            assert await activity(await session.scalar(text(ask))) == ("idle in transaction", ask)
        async with manager.transaction(Propagation.SUPPORTS, read_only=True) as session:
            pid = await session.scalar(text(ask))
            assert await activity(pid) == ("idle", ask)
        assert await activity(pid) == ("idle", ask)  # no ROLLBACK has come after it

    @pytest.mark.parametrize("backend", ["sqlite"])
    async def test_a_read_only_scope_sends_only_its_queries(
        self, manager: DatabaseSessionManager
    ) -> None:
        sent: list[str] = []
        async with manager.transaction(Propagation.SUPPORTS, read_only=True) as session:
            driver: Any = (
                await (await session.connection()).get_raw_connection()
            ).driver_connection
            await driver.set_trace_callback(sent.append)
            assert await session.scalar(text("SELECT 1")) == 1
            assert await session.scalar(text("SELECT 2")) == 2
        assert sent == ["SELECT 1", "SELECT 2"]


class TestPool:
    """`REQUIRES_NEW` wants a second connection while the first is held."""

    @pytest.mark.parametrize("size", [1, 3])
    async def test_a_pool_too_small_for_requires_new_is_an_error_that_names_the_size(
        self, settings: DatabaseSettings, manager: DatabaseSessionManager, size: int
    ) -> None:
        pool = PoolSettings(size=size, max_overflow=0, timeout=0.1)
        everybody_holds_one = asyncio.Barrier(size)

        async def hold_one_and_want_another() -> None:
            async with small.transaction(read_only=True) as session:
                await session.scalar(select(1))
                await everybody_holds_one.wait()
                async with small.transaction(Propagation.REQUIRES_NEW) as another:
                    await another.execute(select(1))

        async with (
            DatabaseSessionManager(settings.model_copy(update={"pool": pool})) as small,
            asyncio.timeout(5),
        ):
            ends = await asyncio.gather(
                *(hold_one_and_want_another() for _ in range(size)), return_exceptions=True
            )
            errors = [
                end for end in ends if end is not None
            ]  # The first one to give up may let another one through.
            assert errors
            for error in errors:
                assert isinstance(error, PoolTimeoutError)
                assert "already held 1 connection" in error.__notes__[0]
                assert (
                    f"pool.size + pool.max_overflow must be at least n + 1; it is {size}"
                    in error.__notes__[0]
                )
            assert checked_out(small) == 0
            async with small.transaction() as session:
                await write(session, "afterwards")
        assert await notes(manager) == ["afterwards"]

    async def test_a_pool_large_enough_serves_both_transactions_of_requires_new(
        self, settings: DatabaseSettings
    ) -> None:
        pool = PoolSettings(size=2, max_overflow=0, timeout=0.1)
        async with (
            DatabaseSessionManager(settings.model_copy(update={"pool": pool})) as manager,
            manager.transaction(read_only=True) as outer,
        ):
            assert await outer.scalar(select(1)) == 1
            async with manager.transaction(Propagation.REQUIRES_NEW) as inner:
                assert await inner.scalar(text("SELECT 2")) == 2
            assert await outer.scalar(text("SELECT 3")) == 3


class TestWithoutBlocksOfItsOwn:
    """`connect()` and `session()` also report a failed statement that was caught."""

    async def test_a_connection_does_not_commit_after_a_failed_statement(
        self, manager: DatabaseSessionManager
    ) -> None:
        with pytest.raises(
            UnexpectedRollbackError, match=r"(?s)IntegrityError.*Propagation\.NESTED"
        ) as raised:
            async with manager.connect() as connection:
                await connection.execute(insert(Note).values(text="twice"))
                with pytest.raises(IntegrityError):
                    await connection.execute(insert(Note).values(text="twice"))
        assert isinstance(raised.value.__cause__, IntegrityError)
        assert await notes(manager) == []

    async def test_a_connection_commits_if_a_savepoint_contained_the_failed_statement(
        self, manager: DatabaseSessionManager
    ) -> None:
        async with manager.connect() as connection:
            await connection.execute(insert(Note).values(text="twice"))
            with pytest.raises(IntegrityError):
                async with connection.begin_nested():
                    await connection.execute(insert(Note).values(text="twice"))
        assert await notes(manager) == ["twice"]

    @pytest.mark.parametrize("by", ["a statement", "a flush"])
    async def test_a_session_does_not_commit_after_a_failed_statement_and_can_begin_again(
        self, manager: DatabaseSessionManager, by: str
    ) -> None:
        async with manager.session() as session:
            await write(session, "twice")
            with pytest.raises(IntegrityError):
                if by == "a flush":
                    session.add(Note(text="twice"))
                await (session.flush() if by == "a flush" else write(session, "twice"))
            with pytest.raises(UnexpectedRollbackError, match="IntegrityError") as raised:
                await session.commit()
            assert isinstance(raised.value.__cause__, IntegrityError)
            assert await notes(manager) == []
            await write(session, "anew")
            await session.commit()
        assert await notes(manager) == ["anew"]

    async def test_a_session_commits_later_work_after_it_rolled_a_failed_statement_back(
        self, manager: DatabaseSessionManager
    ) -> None:
        async with manager.session() as session:
            with pytest.raises(IntegrityError):
                await session.execute(insert(Note), [{"text": "twice"}, {"text": "twice"}])
            await session.rollback()
            await write(session, "kept")
            await session.commit()
        assert await notes(manager) == ["kept"]

    async def test_session_begin_does_not_commit_after_a_failed_statement(
        self, manager: DatabaseSessionManager
    ) -> None:
        async with manager.session() as session, session.begin():
            session.add(Note(text="kept"))
        with pytest.raises(UnexpectedRollbackError, match="IntegrityError"):
            async with manager.session() as session, session.begin():
                await write(session, "lost")
                with pytest.raises(IntegrityError):
                    await write(session, "kept")
        session_block = manager.session()
        session = await session_block.__aenter__()
        async with session.begin():
            await write(session, "lost")
            session.add(Note(text="kept"))
            with pytest.raises(IntegrityError):
                await session.flush()
        with pytest.warns(UncommittedChangesWarning):  # SQLAlchemy reveals no more.
            await session_block.__aexit__(None, None, None)
        assert await notes(manager) == ["kept"]

    async def test_a_session_whose_commit_was_refused_does_not_warn_of_lost_changes(
        self, manager: DatabaseSessionManager
    ) -> None:
        async with manager.session() as session:
            await write(session, "lost")
            with pytest.raises(IntegrityError):
                await write(session, "lost")
            with pytest.raises(UnexpectedRollbackError):
                await session.commit()
        assert await notes(manager) == []


class TestDurable:
    """`durable=True`: what the block has done is committed at its end, or it is refused."""

    async def test_a_durable_block_of_its_own_commits(
        self, manager: DatabaseSessionManager
    ) -> None:
        class Service:
            transaction = manager.transaction

            @transactional(durable=True)
            async def write(self, text: str) -> None:
                await CurrentSession(manager).execute(insert(Note).values(text=text))

        service = Service()
        await service.write("by the decorator")
        async with manager.transaction(durable=True) as session:
            session.add(Note(text="by the block"))
            async with manager.transaction():  # joins, and is not durable
                session.add(Note(text="joined"))
        async with manager.session():
            await service.write("in a session")
        async with manager.transaction(Propagation.NOT_SUPPORTED):
            await service.write("in autocommit")
        assert len(await notes(manager)) == 5

    @pytest.mark.parametrize(
        "mode", [mode for mode in Propagation if mode is not Propagation.MANDATORY], ids=str
    )
    @pytest.mark.parametrize("around", ["transaction", "savepoint"])
    async def test_a_durable_block_is_refused_inside_a_transaction_and_does_it_no_harm(
        self, manager: DatabaseSessionManager, around: str, mode: Propagation
    ) -> None:
        async with manager.transaction() as outer:
            outer.add(Note(text="outer"))
            async with AROUND[around](manager):
                with pytest.raises(
                    IncompatibleTransactionError, match=r"at test_propagation\.py:\d+.*before or af"
                ):
                    async with manager.transaction(mode, durable=True):
                        raise AssertionError("never")
        assert await notes(manager) == ["outer"]

    @pytest.mark.several_connections("a block goes without the transaction around it")
    async def test_a_durable_block_is_refused_if_a_transaction_is_further_outside(
        self, manager: DatabaseSessionManager
    ) -> None:
        async with (
            manager.transaction(read_only=True),
            manager.transaction(Propagation.NOT_SUPPORTED),
        ):
            with pytest.raises(IncompatibleTransactionError, match="durable"):
                async with manager.transaction(durable=True):
                    raise AssertionError("never")
            async with manager.transaction(Propagation.SUPPORTS):
                await manager.transaction.detached(self.write_durably(manager))
        assert await notes(manager) == ["detached"]

    @staticmethod
    async def write_durably(manager: DatabaseSessionManager) -> None:
        async with manager.transaction(durable=True) as session:
            session.add(Note(text="detached"))

    async def test_a_transaction_of_another_database_is_no_obstacle(
        self, manager: DatabaseSessionManager
    ) -> None:
        async with (
            DatabaseSessionManager("sqlite://") as other,
            other.transaction(),
            manager.transaction(durable=True) as session,
        ):
            session.add(Note(text="a"))
        assert await notes(manager) == ["a"]

    async def test_a_sandbox_is_not_taken_for_a_transaction_around_the_block(
        self, manager: DatabaseSessionManager
    ) -> None:
        async with sandbox(manager):
            async with manager.transaction(durable=True) as session:
                session.add(Note(text="a"))
            assert await notes(manager) == ["a"]
            async with manager.transaction():
                with pytest.raises(IncompatibleTransactionError, match="durable"):
                    async with manager.transaction(durable=True):
                        raise AssertionError("never")
        assert await notes(manager) == []

    def test_mandatory_contradicts_durable(self) -> None:
        with pytest.raises(ValueError, match=r"^durable=True.*leave one of them out"):
            transactional(Propagation.MANDATORY, durable=True)
