"""`sandbox`: run everything in one transaction, which is rolled back at the end.

The code under test uses connections and transactions as usual. Each of its transactions
is a savepoint on the one connection, and tasks take turns. A transaction begins inside
another one only if its code runs inside the block of that one.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, TypeVar

from dependency_injector import containers
from sqlalchemy import text

from sessionwire._core.context import current_scope
from sessionwire._database.completion import close_or_invalidate, finish_rollback
from sessionwire._database.options import CONNECTION_OPTIONS, WITHOUT_HOOKS, ConnectionOptions
from sessionwire._database.runtime import database_of
from sessionwire._managers import managers_of
from sessionwire._shield import run_shielded
from sessionwire.errors import SandboxError
from sessionwire.manager import DatabaseSessionManager

from ._interruptible import Interruptible
from ._leaks import TASK_GRACE, LeakDetector
from ._sandbox_engines import SandboxEngines
from ._shared_connection import SharedConnection
from ._substitution import substitute_engines

D = TypeVar("D", bound=DatabaseSessionManager | containers.Container)


@asynccontextmanager
async def sandbox(
    database: D, *, check_deferred: bool = False, patience: float = 5.0
) -> AsyncGenerator[D]:
    """Roll back at the end of the block everything that was done to the database in it.

    Commits, rollbacks, retries, hooks and every kind of block keep their meaning.
    Concurrent tasks take turns: a task has the connection from the first statement of
    its transaction until the transaction ends. A manager that is not open is open
    inside the block.

    Args:
        database: A manager, or a container for all databases in it.
        check_deferred: Check deferred constraints at each commit; otherwise they are
            never checked.
        patience: Seconds after which a task that waits for its turn raises
            `SandboxError` if nothing happens in the transaction of the other task
            meanwhile. It raises at once if that transaction cannot end first.

    Raises:
        SandboxError: A scope, a connection or a task was left open at the end of the
            block; the message names its line. Also for a deadlock in a task that nobody
            awaits, which ends the block, and if a session is open around the block.
        ConfigurationError: The container has no database.
        ConnectionFailedError: The database cannot be reached.

    Example:
        ```python
        @pytest.fixture
        async def container():
            async with sandbox(Container()) as container:
                yield container


        async def test_selling_makes_an_order(container):
            order = await container.shop().sell("tea")
            assert order.id
        ```
    """
    async with AsyncExitStack() as stack:
        for manager in managers_of(database):
            await stack.enter_async_context(_sandbox(manager, check_deferred, patience))
        yield database


@asynccontextmanager
async def _sandbox(
    manager: DatabaseSessionManager, check_deferred: bool, patience: float
) -> AsyncGenerator[None]:
    database = database_of(manager)
    if current_scope(database) is not None:
        raise SandboxError(
            "a session is open around the sandbox, and blocks that join it would commit for real: "
            "open the session inside the sandbox"
        )
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(_opened(manager))
        timeout = manager.settings.rollback_timeout
        connection = await stack.enter_async_context(
            manager.engine.execution_options(
                **{CONNECTION_OPTIONS: ConnectionOptions(write_intent=True), WITHOUT_HOOKS: True}
            ).connect()
        )
        # begins the transaction: a begin() would wait for the first statement
        await connection.execute(text("SELECT 1"))
        raw: Any = await connection.get_raw_connection()
        shared = SharedConnection(
            raw.dbapi_connection,
            connection.dialect,
            database.begin_hooks,
            check_deferred=check_deferred,
            patience=patience,
        )
        detector = LeakDetector(manager)
        error: BaseException | None = None
        with substitute_engines(
            database, lambda real: SandboxEngines(database, real, shared, detector)
        ):
            try:
                with Interruptible():
                    yield
            except BaseException as raised:
                error = raised
            leaks: list[str] = []
            try:
                try:
                    clean_up = _clean_up(detector, shared, asyncio.current_task(), timeout, leaks)
                    await run_shielded(clean_up, TASK_GRACE + 3 * timeout)
                except TimeoutError:
                    leaks.append("what was left open did not end in time")
                finally:
                    shared.close()
                    await finish_rollback(close_or_invalidate(connection), timeout, error)
            except BaseException as cancellation:
                cancellation.__cause__ = cancellation.__cause__ or error
                error = cancellation
            if error is not None:
                for leak in leaks:
                    error.add_note(leak)
                raise error
            if leaks:
                raise SandboxError("\n".join(leaks))


@asynccontextmanager
async def _opened(manager: DatabaseSessionManager) -> AsyncGenerator[None]:
    """Open the manager if it is not open, and restore its state at the end."""
    if manager.is_open:
        yield
        return
    settings = manager.settings if manager.is_initialized else None
    try:
        async with manager:
            yield
    finally:
        if settings is not None and not manager.is_initialized:
            manager.init(settings)


async def _clean_up(
    detector: LeakDetector,
    shared: SharedConnection,
    caller: asyncio.Task[Any] | None,
    timeout: float,
    leaks: list[str],
) -> None:
    """End the tasks and blocks left open in the sandbox, and report them in `leaks`."""
    leaks += await detector.cancel_leftover_tasks(caller, shared.uncancellable_tasks, timeout)
    leaks += detector.abort_leftover_blocks()
    shared.abort_all()
    await shared.wait_for_cleanup()
