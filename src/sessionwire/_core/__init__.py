"""Scopes, blocks and transactions: what one block does, from its begin to its end."""
