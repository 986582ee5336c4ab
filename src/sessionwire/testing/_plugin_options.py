"""Options of the pytest plugin: ini keys, and arguments of the command line."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest


def add_options(parser: pytest.Parser) -> None:
    """Declare the options of the plugin."""
    group = parser.getgroup("sessionwire", "databases for tests")
    for name, default, description in (
        ("url", "embedded", "URL beside whose database the test databases are made, or 'embedded'"),
        ("isolation", "sandbox", "'sandbox', or 'database' for a separate database for each test"),
    ):
        parser.addini(f"sessionwire_{name}", f"{description} (default: {default})", default=default)
        overrides = f"{description}; overrides the ini key sessionwire_{name}"
        group.addoption(f"--sessionwire-{name}", help=overrides)
    deferred = "whether commits in a sandbox check deferred constraints (default: false)"
    parser.addini("sessionwire_check_deferred", deferred, type="bool", default=False)
    patience = "seconds that a task in a sandbox waits for an inactive transaction (default: 5)"
    parser.addini("sessionwire_patience", patience, type="float", default=5.0)


def option(config: pytest.Config, name: str) -> str:
    """Return an argument of the command line, or the value of its ini key."""
    return str(config.getoption(f"sessionwire_{name}") or config.getini(f"sessionwire_{name}"))
