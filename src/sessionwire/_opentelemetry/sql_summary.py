"""Summarize a statement, such as `SELECT account`, and hide the values in its text."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

LONGEST_SUMMARY = 255  # characters, by OpenTelemetry's conventions
LONGEST_READ = 20_000  # characters of a statement: what follows is mostly values

_TOKEN = re.compile(
    r"""(?P<comment>--[^\n]*|/\*.*?(?:\*/|\Z))
    |(?P<value>[eE]'(?:\\.|''|[^'\\])*(?:'|\Z)
        |(?:[bBnNxX]|[uU]&)?'(?:''|[^'])*(?:'|\Z)
        |\$(?P<tag>[A-Za-z_\x80-\U0010ffff]?\w*)\$.*?(?:\$(?P=tag)\$|\Z)
        |\.?\d[\w.]*(?:(?<=[eE])[+-]\d+)?)
    |(?P<name>"(?:""|[^"])*(?:"|\Z)|\$\d+|[A-Za-z_\x80-\U0010ffff][\w$]*)
    |[^\s]""",
    re.DOTALL | re.VERBOSE,
)
# They begin an operation anywhere, and those only at the begin of a query, because they
# also occur in clauses: FOR UPDATE, ON DELETE, WHEN MATCHED THEN INSERT.
ANYWHERE, AT_BEGIN = {"SELECT"}, {"INSERT", "UPDATE", "DELETE", "MERGE", "REPLACE"}
# What stands between a keyword and the name of a table.
FILLERS = {"ONLY", "LATERAL", "INTO", "OR", "IGNORE", "ABORT", "FAIL", "ROLLBACK", "REPLACE"}
END_OF_TABLES = {
    *("WHERE", "GROUP", "ORDER", "HAVING", "LIMIT", "OFFSET", "FETCH", "WINDOW", "FOR", "SET"),
    *("ON", "USING", "VALUES", "RETURNING", "UNION", "INTERSECT", "EXCEPT"),
}
# Verbs that say more with the next word: CREATE TABLE.
WITH_OBJECT = ("CREATE", "DROP", "ALTER", "REFRESH")


class Summary(NamedTuple):
    """What a statement does.

    Attributes:
        text: Its operations, each followed by its tables: `INSERT archive SELECT note`.
        operation: Its only operation, or None.
        table: The only table, or None.
    """

    text: str
    operation: str | None
    table: str | None


class _Level:
    """A query, or what else is between parentheses."""

    def __init__(self) -> None:
        self.operation = ""
        self.lists_tables = False
        self.name = ""  # the last one before its operation, as of a WITH query


def hide_values(sql: str) -> str:
    """Replace the literal values in a statement by question marks."""
    return _TOKEN.sub(lambda found: "?" if found["value"] else found[0], sql)


def summarize_statement(sql: str) -> Summary:
    """Return the operations and tables of a statement, in order."""
    words = list(_words(sql[:LONGEST_READ]))
    parts: list[tuple[str, bool]] = []  # a word, and whether it is an operation
    levels, queries = [_Level()], set[str]()
    expects = ""  # the keyword that the name of a table follows
    at = 0
    while at < len(words):
        word, level = words[at], levels[-1]
        keyword = word.upper()
        at += 1
        if word == "(":
            levels.append(_Level())
            expects = ""
        elif word == ")":
            if len(levels) > 1:
                levels.pop()
            expects = ""
        elif keyword in ANYWHERE or (
            keyword in AT_BEGIN
            and not level.operation
            and not (keyword == "REPLACE" and words[at : at + 1] == ["("])
        ):
            level.operation, level.lists_tables = keyword, False
            parts.append((keyword, True))
            expects = keyword if keyword == "UPDATE" else ""
        elif expects and keyword in FILLERS:
            pass
        elif expects and _is_name(word):
            while at + 1 < len(words) and words[at] == "." and _is_name(words[at + 1]):
                word = f"{word}.{words[at + 1]}"
                at += 2
            is_function = expects != "INTO" and words[at : at + 1] == ["("]
            name = word.replace('"', "")
            since = next((n for n, part in enumerate(reversed(parts)) if part[1]), 0)
            is_known = (name, False) in parts[len(parts) - since :]
            if not (is_function or is_known or name in queries):
                parts.append((name, False))
            expects = ""
        elif not level.operation:
            if keyword == "AS":
                queries.add(level.name.replace('"', ""))
            level.name = word if _is_name(word) else level.name
        elif keyword in ("FROM", "JOIN", "INTO") or (
            keyword == "USING" and level.operation in ("MERGE", "DELETE")
        ):
            # IS DISTINCT FROM is no clause.
            if not (keyword == "FROM" and words[max(at - 2, 0)].upper() == "DISTINCT"):
                expects, level.lists_tables = keyword, keyword == "FROM"
        elif word == "," and level.lists_tables:
            expects = "FROM"
        elif keyword in END_OF_TABLES:
            level.lists_tables = False
    return _summary(parts, words)


def _words(sql: str) -> Iterator[str]:
    for found in _TOKEN.finditer(sql):
        if found["comment"] is None:
            yield "?" if found["value"] else found[0]


def _is_name(word: str) -> bool:
    return word[0] in '"_' or word[0].isalpha()


def _summary(parts: list[tuple[str, bool]], words: list[str]) -> Summary:
    if not parts:
        verbs = words[: 2 if words and words[0].upper() in WITH_OBJECT else 1]
        text = " ".join(verbs).upper()
        return Summary(text, text or None, None)
    operations = [word for word, is_operation in parts if is_operation]
    tables = [word for word, is_operation in parts if not is_operation]
    text = " ".join(word for word, _ in parts)
    if len(text) > LONGEST_SUMMARY:
        text = text[:LONGEST_SUMMARY].rpartition(" ")[0]
    is_one = len(operations) == 1
    return Summary(
        text, operations[0] if is_one else None, tables[0] if is_one and len(tables) == 1 else None
    )
