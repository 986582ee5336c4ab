"""If a planned attempt never begins, the failed one's on_rollback hooks still run."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial

import pytest
from sqlalchemy import insert, select
from sqlalchemy.exc import DBAPIError

from sessionwire import (
    CurrentSession,
    DatabaseSessionManager,
    NotInitializedError,
    TransactionManager,
    transactional,
)
from sessionwire._core import retry
from sessionwire._database.runtime import database_of

from .cancellation import each_cancellation
from .conftest import notes
from .models import Note


def lost_connection() -> DBAPIError:
    return DBAPIError("SELECT 1", None, OSError("gone"), connection_invalidated=True)


@pytest.fixture
def _long_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry.random, "uniform", lambda _low, _high: 60)


class Clerk:
    """Fails in its first attempts, with hooks of each."""

    def __init__(self, manager: DatabaseSessionManager, *, fails: int) -> None:
        self.session, self.transaction, self.fails = (
            CurrentSession(manager),
            manager.transaction,
            fails,
        )
        self.attempts = 0
        self.ran: list[str] = []
        self.failed = asyncio.Event()

    async def note(self, what: str) -> None:
        await asyncio.sleep(0)
        self.ran.append(what)

    def register(self, transaction: TransactionManager) -> None:
        transaction.on_commit(partial(self.ran.append, f"{self.attempts} committed"))
        transaction.on_rollback(partial(self.ran.append, f"{self.attempts} rolled back"))
        transaction.on_rollback(partial(self.note, f"{self.attempts} rolled back, async"))

    @transactional(retries=5)
    async def work(self) -> str:
        self.attempts += 1
        self.register(self.transaction)
        await self.session.execute(insert(Note).values(text="a"))
        if self.attempts <= self.fails:
            asyncio.get_running_loop().call_soon(self.failed.set)
            raise lost_connection()
        return "done"


@pytest.mark.usefixtures("_long_pauses")
class TestInThePause:
    @pytest.fixture
    async def clerk(self, manager: DatabaseSessionManager) -> Clerk:
        return Clerk(manager, fails=1)

    async def _in_the_pause(
        self, clerk: Clerk, manager: DatabaseSessionManager
    ) -> asyncio.Task[str]:
        task = asyncio.create_task(clerk.work())
        await clerk.failed.wait()
        async with asyncio.timeout(5):
            while database_of(manager).open_units:
                await asyncio.sleep(0.001)
        assert clerk.ran == []
        return task

    async def test_a_cancellation_in_the_pause_runs_the_on_rollback_hooks_first(
        self, manager: DatabaseSessionManager, clerk: Clerk
    ) -> None:
        task = await self._in_the_pause(clerk, manager)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert clerk.ran == ["1 rolled back", "1 rolled back, async"]
        assert await notes(manager) == []

    async def test_a_timeout_in_the_pause_runs_the_on_rollback_hooks_first(
        self, manager: DatabaseSessionManager, clerk: Clerk
    ) -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(clerk.work(), 0.5)
        assert clerk.ran == ["1 rolled back", "1 rolled back, async"]

    async def test_an_error_of_a_hook_in_the_pause_is_a_note_on_the_cancellation(
        self, manager: DatabaseSessionManager, clerk: Clerk
    ) -> None:
        register = clerk.register

        def register_more(transaction: TransactionManager) -> None:
            transaction.on_rollback(lambda: 1 // 0)
            register(transaction)

        clerk.register = register_more  # type: ignore[method-assign]
        task = await self._in_the_pause(clerk, manager)
        task.cancel()
        with pytest.raises(asyncio.CancelledError) as raised:
            await task
        assert "ZeroDivisionError" in raised.value.__notes__[0]
        assert clerk.ran == ["1 rolled back", "1 rolled back, async"]


async def test_on_rollback_hooks_run_if_the_manager_was_closed_in_the_pause(
    manager: DatabaseSessionManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    clerk = Clerk(manager, fails=1)
    monkeypatch.setattr(retry.random, "uniform", lambda _low, _high: 0.2)
    task = asyncio.create_task(clerk.work())
    await clerk.failed.wait()
    await manager.close()
    with pytest.raises(NotInitializedError):
        await task
    assert clerk.ran == ["1 rolled back", "1 rolled back, async"]
    await manager.open()


async def test_a_cancellation_at_any_await_runs_the_hooks_of_one_attempt_once(
    manager: DatabaseSessionManager,
) -> None:
    clerks: list[Clerk] = []

    def work() -> Callable[..., object]:
        clerks.append(Clerk(manager, fails=2))
        return clerks[-1].work()  # type: ignore[return-value]

    async for _ in each_cancellation(work, stride=3):  # type: ignore[arg-type]
        clerk = clerks[-1]
        last = {each.split()[0] for each in clerk.ran}
        assert len(last) <= 1, clerk.ran  # Only one attempt ran its hooks.
        assert len(clerk.ran) == len(set(clerk.ran))
        committed = [each for each in clerk.ran if each.endswith("committed")]
        rolled_back = [each for each in clerk.ran if "rolled back" in each]
        assert not (committed and rolled_back)
        if clerk.attempts:
            assert committed or rolled_back, clerk.attempts
        async with manager.transaction() as session:
            kept = list(await session.scalars(select(Note)))
            assert len(kept) == len(committed)
            for each in kept:
                await session.delete(each)
