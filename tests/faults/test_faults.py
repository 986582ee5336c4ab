"""A bounded share of the faults: each scenario once, with a seed of its own. `-m slow` has more seeds."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.cluster import Server, server

from .run import run
from .scenarios import SCENARIOS


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared() -> AsyncIterator[Server]:
    async with server(tcp=True) as shared:
        yield shared


@pytest.mark.parametrize("scenario", SCENARIOS)
async def test_each_promise_is_kept(scenario: str, shared: Server) -> None:
    verdict = await run(SCENARIOS[scenario], 1, shared, seconds=0.7)
    assert not verdict.violations, str(verdict)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 6))
@pytest.mark.parametrize("scenario", SCENARIOS)
async def test_so_it_is_with_other_seeds(scenario: str, seed: int, shared: Server) -> None:
    verdict = await run(SCENARIOS[scenario], seed, shared, seconds=1.5)
    assert not verdict.violations, str(verdict)
