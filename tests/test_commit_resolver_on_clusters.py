"""Outcomes of commits on servers that crash, wait, are replaced or are shared."""

from __future__ import annotations

import asyncio
import random
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import asyncpg
import pytest
import uvloop
from sqlalchemy import func, insert, select, text
from sqlalchemy.exc import DBAPIError

from sessionwire import (
    CommitOutcomeUnknownError,
    CurrentSession,
    DatabaseSessionManager,
    DatabaseSettings,
    PoolSettings,
    Propagation,
    SessionwireError,
    is_retryable,
)
from sessionwire.testing._servers import new_directory

from .cluster import SERVER_USER, Server, cluster, server
from .conftest import DATABASE, Postgres, assert_all_returned, notes
from .models import Note
from .pgbouncer import DEBIAN_12, NEWEST, pgbouncer
from .postgres import FaultyNetwork, OnPostgres, at_port, run_at_commit, through, until
from .proxy import ClientConnection

pytestmark = [pytest.mark.long, pytest.mark.pipeline_only("the id is asked for by the pipeline")]

COMMIT = b"Q\0\0\0\x0cCOMMIT;\0"
ASKED_FOR_ID = b"pg_current_xact_id_if_assigned(),"
QUESTION_ANSWERED = b"Z\0\0\0\x05T"  # ReadyForQuery in a transaction
WAITING = "SELECT pid FROM pg_stat_activity WHERE wait_event = 'SyncRep' ORDER BY backend_start"
CLIENTS = (
    "SELECT count(*) FROM pg_stat_activity "
    "WHERE backend_type = 'client backend' AND application_name = 'shop'"
)
TIMEOUT = 4.0  # seconds for a commit with its look-up


class Network(FaultyNetwork):
    """It keeps back what a server says to COMMITs, or the COMMITs themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.keeps_answers = 0  # to the next so many COMMITs
        self.keeps_commits = 0  # the next so many; what is ahead of them arrives
        self.cuts = True  # the connection; otherwise it stays silent
        self.is_away = False  # It refuses new connections, and counts them.
        self.refused = 0
        self.sent = b""  # all that the clients have sent
        self.carried_out = 0  # the COMMITs whose answers were kept back
        self.looking: set[ClientConnection] = set()  # the connections of look-ups
        self._answers: dict[ClientConnection, bytes] = {}
        self._silent: set[ClientConnection] = set()

    def ask(self, data: bytes, client: ClientConnection) -> None:
        self.sent += data
        if b"pg_control_checkpoint" in data:
            self.looking.add(client)
        if self.is_away and client not in self._answers:
            self.refused += 1
            client.to_client.transport.abort()
            return
        if COMMIT in data and client not in self._answers:
            if self.keeps_commits:
                self.keeps_commits -= 1
                self._answers[client] = b""
                self._silent.add(client)
                data = data[: data.index(COMMIT)]
            elif self.keeps_answers:
                self.keeps_answers -= 1
                self._answers[client] = b""
        super().ask(data, client)

    def answer(self, data: bytes, client: ClientConnection) -> None:
        if client not in self._answers:
            super().answer(data, client)
            return
        before, all_of_it = self._answers[client], self._answers[client] + data
        self._answers[client] = all_of_it
        end = all_of_it.find(QUESTION_ANSWERED) + len(QUESTION_ANSWERED)
        if end < len(QUESTION_ANSWERED):
            end = 0
        super().answer(all_of_it[len(before) : max(end, len(before))], client)
        if end and client in self._silent:
            self.cut(client)
        elif len(all_of_it) > end and b"COMMIT\0" in all_of_it[end:]:
            self.carried_out += 1
            if self.cuts:
                self.cut(client)

    def cut(self, *clients: ClientConnection) -> None:
        """Cut these connections, or those on which an answer is kept back."""
        for client in clients or [each for each in self._answers if each in self.clients]:
            client.to_client.close()
            client.to_server.close()

    async def is_looking(self) -> bool:
        """Tell whether a look-up has met the network while it was away."""
        return self.refused > 0

    def _start(self, carry: Coroutine[None, None, None]) -> None:
        async def until_cut() -> None:
            with suppress(OSError):
                await carry

        super()._start(until_cut())


@asynccontextmanager
async def shop(
    network: Network, primary: Postgres, url: str | None = None, **settings: Any
) -> AsyncIterator[DatabaseSessionManager]:
    """Open a manager behind a network, with empty tables."""
    all_settings = {"commit_timeout": TIMEOUT, "application_name": "shop", **settings}
    url = url or primary.url("postgres")
    async with through(network, primary, url, **all_settings) as remote:
        async with remote.connect() as connection:
            await remote.create_all(connection)
        yield remote
        await assert_all_returned(remote)


class Work:
    """It writes a note, and tells what the hooks are told."""

    def __init__(self, remote: DatabaseSessionManager, note: str = "note") -> None:
        self._remote, self._note = remote, note
        self.ran: list[str] = []

    async def __call__(self) -> None:
        self.ran.append("work")
        self._remote.transaction.on_commit(lambda: self.ran.append("committed"))
        self._remote.transaction.on_rollback(lambda: self.ran.append("rolled back"))
        CurrentSession(self._remote).add(Note(text=self._note))

    def run(self, retries: int = 0) -> asyncio.Task[None]:
        return asyncio.create_task(self._remote.transaction.run(self, retries=retries))


async def notes_on(primary: Postgres, database: str = "postgres") -> list[str]:
    found = await primary.execute("SELECT text FROM note ORDER BY text", database=database)
    return [note for (note,) in found]


async def flush_log(primary: Postgres) -> None:
    await primary.execute("SELECT pg_logical_emit_message(true, 'test', '')")


def has_carried_out(network: Network, count: int = 1) -> Callable[[], Awaitable[bool]]:
    async def holds() -> bool:
        return network.carried_out >= count

    return holds


def commits_on(primary: Postgres) -> Callable[[], Awaitable[object]]:
    running = "SELECT 1 FROM pg_stat_activity WHERE state = 'active' AND query LIKE 'COMMIT%'"
    return lambda: primary.execute(running)


async def nobody_is_left(primary: Postgres, but: int = 0) -> None:
    """Wait until the manager has so many connections only."""

    async def holds() -> bool:
        nonlocal left
        [(left,)] = await primary.execute(CLIENTS)
        return left == but

    left = -1
    with suppress(TimeoutError):
        await until(holds)
    assert left == but


def url_of_hosts(port: int | None, other: int | None, query: str = "") -> str:
    hosts = f"127.0.0.1:{port},127.0.0.1:{other}"
    return f"postgresql://postgres@{hosts}/postgres?sslmode=disable{query}"


SLEEP_UNTIL_RESTART = """
IF (SELECT started FROM first_start) = pg_postmaster_start_time() THEN
PERFORM pg_sleep(60); END IF"""


@pytest.mark.parametrize("how", ["kill", "crash"])
class TestCrash:
    @pytest.mark.parametrize("retries", [0, 1])
    async def test_a_commit_that_a_crash_has_interrupted_is_retried(
        self, how: str, retries: int
    ) -> None:
        network = Network()
        async with server() as primary, shop(network, primary) as remote:
            await primary.execute(
                "CREATE TABLE first_start AS SELECT pg_postmaster_start_time() AS started"
            )
            await run_at_commit(remote, SLEEP_UNTIL_RESTART)
            work = Work(remote)
            task = work.run(retries)
            await until(commits_on(primary))
            await flush_log(primary)
            await getattr(primary, how)()
            await primary.start()
            if retries:
                await task
            else:
                with pytest.raises(DBAPIError, match="not committed") as raised:
                    await task
                assert is_retryable(raised.value)
            told = ["work", "work", "committed"] if retries else ["work", "rolled back"]
            assert work.ran == told
            assert await notes_on(primary) == ["note"] * retries
            await nobody_is_left(primary, but=retries)

    async def test_a_commit_whose_log_a_crash_has_lost_is_not_told_as_committed(
        self, how: str
    ) -> None:
        """The server can't tell a lost end of the log from an older copy."""
        network = Network()
        async with server() as primary, shop(network, primary) as remote:
            await primary.execute(
                "CREATE TABLE first_start AS SELECT pg_postmaster_start_time() AS started"
            )
            await run_at_commit(remote, SLEEP_UNTIL_RESTART)
            work = Work(remote)
            task = work.run()
            await until(commits_on(primary))
            network.is_away = True  # Nobody asks before others have got its id.
            await getattr(primary, how)()
            await primary.start()
            for number in range(3):
                await primary.execute(f"CREATE TABLE other{number} ()")
            network.is_away = False
            with pytest.raises(CommitOutcomeUnknownError) as raised:
                await task
            assert "may have given the id to another" in raised.value.reason
            assert work.ran == ["work"]
            assert await notes_on(primary) == []

    async def test_a_commit_whose_answer_a_crash_has_lost_is_found_after_the_restart(
        self, how: str
    ) -> None:
        network = Network()
        network.cuts = False
        async with server() as primary, shop(network, primary) as remote:
            network.keeps_answers = 1
            work = Work(remote)
            task = work.run(retries=1)
            await until(has_carried_out(network))
            await getattr(primary, how)()
            await primary.start()
            await task
            assert work.ran == ["work", "committed"]
            assert await notes_on(primary) == ["note"]

    async def test_a_server_that_does_not_come_back_leaves_the_outcome_unknown(
        self, how: str
    ) -> None:
        network = Network()
        async with server() as primary:
            async with shop(network, primary, commit_timeout=1) as remote:
                network.keeps_answers, network.cuts = 1, False
                work = Work(remote)
                task = work.run(retries=1)
                await until(has_carried_out(network))
                await getattr(primary, how)()
                with pytest.raises(CommitOutcomeUnknownError) as raised:
                    await task
            assert raised.value.transaction_id
            assert "could not be asked" in raised.value.reason
            assert work.ran == ["work"]


class TestSynchronousStandby:
    @pytest.mark.parametrize("returns", [True, False])
    async def test_a_backend_that_waits_for_its_standby_is_never_ended(self, returns: bool) -> None:
        network = Network()
        async with (
            cluster(synchronous=True) as servers,
            shop(network, servers.primary) as remote,
        ):
            primary = servers.primary
            servers.standby.pause()
            network.keeps_answers = 1
            work = Work(remote)
            task = work.run(retries=1)
            await until(lambda: primary.execute(WAITING))
            [waits] = await primary.execute(WAITING)
            network.cut()

            async def is_asked() -> bool:
                return network.sent.count(b"pg_terminate_backend") >= 1

            await until(is_asked)
            assert await primary.execute(WAITING) == [waits]
            if returns:
                servers.standby.resume()
                await task
                assert work.ran == ["work", "committed"]
            else:
                with pytest.raises(CommitOutcomeUnknownError) as raised:
                    await task
                assert raised.value.transaction_id
                assert "synchronous standby" in raised.value.reason
                assert work.ran == ["work"]
                assert await primary.execute(WAITING) == [waits]
                assert await notes_on(primary) == []
                servers.standby.resume()
            await until(lambda: notes_on(primary))
            await nobody_is_left(primary, but=0)

    @pytest.mark.parametrize("standby", ["there", "paused", "returns", "given up"])
    async def test_a_commit_counts_once_a_later_one_is_replicated(self, standby: str) -> None:
        network = Network()
        network.cuts = False
        async with (
            cluster(synchronous=True) as servers,
            shop(network, servers.primary) as remote,
        ):
            primary = servers.primary
            network.keeps_answers = 1
            work = Work(remote)
            task = work.run(retries=1)
            await until(has_carried_out(network))
            if standby != "there":
                servers.standby.pause()
            network.cut()
            if standby in ("returns", "given up"):
                await until(lambda: primary.execute(WAITING))
            if standby == "returns":
                servers.standby.resume()
            elif standby == "given up":
                await primary.execute(f"SELECT pg_cancel_backend(pid) FROM ({WAITING}) AS waiting")
            if standby in ("there", "returns"):
                await task
                assert work.ran == ["work", "committed"]
            else:
                with pytest.raises(CommitOutcomeUnknownError) as raised:
                    await task
                assert raised.value.transaction_id
                assert "standby" in raised.value.reason
                assert work.ran == ["work"]
            servers.standby.resume()
            assert await notes_on(primary) == ["note"]
            await nobody_is_left(primary)

    async def test_a_look_up_that_waits_for_a_standby_holds_up_no_other(self) -> None:
        network = Network()
        network.cuts = False
        async with (
            cluster(synchronous=True) as servers,
            shop(network, servers.primary) as remote,
        ):
            primary = servers.primary
            network.keeps_answers = 1
            kept, lost = Work(remote, "kept"), Work(remote, "lost")
            first = kept.run()
            await until(has_carried_out(network))
            servers.standby.pause()
            network.cut()
            await until(lambda: primary.execute(WAITING))
            network.keeps_commits = 1
            with pytest.raises(DBAPIError, match="not committed"):
                await lost.run()
            assert not first.done()
            servers.standby.resume()
            await first
            assert (kept.ran[1:], lost.ran[1:]) == (["committed"], ["rolled back"])


class TestAnotherServer:
    @pytest.mark.parametrize("is_replicated", [True, False])
    @pytest.mark.parametrize("is_promoted", [True, False])
    async def test_an_outcome_is_unknown_after_a_failover(
        self, is_replicated: bool, is_promoted: bool
    ) -> None:
        network = Network()
        network.cuts = False
        async with cluster() as servers, shop(network, servers.primary) as remote:
            primary, standby = servers.primary, servers.standby
            await servers.catch_up()
            if not is_replicated:
                await standby.stop()
            network.keeps_answers = 1
            work = Work(remote)
            task = work.run(retries=1)
            await until(has_carried_out(network))
            if is_replicated:
                await servers.catch_up()
            network.is_away = True
            await primary.kill()
            if not is_replicated:
                await standby.start()
            if is_promoted:
                await standby.promote()
                for number in range(5):
                    await standby.execute(f"CREATE TABLE other{number} ()")
            network.leads_to, network.is_away = standby.host, False
            with pytest.raises(CommitOutcomeUnknownError) as raised:
                await task
            assert raised.value.transaction_id
            assert raised.value.reason == (
                "another server has taken over" if is_promoted else "the server is in recovery"
            )
            assert work.ran == ["work"]
            assert await notes_on(standby) == ["note"] * is_replicated

    @pytest.mark.parametrize("target", ["", "&target_session_attrs=primary"])
    async def test_an_outcome_is_unknown_after_a_failover_to_the_other_host_of_the_url(
        self, target: str
    ) -> None:
        async with cluster(tcp=True) as servers, AsyncExitStack() as stack:
            primary, standby = servers.primary, servers.standby
            network = Network()
            port = await stack.enter_async_context(network.open(primary.host))
            url = url_of_hosts(port, standby.port, target)
            async with DatabaseSessionManager(
                DatabaseSettings(url=url, commit_timeout=TIMEOUT)
            ) as remote:
                async with remote.connect() as connection:
                    await remote.create_all(connection)
                network.keeps_answers, network.cuts = 1, False
                work = Work(remote)
                task = work.run(retries=1)
                await until(has_carried_out(network))
                await servers.catch_up()
                await primary.kill()
                await standby.promote()
                await stack.aclose()
                with pytest.raises(CommitOutcomeUnknownError) as raised:
                    await task
                assert raised.value.reason == "another server has taken over"
                assert work.ran == ["work"]

    async def test_a_standby_in_the_url_does_not_answer_for_a_primary_that_comes_back(
        self,
    ) -> None:
        network = Network()
        async with cluster(tcp=True) as servers, network.open(servers.standby.host) as port:
            primary = servers.primary
            url = url_of_hosts(primary.port, port)
            async with DatabaseSessionManager(
                DatabaseSettings(url=url, commit_timeout=TIMEOUT)
            ) as remote:
                async with remote.connect() as connection:
                    await remote.create_all(connection)
                await primary.execute(
                    "CREATE TABLE first_start AS SELECT pg_postmaster_start_time() AS started"
                )
                await run_at_commit(remote, SLEEP_UNTIL_RESTART)
                work = Work(remote)
                task = work.run()
                await until(commits_on(primary))
                await flush_log(primary)
                await primary.kill()

                async def standby_is_asked() -> bool:
                    return b"pg_control_checkpoint" in network.sent

                await until(standby_is_asked)
                await primary.start()
                with pytest.raises(DBAPIError, match="not committed"):
                    await task
                assert work.ran == ["work", "rolled back"]

    @pytest.mark.parametrize("recovers", [True, False])
    async def test_an_outcome_is_unknown_on_a_server_restored_from_a_backup(
        self, recovers: bool
    ) -> None:
        network = Network()
        network.cuts = False
        async with server() as primary, shop(network, primary) as remote:
            restored = Server(Path(primary.host).with_name("restored"))
            try:
                source = f"host={primary.host} user=postgres"
                options = ("--checkpoint=fast", "--no-sync")
                await restored._do("pg_basebackup", "-d", source, "-D", restored.data, *options)
                network.keeps_answers = 1
                work = Work(remote)
                task = work.run(retries=1)
                await until(has_carried_out(network))
                network.is_away = True
                await primary.kill()
                await restored.start(as_standby=recovers)
                network.leads_to, network.is_away = restored.host, False
                with pytest.raises(CommitOutcomeUnknownError) as raised:
                    await task
                assert raised.value.transaction_id
                assert work.ran == ["work"]
                assert await notes_on(restored) == []
            finally:
                await restored.crash()


class OnNetwork(OnPostgres):
    """A class of tests whose manager reaches the server of the run through a network."""

    @pytest.fixture
    def network(self) -> Network:
        return Network()

    @pytest.fixture
    async def remote(
        self,
        network: Network,
        database_url: str,
        postgres: Postgres,
        manager: DatabaseSessionManager,
    ) -> AsyncIterator[DatabaseSessionManager]:
        async with through(
            network, postgres, database_url, commit_timeout=TIMEOUT, application_name="shop"
        ) as remote:
            yield remote
            await assert_all_returned(remote)


NOTIFIES = """
CREATE FUNCTION tell() RETURNS integer LANGUAGE plpgsql AS
$$ BEGIN PERFORM pg_notify('shop', 'told'); RETURN 1; END $$;
CREATE FUNCTION "tell ☎"() RETURNS integer LANGUAGE SQL AS 'SELECT tell()';
CREATE FUNCTION lower(integer) RETURNS integer LANGUAGE SQL AS 'SELECT tell()';
"""


class TestNothingWritten(OnNetwork):
    @pytest.mark.parametrize(
        "statement",
        [
            text("NOTIFY shop"),
            select(func.pg_notify("shop", "told")),
            text("SELECT tell()"),
            text("SELECT tell ()"),
            text("SELECT tell/* */()"),
            text("SELECT tell/* /* */ */()"),
            text("SELECT tell--\n()"),
            text("SELECT public . tell()"),
            text("SELECT public . lower(1)"),
            text('SELECT "tell ☎"()'),
            text("SELECT public. /* */ lower(1)"),
            text("SELECT '--', tell()"),
            text("SELECT * FROM tell()"),
            text("WITH told AS (SELECT tell()) SELECT * FROM told"),
            text("DO $$ BEGIN PERFORM tell(); END $$"),
            text("LISTEN shop"),
        ],
        ids=str,
    )
    async def test_what_may_write_in_its_commit_has_an_unknown_outcome(
        self,
        remote: DatabaseSessionManager,
        network: Network,
        postgres: Postgres,
        statement: Any,
    ) -> None:
        await postgres.run(NOTIFIES, DATABASE)
        with pytest.raises(CommitOutcomeUnknownError) as raised:
            async with remote.transaction() as session:
                await session.execute(statement)
                network.keeps_answers = 1
        assert raised.value.transaction_id is None
        assert "may have written" in raised.value.reason

    @pytest.mark.parametrize(
        "statement",
        [
            select(Note),
            select(func.count(Note.id)).where(Note.text.in_(["a", "b"])),
            select(func.coalesce(func.max(Note.id), 0)).group_by(Note.text),
            text("SELECT id /* why */ FROM note /*traceparent='00-1'*/"),
        ],
        ids=str,
    )
    async def test_what_only_reads_ends_well(
        self, remote: DatabaseSessionManager, network: Network, statement: Any
    ) -> None:
        async with remote.transaction() as session:
            await session.execute(statement)
            network.keeps_answers = 1
        assert network.carried_out == 1

    @pytest.mark.parametrize("ends", ["released", "rolled back", "rolled back after a write"])
    async def test_savepoints_end_well(
        self,
        remote: DatabaseSessionManager,
        manager: DatabaseSessionManager,
        network: Network,
        ends: str,
    ) -> None:
        work = Work(remote)
        async with remote.transaction() as session:
            await session.execute(select(Note.id))
            with suppress(ValueError):
                async with remote.transaction(Propagation.NESTED):
                    await session.execute(select(Note.text))
                    if "write" in ends:
                        await work()
                        await session.flush()
                    if ends != "released":
                        raise ValueError
            network.keeps_answers = 1
        assert network.carried_out == 1
        assert await notes(manager) == []

    @pytest.mark.parametrize("isolation", ["READ COMMITTED", "SERIALIZABLE"])
    async def test_a_read_only_transaction_ends_well_and_is_not_asked_for_its_id(
        self, remote: DatabaseSessionManager, network: Network, isolation: Any
    ) -> None:
        network.sent = b""
        async with remote.transaction(read_only=True, isolation=isolation) as session:
            await session.execute(text("SELECT pg_notify('shop', 'told')"))
            network.keeps_answers = 1
        assert COMMIT in network.sent
        assert ASKED_FOR_ID not in network.sent


class TestRights(OnNetwork):
    @pytest.mark.parametrize(
        "function",
        [
            "pg_control_system()",
            "pg_control_checkpoint()",
            "pg_xact_status(xid8)",
            "pg_current_xact_id_if_assigned()",
            "pg_current_wal_insert_lsn()",
            "pg_walfile_name(pg_lsn)",
            "pg_is_in_recovery()",
        ],
    )
    async def test_a_role_that_may_not_look_outcomes_up_goes_on_without(
        self, network: Network, postgres: Postgres, database_url: str, function: str
    ) -> None:
        await postgres.run(
            f"{CREATE_ROLES}; GRANT ALL ON SCHEMA public TO teller; "
            f"REVOKE EXECUTE ON FUNCTION {function} FROM PUBLIC",
            DATABASE,
        )
        try:
            async with network.open(postgres.host) as port:
                url = at_port(port, database_url).replace("postgres@", "teller@")
                async with DatabaseSessionManager(
                    DatabaseSettings(url=url, commit_timeout=TIMEOUT)
                ) as remote:
                    async with remote.connect() as connection:
                        await remote.create_all(connection)
                    await Work(remote, "a").run()
                    network.keeps_answers = 1
                    network.cuts_answer_to = COMMIT
                    with pytest.raises(CommitOutcomeUnknownError):
                        await Work(remote, "b").run()
                    network.cuts_answer_to = None
                    await Work(remote, "c").run()
                    assert ASKED_FOR_ID not in network.sent
                    assert await notes(remote) == ["a", "b", "c"]
        finally:
            await postgres.run(f"GRANT EXECUTE ON FUNCTION {function} TO PUBLIC", DATABASE)

    async def test_a_role_taken_in_the_transaction_need_not_be_allowed_to_ask(
        self, network: Network, postgres: Postgres, database_url: str
    ) -> None:
        function = "pg_current_wal_insert_lsn()"
        await postgres.run(
            f"{CREATE_ROLES}; GRANT ALL ON SCHEMA public TO teller; GRANT nobody TO teller; "
            f"REVOKE EXECUTE ON FUNCTION {function} FROM PUBLIC; "
            f"GRANT EXECUTE ON FUNCTION {function} TO teller",
            DATABASE,
        )
        try:
            async with network.open(postgres.host) as port:
                url = at_port(port, database_url).replace("postgres@", "teller@")
                async with DatabaseSessionManager(DatabaseSettings(url=url)) as remote:
                    async with remote.connect() as connection:
                        await remote.create_all(connection)
                    async with remote.transaction() as session:
                        session.add(Note(text="kept"))
                        await session.flush()
                        await session.execute(text("SET LOCAL ROLE nobody"))
                    assert await notes(remote) == ["kept"]
        finally:
            await postgres.run(
                f"REVOKE EXECUTE ON FUNCTION {function} FROM teller; "
                f"GRANT EXECUTE ON FUNCTION {function} TO PUBLIC",
                DATABASE,
            )


CREATE_ROLES = """
DO $$ BEGIN CREATE ROLE teller LOGIN; EXCEPTION WHEN duplicate_object THEN NULL; END $$;
DO $$ BEGIN CREATE ROLE nobody; EXCEPTION WHEN duplicate_object THEN NULL; END $$"""
OWN_PID = "SELECT pg_backend_pid()"
SHADOWS = """
DROP SCHEMA IF EXISTS shadow CASCADE;
CREATE SCHEMA shadow;
CREATE FUNCTION shadow.pg_current_xact_id_if_assigned() RETURNS xid8 LANGUAGE SQL
AS 'SELECT 1/0; SELECT NULL::xid8';
CREATE FUNCTION shadow.pg_walfile_name(pg_lsn) RETURNS text LANGUAGE SQL
AS 'SELECT 1/0; SELECT NULL::text';
CREATE FUNCTION shadow.pg_xact_status(xid8) RETURNS text LANGUAGE SQL
AS 'SELECT ''aborted''::text'"""


@pytest.mark.parametrize("resolves", [True, False])
class TestLikeWithout(OnPostgres):
    """Whatever worked without look-ups works with them."""

    @pytest.fixture
    async def remote(
        self,
        manager: DatabaseSessionManager,
        postgres: Postgres,
        database_url: str,
        resolves: bool,
    ) -> AsyncIterator[DatabaseSessionManager]:
        await postgres.run(f"{CREATE_ROLES}; {SHADOWS}", DATABASE)
        settings = DatabaseSettings(url=database_url, resolve_commits=resolves)
        async with DatabaseSessionManager(settings) as remote:
            yield remote
            await assert_all_returned(remote)
        await postgres.run("DROP SCHEMA shadow CASCADE", DATABASE)

    @pytest.mark.parametrize(
        "last",
        [
            "SET LOCAL ROLE nobody",
            "SET LOCAL SESSION AUTHORIZATION nobody",
            "SET LOCAL search_path = shadow, pg_catalog",
            "SET LOCAL search_path = ''",
            "SET LOCAL lock_timeout = 1",
            "SET LOCAL DateStyle = 'German'",
            "SET LOCAL TimeZone = 'Asia/Kathmandu'",
            "SET LOCAL extra_float_digits = -15",
            "SET LOCAL transaction_read_only = on",
            "SET LOCAL client_encoding = 'LATIN1'",
            "SET LOCAL log_statement = 'all'",
            "SET LOCAL default_transaction_isolation = 'serializable'",
        ],
    )
    async def test_a_setting_of_the_transaction_does_no_harm(
        self, remote: DatabaseSessionManager, last: str
    ) -> None:
        for number in range(2):
            async with remote.transaction() as session:
                session.add(Note(text=f"{number}"))
                await session.flush()
                await session.execute(text(last))
        assert await notes(remote) == ["0", "1"]

    async def test_a_short_time_for_statements_does_no_harm(
        self, remote: DatabaseSessionManager
    ) -> None:
        count = 0
        for number in range(100):
            with suppress(DBAPIError):
                async with remote.transaction() as session:
                    session.add(Note(text=f"{number}"))
                    await session.flush()
                    await session.execute(text("SET LOCAL statement_timeout = 1"))
                count += 1
        assert len(await notes(remote)) == count

    async def test_a_failed_transaction_of_a_connection_says_what_failed(
        self, remote: DatabaseSessionManager
    ) -> None:
        told = ""
        try:
            async with remote.connect() as connection:
                await connection.execute(insert(Note).values(text="lost"))
                with suppress(DBAPIError):
                    await connection.execute(text("SELECT 1/0"))
                await connection.commit()
        except Exception as error:
            told = f"{type(error).__name__}: {error}"
        assert "division by zero" in told or "Rollback" in told, told
        assert await notes(remote) == []


class TestStrikes(OnPostgres):
    @pytest.mark.parametrize("how", ["pg_cancel_backend", "pg_terminate_backend"])
    async def test_a_strike_at_any_moment_is_told_truly(
        self,
        manager: DatabaseSessionManager,
        postgres: Postgres,
        database_url: str,
        how: str,
    ) -> None:
        async with (
            asyncio.timeout(100),
            DatabaseSessionManager(
                DatabaseSettings(url=database_url, pool=PoolSettings(size=1, max_overflow=0))
            ) as remote,
        ):
            striker = await asyncpg.connect(host=postgres.host, user="postgres", database=DATABASE)
            kept, lost, unknown = set[str](), set[str](), set[str]()
            rolls = random.Random(3)
            longest = 0.001
            for number in range(300):
                note = f"{number}"
                work, pids = Work(remote, note), list[int]()

                async def write(work: Work = work, pids: list[int] = pids) -> None:
                    await work()
                    await CurrentSession(remote).flush()
                    pids.append(await CurrentSession(remote).scalar(text(OWN_PID)) or 0)

                async def strike(pids: list[int] = pids) -> None:
                    while not pids:
                        await asyncio.sleep(0)
                    await asyncio.sleep(rolls.uniform(0, longest))
                    if pids[0]:
                        await striker.fetch(f"SELECT {how}($1)", pids[0])

                strikes = asyncio.create_task(strike())
                try:
                    await remote.transaction.run(write)
                    kept.add(note)
                    assert work.ran == ["work", "committed"]
                except CommitOutcomeUnknownError:
                    unknown.add(note)
                    assert work.ran == ["work"]
                except (DBAPIError, SessionwireError):
                    lost.add(note)
                    assert work.ran == ["work", "rolled back"]
                finally:
                    pids.append(0)  # The work may have failed before.
                    await strikes
            await striker.close()
            found = set(await notes(manager))
            assert kept <= found
            assert not lost & found
            assert kept
            # A FATAL error may come before the answer to the question for the id.
            assert len(unknown) < 30


@asynccontextmanager
async def behind(
    suite: str, network: Network, postgres: Postgres, *, before: bool
) -> AsyncIterator[int]:
    """Yield the port of a PgBouncer in transaction mode, with a network before or behind it."""
    directory = new_directory()
    directory.mkdir(mode=0o755)
    settings: dict[str, str | int] = {"pool_mode": "transaction", "default_pool_size": 5}
    try:
        if before:
            shutil.chown(directory, SERVER_USER)
            settings["unix_socket_dir"] = str(directory)
            async with pgbouncer(suite, postgres.host, **settings) as bouncer:
                (directory / ".s.PGSQL.5432").symlink_to(f".s.PGSQL.{bouncer.port}")
                async with network.open(str(directory)) as port:
                    yield port
        else:
            async with (
                network.open(postgres.host) as port,
                pgbouncer(suite, f"127.0.0.1 port={port}", **settings) as bouncer,
            ):
                yield bouncer.port
    finally:
        shutil.rmtree(directory)


class TestPgBouncer(OnPostgres):
    @pytest.mark.parametrize("suite", [DEBIAN_12, NEWEST])
    @pytest.mark.parametrize("before", [True, False], ids=["before", "behind"])
    async def test_outcomes_are_told_truly_behind_pgbouncer(
        self,
        manager: DatabaseSessionManager,
        postgres: Postgres,
        database_url: str,
        suite: str,
        before: bool,
    ) -> None:
        """PgBouncer hands on the answer to the question, or only the loss of its server."""
        network = Network()
        async with asyncio.timeout(120), behind(suite, network, postgres, before=before) as port:
            settings = DatabaseSettings(
                url=f"{at_port(port, database_url)}&statement_cache_size=0",
                commit_timeout=TIMEOUT,
                pool=PoolSettings(size=3),
            )
            kept, lost, unknown = set[str](), set[str](), set[str]()

            async def write(remote: DatabaseSessionManager, note: str) -> None:
                work = Work(remote, note)
                try:
                    await work.run()
                    kept.add(note)
                    assert work.ran == ["work", "committed"]
                except CommitOutcomeUnknownError:
                    unknown.add(note)
                    assert work.ran == ["work"]
                except DBAPIError:
                    lost.add(note)
                    assert work.ran == ["work", "rolled back"]

            # Two managers stand for two processes.
            async with (
                DatabaseSessionManager(settings) as one,
                DatabaseSessionManager(settings) as other,
            ):
                for number in range(30):
                    network.keeps_answers = number % 2
                    network.keeps_commits = number % 3 == 2
                    await asyncio.gather(
                        *(
                            write(remote, f"{number} {name} {each}")
                            for each in range(2)
                            for name, remote in (("one", one), ("other", other))
                        )
                    )
                await assert_all_returned(one)
                await assert_all_returned(other)
            found = set(await notes(manager))
            assert kept <= found
            assert not lost & found
            assert lost
            assert network.carried_out > 10
            assert not unknown, unknown


async def in_a_block(remote: DatabaseSessionManager, work: Work) -> None:
    async with remote.transaction():
        await work()


async def in_a_connection(remote: DatabaseSessionManager, work: Work) -> None:
    async with remote.connect() as connection:
        await connection.execute(insert(Note).values(text="note"))
    work.ran += ["work", "committed"]


async def in_a_bare_session(remote: DatabaseSessionManager, work: Work) -> None:
    async with remote.session() as session:
        await work()
        await session.commit()


class TestCancelledLookUp(OnNetwork):
    @pytest.mark.parametrize("way", [in_a_block, in_a_connection])
    @pytest.mark.parametrize("times", [1, 2])
    @pytest.mark.parametrize("is_known", [True, False])
    async def test_a_cancelled_task_waits_for_its_outcome(
        self,
        remote: DatabaseSessionManager,
        network: Network,
        postgres: Postgres,
        manager: DatabaseSessionManager,
        way: Callable[[DatabaseSessionManager, Work], Awaitable[None]],
        times: int,
        is_known: bool,
    ) -> None:
        network.cuts = False
        network.keeps_answers = 1
        work = Work(remote)
        task = asyncio.ensure_future(way(remote, work))
        await until(has_carried_out(network))
        network.is_away = True
        network.cut()
        await until(network.is_looking)
        for _ in range(times):
            task.cancel()
            await asyncio.wait((task,), timeout=0.1)
        assert not task.done()
        network.is_away = not is_known
        with pytest.raises(asyncio.CancelledError) as raised:
            await task
        if is_known:
            assert raised.value.__cause__ is None
            assert work.ran == (["work", "committed"] if way is not in_a_connection else [])
        else:
            assert isinstance(raised.value.__cause__, CommitOutcomeUnknownError)
            assert work.ran == (["work"] if way is not in_a_connection else [])
        network.is_away = False
        assert await notes(manager) == ["note"]
        await nobody_is_left(postgres, but=0)

    async def test_a_cancelled_commit_of_a_bare_session_leaves_its_look_up(
        self,
        remote: DatabaseSessionManager,
        network: Network,
        postgres: Postgres,
        manager: DatabaseSessionManager,
    ) -> None:
        """The caller has its own blocks for what must not be cancelled."""
        network.cuts, network.keeps_answers = False, 1
        work = Work(remote)
        task = asyncio.ensure_future(in_a_bare_session(remote, work))
        await until(has_carried_out(network))
        network.is_away = True
        network.cut()
        await until(network.is_looking)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert work.ran == ["work"]
        assert await notes(manager) == ["note"]
        await nobody_is_left(postgres)

    async def test_many_look_ups_share_a_connection_that_is_closed_afterwards(
        self,
        network: Network,
        postgres: Postgres,
        database_url: str,
        manager: DatabaseSessionManager,
    ) -> None:
        most = 0
        settings: dict[str, Any] = {"commit_timeout": TIMEOUT, "pool": PoolSettings(size=20)}
        async with through(network, postgres, database_url, **settings) as other:
            network.keeps_answers, network.cuts = 20, False
            tasks = [Work(other, f"{each:02}").run() for each in range(20)]
            await until(has_carried_out(network, 20))
            network.cut()
            network.looking.clear()
            while not all(task.done() for task in tasks):
                most = max(most, len(network.looking & network.clients))
                await asyncio.sleep(0)
            await asyncio.gather(*tasks)
            assert len(await notes(manager)) == 20
            assert most == 1
            await assert_all_returned(other)

            async def is_closed() -> bool:
                return not network.looking & network.clients

            await until(is_closed)

    @pytest.mark.parametrize("drain", [0, 2])
    async def test_a_manager_may_be_closed_during_a_look_up(
        self,
        network: Network,
        postgres: Postgres,
        database_url: str,
        manager: DatabaseSessionManager,
        drain: float,
    ) -> None:
        async with network.open(postgres.host) as port:
            remote = DatabaseSessionManager(
                DatabaseSettings(
                    url=at_port(port, database_url),
                    commit_timeout=TIMEOUT,
                    drain_timeout=drain,
                    application_name="shop",
                )
            )
            await remote.open()
            network.keeps_answers, network.cuts = 1, False
            work = Work(remote)
            task = work.run()
            await until(has_carried_out(network))
            network.is_away = True
            network.cut()
            await until(network.is_looking)
            closing = asyncio.create_task(remote.close())
            await asyncio.wait((closing,), timeout=0.1)
            network.is_away = False
            began = asyncio.get_running_loop().time()
            if drain:
                await task
                assert work.ran == ["work", "committed"]
                await closing
            else:
                await closing
                with pytest.raises(CommitOutcomeUnknownError, match="closed"):
                    await task
                assert work.ran == ["work"]
            assert asyncio.get_running_loop().time() - began < 1
            await nobody_is_left(postgres)


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_a_manager_survives_the_end_of_its_loop_during_a_look_up(
    postgres: Postgres, new_loop: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    remote = DatabaseSessionManager()
    told: list[BaseException | None] = []

    async def work() -> None:
        try:
            await remote.transaction.run(Work(remote))
        except asyncio.CancelledError as cancellation:
            told.append(cancellation.__cause__)

    async def leave_a_look_up() -> None:
        network = Network()
        async with asyncio.timeout(20), network.open(postgres.host) as port:
            url = at_port(port, postgres.url(DATABASE))
            remote.init(DatabaseSettings(url=url, application_name="shop"))
            await remote.open()
            async with remote.connect() as connection:
                await connection.run_sync(remote.metadata.drop_all)
                await remote.create_all(connection)
            network.keeps_answers, network.cuts = 1, False
            task = asyncio.create_task(work())
            await until(has_carried_out(network))
            network.is_away = True
            network.cut()
            await until(network.is_looking)
            assert not task.done()

    async def go_on() -> None:
        async with asyncio.timeout(20):
            remote.init(DatabaseSettings(url=postgres.url(DATABASE), application_name="shop"))
            async with remote:
                assert await notes(remote) == ["note"]
            await nobody_is_left(postgres)

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(leave_a_look_up())
    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(go_on())
    [error] = told
    assert isinstance(error, CommitOutcomeUnknownError)
