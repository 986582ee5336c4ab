"""Read the text of a statement: whether it writes, or begins or ends a transaction."""

from __future__ import annotations

import functools
import re

DML_VERBS = ("INSERT", "UPDATE", "DELETE", "MERGE", "REPLACE", "TRUNCATE", "COPY")
LONGEST_VERB = max(map(len, DML_VERBS))
_TRANSACTION_CONTROL = re.compile(
    r"(?>\s|;|--[^\n]*|/\*.*?\*/)*+(BEGIN|START|COMMIT|END|ABORT|PREPARE\s+TRANSACTION"
    r"|ROLLBACK(?!\s+((WORK|TRANSACTION)\s+)?TO\b))\b",
    re.IGNORECASE | re.DOTALL,
)

# What may stand before a parenthesis and surely writes nothing.
_HARMLESS = (
    "abs|all|and|any|array_agg|as|avg|by|cast|ceil|char|coalesce|concat|count|date_part|date_trunc"
    "|distinct|else|exists|extract|filter|floor|from|greatest|group|in|join|json_agg|jsonb_agg"
    "|least|length|lower|max|min|not|now|nullif|numeric|on|or|over|partition|rank|round|row_number"
    "|select|string_agg|sum|then|trim|upper|using|values|varchar|when|where|with"
)
_IN_NAME = r'[\w"$.\x80-\U0010ffff]'
_OTHER_CALL = re.compile(
    rf"(?<!{_IN_NAME})(?!(?:{_HARMLESS})\s*\(){_IN_NAME}+\s*\("
    # A comment or a space may part a name, and stand before the parenthesis.
    r"|--|\*/\s*\(|\.(?:\s|/\*)",
    re.IGNORECASE,
)
_SAVEPOINT = re.compile(r"(SAVEPOINT|RELEASE SAVEPOINT|ROLLBACK TO SAVEPOINT) \w+")


def transaction_control(sql: str) -> str | None:
    """Return the verb of a statement that begins or ends a transaction, or None."""
    found = _TRANSACTION_CONTROL.match(sql)
    return found and found[1].upper()


def is_dml(sql: str) -> bool:
    return sql.lstrip()[:LONGEST_VERB].upper().startswith(DML_VERBS)


@functools.lru_cache(maxsize=1024)
def surely_reads(sql: str) -> bool:
    """Tell whether a statement writes nothing, not even during COMMIT.

    It is a SELECT that calls no function but well-known ones, or about a savepoint.
    """
    is_select = sql.lstrip()[:6].upper() == "SELECT" and not _OTHER_CALL.search(sql)
    return is_select or _SAVEPOINT.fullmatch(sql) is not None
