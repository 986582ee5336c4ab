"""The command line: `python -m ledger demo`, `serve`, `compare`."""

from __future__ import annotations

import argparse
import asyncio
import math
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .settings import LedgerSettings

CONFIG = Path(__file__).parents[2] / "config" / "default.yaml"


def main() -> int:
    """Run a command and return its exit code.

    0: all checks passed, or the server has ended; 1: a check failed; 2: the command
    could not run; 130: it was interrupted.
    """
    arguments = parse()
    try:
        return int(arguments.command(arguments))
    except KeyboardInterrupt:
        consequence = ": every acknowledged transfer is booked" if arguments.command is demo else ""
        print(f"\ninterrupted{consequence}", file=sys.stderr)
        return 130


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m ledger", description="Money moves between accounts."
    )
    commands = parser.add_subparsers(required=True, metavar="command")
    environment = "Environment variables override the file, for example LEDGER_DATABASE__URL=sqlite:///other.db"

    command = commands.add_parser(
        "demo",
        help="send concurrent transfers, and check each answer against the database",
        description="Send concurrent transfers, some of which must fail, and check each answer "
        "against the database.",
        epilog=environment,
    )
    command.set_defaults(command=demo)
    add_settings(command)
    option = command.add_argument
    option(
        "--transfers",
        type=integer(1),
        default=1000,
        metavar="N",
        help="transfers to send (%(default)s)",
    )
    option(
        "--workers",
        type=integer(1),
        default=50,
        metavar="N",
        help="concurrent callers (%(default)s)",
    )
    option(
        "--accounts",
        type=integer(2),
        default=10,
        metavar="N",
        help="accounts to open (%(default)s)",
    )

    command = commands.add_parser(
        "serve",
        help="serve the ledger's HTTP API",
        description="Serve the HTTP API, whose documentation is at /docs. On SIGTERM or SIGINT, "
        "finish the accepted requests and end.",
        epilog=environment,
    )
    command.set_defaults(command=serve)
    add_settings(command)
    option = command.add_argument
    option("--host", default="127.0.0.1", metavar="HOST", help="address to listen on (%(default)s)")
    option(
        "--port",
        type=integer(0, 65535),
        default=8000,
        metavar="PORT",
        help="port; 0: a free one (%(default)s)",
    )
    option("--metrics", action="store_true", help="answer Prometheus at /metrics")

    command = commands.add_parser(
        "compare",
        help="compare three versions of a service: the documented recipe, by hand, with "
        "sessionwire",
        description="Send equal requests to three versions of a service: the documented recipe, "
        "one written by hand with care, and one with sessionwire. Check each answer against the "
        "database, and count the lines of each service. This starts a PostgreSQL server of its "
        "own in var/compare.",
    )
    command.set_defaults(command=compare)
    option = command.add_argument
    option(
        "--requests",
        type=integer(1),
        default=200,
        metavar="N",
        help="requests to each service (%(default)s)",
    )
    option(
        "--workers",
        type=integer(1),
        default=8,
        metavar="N",
        help="concurrent clients (%(default)s)",
    )
    return parser.parse_args()


def add_settings(command: argparse.ArgumentParser) -> None:
    option = command.add_argument
    option(
        "--config",
        type=Path,
        default=CONFIG,
        metavar="FILE",
        help="YAML file to start from (%(default)s)",
    )
    option("--secrets-dir", type=Path, metavar="DIR", help="directory with a file per secret value")


def integer(minimum: int, maximum: float = math.inf) -> Callable[[str], int]:
    """Build a type for argparse, whose messages show the inner function's name."""

    def number(text: str) -> int:
        value = int(text)
        if not minimum <= value <= maximum:
            limit = f"less than {minimum}" if value < minimum else f"more than {maximum}"
            raise argparse.ArgumentTypeError(f"{value} is {limit}")
        return value

    return number


# The commands import their modules. So --help is quick, and an interrupt during the
# slow imports is handled as quietly as a later one.


def demo(arguments: argparse.Namespace) -> int:
    from .demo import Options, run

    options = Options(arguments.transfers, arguments.workers, arguments.accounts)
    return run_command(lambda: run(load(arguments), options))


def serve(arguments: argparse.Namespace) -> int:
    from .server import serve

    host, port, has_metrics = arguments.host, arguments.port, arguments.metrics
    return run_command(lambda: serve(load(arguments), host, port, has_metrics=has_metrics))


def load(arguments: argparse.Namespace) -> LedgerSettings:
    from .settings import LedgerSettings

    return LedgerSettings.load(arguments.config, secrets_dir=arguments.secrets_dir)


def compare(arguments: argparse.Namespace) -> int:
    from .compare import run

    return run_command(lambda: run(arguments.requests, arguments.workers))


def run_command(run: Callable[[], Coroutine[Any, Any, bool]]) -> int:
    """Run a coroutine function and return the exit code. Explain expected errors."""
    from sqlalchemy.exc import SQLAlchemyError

    from sessionwire import SessionwireError

    try:
        return 0 if asyncio.run(run()) else 1
    except (SessionwireError, SQLAlchemyError, OSError) as error:
        print(f"ledger: {getattr(error, 'orig', None) or error}", file=sys.stderr)
        for note in getattr(error, "__notes__", ()):
            print(f"  {note}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
