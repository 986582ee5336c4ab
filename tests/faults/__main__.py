"""Command line: `python -m tests.faults [scenario …]`; `--help` lists its options."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Coroutine
from dataclasses import fields
from typing import Any, TypeVar

from rich.console import Console
from rich.table import Table

from tests.cluster import server

from .run import run
from .scenarios import SCENARIOS
from .verdict import Counts, Verdict

T = TypeVar("T")


def main() -> int:
    options = parse()
    if options.names == ["soak"]:
        from .soak import soak

        return to_its_end(soak(options.seconds or 180))
    names = options.names or list(SCENARIOS)
    verdicts = to_its_end(
        run_all(
            names,
            options.runs or len(names),
            options.seed,
            options.seconds or 1.5,
            pipeline=not options.no_pipeline,
            driver=options.driver,
        )
    )
    show(verdicts)
    return 1 if any(verdict.violations for verdict in verdicts) else 0


def to_its_end(work: Coroutine[Any, Any, T]) -> T:
    """Run the coroutine in a new event loop beside the current one."""
    with asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner:
        return runner.run(work)


def parse() -> argparse.Namespace:
    described = "\n".join(f"  {one.name:34}{one.faults.__doc__}" for one in SCENARIOS.values())
    parser = argparse.ArgumentParser(
        prog=f"python -m {__package__}",
        description=f"Lets things go wrong under load, and counts what comes of it:\n{described}\n"
        "  soak                              the ledger's server under load: "
        "its memory may not grow",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="scenario", help="without a name, all in turn")
    parser.add_argument("--runs", type=int, help="how many in all (default: one of each scenario)")
    parser.add_argument(
        "--seed",
        type=int,
        default=1,
        help="of the first run; it is counted up (default: %(default)s)",
    )
    parser.add_argument(
        "--seconds", type=float, help="of faults in a run (default: 1.5), or of the soak (180)"
    )
    parser.add_argument(
        "--no-pipeline", action="store_true", help="let the callers have `pipeline: false`"
    )
    parser.add_argument(
        "--driver",
        choices=["asyncpg", "psycopg"],
        default="asyncpg",
        help="of the callers, for PostgreSQL (default: %(default)s)",
    )
    options = parser.parse_args()
    if unknown := sorted(set(options.names) - {*SCENARIOS, "soak"}):
        parser.error(f"there is no {', '.join(unknown)}")
    return options


async def run_all(
    names: list[str], runs: int, seed: int, seconds: float, *, pipeline: bool, driver: str
) -> list[Verdict]:
    verdicts: list[Verdict] = []
    async with server(tcp=True) as shared:
        for number in range(runs):
            name = names[number % len(names)]
            seed_of_run = seed + number // len(names)
            verdict = await run(
                SCENARIOS[name], seed_of_run, shared, seconds, pipeline=pipeline, driver=driver
            )
            verdicts.append(verdict)
            if verdict.violations:
                print(verdict, file=sys.stderr)
                again = f"{name} --runs 1 --seed {verdict.seed}"
                if not pipeline:
                    again += " --no-pipeline"
                if driver != "asyncpg":
                    again += f" --driver {driver}"
                print(f"  again: python -m {__package__} {again}", file=sys.stderr)
    return verdicts


def show(verdicts: list[Verdict]) -> None:
    """Return a line for each scenario: its summed counts, and its longest times."""
    table = Table("scenario", box=None)
    for name in ("runs", *(count.name for count in fields(Counts))):
        table.add_column(name.replace("_", "\n"), justify="right", no_wrap=True)
    for name in [*dict.fromkeys(verdict.scenario for verdict in verdicts), "all"]:
        counts = [verdict.counts for verdict in verdicts if name in (verdict.scenario, "all")]
        table.add_row(
            name, str(len(counts)), *(_summed_up(count.name, counts) for count in fields(Counts))
        )
    Console(highlight=False, width=250).print(table)


def _summed_up(name: str, counts: list[Counts]) -> str:
    values = [value for one in counts if (value := getattr(one, name)) is not None]
    if not values:
        return "-"
    return str(sum(values)) if isinstance(values[0], int) else f"{max(values):.2f}"


if __name__ == "__main__":
    sys.exit(main())
