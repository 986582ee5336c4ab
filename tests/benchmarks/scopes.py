"""Measure a scope that reads or writes one row, near its server and farther away."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from contextlib import AsyncExitStack
from math import ceil
from time import perf_counter, process_time
from typing import Any, NamedTuple

import asyncpg

from .report import Table, Times, ratios, rotated
from .variants import BARE, EXPERT, KEY, TEXT, VARIANTS, Work, items
from .wire import far_away, url

# Calls of each variant in each turn. Disturbances of one variant then affect all alike.
CALLS = 20
# By the delay of a message in milliseconds: the turns in a round.
DISTANCES = {0: 5, 1: 5, 5: 1}


class Taken(NamedTuple):
    """Seconds."""

    time: float
    processor_time: float  # of this process, without the server


async def run(
    server_socket_directory: str, rounds: int, progress: Callable[[str], None]
) -> list[Table]:
    times: Times = defaultdict(lambda: defaultdict(list))
    processor_times: Times = defaultdict(lambda: defaultdict(list))
    async with items(server_socket_directory) as database, AsyncExitStack() as wires:
        for delay, turns in DISTANCES.items():
            address, place = url(server_socket_directory), ""
            if delay:
                wire = far_away(server_socket_directory, delay / 1000)
                address, place = await wires.enter_async_context(wire), f", {delay} ms"
            async with AsyncExitStack() as stack:
                works = {
                    name: await stack.enter_async_context(variant(address))
                    for name, variant in VARIANTS.items()
                }
                for column, measure in (
                    (f"read{place}", measure_reads),
                    (f"write{place}", measure_writes),
                ):
                    for turn in range(rounds * turns + 1):
                        progress(f"{column}, round {ceil(turn / turns)} of {rounds}")
                        for name in rotated(list(works), turn):
                            taken = await measure(works[name], database)
                            if turn:  # the first one warms up
                                times[column][name].append(taken.time)
                                processor_times[column][name].append(taken.processor_time)
    note = f"Medians of {rounds} rounds, in turns; the time of the first row is 1."
    return [
        ratios("time per scope", times, BARE, note),
        ratios("time per scope, against an expert's", times, EXPERT, "The same rounds."),
        ratios(
            "processor time per scope",
            processor_times,
            BARE,
            "The same rounds, without the server's processor time.",
        ),
    ]


async def measure_reads(work: Work, database: asyncpg.Connection[Any]) -> Taken:
    started = Taken(perf_counter(), process_time())
    texts = [await work.read(KEY) for _ in range(CALLS)]
    taken = seconds_since(started)
    assert texts == [TEXT] * CALLS
    return taken


async def measure_writes(work: Work, database: asyncpg.Connection[Any]) -> Taken:
    started = Taken(perf_counter(), process_time())
    keys = [await work.write(f"number {number}") for number in range(CALLS)]
    taken = seconds_since(started)
    rows = await database.fetch("SELECT text FROM item WHERE id = ANY($1) ORDER BY id", keys)
    assert [row["text"] for row in rows] == [f"number {number}" for number in range(CALLS)]
    return taken


def seconds_since(started: Taken) -> Taken:
    return Taken(perf_counter() - started.time, process_time() - started.processor_time)
