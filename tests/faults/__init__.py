"""Faults by the hundred: does the ledger keep each transfer that it has acknowledged, and no other?

`scenarios` says what goes wrong, `run` lets it go wrong under the load of `callers`, `verdict` holds what the callers
were told against the books. All of it: `python -m tests.faults`. A bounded share: `test_faults.py`.
"""
