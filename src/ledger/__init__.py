"""The reference service: it moves money between accounts, on a real database.

The service, from the bottom up: `settings`, `models`, `repositories`, `services`, and
the `container` that builds them. `errors` has every refusal of a service, `migrations`
the tables from version to version.

Its HTTP API: `api` has the routes, `problems` the error responses, `server` runs it.

Two more programs: `demo` sends concurrent transfers and checks the answers against the
database; `compare` sends requests to three versions of a smaller service.

`python -m ledger` starts the server and both programs.
"""
