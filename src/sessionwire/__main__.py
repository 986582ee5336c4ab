"""`python -m sessionwire`: the command line."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line, or say what it needs."""
    try:
        from ._cli.commands import commands
    except ImportError as error:
        if error.name not in ("click", "rich"):
            raise
        sys.exit("the command line needs click and rich: pip install 'sessionwire[cli]'")
    commands(prog_name="sessionwire")


if __name__ == "__main__":
    main()
