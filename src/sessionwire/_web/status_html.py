"""The parts of the status page, each from a part of a `Status`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from textwrap import shorten

from sessionwire.status import (
    ConnectionTotals,
    OpenBlock,
    PoolStatus,
    SlowStatement,
    Status,
    TransactionTotals,
)

from .html import HTML, element, join

STATEMENT_WIDTH = 300  # characters
MINUTE, HOUR, DAY = 60, 3600, 86400  # seconds
NONE = "\N{EN DASH}"
BY_HAND = "manager.engine"
# The label of each column, and the class of its cells.
BLOCKS = (
    ("Open for", "number"),
    ("Opened by", "code"),
    ("Now at", "code"),
    ("Connection", ""),
    ("Last statement", "code wide"),
)
SLOW = (
    ("Took", "number"),
    ("Ended", "number"),
    ("Sent at", "code"),
    ("For", "code"),
    ("Statement", "code wide"),
)


def render_databases(statuses: Mapping[str, Status], now: datetime) -> HTML:
    return join(*(_database(name, status, now) for name, status in statuses.items()))


def summary(statuses: Mapping[str, Status]) -> str:
    """Return what the title of the window says, such as `db 3 of 15`."""
    return " · ".join(
        f"{name} {status.pool.in_use} of {status.pool.limit}" for name, status in statuses.items()
    )


def _database(name: str, status: Status, now: datetime) -> HTML:
    title = f"database-{name}"
    return element(
        "section",
        element(
            "header",
            element("h2", name, id=title),
            _state(status),
            element("p", status.name, class_="url code"),
        ),
        _pool(status.pool),
        _blocks(status),
        _slow_statements(status.slow_statements, now),
        element(
            "div",
            _transactions(status.transactions),
            _retries(status.retries),
            _connections(status.connections),
            class_="totals",
        ),
        aria_labelledby=title,
    )


def _state(status: Status) -> HTML:
    state = "closing" if status.is_closing else "open" if status.is_open else "not open"
    return element("p", state, class_="state" if state == "open" else "state alarm")


def _pool(pool: PoolStatus) -> HTML:
    in_use = f"{pool.in_use} of {pool.limit} connections in use"
    others = [f"{pool.idle} idle"]
    if pool.waiting:
        others.append(f"{pool.waiting} {'task waits' if pool.waiting == 1 else 'tasks wait'}")
    is_full = 0 < pool.limit <= pool.in_use
    return element(
        "div",
        element(
            "p",
            element("strong", in_use),
            element("span", ", ".join(others), class_="alarm" if pool.waiting else "muted"),
        ),
        element(
            "meter",
            in_use,
            min=0,
            max=max(pool.limit, 1),
            value=pool.in_use,
            high=max(pool.limit, 1) - 0.5,
            aria_label="Connections in use",
            class_="full" if is_full else None,
        ),
        class_="pool",
    )


# Tables


def _blocks(status: Status) -> HTML:
    by_hand = [
        OpenBlock(BY_HAND, h.held_for, False, h.held_for, h.statement, h.task, h.line)
        for h in status.holders
        if h.call_site == BY_HAND
    ]
    blocks = sorted([*status.blocks, *by_hand], key=lambda block: -block.open_for)
    rows = (
        [
            duration(block.open_for),
            block.call_site,
            block.line or NONE,
            _use(block),
            _statement(block.statement),
        ]
        for block in blocks
    )
    return _table("Open blocks", len(blocks), BLOCKS, rows)


def _use(block: OpenBlock) -> str:
    if block.is_waiting:
        return element("span", "waits for one", class_="alarm")
    return NONE if block.held_for is None else f"held {duration(block.held_for)}"


def _slow_statements(statements: Iterable[SlowStatement], now: datetime) -> HTML:
    rows = [
        [
            duration(each.duration),
            element(
                "time",
                f"{duration((now - each.at).total_seconds())} ago",
                datetime=each.at.astimezone(UTC).isoformat(timespec="seconds"),
            ),
            each.line,
            each.call_site,
            _statement(each.statement),
        ]
        for each in statements
    ]
    return _table("Slow statements", len(rows), SLOW, rows)


def _statement(text: str | None) -> str:
    return NONE if text is None else shorten(text, STATEMENT_WIDTH, placeholder=" …")


def _table(
    title: str, count: int, columns: tuple[tuple[str, str], ...], rows: Iterable[list[str]]
) -> HTML:
    # On a narrow screen the rows are shown as blocks, which takes their roles from the
    # elements: so these are given.
    heading = element("h3", f"{title} ", element("span", str(count), class_="count"))
    if not count:
        return element("div", heading, element("p", "none", class_="muted"), class_="list")
    head = element(
        "tr",
        *(
            element("th", label, scope="col", role="columnheader", class_=class_ or None)
            for label, class_ in columns
        ),
        role="row",
    )
    body = (
        element(
            "tr",
            *(
                element("td", cell, role="cell", class_=class_ or None, data_label=label)
                for cell, (label, class_) in zip(row, columns, strict=True)
            ),
            role="row",
        )
        for row in rows
    )
    return element(
        "div",
        heading,
        element(
            "table",
            element("thead", head, role="rowgroup"),
            element("tbody", *body, role="rowgroup"),
            role="table",
            aria_label=title,
        ),
        class_="list",
    )


# Totals


def _transactions(totals: TransactionTotals) -> HTML:
    return _figures(
        "Transactions",
        {
            "committed": _count(totals.committed),
            "rolled back": _count(totals.rolled_back),
            "timed out": _count(totals.timed_out),
            "unexpected rollbacks": _count(totals.unexpected),
            "unknown outcomes": _alarming(totals.unknown),
            "settled by a look-up": _alarming(totals.settled),
        },
    )


def _retries(retries: Mapping[str, int]) -> HTML:
    by_reason = {reason.replace("_", " "): _count(n) for reason, n in retries.items()}
    return _figures("Retries", by_reason or {"in all": "0"})


def _connections(totals: ConnectionTotals) -> HTML:
    return _figures(
        "Connections",
        {
            "made": _count(totals.made),
            "replaced": _count(totals.replaced),
            "lost": _alarming(totals.lost),
            "waits that timed out": _alarming(totals.timed_out),
            "waited for": duration(totals.waited_for),
            "held for": duration(totals.held_for),
        },
    )


def _figures(title: str, figures: Mapping[str, str]) -> HTML:
    rows = (
        element("div", element("dt", label), element("dd", figure))
        for label, figure in figures.items()
    )
    return element("div", element("h3", title), element("dl", *rows), class_="figures")


def _count(number: int) -> str:
    return f"{number:,}".replace(",", "\N{NARROW NO-BREAK SPACE}")


def _alarming(number: int) -> str:
    return element("strong", _count(number), class_="alarm") if number else "0"


def duration(seconds: float) -> str:
    """Return a duration with three digits or two units: `12.3 s`, `4 min 05 s`."""
    if seconds < 1:
        return f"{round(1000 * max(seconds, 0))} ms"
    if seconds < MINUTE - 0.05:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    for unit, name, part, part_name in (
        (DAY, "d", HOUR, "h"),
        (HOUR, "h", MINUTE, "min"),
        (MINUTE, "min", 1, "s"),
    ):
        if whole >= unit:
            return f"{whole // unit} {name} {whole % unit // part:02} {part_name}"
    return f"{whole} s"
