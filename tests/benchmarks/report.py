"""The results of a benchmark, shown as a table, as JSON, and as plots in SVG."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from html import escape
from pathlib import Path
from statistics import median

from rich import box
from rich.console import Console
from rich.table import Table as Screen


class NotInstalledError(FileNotFoundError):
    """A benchmark is skipped because a program is missing; the message says which."""


@dataclass
class Table:
    """Medians over interleaved rounds, relative to the `base` row."""

    name: str
    columns: list[str]
    rows: dict[str, list[float]] = field(default_factory=dict)
    base: str | None = None
    note: str = ""
    spread: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    """By row and column, the lowest and the highest round."""

    def shown(self, value: float) -> str:
        return f"{value:.2f}" if self.base else f"{value:,g}"

    def shown_row(self, row: str) -> list[str]:
        values = [self.shown(value) for value in self.rows[row]]
        if row not in self.spread or row == self.base:
            return values
        return [
            f"{value}\n{self.shown(lowest)} to {self.shown(highest)}"
            for value, (lowest, highest) in zip(values, self.spread[row], strict=True)
        ]


Times = dict[str, dict[str, list[float]]]
"""By column and row, one for each round."""


def ratios(name: str, times: Times, base: str, note: str = "") -> Table:
    """Make a table of the medians of each round's time, relative to the base."""
    rows = dict.fromkeys([base, *next(iter(times.values()))])
    return Table(
        name,
        list(times),
        {
            row: [median(map(float.__truediv__, of[row], of[base])) for of in times.values()]
            for row in rows
        },
        base,
        note,
    )


def show(tables: list[Table], console: Console) -> None:
    for table in tables:
        screen = Screen(title=table.name, title_justify="left", box=box.SIMPLE)
        screen.add_column("", no_wrap=True)
        for column in table.columns:
            screen.add_column(column, justify="right")
        for row in table.rows:
            style = "dim" if row == table.base else "bold" if is_ours(row) else ""
            screen.add_row(row, *table.shown_row(row), style=style)
        console.print(screen, table.note, "")


def write(tables: list[Table], about: dict[str, object], directory: Path) -> None:
    """Write `results.json`, and a plot for each table."""
    directory.mkdir(parents=True, exist_ok=True)
    results = {**about, "tables": [asdict(table) for table in tables]}
    (directory / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    for table in tables:
        name = "-".join(re.findall(r"\w+", table.name.lower()))
        (directory / f"{name}.svg").write_text(plot(table), encoding="utf-8")


def is_ours(row: str) -> bool:
    return row.startswith("sessionwire")


WIDTH, LABELS, BAR, LINE, GAP = (
    720,
    260,
    380,
    20,
    34,
)  # pixels: the drawing, its names, its longest bar, a row, a title
NOTE = 120  # characters that fit in a line
OURS, OTHERS, INK = "#2563eb", "#b6bcc6", "#1f2328"


def plot(table: Table) -> str:
    """Draw a block of bars for each column, with a line at the base if there is one."""
    top = len(table.columns) * (len(table.rows) * LINE + GAP) + GAP - 12
    note = textwrap.wrap(table.note, NOTE)
    height = top + len(note) * LINE
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
            f'font-family="sans-serif" font-size="12" fill="{INK}">',
            f"<title>{escape(table.name)}</title>",
            '<rect width="100%" height="100%" fill="white"/>',
            *_bars(table),
            *(
                f'<text x="8" y="{top + number * LINE}" font-size="11">{escape(line)}</text>'
                for number, line in enumerate(note)
            ),
            "</svg>\n",
        ]
    )


def _bars(table: Table) -> Iterator[str]:
    top = 0
    for number, column in enumerate(table.columns):
        top += GAP
        longest = max(values[number] for values in table.rows.values()) or 1
        title = escape(f"{table.name}: {column}")
        yield f'<text x="8" y="{top - 10}" font-weight="bold">{title}</text>'
        started = top
        for row, values in table.rows.items():
            length = BAR * values[number] / longest
            color = OURS if is_ours(row) else OTHERS
            yield f'<text x="{LABELS - 8}" y="{top + 14}" text-anchor="end">{escape(row)}</text>'
            yield (
                f'<rect x="{LABELS}" y="{top + 2}" width="{length:.1f}" '
                f'height="{LINE - 4}" fill="{color}"/>'
            )
            shown = table.shown(values[number])
            yield f'<text x="{WIDTH - 8}" y="{top + 14}" text-anchor="end">{shown}</text>'
            top += LINE
        if table.base:
            x = f"{LABELS + BAR * table.rows[table.base][number] / longest:.1f}"
            yield (
                f'<line x1="{x}" x2="{x}" y1="{started}" y2="{top}" '
                f'stroke="{INK}" stroke-dasharray="2 3"/>'
            )


def rotated(names: list[str], turn: int) -> list[str]:
    """Rotate the order in each round, because one variant may slow the next."""
    start = turn % len(names)
    return names[start:] + names[:start]
