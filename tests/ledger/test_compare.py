"""The comparison: what it counts is what the recipe does, and it finds nothing in the books of the other."""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from ledger.compare import Findings
from ledger.compare.traffic import Kind, plan
from ledger.compare.trial import compare


@pytest.fixture
def directory() -> Iterator[Path]:
    directory = tempfile.mkdtemp(prefix="sessionwire-")  # pytest closes its own to the server's user
    yield Path(directory, "postgres")
    shutil.rmtree(directory)


async def test_one_request_after_the_other_the_recipe_lies_as_often_as_it_is_given_cause_to(directory: Path) -> None:
    sent = Counter(request.kind for request in plan(40))
    assert all(sent[kind] for kind in (Kind.PAYMENT, Kind.UNKNOWN_ACCOUNT, Kind.LARGE_REFUND))

    usual, ours = await compare(directory, requests=40, workers=1, answered=lambda: None)

    assert usual.lost == sent[Kind.UNKNOWN_ACCOUNT]
    assert usual.kept == sent[Kind.LARGE_REFUND]
    assert ours == Findings(lost=0, kept=0, failed=0, held=0)
