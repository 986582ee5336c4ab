"""Errors of attributes that are not loaded: they name the attribute and the remedy."""

from __future__ import annotations

import inspect
from traceback import walk_stack
from types import FrameType
from typing import Any

from sqlalchemy.ext.asyncio import AsyncAttrs
from sqlalchemy.orm import InstrumentedAttribute, RelationshipProperty
from sqlalchemy.orm.attributes import instance_state
from sqlalchemy.orm.exc import DetachedInstanceError

from sessionwire.errors import ImplicitIOError

# where code that uses an attribute comes in
ACCESSES = {
    getattr(InstrumentedAttribute, name).__code__ for name in ("__get__", "__set__", "__delete__")
}


def _access() -> FrameType | None:
    """The use of an attribute that the running code is about."""
    frames = (frame for frame, _ in walk_stack(inspect.currentframe()))
    return next((frame for frame in frames if frame.f_code in ACCESSES), None)


def _note_of_detached(error: DetachedInstanceError, *arguments: Any, **options: Any) -> None:
    """Note the remedy when the error is made.

    SQLAlchemy raises this error, and has no session then.
    """
    super(DetachedInstanceError, error).__init__(*arguments, **options)
    if frame := _access():
        attribute, instance = frame.f_locals["self"], frame.f_locals["instance"]
        name = f"{type(instance).__name__}.{attribute.key}"
        is_relationship = isinstance(getattr(attribute, "property", None), RelationshipProperty)
        option = f", with selectinload({name}) in the query" if is_relationship else ""
        error.add_note(
            f"{name} was not loaded when the block of its session ended: load it inside the "
            f"block{option}"
        )


setattr(DetachedInstanceError, "__init__", _note_of_detached)  # noqa: B010  # to type checkers it is a method of theirs


def implicit_io_error() -> ImplicitIOError:
    """Names the attribute that the running code is about, and what would load it."""
    frame = _access()
    if frame is None:
        return ImplicitIOError(
            "this would send a statement without await: call the AsyncSession's own methods, or "
            "call this in a function that is given to session.run_sync()"
        )
    attribute, instance = frame.f_locals["self"], frame.f_locals["instance"]
    key, name = attribute.key, f"{type(instance).__name__}.{attribute.key}"
    is_relationship = isinstance(attribute.property, RelationshipProperty)
    remedies: list[str] = []
    if is_relationship:
        remedies.append(f"selectinload({name}) in the query")
    elif key not in instance_state(instance).expired_attributes:
        remedies.append(f"undefer({name}) in the query")
    if isinstance(instance, AsyncAttrs):
        remedies.append(f"await obj.awaitable_attrs.{key}")
    if not is_relationship or not attribute.property.mapper.common_parent(
        attribute.property.parent
    ):
        remedies.append(
            f'await session.refresh(obj, ["{key}"])'
        )  # which leaves a self-referential one as it is
    return ImplicitIOError(
        f"{name} is not loaded, and this would load it without await: use {', or '.join(remedies)}"
    )
