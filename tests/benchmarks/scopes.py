"""Measure a scope that reads or writes one row, near its server and farther away."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from contextlib import AsyncExitStack
from math import ceil
from time import perf_counter
from typing import Any

import asyncpg

from .report import Table, Times, ratios, rotated
from .variants import BARE, EXPERT, KEY, TEXT, VARIANTS, Work, items
from .wire import far_away, url

# Calls of each variant in each turn, and turns in a round. Disturbances of one variant
# then affect all alike.
CALLS, TURNS = 20, 5
DELAY = 0.001  # seconds


async def run(
    server_socket_directory: str, rounds: int, progress: Callable[[str], None]
) -> list[Table]:
    times: Times = defaultdict(lambda: defaultdict(list))
    async with (
        items(server_socket_directory) as database,
        far_away(server_socket_directory, DELAY) as remote,
    ):
        for place, address in (("", url(server_socket_directory)), (", 1 ms", remote)):
            async with AsyncExitStack() as stack:
                works = {
                    name: await stack.enter_async_context(variant(address))
                    for name, variant in VARIANTS.items()
                }
                for column, seconds in (
                    (f"read{place}", seconds_to_read),
                    (f"write{place}", seconds_to_write),
                ):
                    for turn in range(rounds * TURNS + 1):
                        progress(f"{column}, round {ceil(turn / TURNS)} of {rounds}")
                        for name in rotated(list(works), turn):
                            taken = await seconds(works[name], database)
                            if turn:  # the first one warms up
                                times[column][name].append(taken)
    return [
        ratios(
            "time per scope",
            times,
            BARE,
            f"Medians of {rounds} rounds, in turns; the time of the first row is 1.",
        ),
        ratios("time per scope, against an expert's", times, EXPERT, "The same rounds."),
    ]


async def seconds_to_read(work: Work, database: asyncpg.Connection[Any]) -> float:
    started = perf_counter()
    texts = [await work.read(KEY) for _ in range(CALLS)]
    taken = perf_counter() - started
    assert texts == [TEXT] * CALLS
    return taken


async def seconds_to_write(work: Work, database: asyncpg.Connection[Any]) -> float:
    started = perf_counter()
    keys = [await work.write(f"number {number}") for number in range(CALLS)]
    taken = perf_counter() - started
    rows = await database.fetch("SELECT text FROM item WHERE id = ANY($1) ORDER BY id", keys)
    assert [row["text"] for row in rows] == [f"number {number}" for number in range(CALLS)]
    return taken
