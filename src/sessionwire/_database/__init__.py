"""The engine, its connections, and what each database needs to behave."""
