"""Read the text of a statement: whether it writes, or begins or ends a transaction."""

from __future__ import annotations

import re

DML_VERBS = ("INSERT", "UPDATE", "DELETE", "MERGE", "REPLACE", "TRUNCATE", "COPY")
LONGEST_VERB = max(map(len, DML_VERBS))
_TRANSACTION_CONTROL = re.compile(
    r"(?>\s|;|--[^\n]*|/\*.*?\*/)*+(BEGIN|START|COMMIT|END|ABORT|PREPARE\s+TRANSACTION"
    r"|ROLLBACK(?!\s+((WORK|TRANSACTION)\s+)?TO\b))\b",
    re.IGNORECASE | re.DOTALL,
)


def transaction_control(sql: str) -> str | None:
    """Return the verb of a statement that begins or ends a transaction, or None."""
    found = _TRANSACTION_CONTROL.match(sql)
    return found and found[1].upper()


def is_dml(sql: str) -> bool:
    return sql.lstrip()[:LONGEST_VERB].upper().startswith(DML_VERBS)
