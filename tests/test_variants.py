"""A share of the tests with other defaults: no pipeline, a pool of one, or psycopg."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
FILES = ["test_transactions.py", "test_savepoints.py", "test_propagation.py"]
# Those that meet a driver.
MORE_FILES = [
    *FILES,
    "test_begins.py",
    "test_cancellation.py",
    "test_commit_outcome.py",
    "test_connection_health.py",
    "test_connection_loss.py",
    "test_deadlines.py",
    "test_generators.py",
    "test_hooks.py",
    "test_manager.py",
    "test_memory.py",
    "test_messages.py",
    "test_one_pool.py",
    "test_ownership.py",
    "test_retries_cut_short.py",
    "test_retryable.py",
    "test_scopes.py",
    "test_session_hooks.py",
    "test_storms.py",
    "test_transaction_settings.py",
    "test_wrapped_tasks.py",
    "testing/test_sandbox.py",
    "testing/test_statements.py",
    "testing/test_templates.py",
]


@pytest.mark.long
@pytest.mark.parametrize(
    ("option", "files", "tests", "defaults"),
    [
        ("--no-pipeline", FILES, "not sqlite", "pipeline=False, pool: size=5 max_overflow=10 "),
        ("--pool-of-one", FILES, "", "pipeline=True, pool: size=1 max_overflow=0 "),
        ("--driver=psycopg", MORE_FILES, "not sqlite", "driver=psycopg, pipeline=False, "),
    ],
    ids=["without the pipeline", "a pool of one", "psycopg"],
)
def test_the_tests_of_transactions_pass_with_another_default(
    option: str, files: list[str], tests: str, defaults: str
) -> None:
    options = ["-n", "2", "-p", "no:cacheprovider", "-k", tests, option]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *(str(TESTS / file) for file in files)],
        cwd=TESTS.parent,
        env=os.environ | {"PYTHONPATH": str(TESTS.parent / "src")},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert run.returncode == 0, run.stdout
    [told] = [line for line in run.stdout.splitlines() if line.startswith("defaults: ")]
    assert defaults in told
    # the reason of a test that was skipped
    assert f": {option.partition('=')[0]}: " in run.stdout
