"""Faults by the hundred: does the ledger keep exactly the acknowledged transfers?

`scenarios` says what goes wrong, `run` lets it go wrong under the load of `callers`,
and `verdict` compares what the callers were told with the books. Run all of it with
`python -m tests.faults`, a bounded share with `test_faults.py`.
"""
