"""Read the text of a statement: whether it writes, or begins or ends a transaction."""

from __future__ import annotations

import re

DML_VERBS = ("INSERT", "UPDATE", "DELETE", "MERGE", "REPLACE", "TRUNCATE", "COPY")
TRANSACTION_CONTROL = re.compile(
    r"(?>\s|;|--[^\n]*|/\*.*?\*/)*+(BEGIN|START|COMMIT|END|ABORT|PREPARE\s+TRANSACTION"
    r"|ROLLBACK(?!\s+((WORK|TRANSACTION)\s+)?TO\b))\b",
    re.IGNORECASE | re.DOTALL,
)


def is_dml(sql: str) -> bool:
    return sql.lstrip().upper().startswith(DML_VERBS)
