"""The scenarios, each a function that lets something go wrong while callers call."""

from __future__ import annotations

import asyncio
import sys
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from enum import StrEnum
from random import Random
from time import monotonic

import asyncpg
from sqlalchemy import text

from sessionwire import DatabaseSessionManager, PoolSettings
from tests.cluster import Cluster, Server

from .callers import Answer, Callers, Manner
from .network import FaultyNetwork
from .verdict import RECOVERY, Holds

APPLICATION = "faults"  # application_name of the callers
DATABASE = "faults"
QUIET = 0.4  # seconds without a failure, after which all is taken for well again


class Place(StrEnum):
    """Where the books are, and how the callers get there."""

    FILE = "an SQLite file"
    SERVER = "a server, through the network"
    DIRECT = "a server, with nothing between"
    CLUSTER = "a primary with a synchronous standby, through the network"
    BOTH = "a primary with a synchronous standby, both of which the URL names"


@dataclass
class World:
    """The things that a scenario can break. Some exist only in some places."""

    random: Random
    seconds: float  # for which things go wrong
    # It ends what must stay until the connections are counted.
    until_counted: AsyncExitStack
    callers: Callers
    manager: DatabaseSessionManager  # the callers' manager
    path: str  # the file of SQLite
    server: Server  # the primary
    cluster: Cluster
    network: FaultyNetwork
    returned: float | None = None  # when the server was back
    holds: Holds = field(default_factory=Holds)

    async def moments(self, pause: float) -> AsyncIterator[None]:
        """Yield at random moments, about `pause` seconds apart, during the faults."""
        await self.is_busy()
        until = monotonic() + self.seconds
        while monotonic() < until:
            await asyncio.sleep(self.random.expovariate(1 / pause))
            yield

    async def is_busy(self) -> None:
        """The callers are at work, and have been for a moment."""
        while not any(call.answer is Answer.ACKNOWLEDGED for call in self.callers.calls):
            await asyncio.sleep(0.01)
        await asyncio.sleep(self.random.uniform(0, 0.3))

    async def is_back(self) -> None:
        """Wait after the server's return until the callers succeed, or for too long."""
        self.returned = monotonic()
        late = self.returned + RECOVERY + QUIET
        while (
            monotonic() < late and self.callers.seconds_without_failure(since=self.returned) < QUIET
        ):
            await asyncio.sleep(0.02)


Faults = Callable[[World], Awaitable[None]]


@dataclass(frozen=True)
class Scenario:
    name: str
    place: Place
    faults: Faults
    manner: Manner
    pool: PoolSettings


SCENARIOS: dict[str, Scenario] = {}
POOL = PoolSettings(size=3, max_overflow=2, timeout=2)


def scenario(
    *places: Place,
    manner: Manner = Manner(),  # noqa: B008 - it is frozen
    pool: PoolSettings = POOL,
) -> Callable[[Faults], Faults]:
    def add(faults: Faults) -> Faults:
        for place in places:
            name = faults.__name__ + (f"_{place.name.lower()}" if len(places) > 1 else "")
            SCENARIOS[name] = Scenario(name, place, faults, manner, pool)
        return faults

    return add


# What a server does


@scenario(Place.SERVER, Place.FILE)
async def nothing(world: World) -> None:
    """Nothing goes wrong: the callers only compete with each other."""
    async for _ in world.moments(0.1):
        pass


@scenario(Place.SERVER)
async def killed_backends(world: World) -> None:
    """Server processes are ended at any moment."""
    async for _ in world.moments(0.04):
        await end_one(world, "true")


@scenario(Place.SERVER)
async def killed_in_commit(world: World) -> None:
    """Server processes are ended during a COMMIT, which takes a while here."""
    await at_commit(world, "PERFORM pg_sleep(random() * 0.05)")
    async for _ in world.moments(0.03):
        await end_one(world, "state = 'active' AND query LIKE 'COMMIT%'")


@scenario(Place.SERVER)
async def refused_commits(world: World) -> None:
    """The server refuses some COMMITs, some for good and some as a conflict."""
    await at_commit(
        world,
        "IF random() < 0.3 THEN RAISE EXCEPTION 'refused' USING ERRCODE = "
        "CASE WHEN random() < 0.5 THEN '23514' ELSE '40001' END; END IF",
    )
    async for _ in world.moments(0.1):
        pass


@scenario(Place.SERVER, Place.DIRECT)
async def killed_server(world: World) -> None:
    """The server is killed, or stopped in good order, and comes back."""
    await world.is_busy()
    await world.random.choice([world.server.kill, world.server.crash, world.server.stop])()
    await asyncio.sleep(world.random.uniform(0, 0.5))
    await world.server.start()
    await world.is_back()


# What a network does


@scenario(Place.SERVER, manner=Manner(patience=1))
async def lost_commit_answers(world: World) -> None:
    """The answer to a COMMIT is lost; its connection is then cut or silent."""
    world.network.loses, world.network.loses_only = 0.15, b"COMMIT"
    async for _ in world.moments(0.1):
        pass
    world.network.loses = 0


@scenario(Place.SERVER, manner=Manner(patience=1))
async def lost_answers(world: World) -> None:
    """The answer to any message is lost; its connection is then cut or silent."""
    world.network.loses = 0.03
    async for _ in world.moments(0.1):
        pass
    world.network.loses = 0


@scenario(Place.SERVER)
async def cut_connections(world: World) -> None:
    """Connections are cut between any two messages."""
    async for _ in world.moments(0.03):
        world.network.cut_one()


@scenario(Place.SERVER, manner=Manner(patience=1, deadlines=0.5, deadline=1))
async def black_hole(world: World) -> None:
    """The network swallows everything, and nobody is told."""
    await world.is_busy()
    world.network.is_black_hole = True
    await asyncio.sleep(3.5)  # longer than a caller may be stuck
    world.network.is_black_hole = False
    world.network.cut_all()  # on what was open, messages are missing
    await world.is_back()


# What callers do


@scenario(Place.SERVER, Place.FILE, manner=Manner(callers=20, cancelled=0.8))
async def cancelled_calls(world: World) -> None:
    """Most calls are cancelled at random moments, some of them more than once."""
    async for _ in world.moments(0.1):
        pass


@scenario(
    Place.SERVER,
    manner=Manner(callers=30, cancelled=0.8, cancelled_within=0.03),
    pool=PoolSettings(size=2, max_overflow=2, timeout=2),
)
async def cancelled_calls_on_a_slow_network(world: World) -> None:
    """Calls are cancelled while connections take longer to open and to close."""
    world.network.delays(0.005)
    async for _ in world.moments(0.1):
        pass


@scenario(
    Place.SERVER,
    manner=Manner(callers=12, plain=0, patience=1, cancelled=0.9, cancelled_within=0.25, times=4),
    pool=PoolSettings(size=2, max_overflow=2, timeout=2),
)
async def cancelled_calls_behind_a_lock(world: World) -> None:
    """Calls are cancelled while statements wait for a lock that stays held."""
    await world.is_busy()
    world.network.delays(0.01)
    other = await asyncpg.connect(host=world.server.host, user="postgres", database=DATABASE)
    world.until_counted.push_async_callback(other.close)
    await other.execute("BEGIN; LOCK TABLE account")
    async for _ in world.moments(0.1):
        pass


@scenario(Place.SERVER, Place.FILE, manner=Manner(deadlines=0.8, deadline=0.06))
async def deadlines(world: World) -> None:
    """Most calls are in a transaction whose deadline may strike at any moment."""
    async for _ in world.moments(0.1):
        pass


@scenario(
    Place.SERVER,
    manner=Manner(callers=16, deadlines=0.2, deadline=0.1),
    pool=PoolSettings(size=1, max_overflow=1, timeout=0.1),
)
async def exhausted_pool(world: World) -> None:
    """Others hold the connections of a small pool."""
    async for _ in world.moments(0.1):
        async with asyncio.TaskGroup() as group:
            for _ in range(2):
                group.create_task(hold_a_connection(world, world.random.uniform(0, 0.3)))


@scenario(
    Place.FILE,
    manner=Manner(callers=8, cancelled=0.3),
    pool=PoolSettings(size=3, max_overflow=2, timeout=0.1),
)
async def busy_file(world: World) -> None:
    """Another program holds the file's write lock, at times longer than calls wait."""
    other = await asyncio.create_subprocess_exec(
        sys.executable, "-c", HOLD_LOCK, world.path, stdin=PIPE
    )
    assert other.stdin is not None
    async for _ in world.moments(0.2):
        other.stdin.write(f"{world.random.uniform(0, 0.25)}\n".encode())
    other.stdin.close()
    await other.wait()


@scenario(Place.SERVER, manner=Manner(patience=1, cancelled=0.2, deadlines=0.2, deadline=0.3))
async def everything(world: World) -> None:
    """All of these faults happen side by side."""
    world.network.loses = 0.005
    async for _ in world.moments(0.05):
        if world.random.random() < 0.5:
            world.network.cut_one()
        else:
            await end_one(world, "true")
    world.network.loses = 0


# What a cluster does


@scenario(Place.CLUSTER, Place.BOTH)
async def promotion(world: World) -> None:
    """The primary is lost in one way or another, and its standby takes over."""
    await world.is_busy()
    await world.random.choice([world.server.kill, world.server.crash, world.server.stop])()
    await take_over(world)


@scenario(Place.CLUSTER)
async def promotion_after_silence(world: World) -> None:
    """The primary falls silent with open connections, and its standby takes over."""
    await world.is_busy()
    world.server.pause()
    await asyncio.sleep(world.random.uniform(0, 0.3))
    await world.server.kill()
    await take_over(world)


@scenario(Place.CLUSTER)
async def demotion(world: World) -> None:
    """The primary returns as a standby that callers reach until one takes over."""
    await world.is_busy()
    await world.server.stop()
    await world.server.start(as_standby=True)
    await asyncio.sleep(world.random.uniform(0.2, 0.5))
    await take_over(world)


@scenario(Place.CLUSTER)
async def commits_that_were_not_replicated(world: World) -> None:
    """Commits that wait for the standby are cancelled; it takes over without them."""
    await world.is_busy()
    await world.cluster.standby.kill()
    async for _ in world.moments(0.1):
        await world.server.execute(
            "SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
        )
    await world.server.kill()
    await world.cluster.standby.start()
    await take_over(world)


# How it is done

# a program that holds a file's write lock for as many seconds as each line says
HOLD_LOCK = """
import sqlite3, sys, time
other = sqlite3.connect(sys.argv[1], timeout=10, isolation_level=None)
for line in sys.stdin:
    other.execute("BEGIN IMMEDIATE")
    time.sleep(float(line))
    other.execute("ROLLBACK")
"""


async def take_over(world: World) -> None:
    world.network.leads_to = world.cluster.standby.host
    await asyncio.sleep(world.random.uniform(0, 0.5))
    await world.cluster.standby.promote()
    world.server = world.cluster.standby
    await world.is_back()


async def end_one(world: World, condition: str) -> None:
    """End one of the server processes of the callers."""
    query = (
        f"SELECT pid FROM pg_stat_activity WHERE application_name = $1 AND {condition} ORDER BY pid"
    )
    if found := await world.server.execute(query, APPLICATION):
        await world.server.execute("SELECT pg_terminate_backend($1)", world.random.choice(found)[0])


async def at_commit(world: World, statement: str) -> None:
    """Let the server do this when a call is committed."""
    await world.server.run(
        f"""
        CREATE FUNCTION at_commit() RETURNS trigger LANGUAGE plpgsql AS
            $$ BEGIN {statement}; RETURN NULL; END $$;
        CREATE CONSTRAINT TRIGGER at_commit AFTER INSERT ON witness DEFERRABLE INITIALLY DEFERRED
            FOR EACH ROW EXECUTE FUNCTION at_commit();
        """,
        DATABASE,
    )


async def hold_a_connection(world: World, seconds: float) -> None:
    with suppress(Exception):  # it may wait in vain for one
        async with world.manager.connect() as connection:
            world.holds.begun += 1
            await connection.execute(text("SELECT 1"))
            await asyncio.sleep(seconds)
        world.holds.ended += 1
