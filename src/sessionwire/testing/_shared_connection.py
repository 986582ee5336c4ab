"""One connection for all: each transaction is a savepoint on it, and whoever wants to use it waits for its turn."""

from __future__ import annotations

import asyncio
import gc
import logging
import re
import sqlite3
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, cast

from sqlalchemy import Connection, Pool, PoolProxiedConnection, event
from sqlalchemy.util import await_only, greenlet_spawn

from sessionwire._core.guarded_session import DML_VERBS
from sessionwire._database.begin_hooks import WITHOUT_HOOKS, BeginHooks
from sessionwire._database.driver_errors import IN_FAILED_TRANSACTION, sqlstate
from sessionwire._database.options import ConnectionOptions
from sessionwire._database.sqlite import foreign_keys_switch
from sessionwire._database.sqlite_connections import interrupt_for
from sessionwire._shield import run_shielded
from sessionwire.errors import SandboxError

from ._borrowers import Party
from ._call_sites import where_is
from ._interruptible import Interruptible, innermost, is_unheard

logger = logging.getLogger("sessionwire")
TIMEOUT = 30.0  # seconds for a savepoint to be set or undone
ENDS_ALL = re.compile(
    r"(?>\s|;|--[^\n]*|/\*.*?\*/)*+(BEGIN|START|COMMIT|END|ABORT|PREPARE\s+TRANSACTION"
    r"|ROLLBACK(?!\s+((WORK|TRANSACTION)\s+)?TO\b))\b",
    re.IGNORECASE | re.DOTALL,
)
GRACE = 0.5  # seconds for somebody to ask a task for its error
POLL = 0.05  # seconds between two looks at what a task awaits


class VirtualConnection:
    """A connection as the code under test has it."""

    def __init__(self, real: Any) -> None:
        self._real = real
        self.terms = ConnectionOptions()
        self.party: Party  # both as of its last begin
        self.working: asyncio.Task[Any] | None = None  # the task whose operation is in the database
        self.is_ended = False  # given up: what it began is being undone
        self.is_lost = False  # undone together with the transaction around it
        self.last_used = 0.0
        self.has_written = False
        self.kept: list[str] = []  # where what was committed inside it was begun

    @property
    def is_idle(self) -> bool:
        return self.working is None and not self.is_ended

    def commit(self) -> None:
        raise SandboxError("commit() of the driver's connection would end the sandbox itself: use SQLAlchemy's")

    rollback = commit

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


class SharedConnection:
    """The real one. What is named `do_…` has to be called in a greenlet of SQLAlchemy's, as its dialects are."""

    def __init__(
        self, real: Any, dialect: Any, begin_hooks: BeginHooks, *, check_deferred: bool, patience: float
    ) -> None:
        self._begin_hooks = begin_hooks
        self._real = real
        self._dialect = dialect
        self._check_deferred = check_deferred
        self._patience = patience
        self._open: list[VirtualConnection] = []  # in a transaction, each inside the one before
        self._changed = asyncio.get_running_loop().create_future()
        self._is_closed = False
        self.endings: set[asyncio.Future[Any]] = set()
        self.outlasting: set[asyncio.Task[Any]] = set()  # tasks that went on when they were cancelled
        self._guarded: set[Pool] = set()

    def connect(self) -> VirtualConnection:
        return VirtualConnection(self._real)

    # Turns

    def _take_turn(self, virtual: VirtualConnection) -> None:
        while not self._may_go(virtual):
            await_only(self._wait(virtual))

    def _may_go(self, virtual: VirtualConnection) -> bool:
        if virtual.is_lost:
            raise SandboxError(
                f"the transaction that was begun at {virtual.party.where} was undone together with the one around it: "
                "in a sandbox, which has one connection, it is part of that one"
            )
        if not self._open:
            return True
        last = self._open[-1]
        is_inside = virtual not in self._open and last.party in virtual.party.around
        return last.is_idle and (last is virtual or is_inside)

    async def _wait(self, virtual: VirtualConnection) -> None:
        loop, holder, task = asyncio.get_running_loop(), self._open[-1], asyncio.current_task()
        reason = ""
        if holder.is_idle:
            if holder.party.task is task:
                reason = "which this very task has left open"
            elif _awaits(holder.party.task, task):
                reason = "which waits for this task"
            elif loop.time() >= holder.last_used + self._patience:
                reason = f"in which nothing has happened for {self._patience:g} s"
        if reason:
            error = _deadlock(virtual, holder, reason)
            if (block := innermost()) is not None:
                for each in asyncio.all_tasks():
                    if each is task or _awaits(each, task):  # to whom the error goes
                        each.add_done_callback(partial(_listen, block, error))
            raise error
        # not with asyncio.timeout(): it may end in another task than it began in, by run_shielded()
        await asyncio.wait((self._changed,), timeout=min(POLL, self._patience) if holder.is_idle else None)

    def _notify(self) -> None:
        self._changed.set_result(None)
        self._changed = asyncio.get_running_loop().create_future()

    # What SQLAlchemy asks of its dialect

    def do_begin(self, connection: PoolProxiedConnection) -> None:
        virtual = _of(connection)
        if not virtual.terms.autocommit:
            self._begin(virtual)

    def do_commit(self, connection: PoolProxiedConnection) -> None:
        virtual = _of(connection)
        if virtual.is_lost or virtual in self._open:
            self._take_turn(virtual)
            try:
                if self._check_deferred and len(self._open) == 1:
                    self._check_constraints(virtual)
                self._release(virtual)
            except Exception:
                self._undo(virtual)
                raise

    def do_rollback(self, connection: PoolProxiedConnection) -> None:
        virtual = _of(connection)
        virtual.is_lost = False
        while virtual in self._open and not all(other.is_idle for other in self._from(virtual)):
            await_only(asyncio.wait((self._changed,)))
        if virtual in self._open:  # those that are open inside it are lost
            self._undo(virtual)

    def do_execute(self, execute: Callable[..., None], *arguments: Any) -> None:
        connection: Connection = arguments[-1].root_connection
        virtual = _of(connection.connection)
        if ENDS_ALL.match(arguments[1]):
            raise SandboxError(f"{arguments[1]!r} would end the sandbox itself: use the methods that begin and end")
        if self._is_sqlite and foreign_keys_switch(arguments[1]) is False:
            raise SandboxError(
                "foreign keys can't be switched off in a sandbox, which is one transaction: test this on a database, "
                "a copy of a DatabaseTemplate"
            )
        alone = virtual not in self._open and not virtual.is_lost  # as in autocommit
        if alone:
            self._begin(virtual)
        else:
            self._take_turn(virtual)
            self._check_alive()
        try:
            if alone and not connection.get_execution_options().get(WITHOUT_HOOKS):
                self._begin_hooks.run(connection)
            virtual.working = asyncio.current_task()
            execute(*arguments)
        except Exception:
            if alone:
                self._undo(virtual)
            raise
        finally:
            self._rest(virtual)
        virtual.has_written |= arguments[1].lstrip().upper().startswith(DML_VERBS)
        if alone:
            self._release(virtual)

    def end(self, virtual: VirtualConnection) -> None:
        """Undo what it has begun, without waiting for that."""
        if virtual in self._open and not virtual.is_ended:
            virtual.is_ended = True
            task = asyncio.ensure_future(self._end(virtual))
            self.endings.add(task)
            task.add_done_callback(self.endings.discard)

    def end_all(self) -> None:
        """The same of all that are in a transaction."""
        for virtual in reversed(self._open):
            self.end(virtual)

    async def ended(self) -> None:
        """Wait for all that is being undone."""
        await asyncio.gather(*self.endings, return_exceptions=True)

    def close(self) -> None:
        """Nothing is sent from now on."""
        self._is_closed = True
        self._notify()
        if not self.outlasting:
            for pool in self._guarded:
                event.remove(pool, "checkout", self._refuse)

    # What the pools tell

    def taken(self, _: object, __: object, connection: PoolProxiedConnection) -> None:
        _of(connection).is_lost = False  # as one that failed to commit may have left it

    def guard(self, pool: Pool) -> None:
        """Refuse its connections, which are not the sandbox's: what was done on them would be kept."""
        self._guarded.add(pool)
        event.listen(pool, "checkout", self._refuse)

    def _refuse(self, *_: object) -> None:
        if not self._is_closed:
            raise SandboxError("this engine is from before the sandbox: take it from the manager inside the sandbox")
        if asyncio.current_task() in self.outlasting:
            raise SandboxError("this task began in a sandbox, which has ended: await it there")

    async def _end(self, virtual: VirtualConnection) -> None:
        if self._is_sqlite:
            with suppress(Exception):  # those that wait for its end must not wait for good
                await self._stop_sqlite()
        while working := [other for other in self._from(virtual) if other.working]:
            for other in working:
                if other.is_ended and other.working is not None:
                    other.working.cancel()
            await asyncio.wait((self._changed,))
        if virtual in self._open:
            with suppress(Exception):  # the connection is lost, and all with it
                await greenlet_spawn(self._undo, virtual)

    async def _stop_sqlite(self) -> None:
        driver = self._real.driver_connection
        # it undoes all where it strikes a write
        await interrupt_for(driver, driver.execute("SELECT 1"), interrupt_after=1)
        for cursor in gc.get_referrers(driver._conn):
            # isinstance() would ask a proxy what it stands for
            if issubclass(type(cursor), sqlite3.Cursor) and _has_begun(cursor):
                cursor.close()

    # Savepoints

    def _begin(self, virtual: VirtualConnection) -> None:
        self._take_turn(virtual)
        self._check_alive()
        entering = self._entering(virtual)
        around = self._around(virtual)
        self._open.append(virtual)
        virtual.has_written, virtual.kept = False, []
        try:
            self._send(virtual, f"SAVEPOINT {self._name(virtual)}", *entering)
        except Exception as error:
            self._open.remove(virtual)
            self._notify()
            if around is not None and sqlstate(error) == IN_FAILED_TRANSACTION:
                raise SandboxError(
                    f"a statement has failed in the transaction around this one, which was begun at "
                    f"{around.party.where}: in a sandbox, which has one connection, none can begin inside it before "
                    "it is rolled back"
                ) from error
            raise

    @property
    def _is_alive(self) -> bool:
        driver = self._real.driver_connection
        if self._is_sqlite:
            return bool(driver.in_transaction)
        return driver.is_in_transaction() and not driver.is_closed()

    def _check_alive(self) -> None:
        """Outside of that transaction, what is sent would be kept."""
        if self._is_closed:
            raise SandboxError("the sandbox has ended, and this connection with it")
        if not self._is_alive:
            raise SandboxError("the database has ended the sandbox's transaction, and undone all that was done in it")

    def _release(self, virtual: VirtualConnection) -> None:
        released = f"RELEASE SAVEPOINT {self._name(virtual)}"
        around = self._around(virtual)
        self._send(virtual, *self._leaving(virtual), released, then=lambda: self._open.remove(virtual))
        if around is not None:
            around.kept += [*virtual.kept, *([virtual.party.where] if virtual.has_written else [])]

    def _undo(self, virtual: VirtualConnection) -> None:
        _, *inside = self._from(virtual)
        left = [statement for other in (*reversed(inside), virtual) for statement in self._leaving(other)]
        for inner in inside:
            inner.is_lost = True
            self._open.remove(inner)
        if virtual.kept:
            logger.warning(
                f"what was committed at {', '.join(virtual.kept)} is undone together with the transaction around it, "
                f"which was begun at {virtual.party.where}: in a sandbox, which has one connection, it is part of that"
            )
        name = self._name(virtual)
        undone = f"ROLLBACK TO SAVEPOINT {name}", f"RELEASE SAVEPOINT {name}"
        try:
            if self._is_alive:
                self._send(virtual, *left, *undone)
        finally:
            self._open.remove(virtual)
            self._notify()

    def _from(self, virtual: VirtualConnection) -> list[VirtualConnection]:
        """It and those inside it."""
        return self._open[self._open.index(virtual) :] if virtual in self._open else []

    def _around(self, virtual: VirtualConnection) -> VirtualConnection | None:
        """The transaction that it is inside of, or would begin in."""
        position = self._open.index(virtual) if virtual in self._open else len(self._open)
        return self._open[position - 1] if position else None

    def _name(self, virtual: VirtualConnection) -> str:
        return f"sandbox_{self._open.index(virtual)}"

    @property
    def _is_sqlite(self) -> bool:
        return bool(self._dialect.name == "sqlite")

    def _entering(self, virtual: VirtualConnection) -> list[str]:
        """What makes the transaction read-only, or lets it write."""
        if virtual.terms.read_only == self._is_read_only_around(virtual):
            return []
        if self._is_sqlite:
            return [f"PRAGMA query_only={'ON' if virtual.terms.read_only else 'OFF'}"]
        if virtual.terms.read_only:
            return ["SET TRANSACTION READ ONLY"]  # up to the end of the savepoint
        raise SandboxError(
            "a transaction that may write cannot begin inside a read-only one in a sandbox, which has one connection: "
            "test this on a database: a copy of a DatabaseTemplate, or sessionwire_isolation = database"
        )

    def _leaving(self, virtual: VirtualConnection) -> list[str]:
        around = self._is_read_only_around(virtual)
        if self._is_sqlite and virtual.terms.read_only != around:
            return [f"PRAGMA query_only={'ON' if around else 'OFF'}"]
        return []

    def _is_read_only_around(self, virtual: VirtualConnection) -> bool:
        around = self._around(virtual)
        return around is not None and around.terms.read_only

    def _check_constraints(self, virtual: VirtualConnection) -> None:
        if not self._is_sqlite:  # a savepoint of its own, since this would last to the end of the sandbox
            check = "SAVEPOINT sandbox_check", "SET CONSTRAINTS ALL IMMEDIATE", "ROLLBACK TO SAVEPOINT sandbox_check"
            self._send(virtual, *check, "RELEASE SAVEPOINT sandbox_check")
        elif self._send(virtual, "PRAGMA foreign_key_check"):
            raise self._dialect.loaded_dbapi.IntegrityError("FOREIGN KEY constraint failed")

    def _send(self, virtual: VirtualConnection, *statements: str, then: Callable[[], None] | None = None) -> list[Any]:
        """Send them, and then do that, also while cancelled: which savepoints there are must be known.

        Returns the rows of the last statement.
        """

        def send() -> list[Any]:
            cursor = self._real.cursor()
            for statement in statements:
                cursor.execute(statement)
            if then is not None:
                then()
            return list(cursor.fetchall()) if cursor.description else []

        virtual.working = asyncio.current_task()
        try:
            return await_only(run_shielded(greenlet_spawn(send), TIMEOUT))
        finally:
            self._rest(virtual)

    def _rest(self, virtual: VirtualConnection) -> None:
        virtual.working = None
        virtual.last_used = asyncio.get_running_loop().time()
        self._notify()


def _of(connection: PoolProxiedConnection) -> VirtualConnection:
    return cast(VirtualConnection, connection.dbapi_connection)


def _has_begun(cursor: sqlite3.Cursor) -> bool:
    """Whether a statement has begun on it, and not come to its end.

    An unfinished one would keep any savepoint from its end. One that was interrupted would, on Python 3.11, hold up the
    loop where it is collected as garbage during the next statement: it resets its own, and waits for SQLite's mutex.
    """
    return any(type(each).__name__ == "Statement" for each in gc.get_referents(cursor))


def _awaits(task: asyncio.Task[Any] | None, other: asyncio.Task[Any] | None) -> bool:
    """Whether it goes on only after the other one: it awaits that, or a task that does, alone or with gather()."""
    found: list[Any] = [task]
    for each in found:
        waiter = getattr(each, "_fut_waiter", None)
        found += [awaited for awaited in getattr(waiter, "_children", [waiter]) if awaited not in found]
    return other in found[1:]


def _listen(block: Interruptible, error: SandboxError, task: asyncio.Task[Any]) -> None:
    """End the block where this task has ended with the error and nobody asks for it: what waits may do so for good."""

    def listen() -> None:
        if is_unheard(task):
            block.interrupt(error)
            task.exception()  # asyncio need not tell of it too

    if is_unheard(task):
        task.get_loop().call_later(GRACE, listen)


def _deadlock(virtual: VirtualConnection, holder: VirtualConnection, reason: str) -> SandboxError:
    task = holder.party.task
    held_by = "" if task is None else f" by task {where_is(task)}"
    return SandboxError(
        f"a deadlock on the sandbox's one connection: what was opened at {virtual.party.where} waits for the "
        f"transaction that was opened at {holder.party.where}{held_by}, {reason}; two that must go on side by side "
        "need a database: a copy of a DatabaseTemplate, or of the pytest plugin sessionwire_isolation = database"
    )
