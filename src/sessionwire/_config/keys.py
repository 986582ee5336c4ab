"""Know the keys of settings: their sections, their variables, and their misspellings."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from types import UnionType
from typing import Annotated, Any, TypeAlias, Union, cast, get_args, get_origin

from pydantic import AliasChoices, BaseModel
from pydantic.fields import FieldInfo

from sessionwire.errors import ConfigurationError

Key: TypeAlias = tuple[str | int, ...]


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """List the models that an annotation names, also as items of a list or a dict."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in models_in(part)]


def fields_at(annotation: Any, key: Key = ()) -> dict[str, FieldInfo]:
    """Return the fields of the section at `key`, or none if there is no single section."""
    for name in key:
        # pydantic puts names of types between those of keys: they lead nowhere.
        annotation = _part_of(annotation, name) or annotation
    models = models_in(annotation)
    return models[0].model_fields if len(models) == 1 else {}


def unknown_keys(annotation: Any, values: Any, key: Key = ()) -> Iterator[Key]:
    """Find keys that no section has.

    By default pydantic ignores them in a section of the user's own. A section that sets
    `extra`, or validates its raw values itself, may take any key.

    Args:
        annotation: The type of `values`.
        values: Raw values.
        key: The key of `values` themselves.
    """
    items: Iterable[tuple[str | int, Any]] = ()
    if isinstance(values, Mapping):
        named = cast("Mapping[object, Any]", values)
        items = [(str(name), item) for name, item in named.items()]
    elif isinstance(values, list | tuple):
        items = enumerate(cast("Sequence[Any]", values))
    for name, item in items:
        part = _part_of(annotation, name)
        if models_in(part):
            yield from unknown_keys(part, item, (*key, name))
        elif not part and isinstance(name, str) and not _takes_any_key(models_in(annotation)[0]):
            yield (*key, name)


def _part_of(annotation: Any, name: str | int) -> Any:
    """Return the type of the value at `name`, or None if a section has no such key.

    It is `Any` if several sections could be there.
    """
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        fields = annotation.model_fields.items()
        types = (field.annotation for known, field in fields if name in _names_of(known, field))
        return next(types, None)
    parts = [part for part in get_args(annotation) if models_in(part)]
    if len(parts) != 1:
        return Any
    is_optional = get_origin(annotation) in (Union, UnionType, Annotated)
    return _part_of(parts[0], name) if is_optional else parts[0]


def _takes_any_key(model: type[BaseModel]) -> bool:
    validators = model.__pydantic_decorators__.model_validators.values()
    return "extra" in model.model_config or any(
        validator.info.mode != "after" for validator in validators
    )


def _names_of(name: str, field: FieldInfo) -> set[str | int]:
    return {name, *_aliases(field)}


def _aliases(field: FieldInfo) -> set[str | int]:
    alias = field.validation_alias
    if alias is None:
        return set()
    choices = alias if isinstance(alias, AliasChoices) else AliasChoices(alias)
    return {path[0] for path in choices.convert_to_aliases()}


def variable_name(settings: type[Any], key: Key) -> str:
    """Return the name of the environment variable that sets `key`."""
    prefix = settings.model_config.get("env_prefix", "")
    if key and key[0] not in settings.model_fields:
        aliases = (_aliases(field) for field in settings.model_fields.values())
        prefix = "" if any(key[0] in names for names in aliases) else prefix
    return str(prefix + _delimiter(settings).join(map(str, key))).upper()


def _delimiter(settings: type[Any]) -> str:
    return settings.model_config.get("env_nested_delimiter") or "__"


def _variables(settings: type[Any]) -> dict[str, FieldInfo]:
    """Return the variables of all fields. An alias has no prefix, and hides the name."""
    config = settings.model_config
    keeps_names = config.get("populate_by_name") or config.get("validate_by_name")
    variables: dict[str, FieldInfo] = {}
    for name, field in settings.model_fields.items():
        aliases = _aliases(field)
        variables |= {str(alias).upper(): field for alias in aliases}
        if not aliases or keeps_names:
            variables[variable_name(settings, (name,))] = field
    return variables


def check_sections(settings: type[Any], variables: Iterable[str]) -> None:
    """Reject environment variables of misspelt sections, which pydantic-settings ignores.

    With an `env_prefix` they can be detected.

    Raises:
        ConfigurationError: A variable would be ignored.
    """
    prefix, delimiter = variable_name(settings, ()), _delimiter(settings)
    known = [name for name in _variables(settings) if name.startswith(prefix)]
    beginnings = tuple(name + delimiter for name in known)
    for variable in variables:
        upper = variable.upper()
        section, nested, _ = upper.removeprefix(prefix).partition(delimiter)
        is_ours = prefix and nested and upper.startswith(prefix)
        if is_ours and not (upper + delimiter).startswith(beginnings):
            sections = sorted(name.removeprefix(prefix) for name in known)
            hint = did_you_mean(section, sections) or f"choose one of {', '.join(sections)}"
            raise ConfigurationError(
                f"environment variable {variable}: there is no section {section!r}; {hint}"
            )


def check_underscores(settings: type[Any], names: Iterable[str], place: str) -> None:
    """Reject a name that has the letters of a key, but other underscores.

    Args:
        settings: The class whose keys are compared.
        names: Names of environment variables or of files with secrets.
        place: The origin of the names; it precedes a name in the error.

    Raises:
        ConfigurationError: A name would be ignored.
    """
    prefix, delimiter = variable_name(settings, ()), _delimiter(settings)
    fields = _variables(settings)
    found = {name.upper(): name for name in names}
    for upper, name in found.items():
        if prefix and (upper.startswith(prefix) or delimiter in upper):
            meant = delimiter.join(_key_of(upper.replace("_", ""), fields)).upper()
            if meant and meant not in found:
                raise ConfigurationError(
                    f"{place}{name} is not read: its underscores are not those of {meant}"
                )


def _key_of(letters: str, fields: Mapping[str, FieldInfo]) -> tuple[str, ...]:
    """Return the key with these letters, whatever its underscores, or ()."""
    for name, field in fields.items():
        head = name.upper().replace("_", "")
        if letters == head:
            return (name,)
        rest = letters.removeprefix(head)
        if rest != letters and (key := _key_of(rest, fields_at(field.annotation))):
            return (name, *key)
    return ()


def did_you_mean(name: str, known: Iterable[str], *, form: str = "{!r}") -> str:
    """Ask whether the known name closest to `name` was meant; "" if none is close.

    Args:
        name: The unknown name.
        known: The names to choose from.
        form: The format in which the suggestion is written.
    """
    close = get_close_matches(name, list(known), n=1)
    return f"did you mean {form.format(close[0])}?" if close else ""
