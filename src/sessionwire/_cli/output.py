"""Print for people: in colour on a terminal, plain in a pipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from textwrap import shorten
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .findings import Finding, Level

STYLES = {Level.OK: "green", Level.WARNING: "yellow", Level.ERROR: "bold red"}
STATEMENT_WIDTH = 100  # characters


def _console() -> Console:
    # Lines are cut nowhere in a pipe: programs read them.
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=10_000, soft_wrap=True)
    return console


def print_findings(found: Mapping[str, Sequence[Finding]]) -> None:
    """Print what the checks have found, for each database."""
    console = _console()
    for name, findings in found.items():
        console.print(f"[bold]{escape(name)}[/bold]")
        for each in findings:
            style = STYLES[each.level]
            console.print(
                f"  [{style}]{each.level:<7}[/{style}]  {each.subject}: {escape(each.message)}"
            )
    levels = [each.level for findings in found.values() for each in findings]
    errors, warnings = levels.count(Level.ERROR), levels.count(Level.WARNING)
    console.print(f"{errors} error(s), {warnings} warning(s)")


def print_status(found: Mapping[str, Any], *, clears: bool) -> None:
    """Print the status of a service, or the sessions in a server."""
    console = _console()
    if clears and console.is_terminal:
        console.clear()
    for name, status in found.get("databases", {}).items():
        _print_database(console, name, status)
    for name, sessions in found.get("servers", {}).items():
        _print_sessions(console, name, sessions)


def _print_database(console: Console, name: str, status: Mapping[str, Any]) -> None:
    state = "closing" if status["is_closing"] else "open" if status["is_open"] else "not open"
    console.print(f"[bold]{escape(name)}[/bold]: {escape(status['name'])}, {state}")
    pool = status["pool"]
    style = "bold red" if pool["waiting"] else "default"
    console.print(
        f"pool: {pool['in_use']} of {pool['limit']} in use, {pool['idle']} idle, "
        f"[{style}]{pool['waiting']} waiting[/{style}]"
    )
    console.print(f"transactions: {_counts(status['transactions'])}")
    console.print(f"retries: {_counts(status['retries'])}")
    console.print(f"connections: {_counts(status['connections'])}")
    _print_table(
        console,
        "open blocks, the oldest first",
        ["open for", "connection", "block", "now at", "last statement"],
        [
            [
                f"{block['open_for']:.1f} s",
                "waits for one" if block["is_waiting"] else _held(block["held_for"]),
                block["call_site"],
                block["line"] or "",
                _short(block["statement"]),
            ]
            for block in status["blocks"]
        ],
    )
    _print_table(
        console,
        "slow statements, the latest first",
        ["at", "took", "block", "line", "statement"],
        [
            [
                slow["at"],
                f"{slow['duration']:.3g} s",
                slow["call_site"],
                slow["line"],
                _short(slow["statement"]),
            ]
            for slow in status["slow_statements"]
        ],
    )


def _print_sessions(console: Console, name: str, sessions: Sequence[Mapping[str, Any]]) -> None:
    _print_table(
        console,
        f"{name}: sessions of this role in the server",
        ["pid", "application", "state", "for", "in transaction", "waits for", "statement"],
        [
            [
                str(session["pid"]),
                session["application"],
                session["state"] or "",
                _seconds(session["seconds_in_state"]),
                _seconds(session["seconds_in_transaction"]),
                ", ".join(map(str, session["blocked_by"])) or session["waits_for"] or "",
                _short(session["query"]),
            ]
            for session in sessions
        ],
    )


def _print_table(
    console: Console, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]
) -> None:
    console.print(f"{escape(title)}: {len(rows)}")
    if not rows:
        return
    if not console.is_terminal:
        for row in rows:
            console.print("  " + "  ".join(map(escape, filter(None, row))))
        return
    table = Table(box=None, pad_edge=True)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    console.print(table)


def _counts(totals: Mapping[str, float]) -> str:
    said = [
        f"{value:,.1f} s {name}" if isinstance(value, float) else f"{value:,} {name}"
        for name, value in totals.items()
        if value
    ]
    return ", ".join(said).replace("_", " ") or "none"


def _held(seconds: float | None) -> str:
    return "none" if seconds is None else f"held for {seconds:.1f} s"


def _seconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds:.1f} s"


def _short(statement: str | None) -> str:
    return shorten(statement or "", STATEMENT_WIDTH, placeholder=" …")
