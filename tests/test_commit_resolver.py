"""Look up the outcome of a COMMIT whose answer was lost."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from random import Random

import pytest
from sqlalchemy import func, insert, select, text
from sqlalchemy.exc import DBAPIError

from sessionwire import (
    CommitOutcomeUnknownError,
    CurrentSession,
    DatabaseSessionManager,
    PoolSettings,
    Propagation,
    is_retryable,
)

from .conftest import Postgres, assert_all_returned, notes
from .models import Note
from .postgres import FaultyNetwork, OnFaultyNetwork, through, until
from .proxy import ClientConnection

pytestmark = pytest.mark.pipeline_only("the id is asked for by the pipeline")

COMMIT = b"Q\0\0\0\x0cCOMMIT;\0"
ANSWER_TO_QUESTION = b"Z\0\0\0\x05T"  # ReadyForQuery, in a transaction: its end
GOODBYE = b"E\0\0\0\x23SFATAL\0VFATAL\0C57P01\0Mgoodbye\0\0"
LOOK_UP = b"'the server is in recovery'"

# What is lost: the share of the question and the COMMIT that reaches the server, and the
# end of the answers that reach the client.
LOSSES = {
    "the question": (0.0, None),
    "half of the question": (0.4, None),
    "both answers": (1.0, None),
    "half of the answer to the question": (1.0, b"2\0\0\0\x04"),  # up to BindComplete
    "the COMMIT": (-len(COMMIT), ANSWER_TO_QUESTION),
    "half of the COMMIT": (-len(COMMIT) // 2, ANSWER_TO_QUESTION),
    "the answer to the COMMIT": (1.0, ANSWER_TO_QUESTION),
    "half of the answer to the COMMIT": (1.0, b"COMM"),
}
WITHOUT_ID, WITH_ID = list(LOSSES)[:4], list(LOSSES)[4:]


class LosingNetwork(FaultyNetwork):
    """It loses what belongs to the next COMMIT, then the connection."""

    def __init__(self) -> None:
        super().__init__()
        self.loses: str | None = None
        self.is_silent = False  # The connection stays open.
        self.looking: set[ClientConnection] = set()  # the connections that have looked up
        self._losing: dict[ClientConnection, bytes | None] = {}

    def ask(self, data: bytes, client: ClientConnection) -> None:
        if LOOK_UP in data:
            self.looking.add(client)
        if self.loses is None or COMMIT not in data:
            super().ask(data, client)
            return
        share, self._losing[client] = LOSSES[self.loses]
        self.loses = None
        length = len(data) + share if share < 0 else len(data) * share
        super().ask(data[: int(length)], client)
        if self._losing[client] is None and share < 1:
            self._lose(client)

    def answer(self, data: bytes, client: ClientConnection) -> None:
        end = self._losing.get(client, b"")
        if end == b"":
            super().answer(data, client)
        elif end is None:
            self._lose(client)
        elif (at := data.find(end)) >= 0:
            super().answer(data[: at + len(end)], client)
            self._losing[client] = None
            self._lose(client)
        else:
            super().answer(data, client)

    def _lose(self, client: ClientConnection) -> None:
        if self.is_silent:
            self._dead.add(client)
        else:
            client.to_client.transport.abort()
            client.to_server.close()


async def in_a_transaction(manager: DatabaseSessionManager, note: str) -> None:
    async with manager.transaction() as session:
        session.add(Note(text=note))


async def in_a_connection(manager: DatabaseSessionManager, note: str) -> None:
    async with manager.connect() as connection:
        await connection.execute(insert(Note).values(text=note))


async def in_a_session(manager: DatabaseSessionManager, note: str) -> None:
    async with manager.session() as session:
        session.add(Note(text=note))
        await session.commit()


async def in_a_session_that_begins(manager: DatabaseSessionManager, note: str) -> None:
    async with manager.session() as session, session.begin():
        session.add(Note(text=note))


async def by_the_engine(manager: DatabaseSessionManager, note: str) -> None:
    async with manager.engine.begin() as connection:
        await connection.execute(insert(Note).values(text=note))


Way = Callable[[DatabaseSessionManager, str], Awaitable[None]]
WAYS = [in_a_transaction, in_a_connection, in_a_session, in_a_session_that_begins, by_the_engine]


def each_way(losses: list[str], *, for_all_ways: list[str]) -> list[tuple[Way, str]]:
    """Combine all losses with one way, and some with all ways."""
    return [(way, loses) for way in WAYS for loses in (losses if way is WAYS[0] else for_all_ways)]


class OnLosingNetwork(OnFaultyNetwork):
    timeout = 0.6

    @pytest.fixture
    def network(self) -> LosingNetwork:
        return LosingNetwork()


class TestLostAnswers(OnLosingNetwork):
    @pytest.mark.parametrize(
        ("way", "loses"),
        each_way(WITH_ID, for_all_ways=["the COMMIT", "the answer to the COMMIT"]),
    )
    async def test_an_outcome_is_settled_if_the_id_had_arrived(
        self,
        remote: DatabaseSessionManager,
        manager: DatabaseSessionManager,
        network: LosingNetwork,
        way: Way,
        loses: str,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        network.loses = loses
        if "answer" in loses:
            await way(remote, "kept")
            assert await notes(manager) == ["kept"]
        else:
            with pytest.raises(DBAPIError, match="not committed") as raised:
                await way(remote, "lost")
            assert is_retryable(raised.value)
            assert await notes(manager) == []
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert "the answer to a COMMIT was lost, and looked up: transaction " in caplog.text

    @pytest.mark.parametrize(("way", "loses"), each_way(WITHOUT_ID, for_all_ways=["both answers"]))
    async def test_an_outcome_is_unknown_if_the_id_had_not_arrived(
        self, remote: DatabaseSessionManager, network: LosingNetwork, way: Way, loses: str
    ) -> None:
        network.loses = loses
        with pytest.raises(CommitOutcomeUnknownError) as raised:
            await way(remote, "who knows")
        assert raised.value.transaction_id is None
        assert raised.value.reason == "the id of the transaction had not arrived"
        assert not network.looking

    @pytest.mark.parametrize(
        "loses", ["the question", "both answers", "the COMMIT", "the answer to the COMMIT"]
    )
    async def test_a_silent_network_is_given_up_after_half_of_the_commit_timeout(
        self,
        remote: DatabaseSessionManager,
        manager: DatabaseSessionManager,
        network: LosingNetwork,
        loses: str,
    ) -> None:
        network.loses, network.is_silent = loses, True
        began = asyncio.get_running_loop().time()
        if loses in WITHOUT_ID:
            with pytest.raises(CommitOutcomeUnknownError):
                await in_a_transaction(remote, "who knows")
        elif "answer" in loses:
            await in_a_transaction(remote, "kept")
            assert await notes(manager) == ["kept"]
        else:
            with pytest.raises(DBAPIError, match="not committed"):
                await in_a_transaction(remote, "lost")
            assert await notes(manager) == []
        assert self.timeout / 2 <= asyncio.get_running_loop().time() - began < self.timeout * 1.5

    @pytest.mark.parametrize("loses", ["the answer to the COMMIT", "the COMMIT"])
    async def test_hooks_and_retries_follow_the_settled_outcome(
        self,
        remote: DatabaseSessionManager,
        manager: DatabaseSessionManager,
        network: LosingNetwork,
        loses: str,
    ) -> None:
        ran: list[str] = []

        async def work() -> None:
            ran.append("work")
            remote.transaction.on_commit(lambda: ran.append("committed"))
            remote.transaction.on_rollback(lambda: ran.append("rolled back"))
            CurrentSession(remote).add(Note(text="kept"))

        network.loses = loses
        await remote.transaction.run(work, retries=1)
        attempts = 1 if "answer" in loses else 2
        assert ran == ["work"] * attempts + ["committed"]
        assert await notes(manager) == ["kept"]

    async def test_the_hooks_of_a_bare_session_run_after_a_settled_commit(
        self, remote: DatabaseSessionManager, network: LosingNetwork
    ) -> None:
        ran: list[str] = []
        network.loses = "the answer to the COMMIT"
        async with remote.session() as session:
            session.add(Note(text="kept"))
            remote.transaction.on_commit(lambda: ran.append("committed"))
            await session.commit()
            assert ran == ["committed"]
            assert await session.scalar(select(Note.text)) == "kept"

    async def test_a_cancelled_block_tells_the_settled_outcome_to_its_hooks(
        self,
        remote: DatabaseSessionManager,
        manager: DatabaseSessionManager,
        network: LosingNetwork,
    ) -> None:
        ran: list[str] = []

        async def work() -> None:
            async with remote.transaction() as session:
                remote.transaction.on_commit(lambda: ran.append("committed"))
                remote.transaction.on_rollback(lambda: ran.append("rolled back"))
                session.add(Note(text="kept"))
                await session.flush()
                network.loses, network.is_silent = "the answer to the COMMIT", True

        async def sent() -> bool:
            return COMMIT in network.asked

        task = asyncio.create_task(work())
        await until(sent)
        task.cancel()
        with pytest.raises(asyncio.CancelledError) as raised:
            await task
        assert raised.value.__cause__ is None
        assert ran == ["committed"]
        assert await notes(manager) == ["kept"]

    async def test_nothing_is_looked_up_if_that_is_turned_off(
        self,
        network: LosingNetwork,
        postgres: Postgres,
        database_url: str,
        manager: DatabaseSessionManager,
    ) -> None:
        async with through(network, postgres, database_url, resolve_commits=False) as remote:
            network.loses = "both answers"
            with pytest.raises(CommitOutcomeUnknownError) as raised:
                async with remote.transaction() as session:
                    await session.execute(insert(Note).values(text="kept"))
            assert raised.value.reason == "the connection was lost before its answer came"
        assert not network.looking
        assert await notes(manager) == ["kept"]

    async def test_look_ups_share_one_connection_which_is_closed_after_them(
        self,
        network: LosingNetwork,
        postgres: Postgres,
        database_url: str,
        manager: DatabaseSessionManager,
    ) -> None:
        pool = PoolSettings(size=10, max_overflow=0)
        async with through(network, postgres, database_url, pool=pool) as remote:
            # `loses` is for one COMMIT.
            network.cuts_answer_to = None
            ready = asyncio.Barrier(10)

            async def work(number: int) -> None:
                async with remote.transaction() as session:
                    session.add(Note(text=f"{number}"))
                    await session.flush()
                    await ready.wait()
                    network.loses = "the answer to the COMMIT"

            await asyncio.gather(*map(work, range(10)))
            looked_up = len(network.looking)
            await assert_all_returned(remote)
            # The others had their answers.
            assert looked_up == 1

            async def closed() -> bool:
                return not network.looking & network.clients

            await until(closed)
        assert len(await notes(manager)) == 10

    async def test_nothing_is_committed_if_the_server_says_goodbye_before_the_commit(
        self,
        remote: DatabaseSessionManager,
        manager: DatabaseSessionManager,
        network: LosingNetwork,
    ) -> None:
        received: list[bytes] = []

        async def has_come() -> bool:
            return bool(received)

        with pytest.raises(DBAPIError, match="ended the connection before COMMIT") as raised:
            async with remote.transaction() as session:
                await session.execute(insert(Note).values(text="lost"))
                connection = await session.connection()
                pipeline = (await connection.get_raw_connection()).driver_connection.pipeline
                receive = pipeline.data_received

                def note(data: bytes) -> None:
                    receive(data)
                    received.append(data)

                pipeline.data_received = note
                (client,) = network.clients
                client.to_client.write(GOODBYE)
                await until(has_come)
        assert is_retryable(raised.value)
        assert await notes(manager) == []


class TestWithoutWrites(OnLosingNetwork):
    """No id was assigned before the COMMIT."""

    @pytest.mark.parametrize(
        "statement",
        [select(Note.text), select(func.count(Note.id)), text("SELECT 1")],
        ids=["columns", "count", "text"],
    )
    async def test_a_transaction_that_has_surely_only_read_ends_well(
        self, remote: DatabaseSessionManager, network: LosingNetwork, statement: object
    ) -> None:
        async with remote.transaction() as session:
            await session.execute(statement)  # type: ignore[call-overload]
            network.loses = "the answer to the COMMIT"
        assert not network.looking

    async def test_savepoints_without_writes_end_well(
        self, remote: DatabaseSessionManager, network: LosingNetwork
    ) -> None:
        async with remote.transaction() as session:
            async with remote.transaction(Propagation.NESTED):
                assert await session.scalar(select(func.count(Note.id))) == 0
            async with remote.transaction(Propagation.NESTED):
                remote.transaction.set_rollback_only()
            network.loses = "the answer to the COMMIT"

    @pytest.mark.parametrize(
        "statement",
        [text("NOTIFY changed"), select(func.pg_notify("changed", ""))],
        ids=["NOTIFY", "pg_notify()"],
    )
    async def test_a_transaction_that_may_write_in_its_commit_has_an_unknown_outcome(
        self, remote: DatabaseSessionManager, network: LosingNetwork, statement: object
    ) -> None:
        with pytest.raises(CommitOutcomeUnknownError, match="may have written during the COMMIT"):
            async with remote.transaction() as session:
                await session.execute(statement)  # type: ignore[call-overload]
                network.loses = "the answer to the COMMIT"


class TestMany(OnLosingNetwork):
    @pytest.mark.long
    async def test_of_500_commits_whose_answer_is_lost_none_is_told_wrongly(
        self,
        remote: DatabaseSessionManager,
        manager: DatabaseSessionManager,
        network: LosingNetwork,
    ) -> None:
        random, told, refused, unknown = Random(1), set[str](), set[str](), set[str]()
        for number in range(500):
            note = f"{number:03}"
            loses = random.choice(list(LOSSES))
            network.is_silent = random.random() < 0.02
            network.loses = loses
            ran: list[str] = []

            async def write(note: str = note, ran: list[str] = ran) -> None:
                remote.transaction.on_commit(lambda: ran.append("committed"))
                remote.transaction.on_rollback(lambda: ran.append("rolled back"))
                CurrentSession(remote).add(Note(text=note))

            error: object = None
            try:
                await remote.transaction.run(write)
                told.add(note)
            except DBAPIError:
                refused.add(note)
            except CommitOutcomeUnknownError as raised:
                error = raised
            if loses in WITHOUT_ID:
                assert isinstance(error, CommitOutcomeUnknownError), loses
                assert error.reason == "the id of the transaction had not arrived"
                unknown.add(note)
            expected = "committed" if note in told else "rolled back" if note in refused else None
            assert ran == ([expected] if expected else [])
        kept = set(await notes(manager))
        assert told <= kept <= told | unknown
        assert len(told | refused | unknown) == 500
        assert not refused & kept
