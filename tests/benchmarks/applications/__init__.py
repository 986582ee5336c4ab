"""One FastAPI application, written once for each way of giving an endpoint what it needs.

Each module is the way its library's own documentation shows: a graph of the five objects of `parts`, made for each
request, over a session that reads one row by its primary key.
"""
