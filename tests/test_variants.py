"""A share of the tests with other defaults: without the pipeline, and with a pool of one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
FILES = [
    str(TESTS / file)
    for file in ("test_transactions.py", "test_savepoints.py", "test_propagation.py")
]


@pytest.mark.long
@pytest.mark.parametrize(
    ("option", "tests", "defaults"),
    [
        ("--no-pipeline", "not sqlite", "pipeline=False, pool: size=5 max_overflow=10 "),
        ("--pool-of-one", "", "pipeline=True, pool: size=1 max_overflow=0 "),
    ],
    ids=["without the pipeline", "a pool of one"],
)
def test_the_tests_of_transactions_pass_with_another_default(
    option: str, tests: str, defaults: str
) -> None:
    options = ["-n", "2", "-p", "no:cacheprovider", "-k", tests, option]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *FILES],
        cwd=TESTS.parent,
        env=os.environ | {"PYTHONPATH": str(TESTS.parent / "src")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stdout
    assert f"defaults: {defaults}" in run.stdout
    assert f": {option}: " in run.stdout  # the reason of a test that was skipped
