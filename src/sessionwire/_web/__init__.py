"""The pages and answers of `sessionwire.asgi`. See that module for what users import."""
