"""The benchmarks: `python -m tests.benchmarks [names…] [--rounds N] [--output DIR]`."""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import sys
import tempfile
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

from rich.console import Console

from sessionwire.embedded import EmbeddedServer

from .report import NotInstalledError, Table, show, write

MODULES = {
    "messages": "messages to the server for a read and a write",
    "scopes": "time for a read scope and a write transaction",
    "requests": "whole requests to a FastAPI application",
    "imports": "time to import, to build a container and to wire it",
    "tpcb": "TPC-B on the tables of pgbench, beside pgbench itself",
    "growth": "1 to 2,000 tasks on a pool of 10",
    "sqlite": "time for a write on SQLite, by one caller and by fifty",
    "isolation": "time to isolate a test from the others",
}
COMPARED = ("sqlalchemy", "asyncpg", "dependency-injector")


def main() -> None:
    options = parse()
    with (
        tempfile.TemporaryDirectory(prefix="sessionwire-", ignore_cleanup_errors=True) as directory,
        EmbeddedServer(Path(directory, "data")) as server,
    ):
        tables, failed = measure(options.names, options.rounds, server.socket_directory)
    show(tables, Console(highlight=False))
    if options.output:
        write(tables, about(options.rounds), options.output)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def parse() -> argparse.Namespace:
    names = list(MODULES)
    described = "\n".join(f"  {name:10}{MODULES[name]}" for name in names)
    parser = argparse.ArgumentParser(
        prog=f"python -m {__package__}",
        description=f"Measures sessionwire against its peers:\n{described}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "names", nargs="*", metavar="name", help="what to measure; without a name, all of it"
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=15,
        help="of which the medians are taken (default: %(default)s)",
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="for results.json and the plots")
    options = parser.parse_args()
    if unknown := sorted(set(options.names) - set(names)):
        parser.error(f"there is no benchmark {', '.join(unknown)}; there are {', '.join(names)}")
    options.names = options.names or names
    return options


def measure(names: list[str], rounds: int, socket_directory: str) -> tuple[list[Table], list[str]]:
    """Run these benchmarks. Return the tables, and the names of those that failed."""
    screen = Console(stderr=True, highlight=False)
    tables: list[Table] = []
    failed: list[str] = []
    for name in names:
        with screen.status(name, refresh_per_second=1) as status:
            tell = status.update if screen.is_terminal else screen.print

            def progress(step: str, name: str = name, tell: Callable[[str], None] = tell) -> None:
                tell(f"{name}: {step}")

            try:
                run = import_module(f".{name}", __package__).run
                tables += asyncio.run(run(socket_directory, rounds, progress))
            except ModuleNotFoundError as error:
                screen.print(f"{name}: left out: {error}; pip install it, as the other peers")
            except NotInstalledError as error:
                screen.print(f"{name}: left out: {error}")
            except Exception:
                screen.print_exception()
                failed.append(name)
    return tables, failed


def about(rounds: int) -> dict[str, object]:
    """Describe the machine and the versions of the measurement."""
    return {
        "command": f"python -m {__package__} {' '.join(sys.argv[1:])}",
        "rounds": rounds,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "versions": {name: version(name) for name in COMPARED},
    }


if __name__ == "__main__":
    main()
