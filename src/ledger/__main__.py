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
    """0: the books are right, or the server has ended; 1: they are not; 2: it could not be tried; 130: interrupted."""
    arguments = parse()
    try:
        return int(arguments.command(arguments))
    except KeyboardInterrupt:
        told = ": what was acknowledged is in the books, the rest never happened" if arguments.command is demo else ""
        print(f"\ninterrupted{told}", file=sys.stderr)
        return 130


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m ledger", description="Money moves between accounts.")
    commands = parser.add_subparsers(required=True, metavar="command")
    environment = "Environment variables override the file, for example LEDGER_DATABASE__URL=sqlite:///other.db"

    command = commands.add_parser(
        "demo",
        help="run transfers concurrently, and prove that the books kept every answer",
        description="Runs transfers concurrently, some meant to fail, and proves that the books kept every answer.",
        epilog=environment,
    )
    command.set_defaults(command=demo)
    add_settings(command)
    option = command.add_argument
    option("--transfers", type=number(1), default=1000, metavar="N", help="calls to make (%(default)s)")
    option("--workers", type=number(1), default=50, metavar="N", help="callers at the same time (%(default)s)")
    option("--accounts", type=number(2), default=10, metavar="N", help="accounts to open (%(default)s)")

    command = commands.add_parser(
        "serve",
        help="serve the ledger's HTTP API",
        description="Serves the HTTP API, described at /docs. SIGTERM or SIGINT ends it once all accepted is answered.",
        epilog=environment,
    )
    command.set_defaults(command=serve)
    add_settings(command)
    option = command.add_argument
    option("--host", default="127.0.0.1", metavar="HOST", help="address to listen on (%(default)s)")
    option("--port", type=number(0, 65535), default=8000, metavar="PORT", help="port; 0: a free one (%(default)s)")

    command = commands.add_parser(
        "compare",
        help="send the same to a service as documentation writes it, by hand, and with sessionwire",
        description="Sends the same to a service as documentation writes it, to one written by hand with care, and to "
        "one with sessionwire. Holds each answer against the books, and counts the lines of each service. It starts a "
        "PostgreSQL of its own, in var/compare.",
    )
    command.set_defaults(command=compare)
    option = command.add_argument
    option("--requests", type=number(1), default=200, metavar="N", help="requests to each (%(default)s)")
    option("--workers", type=number(1), default=8, metavar="N", help="clients at the same time (%(default)s)")
    return parser.parse_args()


def add_settings(command: argparse.ArgumentParser) -> None:
    option = command.add_argument
    option("--config", type=Path, default=CONFIG, metavar="FILE", help="YAML file to start from (%(default)s)")
    option("--secrets-dir", type=Path, metavar="DIR", help="directory with a file per secret value")


def number(least: int, most: float = math.inf) -> Callable[[str], int]:
    def number(text: str) -> int:
        value = int(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(
                f"{value} is {f'less than {least}' if value < least else f'more than {most}'}"
            )
        return value

    return number


# The imports are inside: the help comes at once, and an interrupt while the database's packages load is a quiet one.


def demo(arguments: argparse.Namespace) -> int:
    from .demo import Options, run

    options = Options(arguments.transfers, arguments.workers, arguments.accounts)
    return attempt(lambda: run(load(arguments), options))


def serve(arguments: argparse.Namespace) -> int:
    from .server import serve

    return attempt(lambda: serve(load(arguments), arguments.host, arguments.port))


def load(arguments: argparse.Namespace) -> LedgerSettings:
    from .settings import LedgerSettings

    return LedgerSettings.load(arguments.config, secrets_dir=arguments.secrets_dir)


def compare(arguments: argparse.Namespace) -> int:
    from .compare import run

    return attempt(lambda: run(arguments.requests, arguments.workers))


def attempt(run: Callable[[], Coroutine[Any, Any, bool]]) -> int:
    """What could not be tried is explained."""
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
