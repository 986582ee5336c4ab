"""`Holders`: the connections of a pool that are in use, and the code that holds them."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable, Collection
from dataclasses import asdict
from time import monotonic
from typing import Any, Protocol

from greenlet import getcurrent, greenlet
from sqlalchemy import Connection
from sqlalchemy.pool import ConnectionPoolEntry

from sessionwire._log_events import CONNECTION_HELD
from sessionwire.status import Holder, OpenBlock

from .call_sites import BY_HAND, CallSite, current_line, line_of
from .totals import Totals

MAX_LISTED = 10  # holders in an error

Task = asyncio.Task[Any]
# When a place was taken, by the monotonic clock, and in which task and greenlet. The
# task is not kept alive: it may hold the connection in a variable.
Use = tuple[float, "weakref.ref[Task] | None", greenlet]
# A turn, and the task and greenlet that wait for it.
Waiting = tuple[object, Task | None, greenlet]


class Unit(Protocol):
    """The user of a connection until its release: a scope, or a `connect()` block."""

    task: Task | None
    call_site: CallSite | None
    opened_at: float  # by the monotonic clock

    @property
    def transaction_connection(self) -> Connection | None:
        """Its connection, once its transaction has begun. It may be closed."""
        ...

    def is_connecting(self, task: Task | None, greenlet: object) -> bool:
        """Whether it has no connection yet, and takes one in this task and greenlet."""
        ...

    def abort(self) -> None:
        """Let nothing of it commit any more; its connection is being closed."""


class Holders:
    """The places of a pool that are in use, and the units that use them.

    Args:
        units: The open units, of which there may be more.
        totals: The counters.
        warn_after: Seconds after which a use is logged. None: never.
        statement_of: Returns the last statement on a connection, or None.
    """

    def __init__(
        self,
        units: Collection[Unit],
        totals: Totals,
        warn_after: float | None,
        statement_of: Callable[[Any], str | None],
    ) -> None:
        self._units = units
        self.totals = totals
        self._warn_after = warn_after
        self._statement_of = statement_of
        self._uses: dict[ConnectionPoolEntry, Use] = {}  # the longest is the first
        self._timer: asyncio.TimerHandle | None = None
        self._warned_until = 0.0  # Uses that began until then are logged.

    def __len__(self) -> int:
        return len(self._uses)

    # Uses

    def begin(self, place: ConnectionPoolEntry) -> None:
        """Note that a place of the pool is handed out."""
        task = asyncio.current_task()
        self._uses[place] = monotonic(), weakref.ref(task) if task else None, getcurrent()
        if self._warn_after is not None and self._timer is None:
            self._set_timer(self._warn_after)

    def end(self, place: ConnectionPoolEntry) -> None:
        """Note that a place of the pool comes back."""
        use = self._uses.pop(place, None)
        if use is not None:
            held = monotonic() - use[0]
            self.totals.held_for += held
            if self.totals.observer is not None:
                self.totals.observer.give_back(held)

    def forget(self) -> None:
        """Forget all uses, of which nobody will hear again."""
        self._uses.clear()
        self.stop()

    def stop(self) -> None:
        """Log nothing any more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # Who it is

    def list_all(self) -> tuple[Holder, ...]:
        """List who holds the connections, the longest first."""
        units = self.find_units()
        return tuple(
            _holder(place, use, units.get(place), self._statement_of)
            for place, use in list(self._uses.items())
        )

    def list_blocks(self, waiting: Collection[Waiting]) -> tuple[OpenBlock, ...]:
        """List the open units, the oldest first.

        Args:
            waiting: The tasks that wait for a connection.
        """
        places = {unit: place for place, unit in self.find_units().items()}
        return tuple(
            self._block(unit, places.get(unit), waiting)
            for unit in sorted(self._units, key=lambda unit: unit.opened_at)
        )

    def _block(
        self, unit: Unit, place: ConnectionPoolEntry | None, waiting: Collection[Waiting]
    ) -> OpenBlock:
        now, connection = monotonic(), place and place.dbapi_connection
        return OpenBlock(
            call_site=line_of(unit.call_site),
            open_for=now - unit.opened_at,
            is_waiting=place is None
            and any(unit.is_connecting(task, running) for _, task, running in waiting),
            held_for=None if place is None else now - self._uses[place][0],
            statement=None if connection is None else self._statement_of(connection),
            task=None if unit.task is None else unit.task.get_name(),
            line=None if unit.task is None else current_line(unit.task),
        )

    def find_units(self) -> dict[ConnectionPoolEntry, Unit]:
        """Find the users of the places. A connection of `manager.engine` has none."""
        uses = list(self._uses.items())
        places = {id(place.dbapi_connection): place for place, _ in uses}
        found: dict[ConnectionPoolEntry, Unit] = {}
        connecting: list[Unit] = []
        for unit in list(self._units):
            connection = _dbapi_connection(unit)
            if connection is None:
                connecting.append(unit)
            elif id(connection) in places:
                found[places[id(connection)]] = unit
        for place, (_, task, running) in uses:
            if place not in found:
                for unit in connecting:
                    if unit.is_connecting(task() if task else None, running):
                        found[place] = unit
        return found

    def unit_of(self, connection: object) -> Unit | None:
        """Return the user of a connection of the DBAPI, like `find_units()`."""
        units = self.find_units().items()
        return next((unit for place, unit in units if place.dbapi_connection is connection), None)

    def describe(self) -> str:
        """Describe those who have held a connection for the longest, line by line."""
        holders = self.list_all()
        lines = [f"- {holder}" for holder in holders[:MAX_LISTED]]
        if len(holders) > MAX_LISTED:
            lines.append(f"- and {len(holders) - MAX_LISTED} more")
        return "\n".join(lines)

    # Warn

    def _set_timer(self, seconds: float) -> None:
        self._timer = asyncio.get_running_loop().call_later(seconds, self._warn)

    def _warn(self) -> None:
        """Log the uses that have become too long, once, and wait for the next one."""
        self._timer = None
        assert self._warn_after is not None
        due = monotonic() - self._warn_after
        begins = [since for since, *_ in self._uses.values()]
        for since, holder in zip(begins, self.list_all(), strict=True):
            if since > due:
                self._set_timer(since - due)
                break
            if since > self._warned_until:
                self._warned_until = since
                CONNECTION_HELD.log(holder=holder, **asdict(holder))


def _holder(
    place: ConnectionPoolEntry,
    use: Use,
    unit: Unit | None,
    statement_of: Callable[[Any], str | None],
) -> Holder:
    since, reference, _ = use
    task, connection = reference() if reference else None, place.dbapi_connection
    return Holder(
        call_site=BY_HAND if unit is None else line_of(unit.call_site),
        held_for=monotonic() - since,
        statement=None if connection is None else statement_of(connection),
        task=task.get_name() if task else None,
        line=current_line(task) if task else None,
    )


def _dbapi_connection(unit: Unit) -> object:
    connection = unit.transaction_connection
    if connection is None or connection.closed or connection.invalidated:
        return None  # Asked for its own connection, it would open another one.
    return connection.connection.dbapi_connection
