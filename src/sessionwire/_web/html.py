"""`element()`: HTML from Python, in which all text is escaped."""

from __future__ import annotations

from html import escape


class HTML(str):
    """Text that is HTML already."""


def element(name: str, *children: str | None, **attributes: str | float | None) -> HTML:
    """Return an element with its children.

    Args:
        name: The name of the element.
        *children: HTML, and text, which is escaped. None is left out.
        **attributes: The attributes. `_` in a name stands for `-`, and one at its end
            for nothing: `class_`. None is left out.
    """
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return HTML(f"<{name}{given}>{join(*children)}</{name}>")


def join(*children: str | None) -> HTML:
    """Return HTML and escaped text, one after the other."""
    present = [child for child in children if child is not None]
    return HTML("".join(c if isinstance(c, HTML) else escape(c) for c in present))
