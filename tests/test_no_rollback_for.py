"""`no_rollback_for`: errors that commit, and are then raised."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from functools import partial

import pytest
from sqlalchemy import delete, insert
from sqlalchemy.exc import IntegrityError

from sessionwire import (
    CommitOutcomeUnknownError,
    CurrentSession,
    DatabaseSessionManager,
    Propagation,
    TransactionTimeoutError,
    UnexpectedRollbackError,
    transactional,
)

from .cancellation import each_cancellation
from .conftest import checked_out, notes
from .models import Note
from .postgres import FaultyNetwork, OnFaultyNetwork, OnPostgres, run_at_commit


class LoginRefused(Exception):
    pass


class WrongPassword(LoginRefused):
    pass


class OutOfOrder(Exception):
    pass


class Accounts:
    def __init__(self, manager: DatabaseSessionManager) -> None:
        self.session = CurrentSession(manager)
        self.transaction = manager.transaction
        self.called: list[str] = []

    async def note(self, text: str, error: Exception | None) -> None:
        self.transaction.on_commit(lambda: self.called.append("committed"))
        self.transaction.on_rollback(lambda: self.called.append("rolled back"))
        self.session.add(Note(text=text))
        if error is not None:
            raise error

    @transactional(no_rollback_for=(LoginRefused, LookupError))
    async def log_in(self, text: str, error: Exception | None = None) -> None:
        await self.note(text, error)

    @transactional
    async def strictly(self, text: str, error: Exception | None = None) -> None:
        await self.note(text, error)


@pytest.fixture
def accounts(manager: DatabaseSessionManager) -> Accounts:
    return Accounts(manager)


class TestOutermostBlocks:
    @pytest.mark.parametrize("error", [LoginRefused(), WrongPassword(), KeyError("a")], ids=repr)
    async def test_an_error_that_is_named_commits_and_is_raised(
        self, manager: DatabaseSessionManager, accounts: Accounts, error: Exception
    ) -> None:
        with pytest.raises(type(error)) as raised:
            await accounts.log_in("a", error)
        assert raised.value is error
        assert not hasattr(error, "__notes__")
        assert accounts.called == ["committed"]
        totals = manager.status().transactions
        assert (totals.rolled_back, totals.unexpected) == (0, 0)
        assert await notes(manager) == ["a"]

    @pytest.mark.parametrize(
        "error", [OutOfOrder(), ExceptionGroup("all", [LoginRefused()])], ids=repr
    )
    async def test_any_other_error_rolls_back(
        self, manager: DatabaseSessionManager, accounts: Accounts, error: Exception
    ) -> None:
        with pytest.raises(type(error)):
            await accounts.log_in("a", error)
        assert accounts.called == ["rolled back"]
        assert await notes(manager) == []

    async def test_run_commits_once_and_does_not_try_again(
        self, manager: DatabaseSessionManager, accounts: Accounts
    ) -> None:
        with pytest.raises(LoginRefused):
            await manager.transaction.run(
                accounts.note,
                "a",
                LoginRefused(),
                retries=3,
                retry_on=LoginRefused,
                no_rollback_for=LoginRefused,
            )
        assert accounts.called == ["committed"]
        assert await notes(manager) == ["a"]

    async def test_a_statement_that_had_failed_rolls_back_and_is_told(
        self, manager: DatabaseSessionManager
    ) -> None:
        refused = LoginRefused("eve")
        with pytest.raises(LoginRefused) as raised:
            async with manager.transaction(no_rollback_for=LoginRefused) as session:
                await session.execute(insert(Note).values(text="a"))
                with suppress(IntegrityError):
                    await session.execute(insert(Note).values(text="a"))
                raise refused
        assert raised.value is refused
        (note,) = refused.__notes__
        assert note.startswith("rolled back in spite of no_rollback_for: IntegrityError: ")
        totals = manager.status().transactions
        assert (totals.rolled_back, totals.unexpected) == (1, 0)
        assert await notes(manager) == []

    async def test_a_flush_that_fails_at_the_end_rolls_back_and_is_told(
        self, manager: DatabaseSessionManager, accounts: Accounts
    ) -> None:
        with pytest.raises(LoginRefused) as raised:
            async with manager.transaction(no_rollback_for=LoginRefused) as session:
                session.add(Note(text="a"))
                await accounts.note("a", LoginRefused())
        assert raised.value.__notes__[0].startswith("rolled back in spite of no_rollback_for: Int")
        assert accounts.called == ["rolled back"]
        assert await notes(manager) == []

    async def test_the_error_of_the_failed_statement_itself_does_not_commit(
        self, manager: DatabaseSessionManager
    ) -> None:
        with pytest.raises(IntegrityError):
            async with manager.transaction(no_rollback_for=IntegrityError) as session:
                await session.execute(insert(Note).values(text="a"))
                await session.execute(insert(Note).values(text="a"))
        assert await notes(manager) == []

    async def test_set_rollback_only_outweighs_it(
        self, manager: DatabaseSessionManager, accounts: Accounts
    ) -> None:
        with pytest.raises(LoginRefused) as raised:
            async with manager.transaction(no_rollback_for=LoginRefused):
                manager.transaction.set_rollback_only()
                await accounts.note("a", LoginRefused())
        assert not hasattr(raised.value, "__notes__")
        assert accounts.called == ["rolled back"]
        assert await notes(manager) == []

    async def test_an_error_of_a_hook_is_a_note_on_it(
        self, manager: DatabaseSessionManager
    ) -> None:
        def fail() -> None:
            raise ZeroDivisionError("of the hook")

        with pytest.raises(LoginRefused) as raised:
            async with manager.transaction(no_rollback_for=LoginRefused) as session:
                session.add(Note(text="a"))
                manager.transaction.on_commit(fail)
                raise LoginRefused
        assert raised.value.__notes__ == ["then a hook failed: ZeroDivisionError: of the hook"]
        assert await notes(manager) == ["a"]

    async def test_a_deadline_that_has_passed_rolls_back(
        self, manager: DatabaseSessionManager
    ) -> None:
        with pytest.raises(TransactionTimeoutError) as raised:
            async with manager.transaction(timeout=0, no_rollback_for=Exception) as session:
                session.add(Note(text="a"))
                raise LoginRefused
        assert isinstance(raised.value.__context__, LoginRefused)
        assert await notes(manager) == []

    async def test_a_block_without_a_transaction_sends_its_changes_too(
        self, manager: DatabaseSessionManager
    ) -> None:
        with pytest.raises(LoginRefused):
            async with manager.transaction(
                Propagation.NOT_SUPPORTED, no_rollback_for=LoginRefused
            ) as session:
                session.add(Note(text="a"))
                raise LoginRefused
        assert await notes(manager) == ["a"]

    async def test_a_cancellation_at_any_await_leaves_all_or_nothing(
        self, manager: DatabaseSessionManager
    ) -> None:
        async def work() -> None:
            with suppress(LoginRefused):
                async with manager.transaction(no_rollback_for=LoginRefused) as session:
                    await session.execute(insert(Note).values(text="a"))
                    session.add(Note(text="b"))
                    raise LoginRefused

        results = []
        async for _ in each_cancellation(work):
            assert checked_out(manager) == 0
            results.append(await notes(manager))
            async with manager.connect() as connection:
                await connection.execute(delete(Note))
        assert [] in results
        assert results[-1] == ["a", "b"]
        assert all(written in ([], ["a", "b"]) for written in results)


class TestJoinedBlocks:
    async def test_a_joined_block_with_the_rule_does_not_doom_the_outer_one(
        self, manager: DatabaseSessionManager, accounts: Accounts
    ) -> None:
        async with manager.transaction():
            with pytest.raises(LoginRefused):
                await accounts.log_in("a", LoginRefused())
        assert await notes(manager) == ["a"]

    async def test_if_the_error_leaves_an_outer_block_without_the_rule_all_is_rolled_back(
        self, manager: DatabaseSessionManager, accounts: Accounts
    ) -> None:
        with pytest.raises(LoginRefused):
            async with manager.transaction():
                await accounts.log_in("a", LoginRefused())
        assert accounts.called == ["rolled back"]
        assert await notes(manager) == []

    @pytest.mark.parametrize("is_caught", [True, False], ids=["caught", "raised"])
    async def test_the_rule_of_the_outer_block_also_holds_for_joined_blocks_without_one(
        self, manager: DatabaseSessionManager, accounts: Accounts, is_caught: bool
    ) -> None:
        with suppress(LoginRefused):
            async with manager.transaction(no_rollback_for=LoginRefused):
                try:
                    await accounts.strictly("a", LoginRefused())
                except LoginRefused:
                    if not is_caught:
                        raise
        assert accounts.called == ["committed"]
        assert await notes(manager) == ["a"]

    async def test_another_error_of_a_joined_block_still_dooms_the_outer_one(
        self, manager: DatabaseSessionManager, accounts: Accounts
    ) -> None:
        with pytest.raises(UnexpectedRollbackError):
            async with manager.transaction(no_rollback_for=LoginRefused):
                with pytest.raises(OutOfOrder):
                    await accounts.log_in("a", OutOfOrder())
        assert await notes(manager) == []

    async def test_a_deadline_of_a_joined_block_dooms_an_outer_one_that_commits_after_any_error(
        self, manager: DatabaseSessionManager
    ) -> None:
        with pytest.raises(TransactionTimeoutError) as raised:
            async with manager.transaction(no_rollback_for=Exception) as session:
                session.add(Note(text="a"))
                async with manager.transaction(timeout=0):
                    await asyncio.sleep(0.01)
        assert raised.value.__notes__[0].startswith("rolled back in spite of no_rollback_for: Tra")
        assert await notes(manager) == []

    async def test_a_savepoint_is_released_and_the_error_raised(
        self, manager: DatabaseSessionManager
    ) -> None:
        async with manager.transaction() as session:
            with pytest.raises(LoginRefused):
                async with manager.transaction(Propagation.NESTED, no_rollback_for=LoginRefused):
                    session.add(Note(text="released"))
                    raise LoginRefused
            with pytest.raises(LoginRefused):
                async with manager.transaction(Propagation.NESTED):
                    session.add(Note(text="rolled back"))
                    raise LoginRefused
        assert await notes(manager) == ["released"]

    async def test_a_savepoint_with_a_failed_statement_is_rolled_back_and_the_error_raised(
        self, manager: DatabaseSessionManager
    ) -> None:
        async with manager.transaction() as session:
            session.add(Note(text="outer"))
            with pytest.raises(LoginRefused) as raised:
                async with manager.transaction(Propagation.NESTED, no_rollback_for=LoginRefused):
                    session.add_all([Note(text="a"), Note(text="a")])
                    raise LoginRefused
        assert raised.value.__notes__[0].startswith("rolled back in spite of no_rollback_for: Int")
        assert await notes(manager) == ["outer"]


class TestCommitsThatFail(OnPostgres):
    async def test_a_commit_that_is_refused_rolls_back_and_is_told(
        self, manager: DatabaseSessionManager, accounts: Accounts
    ) -> None:
        await run_at_commit(manager, "RAISE 'refused by the trigger'")
        with pytest.raises(LoginRefused) as raised:
            await accounts.log_in("a", LoginRefused())
        (note,) = raised.value.__notes__
        assert "in spite of no_rollback_for" in note
        assert "refused by the trigger" in note
        assert accounts.called == ["rolled back"]
        assert await notes(manager) == []

    async def test_a_commit_that_meets_a_conflict_is_tried_again(
        self, manager: DatabaseSessionManager, accounts: Accounts
    ) -> None:
        await run_at_commit(manager, "RAISE 'conflict' USING ERRCODE = '40001'")
        tried = []

        async def work() -> None:
            tried.append(1)
            await accounts.note("a", LoginRefused())

        with pytest.raises(LoginRefused):
            await manager.transaction.run(work, retries=2, no_rollback_for=LoginRefused)
        assert len(tried) == 3
        assert manager.status().retries == {"serialization_failure": 2}


class TestUnknownOutcomes(OnFaultyNetwork):
    async def test_an_unknown_outcome_is_raised_instead_of_the_error(
        self, network: FaultyNetwork, remote: DatabaseSessionManager
    ) -> None:
        called: list[str] = []
        with pytest.raises(CommitOutcomeUnknownError) as raised:
            async with remote.transaction(no_rollback_for=LoginRefused) as session:
                session.add(Note(text="a"))
                await session.flush()
                remote.transaction.on_commit(partial(called.append, "hook"))
                remote.transaction.on_rollback(partial(called.append, "hook"))
                network.swallows = True
                raise LoginRefused
        assert isinstance(raised.value.__context__, LoginRefused)
        assert called == []
        network.swallows = False
