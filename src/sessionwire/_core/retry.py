"""Run a function in a transaction, and again after errors that changed nothing."""

from __future__ import annotations

import asyncio
import inspect
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar, cast

from sessionwire._database.call_sites import CallSite, line_of
from sessionwire._database.driver_errors import retry_reason
from sessionwire._database.runtime import Database
from sessionwire._error_reports import summarize
from sessionwire._log_events import ATTEMPT_FAILED

from .context import current_scope
from .definition import TransactionDefinition, exception_types
from .hooks import run_hooks, to_call
from .transaction import Hook
from .transaction_block import TransactionBlock

R = TypeVar("R")
RetryOn = type[Exception] | tuple[type[Exception], ...] | Callable[[Exception], bool]

INITIAL_BACKOFF, MAX_BACKOFF = (
    0.01,
    1.0,
)  # seconds before a retry, doubled each time, with full jitter


@dataclass(frozen=True)
class RetryRule:
    """How many attempts there may be, and what says why there is another one."""

    attempts: int
    find_reason: Callable[[BaseException | None], str | None] = retry_reason


def define_retries(retries: object, retry_on: RetryOn | None) -> RetryRule:
    """Validate what says how often, and after which errors, a function is called again.

    Raises:
        TypeError: One is of a wrong type, or there is `retry_on` without `retries`.
        ValueError: `retries` is negative.
    """
    if isinstance(retries, bool) or not isinstance(retries, int):
        raise TypeError(
            f"retries={retries!r} is not a number of retries: write an int, such as retries=3"
        )
    if retries < 0:
        raise ValueError(f"retries={retries} is less than none: write retries=0 for one attempt")
    if retry_on is None:
        return RetryRule(retries + 1)
    is_wanted = _condition(retry_on)
    if not retries:
        raise TypeError(
            "retry_on= says after which errors there is another attempt, and without retries= "
            "there is none: write how many there may be, such as retries=3"
        )
    return RetryRule(retries + 1, partial(retry_reason, is_wanted=is_wanted))


def _condition(retry_on: RetryOn) -> Callable[[Sequence[Exception]], bool]:
    """Return what tells, by an error followed by its causes, whether there is a retry."""
    if isinstance(retry_on, type | tuple):
        types = exception_types(cast(object, retry_on), "retry_on")
        return lambda errors: any(isinstance(error, types) for error in errors)
    if not callable(retry_on):
        raise TypeError(
            f"retry_on={retry_on!r}: write an exception type, a tuple of them, or a function that "
            "takes the error and returns whether to try again"
        )
    to_call(retry_on, "retry_on=", "the error")
    if inspect.iscoroutinefunction(retry_on):
        raise TypeError(
            "retry_on= takes a function that answers at once, and was given a coroutine "
            "function: write 'def' instead of 'async def'"
        )
    return lambda errors: bool(retry_on(errors[0]))


async def run_with_retries(
    database: Database,
    definition: TransactionDefinition,
    rule: RetryRule,
    function: Callable[[], Awaitable[R]],
    call_site: CallSite | None,
) -> R:
    """Run the function in a block, as often as the rule says.

    If a scope is open, run it once: the outer block retries.
    """
    attempts = 1 if current_scope(database) is not None else rule.attempts
    # Of the failed attempt: they run if no other one begins.
    postponed_hooks: Sequence[Hook] = ()
    attempt = 0
    while True:
        attempt += 1
        find_reason = rule.find_reason if attempt < attempts else None
        block = TransactionBlock(
            database, definition, call_site, find_retry_reason=find_reason, attempt=attempt
        )
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
                ATTEMPT_FAILED.log(
                    attempt=attempt,
                    attempts=attempts,
                    reason=block.retry_reason,
                    error=summarize(error),
                    call_site=line_of(call_site),
                )
                continue
            failure = await run_hooks(postponed_hooks, error)
            if failure is not None and failure is not error:
                raise failure from error
            raise
