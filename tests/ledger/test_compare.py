"""The comparison: what it finds in the books of each service, and how it counts lines."""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest

from ledger.compare.lines import lines_of_code
from ledger.compare.traffic import Kind, plan
from ledger.compare.trial import SERVICES, Findings, compare, try_out
from sessionwire import DatabaseSessionManager


@pytest.fixture
def directory() -> Iterator[Path]:
    directory = tempfile.mkdtemp(prefix="sessionwire-")  # pytest closes its own to the server's user
    yield Path(directory, "postgres")
    shutil.rmtree(directory)


def faultless(lines: int) -> Findings:
    return Findings(lost=0, kept=0, failed=0, held=0, lines=lines)


@pytest.mark.long
async def test_one_request_after_the_other_each_service_is_right(directory: Path) -> None:
    sent = Counter(request.kind for request in plan(40))
    assert all(sent[kind] for kind in (Kind.PAYMENT, Kind.UNKNOWN_ACCOUNT, Kind.REFUND, Kind.LARGE_REFUND))

    findings = await compare(directory, requests=40, workers=1, answered=lambda: None)

    assert len(findings) == len(SERVICES)
    assert findings == [faultless(of_one.lines) for of_one in findings]


@pytest.mark.long
async def test_only_new_attempts_answer_each_of_many_refunds_at_a_time(directory: Path) -> None:
    refunds = [request for request in plan(200) if request.kind is Kind.REFUND]
    async with DatabaseSessionManager(f"embedded:{directory}") as server:
        recipe, by_hand, ours = [
            await try_out(server, name, deepcopy(refunds), workers=8, answered=lambda: None) for name in SERVICES
        ]

    assert recipe == replace(faultless(recipe.lines), failed=recipe.failed)
    assert 0 < recipe.failed < len(refunds)
    assert by_hand == faultless(by_hand.lines)
    assert ours == faultless(ours.lines)


def test_a_line_counts_where_it_has_code() -> None:
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
    assert lines_of_code(source) == 7
