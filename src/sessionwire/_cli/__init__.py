"""The command line: look at a database as its service would, and migrate it."""
