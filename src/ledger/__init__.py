"""The reference service: money moves between accounts, through wired services, on a real database.

The way data takes: `settings`, `container`, then `models`, `repositories`, `services`; `errors` are the refusals.
`api` is its HTTP edge, the refusals are its `problems`, `server` runs it. `demo` sends traffic through the services,
and `proof` holds the answers against the books. `compare` is a program of its own. `python -m ledger` starts them.
"""
