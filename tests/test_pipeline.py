"""What is sent to PostgreSQL ahead of the next message, and what becomes of it."""

from __future__ import annotations

import asyncio
import gc
import io
import ssl
import struct
import subprocess
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import uvloop
from sqlalchemy import insert, select, text
from sqlalchemy.exc import DBAPIError

from sessionwire import (
    DatabaseSessionManager,
    DatabaseSettings,
    PoolSettings,
    Propagation,
    UnexpectedRollbackError,
)
from sessionwire._database.pipeline import Pipeline
from sessionwire.testing import sandbox

from .cancellation import each_cancellation
from .cluster import cluster
from .conftest import Postgres, checked_out, notes
from .models import Note
from .postgres import FaultyNetwork, OnPostgres, at_port, until
from .proxy import ClientConnection

NESTED = Propagation.NESTED
SUPPORTS = Propagation.SUPPORTS
ONE = PoolSettings(size=1, max_overflow=0)
REFUSED = {"statement_timeout": "nonsense"}  # The server answers with an error.
BOTH = pytest.mark.parametrize("pipeline", [True, False], ids=["pipeline", "no pipeline"])


def messages(data: bytes) -> Iterator[bytes]:
    """Split what a client or a server has sent into messages."""
    while data:
        length = 1 + int.from_bytes(data[1:5])
        yield data[:length]
        data = data[length:]


class Network(FaultyNetwork):
    """A network that puts other words into the mouth of a client, so that what is sent
    ahead fails or takes long; that strikes at the n-th message; and that records.
    """

    def __init__(self) -> None:
        super().__init__()
        self.replaces: dict[bytes, bytes] = {}
        self.strikes_at = 0  # the number of messages until then; 0: never
        self.strike: Callable[[ClientConnection], Awaitable[object]] | None = None
        self.has_struck = False
        self._held: list[bytes] | None = None  # until the strike is over
        self.answers = b""
        self.halves_notifications = False  # The rest comes before the next answer.
        self.second_half = b""

    def ask(self, data: bytes, client: ClientConnection) -> None:
        if self.second_half:
            super().answer(self.second_half, client)
            self.second_half = b""
        if data[:1] == b"\0":  # the start of a connection
            super().ask(data, client)
            return
        for message in messages(data):
            if self.strikes_at and self.strike is not None:
                self.strikes_at -= 1
                if not self.strikes_at:
                    self.has_struck, self._held = True, []
                    self._start(self._strike(self.strike, client))
            if self._held is not None:
                self._held.append(message)
            else:
                super().ask(self._replaced(message), client)

    def strike_nothing(self) -> None:
        """Be a good network again."""
        self.strikes_at, self.has_struck, self._held = 0, False, None
        self._dead.clear()

    async def _strike(
        self, strike: Callable[[ClientConnection], Awaitable[object]], client: ClientConnection
    ) -> None:
        await strike(client)
        held, self._held = self._held or [], None
        for message in held:
            super().ask(message, client)

    def _replaced(self, message: bytes) -> bytes:
        for old, new in self.replaces.items():
            if message[:1] in (b"P", b"Q") and old in message:
                content = message[5:].replace(old, new)
                return message[:1] + struct.pack("!I", len(content) + 4) + content
        return message

    def answer(self, data: bytes, client: ClientConnection) -> None:
        self.answers += data
        if self.halves_notifications and data[:1] == b"A":
            data, self.second_half = data[:40], data[40:]
        super().answer(data, client)


async def write(manager: DatabaseSessionManager, note: str = "a") -> None:
    async with manager.transaction() as session:
        await session.execute(insert(Note).values(text=note))


async def write_two(manager: DatabaseSessionManager) -> None:
    """Write with asyncpg's executemany."""
    two = [{"text": str(uuid4())}, {"text": str(uuid4())}]
    async with manager.transaction() as session:
        await session.execute(text("INSERT INTO note (text) VALUES (:text)"), two)


async def read(manager: DatabaseSessionManager) -> list[str]:
    async with manager.transaction(SUPPORTS, read_only=True) as session:
        return list(await session.scalars(select(Note.text)))


async def read_snapshot(manager: DatabaseSessionManager) -> None:
    async with manager.transaction(read_only=True, isolation="REPEATABLE READ") as session:
        await session.scalars(select(Note.text))
        await session.scalars(select(Note.text))


async def driver_of(session: Any) -> Any:
    """Return asyncpg's connection, as a user gets it."""
    connection = session if hasattr(session, "get_raw_connection") else await session.connection()
    return (await connection.get_raw_connection()).driver_connection


async def prepare_only(session: Any) -> None:
    await (await driver_of(session)).prepare("SELECT 2")


async def give_a_wrong_argument(session: Any) -> None:
    await session.execute(text("SELECT CAST(:n AS integer)"), {"n": "no number"})


def run_in_session(sql: str) -> Callable[[Any], Awaitable[object]]:
    return lambda session: session.execute(text(sql))


@pytest.fixture
def settings(database_url: str) -> DatabaseSettings:
    return DatabaseSettings(url=database_url, pool=PoolSettings(size=3), pipeline=True)


@pytest.fixture
def network() -> Network:
    return Network()


Open = Callable[..., Any]


@pytest.fixture
def open_remote(
    network: Network, postgres: Postgres, database_url: str, manager: DatabaseSessionManager
) -> Open:
    """Return a function that opens a manager which reaches its database through `network`."""

    @asynccontextmanager
    async def open_remote(
        session_settings: Any = None, **settings: Any
    ) -> AsyncIterator[DatabaseSessionManager]:
        async with network.open(postgres.host) as port, asyncio.timeout(60):
            remote = DatabaseSessionManager(
                DatabaseSettings.model_validate(
                    {
                        "url": at_port(port, database_url),
                        "commit_timeout": 0.3,
                        "rollback_timeout": 0.3,
                        "pipeline": True,
                        **settings,
                    }
                ),
                session_settings=session_settings,
            )
            async with remote:
                yield remote
                await until(lambda: _all_are_back(remote))

    return open_remote


async def _has_come(network: Network, answer: bytes) -> bool:
    return answer in network.answers


async def _all_are_back(manager: DatabaseSessionManager) -> bool:
    return checked_out(manager) == 0


async def outcome(work: Awaitable[object]) -> str:
    """Return how it ended, in one word; a hang is one of the ways."""
    try:
        async with asyncio.timeout(5) as limit:
            result = await work
    except Exception as error:
        cause = getattr(error, "orig", None)
        return (
            "hang"
            if limit.expired()
            else type(error).__name__ + (f" of {type(cause.__cause__).__name__}" if cause else "")
        )
    return repr(result)


def told(error: BaseException) -> str:
    return "\n".join([str(error), *getattr(error, "__notes__", ())])


# Messages


async def nothing_more(manager: DatabaseSessionManager) -> None: ...


class TestMessages(OnPostgres):
    @pytest.mark.parametrize(
        ("work", "ahead", "at_once"),
        [(read, 1, 3), (write, 2, 3), (read_snapshot, 3, 4)],
        ids=["a read", "a write of one row", "a snapshot of two reads"],
    )
    @BOTH
    async def test_a_warm_block_waits_for_as_many_answers_as_it_must(
        self,
        network: Network,
        open_remote: Open,
        work: Any,
        ahead: int,
        at_once: int,
        pipeline: bool,
    ) -> None:
        arguments = ([str(number)] if work is write else [] for number in range(9))
        async with open_remote(pipeline=pipeline) as remote:
            for _ in range(2):
                await work(remote, *next(arguments))
            network.round_trips = 0
            await work(remote, *next(arguments))
            assert network.round_trips == (ahead if pipeline else at_once)

    @pytest.mark.parametrize("work", [read, write, read_snapshot])
    async def test_a_cold_block_waits_for_no_more_answers_than_without_a_pipeline(
        self, network: Network, open_remote: Open, work: Any, manager: DatabaseSessionManager
    ) -> None:
        counted = []
        for pipeline in (True, False):
            async with open_remote(pipeline=pipeline) as remote:
                network.round_trips = 0
                await work(remote)
                counted.append(network.round_trips)
            async with manager.transaction() as session:
                await session.execute(text("TRUNCATE note"))
        assert counted[0] < counted[1]

    @BOTH
    async def test_a_nested_block_with_one_write_waits_for_one_answer(
        self, network: Network, open_remote: Open, pipeline: bool
    ) -> None:
        async with open_remote(pipeline=pipeline) as remote, remote.transaction() as session:
            await session.execute(insert(Note).values(text="warm"))
            for name in ("warm", "counted"):
                network.round_trips = 0
                async with remote.transaction(NESTED):
                    await session.execute(insert(Note).values(text=f"{name} a"))
                await session.execute(insert(Note).values(text=f"{name} b"))
            assert network.round_trips == (2 if pipeline else 6)

    async def test_settings_of_a_tenant_cost_no_message(
        self, network: Network, open_remote: Open, manager: DatabaseSessionManager
    ) -> None:
        async with manager.transaction() as session:
            for sql in (
                "ALTER TABLE note ENABLE ROW LEVEL SECURITY",
                "CREATE POLICY own ON note USING "
                "(text = nullif(current_setting('app.tenant', true), ''))",
                "INSERT INTO note (text) VALUES ('7'), ('8')",
            ):
                await session.execute(text(sql))
        # A role of the server, because policies do not apply to a superuser.
        tenant = {"role": "pg_read_all_data", "app.tenant": "7"}
        async with open_remote(lambda: tenant) as remote:
            assert await read(remote) == ["7"]
            network.round_trips = 0
            assert await read(remote) == ["7"]
            assert network.round_trips == 1
            tenant["app.tenant"] = "8"
            assert await read(remote) == ["8"]
            await read_snapshot(remote)
            network.round_trips = 0
            await read_snapshot(remote)
            assert network.round_trips == 3


# Errors


class TestErrors(OnPostgres):
    async def test_the_error_of_a_setting_is_that_of_the_next_statement_and_its_note_names_it(
        self, manager: DatabaseSessionManager
    ) -> None:
        with pytest.raises(DBAPIError, match='invalid value for parameter "statement_t') as raised:
            async with manager.transaction(settings=REFUSED) as session:
                await session.execute(insert(Note).values(text="lost"))
        assert "INSERT INTO note" in str(raised.value)
        assert "set_config($1, $2, true)' which failed" in told(raised.value).replace("',", "'")
        assert await notes(manager) == []

    async def test_a_block_without_a_statement_sends_neither_begin_nor_settings(
        self, network: Network, open_remote: Open
    ) -> None:
        async with open_remote(pool=ONE) as remote:
            await write(remote)
            network.round_trips = 0
            async with remote.transaction(settings=REFUSED) as session:
                await session.connection()
                async with remote.transaction(NESTED):
                    pass
            assert network.round_trips == 0

    async def test_a_begin_that_fails_is_the_error_of_the_next_statement_and_its_note_names_it(
        self, network: Network, open_remote: Open, manager: DatabaseSessionManager
    ) -> None:
        async with open_remote(pool=ONE) as remote:
            network.replaces = {b"BEGIN": b"BEGUN"}
            for _ in range(2):
                with pytest.raises(DBAPIError, match="syntax error") as raised:
                    await write(remote, "lost")
                assert "it was sent after 'BEGIN" in told(raised.value)
            network.replaces = {}
            with pytest.raises(DBAPIError) as raised:
                async with remote.transaction() as session:
                    await session.execute(text("SELECT no_such"))
            assert "it was sent after" not in told(raised.value)
            await write(remote, "kept")
        assert await notes(manager) == ["kept"]

    @BOTH
    async def test_no_statement_runs_outside_of_a_transaction_whose_begin_failed(
        self,
        network: Network,
        open_remote: Open,
        manager: DatabaseSessionManager,
        pipeline: bool,
    ) -> None:
        async with open_remote(pool=ONE, pipeline=pipeline) as remote:
            await write(remote, "warm")
            for note in ("first", "second"):
                with pytest.raises((DBAPIError, UnexpectedRollbackError)):
                    async with remote.transaction() as session:
                        network.replaces = {b"BEGIN": b"BEGUN"}
                        with suppress(DBAPIError):
                            await session.execute(insert(Note).values(text="lost " + note))
                        network.replaces = {}
                        await session.execute(insert(Note).values(text=note))
            await write(remote, "kept")
        assert await notes(manager) == ["kept", "warm"]

    @BOTH
    async def test_no_statement_of_a_driver_runs_outside_of_a_transaction_whose_begin_failed(
        self,
        network: Network,
        open_remote: Open,
        manager: DatabaseSessionManager,
        pipeline: bool,
    ) -> None:
        async with open_remote(pool=ONE, pipeline=pipeline) as remote:
            for use in ("execute", "fetch", "fetchval"):
                async with remote.connect() as connection:
                    driver: Any = await driver_of(connection)
                    network.replaces = {b"BEGIN": b"BEGUN"}
                    with suppress(Exception):
                        async with driver.transaction():
                            with suppress(Exception):
                                await driver.fetch("SELECT 1")
                            network.replaces = {}
                            await getattr(driver, use)("INSERT INTO note (text) VALUES ('lost')")
                    network.replaces = {}
                    async with driver.transaction():
                        await driver.execute("INSERT INTO note (text) VALUES ($1)", use)
        assert await notes(manager) == ["execute", "fetch", "fetchval"]

    async def test_no_statement_runs_after_a_begin_whose_failure_came_late(
        self,
        network: Network,
        open_remote: Open,
        manager: DatabaseSessionManager,
    ) -> None:
        async with open_remote(pool=ONE) as remote:
            await write(remote, "warm")
            with suppress(DBAPIError):  # The statement is prepared.
                async with remote.transaction() as session:
                    await give_a_wrong_argument(session)
            with pytest.raises((DBAPIError, UnexpectedRollbackError)):
                async with remote.transaction() as session:
                    network.answers = b""
                    network.replaces = {b"BEGIN": b"BEGUN"}
                    with suppress(DBAPIError):
                        await give_a_wrong_argument(session)
                    await until(lambda: _has_come(network, b"syntax error"))
                    await asyncio.sleep(0)
                    network.replaces = {}
                    await session.execute(insert(Note).values(text="lost"))
            await write(remote, "kept")
        assert await notes(manager) == ["kept", "warm"]

    async def test_a_failure_of_a_read_before_is_no_note_of_the_next_one(
        self, open_remote: Open
    ) -> None:
        settings = dict(REFUSED)
        async with open_remote(lambda: settings, pool=ONE) as remote:
            for _ in range(2):
                settings.clear()
                with suppress(DBAPIError):  # The statement is prepared, and never runs.
                    async with remote.transaction(SUPPORTS, read_only=True) as session:
                        await give_a_wrong_argument(session)
                settings |= REFUSED
                with suppress(DBAPIError):
                    async with remote.transaction(SUPPORTS, read_only=True) as session:
                        await give_a_wrong_argument(session)
                settings.clear()
                with pytest.raises(DBAPIError, match="no_such") as raised:
                    async with remote.transaction(SUPPORTS, read_only=True) as session:
                        await session.execute(text("SELECT no_such"))
                assert "it was sent after" not in told(raised.value)

    @pytest.mark.parametrize("failing", ["BEGIN", "a setting"])
    @pytest.mark.parametrize("is_warm", [True, False], ids=["warm", "cold"])
    async def test_a_wrong_type_after_a_failure_ahead_leaves_a_clean_connection(
        self,
        network: Network,
        open_remote: Open,
        manager: DatabaseSessionManager,
        failing: str,
        is_warm: bool,
    ) -> None:
        settings = REFUSED if failing == "a setting" else {}
        async with open_remote(pool=ONE) as remote:
            if is_warm:
                await write(remote, "warm")
            network.replaces = {b"BEGIN": b"BEGUN"} if failing == "BEGIN" else {}
            for _ in range(2):
                with pytest.raises((DBAPIError, UnexpectedRollbackError)):
                    async with remote.transaction(settings=settings) as session:
                        for _ in range(2):
                            with suppress(DBAPIError):
                                await session.execute(insert(Note).values(text=object()))
                            await asyncio.sleep(0.01)  # The error may arrive now.
            network.replaces = {}
            await write(remote, "kept")
        assert await notes(manager) == (["kept", "warm"] if is_warm else ["kept"])

    @pytest.mark.parametrize("is_warm", [True, False], ids=["warm", "cold"])
    @BOTH
    async def test_a_wrong_type_in_the_first_statement_that_is_swallowed_rolls_back(
        self, open_remote: Open, manager: DatabaseSessionManager, is_warm: bool, pipeline: bool
    ) -> None:
        async with open_remote(pool=ONE, pipeline=pipeline) as remote:
            if is_warm:
                await write(remote, "warm")
            with pytest.raises(UnexpectedRollbackError):
                async with remote.transaction() as session:
                    with suppress(DBAPIError):
                        await session.execute(insert(Note).values(text=object()))
            async with remote.connect() as connection:
                driver: Any = await driver_of(connection)
                async with driver.transaction():
                    with pytest.raises(Exception, match="expected str"):
                        await driver.execute("INSERT INTO note (text) VALUES ($1)", 3)
                    await driver.execute("INSERT INTO note (text) VALUES ($1)", "driver")
            await write(remote, "kept")
        expected = ["driver", "kept", "warm"] if is_warm else ["driver", "kept"]
        assert await notes(manager) == expected

    @pytest.mark.parametrize("row", [0, 1, 5000])
    @BOTH
    async def test_a_wrong_type_in_many_rows_as_first_statement_keeps_nothing(
        self, open_remote: Open, manager: DatabaseSessionManager, row: int, pipeline: bool
    ) -> None:
        sql = "INSERT INTO note (text) VALUES ($1)"
        rows: list[tuple[Any]] = [(str(number),) for number in range(6000)]
        rows[row] = (3,)
        async with open_remote(pool=ONE, pipeline=pipeline) as remote:
            with pytest.raises(ZeroDivisionError):
                async with remote.transaction() as session:
                    with suppress(DBAPIError):
                        await session.execute(
                            text("INSERT INTO note (text) VALUES (:text)"),
                            [{"text": text} for (text,) in rows],
                        )
                    with suppress(DBAPIError):
                        await session.execute(insert(Note).values(text="lost"))
                    raise ZeroDivisionError
            async with remote.connect() as connection:
                driver: Any = await driver_of(connection)
                for many in (driver.executemany, (await driver.prepare(sql)).executemany):
                    with pytest.raises(ZeroDivisionError):
                        async with driver.transaction():
                            with pytest.raises(Exception, match="expected str"):
                                await (
                                    many(sql, rows) if many == driver.executemany else many(rows)
                                )
                            with suppress(Exception):
                                await driver.execute(sql, "lost")
                            raise ZeroDivisionError
            await write(remote, "kept")
        assert await notes(manager) == ["kept"]

    async def test_a_standby_refuses_a_serializable_begin_and_nothing_hangs(self) -> None:
        async with cluster() as servers:
            await servers.primary.execute("CREATE TABLE note (id serial, text text)")
            await servers.catch_up()
            url = servers.standby.url("postgres")
            async with DatabaseSessionManager(
                DatabaseSettings(url=url, pool=ONE, pipeline=True)
            ) as standby:
                for first in (
                    text("SELECT 1"),
                    select(Note).where(Note.text == object()),
                    text("SELECT no_such"),
                ):
                    for _ in range(2):
                        async with asyncio.timeout(5):
                            with pytest.raises((DBAPIError, UnexpectedRollbackError)):
                                async with standby.transaction(isolation="SERIALIZABLE") as session:
                                    with suppress(DBAPIError):
                                        await session.execute(first)
                                    await session.execute(text("SELECT 1"))
                assert await notes(standby) == []

    async def test_a_savepoint_by_hand_outside_of_a_transaction_is_refused_at_once(
        self, manager: DatabaseSessionManager
    ) -> None:
        async with manager.transaction(Propagation.NOT_SUPPORTED) as session:
            with pytest.raises(DBAPIError, match="can only be used in transaction blocks"):
                await session.execute(text("SAVEPOINT a"))
            assert await session.scalar(text("SELECT 1")) == 1

    async def test_a_savepoint_that_fails_is_the_error_of_the_next_statement(
        self, network: Network, open_remote: Open, manager: DatabaseSessionManager
    ) -> None:
        async with open_remote(pool=ONE) as remote:
            with pytest.raises((DBAPIError, UnexpectedRollbackError)) as raised:
                async with remote.transaction() as session:
                    await session.execute(insert(Note).values(text="lost"))
                    network.replaces = {b"SAVEPOINT": b"SAVEPAINT"}
                    async with remote.transaction(NESTED):
                        await session.execute(insert(Note).values(text="lost too"))
            assert "it was sent after 'SAVEPOINT" in told(raised.value)
            network.replaces = {}
            await write(remote, "kept")
        assert await notes(manager) == ["kept"]


# A user's own use of the driver

Use = Callable[[Any], Awaitable[object]]
USES: dict[str, Use] = {}
INSERT = "INSERT INTO note (text) VALUES ($1)"


def use(function: Use) -> Use:
    USES[function.__name__.replace("_", " ")] = function
    return function


@use
async def execute(driver: Any) -> object:
    return await driver.execute("INSERT INTO note (text) VALUES ('a')")


@use
async def execute_with_arguments(driver: Any) -> object:
    return await driver.execute(INSERT, "a")


@use
async def execute_several_statements(driver: Any) -> object:
    return await driver.execute("SELECT 1; INSERT INTO note (text) VALUES ('a')")


@use
async def fetch(driver: Any) -> object:
    return await driver.fetch(INSERT + " RETURNING text", "a")


@use
async def fetchrow(driver: Any) -> object:
    return await driver.fetchrow(INSERT + " RETURNING text", "a")


@use
async def fetchval(driver: Any) -> object:
    return await driver.fetchval(INSERT + " RETURNING text", "a")


@use
async def fetchmany(driver: Any) -> object:
    return await driver.fetchmany(INSERT + " RETURNING text", [("a",), ("b",)])


@use
async def executemany(driver: Any) -> object:
    return await driver.executemany(INSERT, [("a",), ("b",)])


@use
async def copy_in(driver: Any) -> object:
    source = io.BytesIO(b"".join(b"%d\n" % number for number in range(20_000)))
    return await driver.copy_to_table("note", source=source, columns=["text"])


@use
async def copy_records_in(driver: Any) -> object:
    records = [(str(number),) for number in range(2000)]
    return await driver.copy_records_to_table("note", records=records, columns=["text"])


@use
async def prepare_and_fetch(driver: Any) -> object:
    statement = await driver.prepare(INSERT + " RETURNING text")
    return await statement.fetch("a"), await statement.fetch("b"), statement.get_statusmsg()


@use
async def prepare_and_fetchval(driver: Any) -> object:
    statement = await driver.prepare(INSERT + " RETURNING text")
    return await statement.fetchval("a")


@use
async def prepare_and_fetchrow(driver: Any) -> object:
    statement = await driver.prepare(INSERT + " RETURNING text")
    return await statement.fetchrow("a")


@use
async def prepare_and_fetchmany(driver: Any) -> object:
    statement = await driver.prepare(INSERT + " RETURNING text")
    return await statement.fetchmany([("a",), ("b",)])


@use
async def prepare_and_executemany(driver: Any) -> object:
    statement = await driver.prepare(INSERT)
    return await statement.executemany([("a",), ("b",)])


@use
async def prepare_and_explain(driver: Any) -> object:
    statement = await driver.prepare(INSERT)
    return len(await statement.explain("a", analyze=True))


@use
async def a_transaction(driver: Any) -> object:
    async with driver.transaction():
        await driver.execute(INSERT, "a")
        async with driver.transaction():
            await driver.execute(INSERT, "b")
    return None


@use
async def a_script_with_its_own_transaction(driver: Any) -> object:
    return await driver.execute("BEGIN; INSERT INTO note (text) VALUES ('a'); COMMIT")


WRITES = dict(USES)


@use
async def copy_out(driver: Any) -> object:
    output = io.BytesIO()
    query = "SELECT repeat('x', 1000) FROM generate_series(1, 2000)"
    status = await driver.copy_from_query(query, output=output)
    return status, len(output.getvalue())


@use
async def copy_a_table_out(driver: Any) -> object:
    return await driver.copy_from_table("note", output=io.BytesIO())


@use
async def many_rows(driver: Any) -> object:
    return len(await driver.fetch("SELECT repeat('x', 1000) FROM generate_series(1, 2000)"))


@use
async def listen_and_notify(driver: Any) -> object:
    heard: asyncio.Queue[str] = asyncio.Queue()

    def hear(_connection: object, _pid: int, _channel: str, payload: str) -> None:
        heard.put_nowait(payload)

    await driver.add_listener("news", hear)
    await driver.remove_listener("news", hear)
    return heard.qsize()


@use
async def an_enum(driver: Any) -> object:
    return await driver.fetchval("SELECT array_agg(x) FROM unnest(enum_range(null::mood)) x")


@use
async def a_composite_type(driver: Any) -> object:
    return await driver.fetchval("SELECT (1, 'ok')::pair")


@use
async def a_domain(driver: Any) -> object:
    return await driver.fetchval("SELECT $1::positive", 3)


@use
async def a_codec(driver: Any) -> object:
    await driver.set_type_codec("mood", encoder=str, decoder=str.upper, format="text")
    return await driver.fetchval("SELECT 'ok'::mood")


@use
async def reset(driver: Any) -> object:
    await driver.execute("SELECT 1")
    return await driver.fetchval("SELECT 1")


TYPES = (
    "CREATE TYPE mood AS ENUM ('ok', 'bad')",
    "CREATE TYPE pair AS (number int, mood mood)",
    "CREATE DOMAIN positive AS int CHECK (value > 0)",
)
EACH_USE = pytest.mark.parametrize("use", USES.values(), ids=USES)


@pytest.fixture
async def types(manager: DatabaseSessionManager) -> None:
    async with manager.connect() as connection:
        for sql in TYPES:
            await connection.execute(text(sql))


@pytest.mark.usefixtures("types")
class TestDriver(OnPostgres):
    """Whatever a user does with the connection of asyncpg."""

    @pytest.fixture
    def settings(self, database_url: str, pipeline: bool) -> DatabaseSettings:
        return DatabaseSettings(url=database_url, pool=ONE, pipeline=pipeline)

    @pytest.fixture
    def pipeline(self) -> bool:
        return True

    @EACH_USE
    async def test_each_use_after_a_begin_sent_ahead_does_as_it_does_without(
        self, manager: DatabaseSessionManager, settings: DatabaseSettings, use: Use
    ) -> None:
        ends = []
        plain = settings.model_copy(update={"pipeline": False})
        async with DatabaseSessionManager(plain) as without:
            for each in (manager, without):
                for _ in range(2):  # cold and warm
                    async with each.connect() as connection:
                        driver: Any = await driver_of(connection)
                        if use is a_script_with_its_own_transaction:
                            ends.append(await outcome(use(driver)))
                        else:
                            async with driver.transaction():
                                ends.append(await outcome(use(driver)))
                            assert not driver.is_in_transaction()
                    ends.append(str(len(await notes(each))))
                    async with each.connect() as connection:
                        await connection.execute(text("TRUNCATE note"))
        assert ends[: len(ends) // 2] == ends[len(ends) // 2 :]
        assert "hang" not in ends

    @EACH_USE
    async def test_each_use_after_a_setting_that_failed_fails_and_leaves_the_connection_usable(
        self, manager: DatabaseSessionManager, use: Use
    ) -> None:
        for _ in range(2):
            with pytest.raises(Exception, match=r"invalid value for parameter|aborted"):
                async with asyncio.timeout(5), manager.transaction(settings=REFUSED) as session:
                    await use(await driver_of(session))
            assert await notes(manager) == []

    @EACH_USE
    async def test_each_use_after_a_savepoint_that_failed_fails_and_nothing_hangs(
        self, manager: DatabaseSessionManager, use: Use
    ) -> None:
        for _ in range(2):
            with pytest.raises((DBAPIError, UnexpectedRollbackError)):
                async with asyncio.timeout(5), manager.transaction() as session:
                    driver: Any = await driver_of(session)
                    with suppress(DBAPIError):
                        await session.execute(text("SELECT no_such"))
                    async with session.begin_nested():
                        with pytest.raises(Exception, match="aborted"):
                            await use(driver)
            assert await notes(manager) == []

    @pytest.mark.parametrize("use", WRITES.values(), ids=WRITES)
    async def test_each_way_to_write_is_refused_in_a_read_scope(
        self, manager: DatabaseSessionManager, use: Use
    ) -> None:
        for _ in range(2):
            async with manager.transaction(SUPPORTS, read_only=True) as session:
                assert list(await session.scalars(select(Note.text))) == []
                driver: Any = await driver_of(session)
                with pytest.raises(Exception, match="read-only transaction"):
                    await use(driver)
                if use is not a_script_with_its_own_transaction:  # It has left it open.
                    assert list(await session.scalars(select(Note.text))) == []
            assert await notes(manager) == []

    async def test_a_write_is_refused_in_a_read_scope_whose_begin_is_not_sent_ahead(
        self, manager: DatabaseSessionManager
    ) -> None:
        def hear(*_: object) -> None: ...

        async with manager.transaction(SUPPORTS, read_only=True) as session:
            driver: Any = await driver_of(session)
            await driver.add_listener("news", hear)
            with pytest.raises(Exception, match="read-only transaction"):
                async with driver.transaction(isolation="serializable"):
                    assert not driver.pipeline.unanswered
                    await driver.execute(INSERT, "lost")
            await driver.remove_listener("news", hear)
        assert await notes(manager) == []

    @EACH_USE
    async def test_each_use_beside_a_running_statement_is_refused_and_disturbs_nothing(
        self, manager: DatabaseSessionManager, use: Use
    ) -> None:
        for block in (manager.transaction(), manager.transaction(SUPPORTS, read_only=True)):
            async with block as session:
                await session.execute(text("SELECT 1"))
                driver: Any = await driver_of(session)
                slow = asyncio.create_task(session.scalar(text("SELECT 7, pg_sleep(0.2)")))
                await asyncio.sleep(0.05)
                with pytest.raises(Exception, match=r"in progress|manually started"):
                    async with asyncio.timeout(5):
                        await use(driver)
                assert await slow == 7
                assert await session.scalar(text("SELECT 8")) == 8

    async def test_a_savepoint_beside_a_running_cursor_disturbs_nothing(
        self, manager: DatabaseSessionManager
    ) -> None:
        slow = text("SELECT x, pg_sleep(0.01) FROM generate_series(1, 200) x")
        async with manager.connect() as connection:
            await connection.execute(insert(Note).values(text="kept"))
            rows = await connection.stream(slow)
            reading = asyncio.create_task(anext(rows))
            while (await asyncio.wait([reading], timeout=0.02))[0]:
                reading = asyncio.create_task(anext(rows))
            savepoint = await connection.begin_nested()
            with pytest.raises(Exception, match="another one is in progress"):
                await connection.execute(insert(Note).values(text="refused"))
            await reading
            await savepoint.rollback()
        assert await notes(manager) == ["kept"]

    @BOTH
    async def test_a_stream_may_be_the_first_statement(
        self, manager: DatabaseSessionManager, pipeline: bool
    ) -> None:
        query = text("SELECT repeat('x', 1000) FROM generate_series(1, 200)")
        for _ in range(2):
            async with manager.transaction() as session:
                rows = [row async for row in await session.stream(query)]
                assert len(rows) == 200
            with pytest.raises(DBAPIError, match="expected str"):
                async with manager.transaction() as session:
                    await session.stream(select(Note).where(Note.text == object()))
            if pipeline:
                with pytest.raises(DBAPIError, match="outside of a transaction"):
                    async with manager.transaction(SUPPORTS, read_only=True) as session:
                        await session.stream(query)
            async with manager.connect() as connection:
                driver: Any = await driver_of(connection)
                async with driver.transaction():
                    assert len([row async for row in driver.cursor("SELECT 1")]) == 1
                async with driver.transaction():
                    cursor = await driver.cursor("SELECT generate_series(1, 9)")
                    assert await cursor.forward(4) == 4
                    assert [row[0] for row in await cursor.fetch(2)] == [5, 6]
                prepared = await driver.prepare("SELECT generate_series(1, 9)")
                async with driver.transaction():
                    assert len([row async for row in prepared.cursor()]) == 9

    async def test_a_stream_after_a_failure_ahead_fails_with_it(
        self, manager: DatabaseSessionManager
    ) -> None:
        for _ in range(2):
            with pytest.raises(DBAPIError, match="invalid value for parameter"):
                async with asyncio.timeout(5), manager.transaction(settings=REFUSED) as session:
                    await session.stream(select(Note))
            assert await notes(manager) == []

    async def test_a_connection_that_was_terminated_refuses_to_begin(
        self, manager: DatabaseSessionManager
    ) -> None:
        async with manager.engine.connect() as connection:
            driver: Any = await driver_of(connection)
            driver.terminate()
            with pytest.raises(Exception, match="closed"):
                await driver.transaction().start()

    async def test_a_query_logger_is_told_of_begin(self, manager: DatabaseSessionManager) -> None:
        logged: list[str] = []
        async with manager.connect() as connection:
            driver: Any = await driver_of(connection)
            with driver.query_logger(lambda record: logged.append(record.query)):
                async with driver.transaction():
                    await driver.execute("SELECT 1")
                await asyncio.sleep(0)  # asyncpg tells its loggers a moment later.
        assert logged == ["BEGIN;", "SELECT 1", "COMMIT;"]

    @BOTH
    async def test_notifications_arrive_while_an_answer_is_outstanding(
        self, manager: DatabaseSessionManager, postgres: Postgres, pipeline: bool
    ) -> None:
        heard: list[str] = []
        database = manager.engine.url.database or ""
        async with manager.connect() as connection:
            driver: Any = await driver_of(connection)

            def hear(_connection: object, _pid: int, _channel: str, payload: str) -> None:
                heard.append(payload)

            await driver.add_listener("news", hear)
            for number in range(5):
                notify = f"SELECT pg_notify('news', repeat('{number}', 7000))"
                notifying = asyncio.create_task(postgres.execute(notify, database=database))
                async with driver.transaction():
                    await driver.fetchval("SELECT 1")
                await notifying

            async def all_are_heard() -> bool:
                return len(heard) == 5

            await until(all_are_heard)
            await driver.remove_listener("news", hear)
        assert [set(payload) for payload in heard] == [{str(number)} for number in range(5)]

    async def test_half_of_a_notification_may_have_come_before_a_begin(
        self, network: Network, open_remote: Open, postgres: Postgres
    ) -> None:
        heard: list[str] = []

        def hear(_connection: object, _pid: int, _channel: str, payload: str) -> None:
            heard.append(payload)

        async def half_has_come() -> bool:
            return bool(network.second_half)

        async with open_remote(pool=ONE) as remote, remote.connect() as connection:
            driver: Any = await driver_of(connection)
            await driver.add_listener("news", hear)
            network.halves_notifications = True
            database = remote.engine.url.database or ""
            await postgres.execute("SELECT pg_notify('news', repeat('x', 99))", database=database)
            await until(half_has_come)
            async with asyncio.timeout(5), driver.transaction():
                assert await driver.fetchval("SELECT 7") == 7
            assert heard == ["x" * 99]
            await driver.remove_listener("news", hear)

    @BOTH
    async def test_get_settings_follows_what_is_set_ahead(
        self, manager: DatabaseSessionManager, pipeline: bool
    ) -> None:
        async with manager.transaction() as session:
            driver: Any = await driver_of(session)
            before = driver.get_settings().TimeZone
        async with manager.transaction(settings={"TimeZone": "Asia/Tokyo"}) as session:
            await session.execute(text("SELECT 1"))
            driver = await driver_of(session)
            assert driver.get_settings().TimeZone == "Asia/Tokyo"
            await session.execute(text("SET LOCAL TimeZone = 'Asia/Seoul'"))
            assert driver.get_settings().TimeZone == "Asia/Seoul"
        assert driver.get_settings().TimeZone == before

    @BOTH
    async def test_notices_reach_the_listeners_of_the_log(
        self, manager: DatabaseSessionManager, pipeline: bool
    ) -> None:
        told: list[str] = []
        async with manager.connect() as connection:
            driver: Any = await driver_of(connection)
            driver.add_log_listener(lambda _connection, message: told.append(message.message))
            await driver.execute("BEGIN;")
            await driver.execute("BEGIN;")  # The server warns of the second one.
            await driver.execute("DO $$ BEGIN RAISE NOTICE 'hello'; END $$")
            await driver.execute("ROLLBACK;")
            await asyncio.sleep(0)
        assert told == ["there is already a transaction in progress", "hello"]


# Settings of reads


class TestReads(OnPostgres):
    async def test_a_search_path_of_session_settings_holds_for_cold_and_warm_reads(
        self, manager: DatabaseSessionManager, settings: DatabaseSettings
    ) -> None:
        async with manager.connect() as connection:
            for sql in (
                "CREATE SCHEMA tenant",
                "CREATE TABLE tenant.thing (text text)",
                "INSERT INTO tenant.thing VALUES ('x')",
            ):
                await connection.execute(text(sql))
        of_tenant = DatabaseSessionManager(
            settings.model_copy(update={"pool": ONE}),
            session_settings=lambda: {"search_path": "tenant"},
        )
        try:
            async with of_tenant:
                for _ in range(3):
                    async with of_tenant.transaction(SUPPORTS, read_only=True) as session:
                        assert await session.scalar(text("SELECT text FROM thing")) == "x"
                        driver: Any = await driver_of(session)
                        assert await driver.fetchval("SELECT text FROM thing") == "x"
                async with of_tenant.engine.connect() as plain:
                    assert await plain.scalar(text("SHOW search_path")) == '"$user", public'
        finally:
            async with manager.connect() as connection:
                await connection.execute(text("DROP SCHEMA tenant CASCADE"))

    async def test_nothing_of_a_read_scope_stays_on_the_connection(
        self, settings: DatabaseSettings, manager: DatabaseSessionManager
    ) -> None:
        one = DatabaseSessionManager(
            settings.model_copy(update={"pool": ONE}), session_settings=lambda: {"app.tenant": "7"}
        )
        show = text("SELECT current_setting('app.tenant', true), current_setting($$x$$, true)")
        show = text(
            "SELECT coalesce(current_setting('app.tenant', true), ''), "
            "current_setting('transaction_read_only')"
        )
        async with one:
            for last in ("SELECT 1", "SELECT no_such", "SELECT 1/0", "prepare", "wrong type"):
                with suppress(DBAPIError):
                    async with one.transaction(SUPPORTS, read_only=True) as session:
                        if last == "prepare":
                            driver: Any = await driver_of(session)
                            await driver.prepare("SELECT 1, 2")
                        elif last == "wrong type":
                            await session.execute(select(Note).where(Note.text == object()))
                        else:
                            await session.execute(text(last))
                async with one.engine.connect() as plain:
                    assert tuple((await plain.execute(show)).one()) == ("", "off"), last
                async with one.engine.connect() as plain:
                    isolated = await plain.execution_options(isolation_level="SERIALIZABLE")
                    assert tuple((await isolated.execute(show)).one()) == ("", "off"), last

    async def test_what_was_set_for_a_statement_that_never_ran_ends_with_its_scope(
        self, settings: DatabaseSettings, manager: DatabaseSessionManager
    ) -> None:
        tenant = {"app.tenant": "7"}
        one = DatabaseSessionManager(
            settings.model_copy(update={"pool": ONE}), session_settings=lambda: tenant
        )
        show = "SELECT coalesce(current_setting('app.tenant', true), '')"
        ends: list[Callable[[], Awaitable[str]]] = []

        async def autocommit() -> str:
            async with one.engine.connect() as connection:
                plain = await connection.execution_options(isolation_level="AUTOCOMMIT")
                return str(await plain.scalar(text(show)))

        async def transaction() -> str:
            async with one.transaction() as session:
                return str(await session.scalar(text(show)))

        async def another_read() -> str:
            async with one.transaction(SUPPORTS, read_only=True) as session:
                return str(await session.scalar(text(show)))

        async def by_the_driver() -> str:
            async with one.engine.connect() as connection:
                return str(await (await driver_of(connection)).fetchval(show))

        ends = [autocommit, transaction, another_read, by_the_driver]
        async with one:
            for _ in range(2):
                for end in ends:
                    tenant["app.tenant"] = "7"
                    async with one.transaction(SUPPORTS, read_only=True) as session:
                        driver: Any = await driver_of(session)
                        await driver.prepare(show)
                    tenant.clear()
                    assert await end() == "", end
                    async with one.engine.connect() as connection:
                        driver = await driver_of(connection)
                        await driver.execute("CREATE TEMP TABLE IF NOT EXISTS writable (x int)")

    async def test_a_write_is_refused_after_the_connection_of_a_read_scope_was_lost(
        self, manager: DatabaseSessionManager, postgres: Postgres
    ) -> None:
        async with manager.session() as _:
            pass
        async with manager.transaction(SUPPORTS, read_only=True) as session:
            pid = await session.scalar(text("SELECT pg_backend_pid()"))
            await postgres.execute(f"SELECT pg_terminate_backend({pid}, 5000)")
            with pytest.raises(DBAPIError):
                await session.scalar(text("SELECT 1"))
            await session.rollback()
            with pytest.raises(DBAPIError, match="read-only transaction"):
                await session.execute(insert(Note).values(text="lost"))
        assert await notes(manager) == []


class OldPooler(Network):
    """A network with a pooler that gives the server's session to another client as soon
    as the server is ready outside of a transaction, as PgBouncer did before 1.21: what
    was sent before that has come would be lost, and is noted in `early`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.early: list[bytes] = []
        self._sent: dict[ClientConnection, list[bytes]] = {}

    def ask(self, data: bytes, client: ClientConnection) -> None:
        if data[:1] != b"\0":
            self._sent.setdefault(client, []).extend(messages(data))
        super().ask(data, client)

    def answer(self, data: bytes, client: ClientConnection) -> None:
        loop = asyncio.get_running_loop()  # The next messages come before the answer does.
        loop.call_later(0.005, self._answer, data, client)

    def _answer(self, data: bytes, client: ClientConnection) -> None:
        sent = self._sent.setdefault(client, [])
        for message in messages(data):
            if message[:1] == b"Z" and sent:  # The first one belongs to the connection's start.
                while sent.pop(0)[:1] not in (b"S", b"Q"):
                    pass
                if message[5:] == b"I":
                    self.early += sent
        super().answer(data, client)


UNFINISHED: dict[str, Callable[[Any], Awaitable[object]]] = {
    "fails as it runs": run_in_session("SELECT 1/0"),
    "fails as it is prepared": run_in_session("SELECT no_such"),
    "is only prepared": prepare_only,
    "has a wrong argument": give_a_wrong_argument,
}


class TestOldPooler(OnPostgres):
    @pytest.fixture
    def network(self) -> OldPooler:
        return OldPooler()

    @pytest.mark.parametrize("of_tenant", [False, True], ids=["no settings", "settings"])
    @pytest.mark.parametrize("statement", UNFINISHED.values(), ids=list(UNFINISHED))
    async def test_nothing_is_sent_before_a_session_is_given_back(
        self,
        network: OldPooler,
        open_remote: Open,
        statement: Callable[[Any], Awaitable[object]],
        of_tenant: bool,
    ) -> None:
        async def fail(remote: DatabaseSessionManager, *block: Any, **options: Any) -> None:
            with suppress(DBAPIError):
                async with remote.transaction(*block, **options) as session:
                    await statement(session)

        async def execute_by_hand(remote: DatabaseSessionManager) -> None:
            async with remote.transaction(SUPPORTS, read_only=True) as session:
                await (await driver_of(session)).execute("SELECT 3")

        settings = (lambda: {"app.tenant": "7"}) if of_tenant else None
        async with open_remote(settings, pool=ONE) as remote:
            for follow in (write_two, read, read_snapshot, execute_by_hand) * 2:
                await fail(remote, SUPPORTS, read_only=True)
                await follow(remote)
                await fail(remote)
                await follow(remote)
                assert network.early == [], follow.__name__


# The parser

BOUND = b"2\0\0\0\x04"


class Recorder(asyncio.Protocol):
    def __init__(self) -> None:
        self.received = b""

    def data_received(self, data: bytes) -> None:
        self.received += data


class StubTransport:
    """Holds a protocol, and counts what is written."""

    def __init__(self, protocol: Any) -> None:
        self.protocol, self.written = protocol, b""

    def set_protocol(self, protocol: Any) -> None:
        self.protocol = protocol

    def write(self, data: bytes) -> None:
        self.written += data


class TestParser(OnPostgres):
    async def test_answers_cut_anywhere_are_told_apart(
        self, network: Network, open_remote: Open
    ) -> None:
        async with open_remote(pool=ONE) as remote:
            settings = {"TimeZone": "Asia/Tokyo", "app.tenant": "7"}
            for _ in range(2):
                network.answers = b""
                async with remote.transaction(settings=settings) as session:
                    await session.execute(text("SELECT 'x' || 1"))
                    stream = network.answers
        kinds = b"".join(message[:1] for message in messages(stream))
        assert kinds == b"12C12DC2DCSZ"
        notice = b"N\0\0\0\x05\0"
        status = next(each for each in messages(stream) if each[:1] == b"S")
        stream = notice + stream.replace(BOUND, BOUND + status)
        rest = stream[stream.rindex(BOUND) :]
        for size in range(1, len(stream) + 1):
            recorder = Recorder()
            transport = StubTransport(recorder)
            pipeline = Pipeline(recorder, transport)
            pipeline.hold("BEGIN;")
            pipeline.hold("SELECT set_config($1, $2, true)", "a", "b")
            pipeline.release()
            for start in range(0, len(stream), size):
                transport.protocol.data_received(stream[start : start + size])
            assert recorder.received == notice + status * 2 + rest
            transport.protocol.data_received(b"more")
            assert recorder.received.endswith(b"more")
            assert not pipeline.unanswered

    @pytest.mark.parametrize("ends_in_sync", [True, False])
    def test_an_error_cut_anywhere_is_handed_on_once(self, ends_in_sync: bool) -> None:
        error = b"E" + struct.pack("!I", 4 + 8) + b"SERROR\0\0"
        done = b"1\0\0\0\x042\0\0\0\x04C\0\0\0\x0aBEGIN\0"
        ready = b"Z\0\0\0\x05E"
        stream = done + error + ready
        for size in range(1, len(stream) + 1):
            recorder = Recorder()
            transport = StubTransport(recorder)
            pipeline = Pipeline(recorder, transport)
            pipeline.hold("BEGIN;")
            pipeline.hold("SAVEPOINT a")
            pipeline.release(ends_in_sync=ends_in_sync)
            transport.write(b"what follows")
            assert transport.written.endswith(b"what follows")
            written = len(transport.written)
            for start in range(0, len(stream), size):
                transport.protocol.data_received(stream[start : start + size])
            assert recorder.received == error + ready
            assert pipeline.failed == ("SAVEPOINT a",)
            assert transport.written[written:] == (b"" if ends_in_sync else b"S\0\0\0\x04")


# Cancellations


class TestCancellations(OnPostgres):
    @BOTH
    async def test_a_begin_cancelled_by_the_user_leaves_a_clean_connection(
        self,
        network: Network,
        open_remote: Open,
        manager: DatabaseSessionManager,
        pipeline: bool,
    ) -> None:
        """The server takes the BEGIN for something slow."""
        async with open_remote(pool=ONE, pipeline=pipeline) as remote:
            await write(remote, "warm")
            network.replaces = {b"BEGIN;": b"SELECT pg_sleep(2);"}
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.1):
                    await write(remote, "lost")
            async with remote.connect() as connection:
                driver: Any = await driver_of(connection)
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(0.1), driver.transaction():
                        await driver.execute(INSERT, "lost")
                network.replaces = {}
                if not driver.is_closed():
                    async with driver.transaction():
                        await driver.execute(INSERT, "driver")
                    assert await driver.fetchval("SELECT 7") == 7
                    assert await driver.fetchval("SELECT 8") == 8
            await write(remote, "kept")
        expected = ["driver", "kept", "warm"] if pipeline else ["kept", "warm"]
        assert await notes(manager) == expected

    @pytest.mark.parametrize("by", ["deadline", "cancellation"])
    async def test_a_savepoint_struck_by_a_cancellation_costs_the_transaction_and_says_so(
        self, network: Network, open_remote: Open, manager: DatabaseSessionManager, by: str
    ) -> None:
        async with open_remote(pool=ONE) as remote:
            with pytest.raises(
                UnexpectedRollbackError, match="the whole transaction was rolled back"
            ):
                async with remote.transaction() as session:
                    await session.execute(insert(Note).values(text="lost"))
                    network.replaces = {b"SAVEPOINT": b"SELECT pg_sleep(9) AS"}
                    with suppress(TimeoutError):
                        if by == "deadline":
                            async with remote.transaction(NESTED, timeout=0.1):
                                await session.execute(insert(Note).values(text="lost too"))
                        else:
                            async with asyncio.timeout(0.1), remote.transaction(NESTED):
                                await session.execute(insert(Note).values(text="lost too"))
                    network.replaces = {}
                    await session.execute(insert(Note).values(text="lost as well"))
            await write(remote, "kept")
        assert await notes(manager) == ["kept"]

    async def test_a_release_struck_by_a_cancellation_costs_the_savepoint_around_it(
        self, network: Network, open_remote: Open, manager: DatabaseSessionManager
    ) -> None:
        async with open_remote(pool=ONE) as remote:
            async with remote.transaction() as session:
                await session.execute(insert(Note).values(text="kept"))
                with suppress(TimeoutError):
                    async with remote.transaction(NESTED, timeout=0.3):
                        network.replaces = {b"RELEASE SAVEPOINT": b"SELECT pg_sleep(9) AS"}
                        async with remote.transaction(NESTED):
                            await session.execute(insert(Note).values(text="lost"))
                        await session.execute(insert(Note).values(text="lost too"))
                network.replaces = {}
                await session.execute(insert(Note).values(text="kept too"))
            await write(remote, "kept at last")
        assert await notes(manager) == ["kept", "kept at last", "kept too"]

    async def test_a_release_and_the_next_savepoint_struck_together_cost_the_transaction(
        self, network: Network, open_remote: Open, manager: DatabaseSessionManager
    ) -> None:
        async with open_remote(pool=ONE) as remote:
            with pytest.raises(UnexpectedRollbackError, match="the whole transaction"):
                async with remote.transaction() as session:
                    network.replaces = {b"RELEASE SAVEPOINT": b"SELECT pg_sleep(9) AS"}
                    async with remote.transaction(NESTED):
                        await session.execute(insert(Note).values(text="lost"))
                    with suppress(TimeoutError):
                        async with remote.transaction(NESTED, timeout=0.1):
                            await session.execute(insert(Note).values(text="lost too"))
                    network.replaces = {}
                    await session.execute(insert(Note).values(text="lost as well"))
            await write(remote, "kept")
        assert await notes(manager) == ["kept"]

    @BOTH
    @pytest.mark.parametrize("use", [execute, fetch, copy_in, executemany])
    async def test_a_use_of_the_driver_cancelled_at_any_await_disturbs_no_later_one(
        self, open_remote: Open, manager: DatabaseSessionManager, pipeline: bool, use: Use
    ) -> None:
        async with open_remote(pool=ONE, pipeline=pipeline) as remote:

            async def work() -> None:
                async with remote.engine.connect() as connection:
                    driver: Any = await driver_of(connection)
                    try:
                        async with driver.transaction():
                            await use(driver)
                            raise ZeroDivisionError
                    except ZeroDivisionError:
                        pass
                    except BaseException:
                        if not driver.is_closed():
                            async with asyncio.timeout(5):
                                assert await driver.fetchval("SELECT 7") == 7
                                assert await driver.execute("SELECT 8, 9") == "SELECT 1"
                        raise

            async for _ in each_cancellation(work):
                assert await notes(manager) == []
            await write(remote, "kept")
        assert await notes(manager) == ["kept"]


# Ways to the server


@asynccontextmanager
async def tls_proxy(server: Postgres, directory: Path) -> AsyncIterator[int]:
    """Yield a port that takes TLS, for a server that does not."""
    certificate, key = directory / "certificate.pem", directory / "key.pem"
    subprocess.run(  # noqa: ASYNC221
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1"),
            *("-subj", "/CN=localhost", "-keyout", str(key), "-out", str(certificate)),
        ],
        check=True,
        capture_output=True,
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    carriers: set[asyncio.Task[None]] = set()

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
        writer.close()

    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(8)  # the question for TLS
        writer.write(b"S")
        await writer.start_tls(context)
        from_server, to_server = await asyncio.open_unix_connection(f"{server.host}/.s.PGSQL.5432")
        for task in (carry(reader, to_server), carry(from_server, writer)):
            carriers.add(asyncio.create_task(task))

    async with await asyncio.start_server(connect, "127.0.0.1", 0) as proxy:
        try:
            yield proxy.sockets[0].getsockname()[1]
        finally:
            for carrier in carriers:
                carrier.cancel()
            await asyncio.gather(*carriers, return_exceptions=True)


async def work_of_all_kinds(url: str) -> None:
    """Write, read, nest and fail, through the driver too."""
    async with DatabaseSessionManager(
        DatabaseSettings(url=url, pool=ONE, pipeline=True)
    ) as manager:
        async with manager.connect() as connection:
            await connection.run_sync(manager.metadata.drop_all)
            await connection.run_sync(manager.metadata.create_all)
        for name in ("a", "b"):
            await write(manager, name)
            with pytest.raises(DBAPIError, match="invalid value"):
                async with manager.transaction(settings=REFUSED) as session:
                    await session.execute(insert(Note).values(text="lost"))
            async with manager.transaction() as session:
                async with manager.transaction(NESTED):
                    session.add(Note(text=name * 2))
                driver: Any = await driver_of(session)
                assert await many_rows(driver) == 2000
            with pytest.raises(TimeoutError):
                async with manager.transaction(timeout=0.1) as session:
                    await session.execute(text("SELECT pg_sleep(9)"))
            await read_snapshot(manager)
        assert await read(manager) == ["a", "aa", "b", "bb"]


class TestWays(OnPostgres):
    async def test_it_works_through_tls(
        self, postgres: Postgres, database_url: str, tmp_path: Path
    ) -> None:
        async with tls_proxy(postgres, tmp_path) as port:
            url = at_port(port, database_url).replace("disable", "require")
            await work_of_all_kinds(url)

    @pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
    @pytest.mark.parametrize("way", ["a Unix socket", "TCP"])
    def test_it_works_on_each_loop_and_socket(
        self, postgres: Postgres, database_url_of_loops: str, new_loop: Any, way: str
    ) -> None:
        async def work() -> None:
            if way == "TCP":
                async with Network().open(postgres.host) as port:
                    await work_of_all_kinds(at_port(port, database_url_of_loops))
            else:
                await work_of_all_kinds(database_url_of_loops)

        with asyncio.Runner(loop_factory=new_loop) as runner:
            runner.run(work())

    @pytest.fixture
    def database_url_of_loops(self, postgres: Postgres) -> Iterator[str]:
        asyncio.run(postgres.execute("CREATE DATABASE loops"))
        yield postgres.url("loops")
        asyncio.run(postgres.execute("DROP DATABASE loops WITH (FORCE)"))

    async def test_it_works_in_a_sandbox(self, manager: DatabaseSessionManager) -> None:
        async with sandbox(manager):
            await write(manager)
            async with manager.transaction(settings={"app.tenant": "7"}) as session:
                async with manager.transaction(NESTED):
                    session.add(Note(text="b"))
                assert await session.scalar(text("SHOW app.tenant")) == "7"
            with suppress(DBAPIError):
                async with manager.transaction(settings=REFUSED) as session:
                    await session.execute(insert(Note).values(text="lost"))
            with pytest.raises(DBAPIError, match="read-only"):
                async with manager.transaction(SUPPORTS, read_only=True) as session:
                    await session.execute(insert(Note).values(text="lost"))
            assert await read(manager) == ["a", "b"]
        assert await notes(manager) == []

    async def test_nothing_keeps_a_connection_alive(self, settings: DatabaseSettings) -> None:
        with without_garbage_collector():
            async with DatabaseSessionManager(settings) as manager:
                async with manager.transaction(settings={"app.tenant": "7"}) as session:
                    async with session.begin_nested():
                        await session.execute(text("SELECT 1"))
                    living = parts_of(await driver_of(session))
                async with manager.transaction(SUPPORTS, read_only=True) as session:
                    await session.execute(text("SELECT 1"))
            del manager, session
            assert await dead(living)

    @pytest.mark.parametrize("lost", ["killed", "terminated", "closed"])
    async def test_nothing_keeps_a_connection_alive_that_is_lost_with_an_answer_outstanding(
        self, settings: DatabaseSettings, postgres: Postgres, lost: str
    ) -> None:
        with without_garbage_collector():
            async with DatabaseSessionManager(settings) as manager:
                async with manager.engine.connect() as connection:
                    driver: Any = await driver_of(connection)
                    statement = await driver.prepare("SELECT pg_sleep($1)")
                    await driver.execute("BEGIN;")
                    waiting = asyncio.create_task(statement.fetch(2.0))
                    del statement
                    async with asyncio.timeout(5):
                        while not driver.pipeline.unanswered:
                            await asyncio.sleep(0)
                    living = parts_of(driver)
                    if lost == "killed":
                        pid = driver.get_server_pid()
                        await postgres.execute(f"SELECT pg_terminate_backend({pid}, 5000)")
                    elif lost == "closed":
                        await driver.close()
                    else:
                        driver.terminate()
                    async with asyncio.timeout(5):
                        while not driver.is_closed():
                            await asyncio.sleep(0.01)
                    await asyncio.gather(waiting, return_exceptions=True)
                    await connection.invalidate()
                    del driver, waiting
                del connection
            del manager
            assert await dead(living)


@contextmanager
def without_garbage_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def parts_of(driver: Any) -> list[weakref.ref[Any]]:
    """Return what may die. The transport is in a cycle of asyncio's own."""
    protocol = driver._protocol
    return [weakref.ref(each) for each in (driver, driver.pipeline, protocol, protocol._protocol)]


async def dead(living: list[weakref.ref[Any]]) -> bool:
    """Wait until they are dead: the loop calls what belongs to a closed socket."""
    with suppress(TimeoutError):
        async with asyncio.timeout(1):
            while any(each() is not None for each in living):
                await asyncio.sleep(0.01)
    return [each() for each in living] == [None] * len(living)


# Strikes

Work = Callable[[DatabaseSessionManager], Awaitable[object]]


async def two_writes(manager: DatabaseSessionManager) -> None:
    async with manager.transaction(timeout=0.4) as session:
        await session.execute(insert(Note).values(text="a"))
        await session.execute(insert(Note).values(text="b"))


async def nested_writes(manager: DatabaseSessionManager) -> None:
    async with manager.transaction(timeout=0.4) as session:
        await session.execute(insert(Note).values(text="a"))
        async with manager.transaction(NESTED):
            await session.execute(insert(Note).values(text="b"))


async def tenants_write(manager: DatabaseSessionManager) -> None:
    settings = {"app.tenant": "7"}
    async with manager.transaction(timeout=0.4, settings=settings) as session:
        await session.execute(insert(Note).values(text="a"))
        await session.execute(insert(Note).values(text="b"))


async def timed_read(manager: DatabaseSessionManager) -> None:
    async with manager.transaction(SUPPORTS, read_only=True, timeout=0.4) as session:
        await session.scalars(select(Note.text))


async def cut(client: ClientConnection) -> None:
    client.to_client.close()
    client.to_server.close()


class TestStrikes(OnPostgres):
    """At each point between two messages."""

    @pytest.mark.parametrize(
        "strike",
        [
            "cut",
            pytest.param("killed", marks=pytest.mark.long),
            pytest.param("silence", marks=pytest.mark.long),
        ],
    )
    @pytest.mark.parametrize("work", [two_writes, nested_writes, tenants_write, timed_read])
    async def test_a_strike_between_any_two_messages_ends_as_it_does_without_a_pipeline(
        self,
        network: Network,
        open_remote: Open,
        manager: DatabaseSessionManager,
        postgres: Postgres,
        work: Work,
        strike: str,
    ) -> None:
        async def kill(client: ClientConnection) -> None:
            await postgres.execute(
                "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity "
                "WHERE application_name = 'struck'"
            )

        async def silence(client: ClientConnection) -> None:
            network.swallow_what_is_open()

        network.strike = {"cut": cut, "killed": kill, "silence": silence}[strike]
        ends: dict[bool, set[tuple[str, int]]] = {True: set(), False: set()}
        for pipeline in ends:
            for at in range(1, 60):
                network.strike_nothing()
                async with open_remote(
                    pool=ONE,
                    pipeline=pipeline,
                    resolve_commits=False,  # It needs the pipeline.
                    application_name="struck",
                    connect_timeout=2,
                ) as remote:
                    if at % 2:  # warm
                        await read(remote)
                    network.strikes_at = at
                    end = await outcome(work(remote))
                    network.strikes_at = 0
                    kept = len(await notes(manager))
                    assert kept in (0, 2)
                    assert end != "hang"
                    ends[pipeline].add((end, kept))
                await manager_is_emptied(manager)
                if not network.has_struck:
                    break
            else:
                raise AssertionError("it never ends")
        assert ends[True] == ends[False]


async def manager_is_emptied(manager: DatabaseSessionManager) -> None:
    async with manager.connect() as connection:
        await connection.execute(text("TRUNCATE note"))
