"""The tree of loggers: each event has a name, fields, and a row in the reference."""

from __future__ import annotations

import asyncio
import logging
import re
from pathlib import Path

import pytest
from sqlalchemy import insert, select, text

from sessionwire import DatabaseSessionManager, DatabaseSettings, Propagation
from sessionwire._log_events import EVENTS, LogEvent

from .models import Note
from .postgres import until

ROOT = Path(__file__).parents[1]
REFERENCE = ROOT / "docs" / "reference" / "logging.md"


def rows_of_the_reference() -> set[tuple[str, str, str]]:
    rows = re.findall(r"^\| `(\w+)` \| `([\w.]+)` \| (\w+) \|", REFERENCE.read_text(), re.MULTILINE)
    return set(rows)


def test_the_reference_has_each_event_and_no_other() -> None:
    declared = {
        (event.name, f"sessionwire.{event.place}", logging.getLevelName(event.level))
        for event in EVENTS
    }
    assert rows_of_the_reference() == declared


def test_the_library_logs_nothing_else() -> None:
    source = ROOT / "src" / "sessionwire"
    users = {path.name for path in source.rglob("*.py") if "getLogger" in path.read_text()}
    # The command line reads what is logged, and lets Alembic's log be seen.
    assert users == {"_log_events.py", "checks.py", "commands.py"}


def test_no_field_of_an_event_is_one_of_a_log_record() -> None:
    taken = {*vars(logging.makeLogRecord({})), "message", "asctime"}
    for event in EVENTS:
        fields = {"event", *re.findall(r"%\((\w+)\)", event.message)}
        assert not fields & taken


def test_an_event_is_a_record_with_fields(caplog: pytest.LogCaptureFixture) -> None:
    LogEvent("place", logging.WARNING, "kettle_boils", "%(what)s boils at %(heat).1f °C").log(
        what="water", heat=100, since="noon"
    )
    (record,) = caplog.records
    assert (record.name, record.funcName) == ("sessionwire.place", self_name())
    assert record.getMessage() == "water boils at 100.0 °C"
    assert vars(record)["event"] == "kettle_boils"
    assert (vars(record)["heat"], vars(record)["since"]) == (100, "noon")


def test_an_event_may_have_no_fields(caplog: pytest.LogCaptureFixture) -> None:
    LogEvent("place", logging.WARNING, "tea_is_ready", "100 % ready").log()
    assert caplog.records[0].getMessage() == "100 % ready"


def self_name() -> str:
    return test_an_event_is_a_record_with_fields.__name__


async def test_normal_work_logs_nothing_at_info_or_above(
    settings: DatabaseSettings, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "sessionwire")
    manager = DatabaseSessionManager(settings)
    async with manager:
        async with manager.connect() as connection:
            await manager.create_all(connection)
        async with manager.transaction() as session:
            session.add(Note(text="kept"))
            manager.transaction.on_commit(lambda: None)
            async with manager.transaction(Propagation.NESTED):
                await session.execute(insert(Note).values(text="nested"))
        async with manager.transaction(Propagation.SUPPORTS, read_only=True) as session:
            await session.execute(select(Note))
        async with manager.session() as session:
            await session.execute(select(Note))
        with pytest.raises(ZeroDivisionError):
            async with manager.transaction() as session:
                await session.execute(text("SELECT 1"))
                raise ZeroDivisionError
        async with manager.connect() as connection:
            await connection.execute(text("DELETE FROM note"))
        manager.status()
    assert [record for record in caplog.records if record.name.startswith("sessionwire")] == []


class TestDrain:
    async def test_it_says_how_many_blocks_it_waits_for_and_names_those_that_it_cuts_off(
        self, settings: DatabaseSettings, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.INFO, "sessionwire.close")
        settings = settings.model_copy(update={"drain_timeout": 0.2})
        manager = DatabaseSessionManager(settings)
        await manager.open()
        waits, ends = asyncio.Event(), asyncio.Event()

        async def hold(until_then: asyncio.Event) -> None:
            async with manager.session() as session:
                await session.execute(text("SELECT 1"))
                await until_then.wait()

        stays, leaves = (asyncio.create_task(hold(event)) for event in (waits, ends))

        async def both_hold() -> bool:
            return manager.status().pool.in_use == 2

        await until(both_hold)
        closing = asyncio.create_task(manager.close())

        async def is_closing() -> bool:
            return manager.status().is_closing

        await until(is_closing)
        ends.set()
        await leaves
        await closing
        assert not manager.status().is_closing
        begins, cut_off = caplog.records
        assert begins.getMessage() == "closing: waiting up to 0.2 s for 2 open block(s)"
        fields = vars(cut_off)
        assert (cut_off.levelname, fields["event"]) == ("WARNING", "block_cut_off")
        assert fields["call_site"].startswith("test_logging.py:")
        assert fields["call_site"].endswith("in " + hold.__qualname__)
        assert fields["line"].endswith("in " + hold.__qualname__)
        assert fields["statement"].startswith("SELECT 1")
        waits.set()
        await stays

    async def test_nothing_is_said_if_no_block_is_open(
        self, settings: DatabaseSettings, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.INFO, "sessionwire.close")
        manager = DatabaseSessionManager(settings)
        await manager.open()
        await manager.close()
        assert caplog.records == []
