"""The engines, their connections, and the peculiarities of each database."""
