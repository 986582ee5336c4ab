"""Serves one of the applications: `python -m tests.benchmarks.applications MODULE PORT`."""

import gc
import sys
from importlib import import_module

import uvicorn

app = import_module(f".{sys.argv[1]}", __package__).app
gc.freeze()  # what stays for good need not be looked through again and again, whichever library it is of
uvicorn.run(app, port=int(sys.argv[2]), log_level="critical", access_log=False)
