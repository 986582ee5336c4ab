"""Find sections of settings, and their keys: a section is a model within a model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import UnionType
from typing import Annotated, Any, TypeAlias, Union, cast, get_args, get_origin

from pydantic import AliasChoices, AliasPath, BaseModel
from pydantic.fields import FieldInfo

Key: TypeAlias = tuple[str | int, ...]


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """List the models that an annotation names, also as items of a list or a dict."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in models_in(part)]


def fields_at(model: type[BaseModel], key: Sequence[str | int]) -> dict[str, FieldInfo]:
    """Return the fields of the section at `key`, or none if there is no section."""
    fields = model.model_fields
    for part in key:
        for name, field in fields.items():
            if part in (name, field.validation_alias):
                # Skip the indexes of a list and the keys of a dict: they name no field.
                models = models_in(field.annotation)
                fields = models[0].model_fields if len(models) == 1 else {}
                break
    return fields


def unknown_keys(annotation: Any, values: Any, key: Key = ()) -> Iterator[Key]:
    """Find keys that no section has.

    By default pydantic ignores them in a section of the user's own. A section that sets
    `extra`, or validates its raw values itself, may take any key.

    Args:
        annotation: The type of `values`.
        values: Raw values.
        key: The key of `values` themselves.
    """
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        if isinstance(values, Mapping):
            yield from _unknown_in_model(annotation, cast("Mapping[str | int, Any]", values), key)
        return
    parts = [part for part in get_args(annotation) if models_in(part)]
    if len(parts) != 1:
        return
    if get_origin(annotation) in (Union, UnionType, Annotated):
        yield from unknown_keys(parts[0], values, key)
        return
    items: Iterable[tuple[str | int, Any]] = ()
    if isinstance(values, Mapping):
        items = cast("Mapping[str | int, Any]", values).items()
    elif isinstance(values, list | tuple):
        items = enumerate(cast("Sequence[Any]", values))
    for name, item in items:
        yield from unknown_keys(parts[0], item, (*key, name))


def _unknown_in_model(
    model: type[BaseModel], values: Mapping[str | int, Any], key: Key
) -> Iterator[Key]:
    validators = model.__pydantic_decorators__.model_validators.values()
    takes_any_key = "extra" in model.model_config or any(
        validator.info.mode != "after" for validator in validators
    )
    for name, value in values.items():
        for known, field in model.model_fields.items():
            if name in _names_of(known, field):
                yield from unknown_keys(field.annotation, value, (*key, name))
                break
        else:
            if not takes_any_key:
                yield (*key, str(name))


def _names_of(name: str, field: FieldInfo) -> set[str | int]:
    alias = field.validation_alias
    if isinstance(alias, AliasChoices):
        return {name, *(path[0] for path in alias.convert_to_aliases())}
    return {name, alias.path[0] if isinstance(alias, AliasPath) else alias or name}
