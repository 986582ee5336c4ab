"""Run a function in a transaction, and again after errors that changed nothing."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from sessionwire._database.call_sites import CallSite
from sessionwire._database.runtime import Database
from sessionwire._error_reports import summarize

from .context import current_scope
from .definition import TransactionDefinition
from .hooks import run_hooks
from .transaction import Hook
from .transaction_block import TransactionBlock

logger = logging.getLogger("sessionwire.retry")
R = TypeVar("R")

INITIAL_BACKOFF, MAX_BACKOFF = (
    0.01,
    1.0,
)  # seconds before a retry, doubled each time, with full jitter


async def run_with_retries(
    database: Database,
    definition: TransactionDefinition,
    attempts: int,
    function: Callable[[], Awaitable[R]],
    call_site: CallSite | None,
) -> R:
    """Run the function in a block, up to `attempts` times.

    If a scope is open, run it once: the outer block retries.
    """
    if current_scope(database) is not None:
        attempts = 1
    # Of the failed attempt: they run if no other one begins.
    postponed_hooks: Sequence[Hook] = ()
    attempt = 0
    while True:
        attempt += 1
        block = TransactionBlock(database, definition, call_site, may_retry=attempt < attempts)
        try:
            if attempt > 1:
                longest = min(MAX_BACKOFF, INITIAL_BACKOFF * 2.0 ** min(attempt - 1, 20))
                await asyncio.sleep(random.uniform(0, longest))
            async with block:
                postponed_hooks = ()
                return await function()
        except BaseException as error:
            if block.retry_reason:
                database.totals.retries[block.retry_reason] += 1
                postponed_hooks = block.postponed_hooks
                logger.info("attempt %d of %d failed: %s", attempt, attempts, summarize(error))
                continue
            failure = await run_hooks(postponed_hooks, error)
            if failure is not None and failure is not error:
                raise failure from error
            raise
