"""The comparison: the faults of each service, and the count of its lines."""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest

from ledger.compare.experiment import SERVICES, Result, compare, measure
from ledger.compare.line_count import count_lines_of_code
from ledger.compare.workload import RequestKind, generate_requests
from sessionwire import DatabaseSessionManager


@pytest.fixture
def directory() -> Iterator[Path]:
    # The server's user may not enter pytest's directories.
    directory = tempfile.mkdtemp(prefix="sessionwire-")
    yield Path(directory, "postgres")
    shutil.rmtree(directory)


def faultless(lines_of_code: int) -> Result:
    return Result(
        missing_rows=0,
        unexpected_rows=0,
        spurious_failures=0,
        leaked_connections=0,
        lines_of_code=lines_of_code,
    )


@pytest.mark.long
async def test_each_compared_service_is_faultless_with_one_request_at_a_time(
    directory: Path,
) -> None:
    sent = Counter(request.kind for request in generate_requests(40))
    rare = (
        RequestKind.PAYMENT,
        RequestKind.UNKNOWN_ACCOUNT,
        RequestKind.REFUND,
        RequestKind.LARGE_REFUND,
    )
    assert all(sent[kind] for kind in rare)

    results = await compare(directory, requests=40, workers=1, on_answer=lambda: None)

    assert len(results) == len(SERVICES)
    assert results == [faultless(result.lines_of_code) for result in results]


@pytest.mark.long
async def test_only_services_with_retries_answer_every_concurrent_refund(directory: Path) -> None:
    refunds = [request for request in generate_requests(200) if request.kind is RequestKind.REFUND]
    async with DatabaseSessionManager(f"embedded:{directory}") as server:
        recipe, by_hand, with_sessionwire = [
            await measure(server, name, deepcopy(refunds), workers=8, on_answer=lambda: None)
            for name in SERVICES
        ]

    assert recipe == replace(
        faultless(recipe.lines_of_code), spurious_failures=recipe.spurious_failures
    )
    assert 0 < recipe.spurious_failures < len(refunds)
    assert by_hand == faultless(by_hand.lines_of_code)
    assert with_sessionwire == faultless(with_sessionwire.lines_of_code)


def test_only_lines_with_code_are_counted() -> None:
    source = '''
"""What this is."""

import os
from pathlib import (
    Path,
)

NAMES = [  # a comment beside code
    "a",
]


# a comment alone
def first(path: Path) -> str:
    """Tell a name.

    The first.
    """
    text = """two
    lines"""
    return NAMES[0] + str(path) + os.sep + text
'''
    assert count_lines_of_code(source) == 7
