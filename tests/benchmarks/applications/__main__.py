"""Serve an application: `python -m tests.benchmarks.applications MODULE PORT`."""

import gc
import sys
from importlib import import_module

import uvicorn

app = import_module(f".{sys.argv[1]}", __package__).app
# Objects that stay for good need not be examined at every collection.
gc.freeze()
uvicorn.run(app, port=int(sys.argv[2]), log_level="critical", access_log=False)
