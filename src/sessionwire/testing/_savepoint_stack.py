"""The open transactions of a sandbox, each a savepoint on its one connection."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

from sqlalchemy.util import await_only, greenlet_spawn

from sessionwire._database.call_sites import UNKNOWN_LINE
from sessionwire._database.driver_errors import IN_FAILED_TRANSACTION, sqlstate
from sessionwire._database.holders import Unit
from sessionwire._database.options import ConnectionOptions
from sessionwire._log_events import WORK_UNDONE_IN_SANDBOX
from sessionwire._shield import run_shielded
from sessionwire.errors import SandboxError

SAVEPOINT_TIMEOUT = 30.0  # seconds to set, release or roll back a savepoint


class VirtualConnection:
    """A connection in the eyes of the code under test."""

    def __init__(self, real: Any) -> None:
        self._real = real
        # of its last transaction
        self.options = ConnectionOptions()
        self.line = UNKNOWN_LINE  # that began it
        self.forget_user()
        # the task that executes something on it now
        self.running_task: asyncio.Task[Any] | None = None
        # whether its transaction is being rolled back in the background
        self.is_aborted = False
        # whether its transaction was rolled back together with the enclosing one
        self.rolled_back_by_outer = False
        self.last_used = 0.0
        self.has_written = False
        # the transactions that were committed inside its own
        self.committed_lines: list[str] = []
        # the values that its settings had before it
        self.former_settings: dict[str, str] = {}

    def forget_user(self) -> None:
        """Let go of the code that has the connection."""
        self.unit: Unit | None = None  # None: it is of a connection of `manager.engine`
        self.enclosing: Set[object] = frozenset()  # inside whose transactions it may begin
        self.task: asyncio.Task[Any] | None = None
        self.last_statement: str | None = None

    @property
    def is_idle(self) -> bool:
        return self.running_task is None and not self.is_aborted

    def commit(self) -> None:
        raise SandboxError(
            "commit() of the driver's connection would end the sandbox itself: use SQLAlchemy's"
        )

    rollback = commit

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


class SavepointStack:
    """The savepoints of the virtual connections that are in a transaction.

    The methods that send something must be called in SQLAlchemy's greenlet.
    """

    def __init__(self, real: Any, dialect: Any) -> None:
        self._real = real
        self._dialect = dialect
        self._changed = asyncio.get_running_loop().create_future()
        self.open: list[VirtualConnection] = []  # the innermost one is last
        self.is_sqlite: bool = dialect.name == "sqlite"

    def begin(self, virtual: VirtualConnection) -> None:
        """Set a savepoint inside the innermost transaction."""
        access_mode = self._access_mode_on_enter(virtual)
        enclosing = self._enclosing(virtual)
        self.open.append(virtual)
        virtual.has_written, virtual.committed_lines = False, []
        virtual.former_settings = {}
        try:
            self._send(virtual, f"SAVEPOINT {self._name(virtual)}", *access_mode)
        except Exception as error:
            self.open.remove(virtual)
            self.notify()
            if enclosing is not None and sqlstate(error) == IN_FAILED_TRANSACTION:
                raise SandboxError(
                    f"a statement failed in the enclosing transaction, which was begun at "
                    f"{enclosing.line}; roll it back before starting another one: "
                    "in a sandbox both share one connection"
                ) from error
            raise

    def release(self, virtual: VirtualConnection) -> None:
        """Commit, as far as the enclosing transaction commits."""
        release = f"RELEASE SAVEPOINT {self._name(virtual)}"
        enclosing = self._enclosing(virtual)
        self._send(
            virtual,
            *self._access_mode_on_exit(virtual),
            *_setting_statements(virtual.former_settings),
            release,
            then=lambda: self.open.remove(virtual),
        )
        if enclosing is not None:
            enclosing.committed_lines += virtual.committed_lines
            if virtual.has_written:
                enclosing.committed_lines.append(virtual.line)

    def roll_back(self, virtual: VirtualConnection) -> None:
        """Roll back its transaction, and those that are open inside it."""
        _, *nested = self.with_nested(virtual)
        access_modes = [
            statement
            for other in (*reversed(nested), virtual)
            for statement in self._access_mode_on_exit(other)
        ]
        for inner in nested:
            inner.rolled_back_by_outer = True
            self.open.remove(inner)
        if virtual.committed_lines:
            WORK_UNDONE_IN_SANDBOX.log(
                committed=", ".join(virtual.committed_lines), begun=virtual.line
            )
        name = self._name(virtual)
        try:
            if self.is_alive:
                roll_back = f"ROLLBACK TO SAVEPOINT {name}", f"RELEASE SAVEPOINT {name}"
                self._send(virtual, *access_modes, *roll_back)
        finally:
            self.open.remove(virtual)
            self.notify()

    def check_deferred_constraints(self, virtual: VirtualConnection) -> None:
        """Raise the driver's `IntegrityError` if a deferred constraint is violated."""
        if self.is_sqlite:
            if self._send(virtual, "PRAGMA foreign_key_check"):
                raise self._dialect.loaded_dbapi.IntegrityError("FOREIGN KEY constraint failed")
            return
        # without the savepoint, constraints would stay immediate until the sandbox ends
        self._send(
            virtual,
            "SAVEPOINT sandbox_check",
            "SET CONSTRAINTS ALL IMMEDIATE",
            "ROLLBACK TO SAVEPOINT sandbox_check",
            "RELEASE SAVEPOINT sandbox_check",
        )

    def keep_settings(self, virtual: VirtualConnection, names: Sequence[str]) -> None:
        """Remember the values of settings, which would outlive the savepoint."""
        calls = ", ".join(f"current_setting('{name}', true)" for name in names)
        [values] = self._send(virtual, f"SELECT {calls}")
        for name, value in zip(names, values, strict=True):
            virtual.former_settings.setdefault(name, value or "")

    def with_nested(self, virtual: VirtualConnection) -> list[VirtualConnection]:
        """Return `virtual` and those whose transactions are inside its own."""
        return self.open[self.open.index(virtual) :] if virtual in self.open else []

    @property
    def is_alive(self) -> bool:
        """Whether the sandbox's own transaction, around all others, is still open."""
        driver = self._real.driver_connection
        if self.is_sqlite:
            return bool(driver.in_transaction)
        return driver.is_in_transaction() and not driver.is_closed()

    # Waiting for one another

    def mark_idle(self, virtual: VirtualConnection) -> None:
        virtual.running_task = None
        virtual.last_used = asyncio.get_running_loop().time()
        self.notify()

    def notify(self) -> None:
        """Wake the tasks in `wait_for_change()`."""
        self._changed.set_result(None)
        self._changed = asyncio.get_running_loop().create_future()

    async def wait_for_change(self, timeout: float | None = None) -> None:
        """Wait until a virtual connection becomes idle, at most `timeout` seconds."""
        # not with asyncio.timeout(): run_shielded() may finish this in another task
        await asyncio.wait((self._changed,), timeout=timeout)

    # SQL

    def _enclosing(self, virtual: VirtualConnection) -> VirtualConnection | None:
        """Return the transaction around its own, or around one that would begin now."""
        position = self.open.index(virtual) if virtual in self.open else len(self.open)
        return self.open[position - 1] if position else None

    def _name(self, virtual: VirtualConnection) -> str:
        return f"sandbox_{self.open.index(virtual)}"

    def _access_mode_on_enter(self, virtual: VirtualConnection) -> list[str]:
        """Return the statements that set the access mode of a new transaction."""
        read_only = virtual.options.read_only
        if read_only == self._is_enclosing_read_only(virtual):
            return []
        if self.is_sqlite:
            return [f"PRAGMA query_only={'ON' if read_only else 'OFF'}"]
        if read_only:
            return ["SET TRANSACTION READ ONLY"]  # holds until the end of the savepoint
        raise SandboxError(
            "a transaction that may write cannot begin inside a read-only one in a sandbox, "
            "where both share one connection. Test this on a real database: "
            "use DatabaseTemplate, or sessionwire_isolation = database."
        )

    def _access_mode_on_exit(self, virtual: VirtualConnection) -> list[str]:
        """Return the statements that restore the enclosing access mode."""
        read_only = self._is_enclosing_read_only(virtual)
        if self.is_sqlite and virtual.options.read_only != read_only:
            return [f"PRAGMA query_only={'ON' if read_only else 'OFF'}"]
        return []

    def _is_enclosing_read_only(self, virtual: VirtualConnection) -> bool:
        enclosing = self._enclosing(virtual)
        return enclosing is not None and enclosing.options.read_only

    def _send(
        self, virtual: VirtualConnection, *statements: str, then: Callable[[], None] | None = None
    ) -> list[Any]:
        """Execute `statements`, then call `then`, shielded from cancellation.

        The record of the open savepoints must stay correct.

        Returns:
            The rows of the last statement.
        """

        def send() -> list[Any]:
            cursor = self._real.cursor()
            for statement in statements:
                cursor.execute(statement)
            if then is not None:
                then()
            return list(cursor.fetchall()) if cursor.description else []

        virtual.running_task = asyncio.current_task()
        try:
            return await_only(run_shielded(greenlet_spawn(send), SAVEPOINT_TIMEOUT))
        finally:
            self.mark_idle(virtual)


def _setting_statements(settings: Mapping[str, str]) -> list[str]:
    values = [(name, value.replace("'", "''")) for name, value in settings.items()]
    return [f"SELECT set_config('{name}', '{value}', true)" for name, value in values]
