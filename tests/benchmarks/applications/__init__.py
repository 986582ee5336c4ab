"""One FastAPI application, written once for each way of giving an endpoint what it needs.

Each module follows the documentation of its library: it builds the graph of the five
objects of `parts` for each request, over a session that reads one row by primary key.
"""
