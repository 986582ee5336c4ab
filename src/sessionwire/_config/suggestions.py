"""Suggest the name that was probably meant in place of an unknown one."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def did_you_mean(name: str, known: Iterable[str], *, form: str = "{!r}") -> str:
    """Ask whether the known name closest to `name` was meant; "" if none is close.

    Args:
        name: The unknown name.
        known: The names to choose from.
        form: The format in which the suggestion is written.
    """
    close = get_close_matches(name, list(known), n=1)
    return f"did you mean {form.format(close[0])}?" if close else ""
