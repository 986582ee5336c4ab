"""The command line of the demo: messages and exit codes of failed runs."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from .conftest import Ledger, assert_explained


def test_the_demo_runs_without_arguments_from_any_directory_on_its_own_sqlite_file(
    ledger: Ledger, tmp_path: Path
) -> None:
    finished = ledger.run("demo", "--transfers", "20")

    assert finished.returncode == 0, finished.stderr
    assert "SQLite" in finished.stdout
    assert (tmp_path / "var" / "ledger.db").exists()


def test_the_demo_explains_a_misspelt_settings_key(ledger: Ledger, tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text("database:\n  url: sqlite://\n  pol:\n    size: 5\n")

    assert_explained(
        ledger.run_here("demo", "--config", "my.yaml"),
        "database.pol (my.yaml)",
        "did you mean 'pool'?",
    )


def test_the_demo_explains_a_missing_config_file(ledger: Ledger) -> None:
    assert_explained(
        ledger.run_here("demo", "--config", "nowhere.yaml"),
        "nowhere.yaml: No such file or directory",
    )


def test_the_demo_explains_an_unreachable_database_without_its_password(ledger: Ledger) -> None:
    finished = ledger.on("postgresql://someone:secret@127.0.0.1:9/ledger").run_here("demo")

    assert_explained(finished, "'ledger'", "127.0.0.1:9", "user someone")
    assert "secret" not in finished.stderr


def test_the_demo_explains_an_unusable_number(ledger: Ledger, subtests: pytest.Subtests) -> None:
    for option, number in [("--workers", "0"), ("--accounts", "1"), ("--transfers", "many")]:
        with subtests.test(option):
            assert_explained(ledger.run_here("demo", option, number), f"argument {option}")


@pytest.mark.long
def test_an_interrupted_demo_ends_quietly_with_130(ledger: Ledger, database_url: str) -> None:
    demo = ledger.on(database_url).start(
        "demo", "--transfers", "5000", python=("-W", "error", "-X", "dev")
    )
    assert demo.stdout is not None
    while "Sending" not in demo.stdout.readline():
        assert demo.poll() is None

    demo.send_signal(signal.SIGINT)
    finished = ledger.finish(demo)

    assert finished.returncode == 130
    assert "interrupted" in finished.stderr
    assert "Traceback" not in finished.stderr
    assert "Warning" not in finished.stderr
