"""The reference service: money moves between accounts, through wired services, on a real database.

The way data takes: `settings`, `container`, then `models`, `repositories`, `services`; `errors` are the refusals.
`demo` sends traffic through it and `proof` holds the answers against the books. `python -m ledger demo` runs it.
"""
