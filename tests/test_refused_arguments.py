"""Invalid hooks and numbers are refused in the call that passes them."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Coroutine
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
from sqlalchemy import insert

from sessionwire import DatabaseSessionManager, Propagation, TransactionManager, transactional
from sessionwire._database.runtime import database_of
from sessionwire.asgi import TransactionMiddleware

from .conftest import notes
from .models import Note

TAKE_HOOKS = ("before_commit", "on_commit", "on_rollback", "on_begin", "on_connect")


async def send(mail: str) -> None:
    await asyncio.sleep(0)


@pytest.mark.parametrize("method", TAKE_HOOKS)
class TestHooks:
    async def test_a_coroutine_passed_as_a_hook_is_closed_and_refused(
        self, manager: DatabaseSessionManager, method: str
    ) -> None:
        coroutine = send("hello")
        with pytest.raises(
            TypeError, match=r"coroutine that send\(\) returned.*functools\.partial\(send, …\)"
        ):
            async with manager.transaction() as session:
                await session.execute(insert(Note).values(text="a"))
                getattr(manager.transaction, method)(coroutine)
        assert inspect.getcoroutinestate(coroutine) == inspect.CORO_CLOSED
        assert await notes(manager) == []
        assert not database_of(manager).begin_hooks
        assert not database_of(manager).connect_hooks

    @pytest.mark.parametrize("given", [None, "send", 3], ids=str)
    async def test_a_hook_that_is_not_callable_is_refused_at_the_call(
        self, manager: DatabaseSessionManager, method: str, given: Any
    ) -> None:
        take = getattr(manager.transaction, method)
        described = "None" if given is None else type(given).__name__
        refused = pytest.raises(
            TypeError, match=rf"{method}\(\) takes a function.*{described}.*lambda: function"
        )
        with refused:
            take(given)
        async with manager.session():
            with refused:
                take(given)
        for mode in (Propagation.REQUIRED, Propagation.SUPPORTS, Propagation.NOT_SUPPORTED):
            async with manager.transaction(mode):
                with refused:
                    take(given)

    async def test_a_hook_that_needs_an_argument_is_refused_at_the_call(
        self, manager: DatabaseSessionManager, method: str
    ) -> None:
        def lacking(connection: object, mail: str) -> None: ...

        async with manager.transaction():
            with pytest.raises(
                TypeError, match=r"calls lacking\(\) with .* argument.*partial\(lacking, …\)"
            ):
                getattr(manager.transaction, method)(lacking)


async def test_any_callable_is_accepted_as_a_hook(manager: DatabaseSessionManager) -> None:
    class Callables:
        def method(self) -> None:
            called.append("method")

        def __call__(self) -> None:
            called.append("object")

    def with_defaults(what: str = "defaults", *more: object, **options: object) -> None:
        called.append(what)

    called: list[str] = []
    without_signature: Callable[[], object] = dict
    async with manager.transaction():
        for function in (
            Callables().method,
            Callables(),
            with_defaults,
            partial(with_defaults, "partial"),
        ):
            manager.transaction.on_commit(function)
        manager.transaction.on_commit(without_signature)
    assert called == ["method", "object", "defaults", "partial"]


async def test_run_refuses_a_coroutine_instead_of_its_function(
    manager: DatabaseSessionManager,
) -> None:
    coroutine = send("hello")
    with pytest.raises(TypeError, match=r"run\(\) takes a function.*send\(\)"):
        await manager.transaction.run(coroutine)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    assert inspect.getcoroutinestate(coroutine) == inspect.CORO_CLOSED
    with pytest.raises(TypeError, match=r"run\(\) calls send\(\) with no arguments"):
        await manager.transaction.run(send)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


async def app(scope: Any, receive: Any, send: Any) -> None: ...


def in_block(transaction: TransactionManager, **options: Any) -> None:
    transaction(**options)


def by_decorator(transaction: TransactionManager, **options: Any) -> None:
    transactional(**options)


def by_middleware(transaction: TransactionManager, **options: Any) -> None:
    TransactionMiddleware(app, transaction=transaction, **options)


def by_run(transaction: TransactionManager, **options: Any) -> None:
    async def work() -> None:
        raise AssertionError("never")

    running: Coroutine[Any, Any, None] = transaction.run(work, **options)
    with pytest.raises(StopIteration):
        running.send(None)


WRONG_TIMES = [
    pytest.param(-1, ValueError, id="negative"),
    pytest.param(-0.5, ValueError, id="negative fraction"),
    pytest.param(timedelta(seconds=-1), ValueError, id="negative timedelta"),
    pytest.param(float("nan"), ValueError, id="not a number"),
    pytest.param("3", TypeError, id="text"),
    pytest.param(True, TypeError, id="a truth value"),
    pytest.param([1], TypeError, id="a list"),
]
WRONG_COUNTS = [
    pytest.param(-1, ValueError, id="negative"),
    pytest.param("3", TypeError, id="text"),
    pytest.param(1.5, TypeError, id="fraction"),
    pytest.param(True, TypeError, id="a truth value"),
    pytest.param(None, TypeError, id="None"),
]


async def is_gone(_: Exception) -> bool:
    return True


class TestErrors:
    """Also on a manager that is not open."""

    @pytest.mark.parametrize("ask", [by_decorator, by_run])
    @pytest.mark.parametrize(
        ("given", "why"),
        [
            pytest.param(ValueError("a"), "a function that takes the error", id="an error"),
            pytest.param([ValueError], "a tuple of them", id="a list"),
            pytest.param(int, "not an exception type", id="another type"),
            pytest.param((ValueError, "KeyError"), "not an exception type", id="text"),
            pytest.param(asyncio.CancelledError, "CancelledError is no error", id="cancellation"),
            pytest.param((OSError, BaseException), "BaseException is no error", id="everything"),
            pytest.param(lambda: True, "takes the error|the 1 argument|with 1 argument", id="none"),
            pytest.param(is_gone, "write 'def' instead of 'async def'", id="async"),
        ],
    )
    def test_what_can_say_of_no_error_whether_to_retry_is_refused(
        self, ask: Callable[..., None], given: Any, why: str
    ) -> None:
        with pytest.raises(TypeError, match=f"^retry_on=.*({why})"):
            ask(DatabaseSessionManager().transaction, retries=2, retry_on=given)

    @pytest.mark.parametrize("ask", [by_decorator, by_run])
    def test_retry_on_without_retries_is_refused(self, ask: Callable[..., None]) -> None:
        with pytest.raises(TypeError, match=r"without retries= there is none.*retries=3"):
            ask(DatabaseSessionManager().transaction, retry_on=ValueError)

    @pytest.mark.parametrize("ask", [in_block, by_decorator, by_run])
    @pytest.mark.parametrize(
        ("given", "why"),
        [
            pytest.param(ValueError("a"), "is not an exception type", id="an error"),
            pytest.param([ValueError], "a tuple of them", id="a list"),
            pytest.param((ValueError, "KeyError"), "'KeyError' is not an exc", id="text"),
            pytest.param(asyncio.CancelledError, "CancelledError is no error", id="cancellation"),
            pytest.param(BaseException, "BaseException is no error", id="everything"),
        ],
    )
    def test_what_is_no_type_of_errors_is_refused_as_no_rollback_for(
        self, ask: Callable[..., None], given: Any, why: str
    ) -> None:
        with pytest.raises(TypeError, match=f"^no_rollback_for=.*{why}"):
            ask(DatabaseSessionManager().transaction, no_rollback_for=given)

    def test_a_block_has_no_retry_on(self) -> None:
        with pytest.raises(TypeError, match=r"'retry_on': only @transactional\(retries=…"):
            in_block(DatabaseSessionManager().transaction, retry_on=ValueError)


class TestNumbers:
    """On a manager that is not open: whatever would be opened first would say so."""

    @pytest.mark.parametrize("ask", [in_block, by_decorator, by_middleware, by_run])
    @pytest.mark.parametrize(("timeout", "error"), WRONG_TIMES)
    def test_an_invalid_timeout_is_refused(
        self, ask: Callable[..., None], timeout: Any, error: type[Exception]
    ) -> None:
        with pytest.raises(error, match=r"^timeout="):
            ask(DatabaseSessionManager().transaction, timeout=timeout)

    @pytest.mark.parametrize("ask", [by_decorator, by_run])
    @pytest.mark.parametrize(("retries", "error"), WRONG_COUNTS)
    def test_an_invalid_number_of_retries_is_refused(
        self, ask: Callable[..., None], retries: Any, error: type[Exception]
    ) -> None:
        with pytest.raises(error, match=r"^retries="):
            ask(DatabaseSessionManager().transaction, retries=retries)

    @pytest.mark.parametrize(
        "timeout", [30, 30.0, timedelta(seconds=30), float("inf"), None], ids=str
    )
    async def test_valid_timeouts_and_retries_are_accepted(
        self, manager: DatabaseSessionManager, timeout: Any
    ) -> None:
        async def work() -> str:
            return "done"

        assert await manager.transaction.run(work, timeout=timeout, retries=0) == "done"
