"""A share of the faults: `-m long` runs each scenario once, `-m slow` more seeds.

Without the pipeline, and with psycopg, `-m long` runs the scenarios on one server.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from sqlalchemy import delete

from tests.cluster import Server, server

from .__main__ import main
from .callers import Manner, witness
from .run import run
from .scenarios import POOL, SCENARIOS, Place, Scenario, World

ON_ONE_SERVER = [name for name, one in SCENARIOS.items() if one.place is Place.SERVER]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared() -> AsyncIterator[Server]:
    async with server(tcp=True) as shared:
        yield shared


@pytest.mark.long
@pytest.mark.parametrize("scenario", SCENARIOS)
async def test_each_scenario_of_the_fault_suite_keeps_every_promise(
    scenario: str, shared: Server
) -> None:
    verdict = await run(SCENARIOS[scenario], 1, shared, seconds=0.7)
    assert not verdict.violations, str(verdict)


@pytest.mark.long
@pytest.mark.parametrize("scenario", ON_ONE_SERVER)
async def test_each_scenario_on_one_server_keeps_every_promise_without_the_pipeline(
    scenario: str, shared: Server
) -> None:
    verdict = await run(SCENARIOS[scenario], 1, shared, seconds=0.7, pipeline=False)
    assert not verdict.violations, str(verdict)


@pytest.mark.long
@pytest.mark.parametrize("scenario", ON_ONE_SERVER)
async def test_each_scenario_on_one_server_keeps_every_promise_with_psycopg(
    scenario: str, shared: Server
) -> None:
    verdict = await run(SCENARIOS[scenario], 1, shared, seconds=0.7, driver="psycopg")
    assert not verdict.violations, str(verdict)


@pytest.mark.slow
@pytest.mark.parametrize("pipeline", [True, False], ids=["pipeline", "no pipeline"])
@pytest.mark.parametrize("seed", range(2, 6))
@pytest.mark.parametrize("scenario", SCENARIOS)
async def test_each_scenario_keeps_every_promise_with_other_seeds(
    scenario: str, seed: int, pipeline: bool, shared: Server
) -> None:
    verdict = await run(SCENARIOS[scenario], seed, shared, seconds=1.5, pipeline=pipeline)
    assert not verdict.violations, str(verdict)


async def forget(world: World) -> None:
    """Delete what was committed, which no library can prevent."""
    await world.is_busy()
    async with world.manager.connect() as connection:
        await connection.execute(delete(witness))


@pytest.mark.long
def test_a_violated_promise_is_reported_with_the_seed_that_repeats_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(SCENARIOS, "forget", Scenario("forget", Place.FILE, forget, Manner(), POOL))
    monkeypatch.setattr(
        "sys.argv", ["faults", "nothing_file", "forget", "--seed", "3", "--seconds", "0.1"]
    )

    assert main() == 1

    table, told = capsys.readouterr()
    assert [line.split()[:2] for line in table.splitlines()[2:]] == [
        ["nothing_file", "1"],
        ["forget", "1"],
        ["all", "2"],
    ]
    assert "forget, seed 3: " in told
    assert "\n  lost: " in told
    assert told.endswith("\n  again: python -m tests.faults forget --runs 1 --seed 3\n")
    assert "nothing_file" not in told
