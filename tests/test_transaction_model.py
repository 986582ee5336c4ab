"""Random steps into and out of scopes: library and model of the design must agree."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Coroutine
from contextlib import AbstractAsyncContextManager, suppress
from contextvars import copy_context
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Literal

from hypothesis import Phase
from hypothesis import settings as hypothesis_settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from hypothesis.strategies import booleans, lists, sampled_from
from sqlalchemy import delete, insert, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, create_async_engine

from sessionwire import (
    CurrentSession,
    DatabaseSessionManager,
    DatabaseSettings,
    IncompatibleTransactionError,
    PoolSettings,
    Propagation,
    ScopeOwnsTransactionError,
    TransactionForbiddenError,
    TransactionRequiredError,
    UncommittedChangesWarning,
    UnexpectedRollbackError,
)

from .conftest import checked_out
from .models import Note

Error = type[BaseException] | None

DEPTH = 4

# Modes that lead further are drawn more often; None is a session().
MODES = [Propagation.REQUIRED, Propagation.NESTED, None] * 3 + [
    Propagation.REQUIRES_NEW,
    *Propagation,
]


# What a block does, where a transaction is current, and where none is.
TABLE: dict[Propagation, tuple[str | type[BaseException], str | type[BaseException]]] = {
    Propagation.REQUIRED: ("join", "begin"),
    Propagation.REQUIRES_NEW: ("begin", "begin"),
    Propagation.NESTED: ("savepoint", "begin"),
    Propagation.MANDATORY: ("join", TransactionRequiredError),
    Propagation.SUPPORTS: ("join", "go without"),
    Propagation.NOT_SUPPORTED: ("go without", "go without"),
    Propagation.NEVER: (TransactionForbiddenError, "go without"),
}


@dataclass
class Level:
    """A transaction, or a savepoint in one: what is kept or undone as one."""

    rows: set[str] = field(default_factory=set)
    # Each hook has a number, the time at which it is due, and a name.
    hooks: list[tuple[int, str, str]] = field(default_factory=list)
    doomed: bool = False  # something failed in it and was caught
    broken: bool = False  # it was a statement: PostgreSQL takes no other
    asked: bool = False  # its own block called set_rollback_only()


@dataclass
class Session:
    kind: Literal["bare", "autocommit", "transaction"]
    in_transaction: bool = False  # a block's transaction
    levels: list[Level] = field(default_factory=lambda: [Level()])
    pending: bool = False  # added and not yet flushed
    written: bool = False
    used: bool = False  # since its transaction began: on SQLite it has the lock
    # Hooks that wait for the next commit of a session().
    waiting: list[str] = field(default_factory=list)


@dataclass
class Frame:
    act: str
    session: Session

    @property
    def owns(self) -> bool:
        """Return whether it began the innermost level of its session."""
        return self.act in ("begin", "take over", "savepoint")


class Model:
    """The design's section on transactions, for one task."""

    def __init__(self, *, one_writer: bool) -> None:
        self.one_writer = one_writer
        self.frames: list[Frame] = []
        self.rows: set[str] = set()
        self.hooks_run: list[str] = []
        self._hooks_given = 0

    @property
    def session(self) -> Session:
        return self.frames[-1].session

    @property
    def level(self) -> Level:
        return self.session.levels[-1]

    @property
    def in_transaction(self) -> bool:
        return bool(self.frames) and self.session.in_transaction

    @property
    def can_execute(self) -> bool:
        others = (frame.session for frame in self.frames if frame.session is not self.session)
        return not self.level.broken and not (
            self.one_writer and any(other.used for other in others)
        )

    # Blocks

    def open(self, mode: Propagation | None) -> Error:
        if mode is None:
            self.frames.append(Frame("session", Session("bare")))
            return None
        act = TABLE[mode][0 if self.in_transaction else 1]
        if isinstance(act, type):
            return act
        alone = mode in (Propagation.REQUIRES_NEW, Propagation.NOT_SUPPORTED)
        shared = self.session if self.frames and not alone else None
        if act == "begin" and shared is not None and shared.kind == "bare":
            self.frames.append(Frame("take over", shared))
        elif act == "begin":
            if self.one_writer and any(
                frame.session.in_transaction or frame.session.used for frame in self.frames
            ):
                return IncompatibleTransactionError
            self.frames.append(Frame("begin", Session("transaction")))
        elif act == "go without":
            self.frames.append(Frame(act, shared or Session("autocommit")))
        else:
            self.frames.append(Frame(act, self.session))
        if act == "begin":
            self.session.in_transaction = True
        if act == "savepoint":
            self._sent()
            self.session.levels.append(Level())
        return None

    def leave(self, error: Error) -> Error:
        """End the innermost block with this error; return the error that comes out."""
        frame = self.frames[-1]
        session, level = frame.session, self.level
        if frame.owns and error is None and not level.asked and level.doomed:
            error = UnexpectedRollbackError
        kept = error is None and not level.asked
        self.frames.pop()
        if frame.act == "join" and error is not None:
            level.doomed = True
        elif frame.act == "session" and error is None and (session.pending or session.written):
            error = UncommittedChangesWarning
        elif frame.act == "savepoint":
            session.levels.pop()
            outer = session.levels[-1]
            outer.rows |= level.rows if kept else set()
            outer.hooks += (
                level.hooks if kept else [(n, "always", name) for n, name in due(level, "rollback")]
            )
        elif frame.owns:
            session.in_transaction = False
            self.end(session, kept=kept)
            self.hooks_run += [
                name for _, name in sorted(due(level, "commit" if kept else "rollback"))
            ]
        return error

    def end(self, session: Session, *, kept: bool, by_session: bool = False) -> None:
        """Commit or roll back. If nothing began, the hooks of a session() wait on."""
        if kept:
            self.rows |= session.levels[0].rows
        if by_session or session.used or session.pending or session.written:
            self.hooks_run += session.waiting if kept else []
            session.waiting = []
        session.levels = [Level()]
        session.pending = session.written = session.used = False

    # What is done in them

    def write(self, name: str, *, sent: bool) -> None:
        if self.session.kind == "autocommit":
            self.rows.add(name)
            return
        self.level.rows.add(name)
        self.session.pending = True
        if sent:
            self._sent()

    def _sent(self) -> None:
        """Record that a statement was sent, after a flush."""
        session = self.session
        session.written |= session.pending
        session.pending = False
        session.used = True

    def fail(self, how: str) -> None:
        if self.session.kind == "autocommit":
            return
        if how == "by flush":
            self.session.pending = False  # it went down with it
        self._sent()
        self.level.doomed = self.level.broken = True

    def set_rollback_only(self) -> Error:
        if not self.in_transaction:
            return TransactionRequiredError
        if self.frames[-1].owns:
            self.level.asked = True
        else:
            self.level.doomed = True
        return None

    def hook(self, when: str, name: str, *, is_async: bool) -> Error:
        if self.in_transaction:
            self._hooks_given += 1
            self.level.hooks.append((self._hooks_given, when, name))
        elif when == "commit" and self.session.kind == "bare":
            self.session.waiting.append(name)
        elif when == "commit":
            if is_async:
                return TransactionRequiredError
            self.hooks_run.append(name)
        return None

    def commit(self) -> Error:
        if self.in_transaction:
            return ScopeOwnsTransactionError
        doomed = self.level.doomed
        self.end(self.session, kept=not doomed, by_session=True)
        return UnexpectedRollbackError if doomed else None

    def rollback(self) -> Error:
        if self.in_transaction:
            return ScopeOwnsTransactionError
        self.end(self.session, kept=False, by_session=True)
        return None


def due(level: Level, end: str) -> list[tuple[int, str]]:
    return [(number, name) for number, when, name in level.hooks if when in (end, "always")]


class LibraryAndModel(RuleBasedStateMachine):
    """Take each step in the library and in the model, and compare the results.

    An error that comes of a step is caught, unless the next step is `let_it_out`.
    """

    def __init__(
        self, manager: DatabaseSessionManager, witness: AsyncConnection, runner: asyncio.Runner
    ) -> None:
        super().__init__()
        self.manager, self.witness, self.runner = manager, witness, runner
        self.session = CurrentSession(manager)
        self.model = Model(one_writer=manager.engine.name == "sqlite")
        self.context = (
            copy_context()
        )  # one for all steps: the next one sees the block that this one opens
        self.blocks: list[AbstractAsyncContextManager[AsyncSession]] = []
        self.error: Exception | None = None  # the error of the last step
        self.hooks_run: list[str] = []
        self.names = map("{:03}".format, count())
        runner.run(self.empty_table())

    def do(self, work: Coroutine[Any, Any, None], *, expected: Error = None) -> None:
        self.error = error = None
        try:
            self.runner.run(work, context=self.context)
        except Exception as caught:
            self.error = error = caught
        assert kind(error) is expected, f"the model expects {expected}, the library has {error!r}"

    # Preconditions exclude steps that wait for a lock of the same task, or that differ
    # between databases.

    def is_inside(self) -> bool:
        return bool(self.blocks)

    def can_execute(self) -> bool:
        return self.is_inside() and self.model.can_execute

    def can_add(self) -> bool:
        return self.can_execute() and self.model.session.kind != "autocommit"

    def can_end_transaction(self) -> bool:
        return self.can_add() or (self.is_inside() and self.model.level.broken)

    def can_open(self) -> bool:
        locked = self.is_inside() and self.model.one_writer and self.model.level.broken
        return len(self.blocks) < DEPTH and not locked

    def can_nest(self) -> bool:
        return self.can_open() and (self.can_execute() or not self.model.in_transaction)

    def can_let_it_out(self) -> bool:
        return self.is_inside() and self.error is not None

    # Blocks

    @initialize(modes=lists(sampled_from(MODES), min_size=1, max_size=DEPTH))
    def open_the_first(self, modes: list[Propagation | None]) -> None:
        """Reach deep states at once, even if Hypothesis omits rules opening blocks."""
        for mode in modes:
            if self.can_nest():
                self.open(mode)

    @precondition(can_open)
    @rule(mode=sampled_from([mode for mode in MODES if mode not in (Propagation.NESTED, None)]))
    def open_transaction(self, mode: Propagation) -> None:
        self.open(mode)

    @precondition(can_nest)
    @rule()
    def open_nested(self) -> None:
        self.open(Propagation.NESTED)

    @precondition(can_open)
    @rule()
    def open_session(self) -> None:
        self.open(None)

    @precondition(is_inside)
    @rule()
    def end_well(self) -> None:
        self.leave(None)

    @precondition(is_inside)
    @rule()
    def fail(self) -> None:
        self.leave(ValueError("in the block"))

    @precondition(can_let_it_out)
    @rule()
    def let_it_out(self) -> None:
        self.leave(self.error)

    def open(self, mode: Propagation | None) -> None:
        block = self.manager.session() if mode is None else self.manager.transaction(mode)
        self.do(self.enter(block), expected=self.model.open(mode))

    def leave(self, error: Exception | None) -> None:
        self.do(exit_with(error, self.blocks.pop()), expected=self.model.leave(kind(error)))

    # What is done in them

    @precondition(can_execute)
    @rule(how=sampled_from(["by statement", "by flush"]))
    def write(self, how: str) -> None:
        name = next(self.names)
        self.do(self.insert(name, how))
        self.model.write(name, sent=True)

    @precondition(can_add)
    @rule()
    def add(self) -> None:
        name = next(self.names)
        self.do(self.insert(name, "by add"))
        self.model.write(name, sent=False)

    @precondition(can_execute)
    @rule(how=sampled_from(["by statement", "by flush"]))
    def write_what_is_taken(self, how: str) -> None:
        self.do(self.insert("taken", how), expected=IntegrityError)
        self.model.fail(how)

    @precondition(is_inside)
    @rule(is_async=booleans())
    def on_commit(self, is_async: bool) -> None:
        self.add_hook("commit", is_async=is_async)

    @precondition(is_inside)
    @rule(is_async=booleans())
    def on_rollback(self, is_async: bool) -> None:
        self.add_hook("rollback", is_async=is_async)

    @precondition(is_inside)
    @rule()
    def set_rollback_only(self) -> None:
        self.do(self.ask_for_rollback(), expected=self.model.set_rollback_only())

    @precondition(can_end_transaction)
    @rule(how=sampled_from(["commit", "rollback"]))
    def end_transaction(self, how: str) -> None:
        if how == "commit":
            self.do(self.session.commit(), expected=self.model.commit())
        else:
            self.do(self.session.rollback(), expected=self.model.rollback())

    def add_hook(self, when: str, *, is_async: bool) -> None:
        name = next(self.names)
        self.do(
            self.hook(when, name, is_async=is_async),
            expected=self.model.hook(when, name, is_async=is_async),
        )

    # What must hold

    @invariant()
    def agrees(self) -> None:
        transaction = self.manager.transaction
        assert self.context.run(lambda: transaction.active) == self.model.in_transaction
        assert self.hooks_run == self.model.hooks_run

    def teardown(self) -> None:
        try:
            # Otherwise a step disagreed, and more steps would hide it.
            if sys.exception() is None:
                while self.blocks:
                    self.end_well()
                self.agrees()
                assert self.runner.run(self.rows()) == self.model.rows
                assert checked_out(self.manager) == 0
        finally:
            while self.blocks:  # no lock may outlive the example
                with suppress(Exception):
                    self.runner.run(
                        exit_with(ValueError("disagreement"), self.blocks.pop()),
                        context=self.context,
                    )

    # With the library

    async def enter(self, block: AbstractAsyncContextManager[AsyncSession]) -> None:
        await block.__aenter__()
        self.blocks.append(block)

    async def insert(self, name: str, how: str) -> None:
        if how == "by statement":
            await self.session.execute(insert(Note).values(text=name))
        else:
            self.session.add(Note(text=name))
        if how == "by flush":
            await self.session.flush()

    async def hook(self, when: str, name: str, *, is_async: bool) -> None:
        async def run_async() -> None:
            await asyncio.sleep(0)
            self.hooks_run.append(name)

        transaction = self.manager.transaction
        add = transaction.on_commit if when == "commit" else transaction.on_rollback
        add(run_async if is_async else lambda: self.hooks_run.append(name))

    async def ask_for_rollback(self) -> None:
        self.manager.transaction.set_rollback_only()

    # With the database

    async def empty_table(self) -> None:
        await self.witness.execute(delete(Note))
        await self.witness.execute(insert(Note).values(text="taken"))

    async def rows(self) -> set[str]:
        return set(await self.witness.scalars(select(Note.text).where(Note.text != "taken")))


async def exit_with(
    error: Exception | None, block: AbstractAsyncContextManager[AsyncSession]
) -> None:
    await block.__aexit__(kind(error), error, None)
    if error is not None:
        raise error


def kind(error: BaseException | None) -> Error:
    return None if error is None else type(error)


def test_random_sequences_of_blocks_agree_with_the_model(settings: DatabaseSettings) -> None:
    manager = DatabaseSessionManager(settings.model_copy(update={"pool": PoolSettings(size=20)}))

    async def start() -> AsyncConnection:
        await manager.open()
        async with manager.connect() as connection:
            await manager.create_all(connection)
        return await create_async_engine(manager.engine.url, isolation_level="AUTOCOMMIT").connect()

    async def stop() -> None:
        await witness.close()
        await witness.engine.dispose()
        await manager.close()

    def machine() -> LibraryAndModel:
        return LibraryAndModel(manager, witness, runner)

    with asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner:
        witness = runner.run(start())
        try:
            run_state_machine_as_test(
                machine,
                settings=hypothesis_settings(
                    max_examples=60,
                    stateful_step_count=20,
                    derandomize=True,
                    database=None,
                    deadline=None,  # the first one connects
                    phases=(Phase.generate, Phase.shrink),
                    report_multiple_bugs=False,
                ),
            )
        finally:
            runner.run(stop())
