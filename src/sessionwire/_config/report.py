"""Report problems of settings: a line for each, with key, source and remedy."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, cast

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings

from sessionwire.errors import ConfigurationError

from .keys import Key, did_you_mean, fields_at, unknown_keys, variable_name
from .sources import ARGUMENT, ENVIRONMENT, Source, environment_source

if TYPE_CHECKING:
    from pydantic._internal._model_construction import ModelMetaclass
else:
    ModelMetaclass = type(BaseModel)

ModelT = TypeVar("ModelT", bound=BaseModel)
REMOVED_KEYS = {
    "read_only_connections": (
        "leave it out: reads and writes share one pool, and poolers need no setting for reads"
    ),
}


class ConfigurationErrorMeta(ModelMetaclass):
    """Make `Model(…)` raise `ConfigurationError` in place of `ValidationError`.

    A metaclass can tell the outermost model, which is called, from the models nested in
    it, which pydantic validates without a call: only the outermost one knows the whole
    key, and reports.
    """

    if not TYPE_CHECKING:  # so that a type checker sees the model's own signature

        def __call__(cls, *args, **values):
            if args:
                return super().__call__(*args, **values)
            further = [environment_source(cls)] if issubclass(cls, BaseSettings) else []
            return build(cls, values, Source(ARGUMENT, values), *further)


def build(model: type[ModelT], values: Mapping[str, Any], *sources: Source) -> ModelT:
    """Build a model of settings.

    Args:
        model: The class of the settings.
        values: The values of all sources, merged.
        sources: Where they came from, for the errors.

    Raises:
        ConfigurationError: A value is wrong, missing, or unknown.
    """
    problems: list[ErrorDetails] = []
    if issubclass(model, BaseSettings):
        # pydantic ignores them, if their section does not forbid them.
        unknown = (key for source in sources for key in unknown_keys(model, source.values))
        problems = [
            ErrorDetails(type="extra_forbidden", loc=key, msg="", input=None)
            for key in dict.fromkeys(unknown)
        ]
    try:
        built: ModelT = type.__call__(model, **{str(key): item for key, item in values.items()})
        if not problems:
            return built
    except ValidationError as error:
        problems = error.errors(include_input=False) + problems
    raise ConfigurationError(
        "\n".join(_format_problem(model, problem, sources) for problem in problems)
    )


def _format_problem(model: type[Any], problem: ErrorDetails, sources: Sequence[Source]) -> str:
    """Format one problem: key, source, what is wrong, remedy."""
    key, kind, message = problem["loc"], problem["type"], problem["msg"]
    fields = fields_at(model, key[:-1] if kind == "extra_forbidden" else key)
    if kind == "missing":
        # Of a whole section, name the key that it cannot do without.
        key += tuple(name for name, field in fields.items() if field.is_required())[:1]
        message = f"is missing: set it {_ways_to_set(model, key, sources)}"
    elif kind == "extra_forbidden":
        message = REMOVED_KEYS.get(str(key[-1]), "there is no such key")
        if fields and key[-1] not in REMOVED_KEYS:
            choice = f"choose one of {', '.join(sorted(fields))}"
            message += f"; {did_you_mean(str(key[-1]), fields) or choice}"
    elif kind == "model_type":
        message = f"this is a section, with keys below it: {', '.join(fields)}"
    source = next((source.name for source in sources if _contains(source.values, key)), "")
    if source == ENVIRONMENT:
        source = f"environment variable {variable_name(model, key)}"
    place = f" ({source})" if source else ""
    return f"{'.'.join(map(str, key))}{place}: {message.removeprefix('Value error, ')}"


def _contains(values: object, key: Key) -> bool:
    """Return whether the value at `key`, or its whole section, is in `values`."""
    if not key or not isinstance(values, Mapping):
        return True
    items = cast("Mapping[object, object]", values).items()
    return any(str(name) == str(key[0]) and _contains(item, key[1:]) for name, item in items)


def _ways_to_set(model: type[Any], key: Key, sources: Sequence[Source]) -> str:
    variable = variable_name(model, key)
    letters = variable.replace("_", "")
    similar = [name for name in os.environ if name.upper().replace("_", "") == letters]
    hint = f"; {similar[0]} is set, but its underscores are not those" if similar else ""
    ways = {ARGUMENT: "as an argument", ENVIRONMENT: f"as environment variable {variable}{hint}"}
    environment_last = sorted(sources, key=lambda source: source.name == ENVIRONMENT)
    return ", or ".join(ways.get(source.name, f"in {source.name}") for source in environment_last)
