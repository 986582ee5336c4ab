"""The command line: `python -m ledger demo`."""

import argparse
import asyncio
import sys
from collections.abc import Callable
from pathlib import Path

CONFIG = Path(__file__).parents[2] / "config" / "default.yaml"


def main() -> int:
    """0: the books are right; 1: they are not; 2: it could not be tried; 130: interrupted."""
    arguments = parse()
    try:
        return demo(arguments)
    except KeyboardInterrupt:
        print("\ninterrupted: what was acknowledged is in the books, the rest never happened", file=sys.stderr)
        return 130


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m ledger", description="Money moves between accounts.")
    commands = parser.add_subparsers(required=True, metavar="command")
    command = commands.add_parser(
        "demo",
        help="run transfers concurrently, and prove that the books kept every answer",
        description="Runs transfers concurrently, some meant to fail, and proves that the books kept every answer.",
        epilog="Environment variables override the file, for example LEDGER_DATABASE__URL=sqlite:///other.db",
    )
    option = command.add_argument
    option("--config", type=Path, default=CONFIG, metavar="FILE", help="YAML file to start from (%(default)s)")
    option("--secrets-dir", type=Path, metavar="DIR", help="directory with a file per secret value")
    option("--transfers", type=at_least(1), default=1000, metavar="N", help="calls to make (%(default)s)")
    option("--workers", type=at_least(1), default=50, metavar="N", help="callers at the same time (%(default)s)")
    option("--accounts", type=at_least(2), default=10, metavar="N", help="accounts to open (%(default)s)")
    return parser.parse_args()


def at_least(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is less than {least}")
        return value

    return number


def demo(arguments: argparse.Namespace) -> int:
    # Imported here: the help comes at once, and an interrupt while the database's packages load is a quiet one.
    from sqlalchemy.exc import SQLAlchemyError

    from sessionwire import SessionwireError

    from .demo import Options, run
    from .settings import LedgerSettings

    try:
        settings = LedgerSettings.load(arguments.config, secrets_dir=arguments.secrets_dir)
        options = Options(arguments.transfers, arguments.workers, arguments.accounts)
        return 0 if asyncio.run(run(settings, options)) else 1
    except (SessionwireError, SQLAlchemyError, OSError) as error:
        print(f"ledger: {getattr(error, 'orig', None) or error}", file=sys.stderr)
        for note in getattr(error, "__notes__", ()):
            print(f"  {note}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
