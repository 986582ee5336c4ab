"""One FastAPI application, in a version for each way to inject its services.

Each module follows the documentation of its library: it builds the graph of the five
objects of `parts` for each request, over a session that reads one row by primary key.
"""
