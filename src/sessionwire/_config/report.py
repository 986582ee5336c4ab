"""Report problems of settings: a line for each, with key, source and remedy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings

from sessionwire.errors import ConfigurationError

from .sections import Key, fields_at, unknown_keys
from .sources import ARGUMENT, ENVIRONMENT, Source, environment_source
from .suggestions import did_you_mean
from .variable_names import check_variables, similar_variable, variable_name

if TYPE_CHECKING:
    from pydantic._internal._model_construction import ModelMetaclass
else:
    ModelMetaclass = type(BaseModel)


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
            return cls.validated(values, Source(ARGUMENT, values), *further)

    def validated(cls, values: Mapping[str, Any], *sources: Source) -> Any:
        """Build the model.

        Args:
            values: The values of all sources, merged.
            sources: Where they came from, for the errors.

        Raises:
            ConfigurationError: A value is wrong, missing, or unknown.
        """
        problems: list[ErrorDetails] = []
        if issubclass(cls, BaseSettings):
            check_variables(cls)
            problems = _find_unknown(cls, sources)
        try:
            model = super().__call__(**{str(key): value for key, value in values.items()})
            if not problems:
                return model
        except ValidationError as error:
            invalid = error.errors(include_url=False, include_input=False, include_context=False)
            problems = invalid + problems
        raise ConfigurationError(
            "\n".join(_format_problem(cls, problem, sources) for problem in problems)
        )


def _find_unknown(model: type[BaseModel], sources: Sequence[Source]) -> list[ErrorDetails]:
    """Find keys that pydantic ignores, because their section does not forbid them."""
    keys = dict.fromkeys(key for source in sources for key in unknown_keys(model, source.values))
    return [ErrorDetails(type="extra_forbidden", loc=key, msg="", input=None) for key in keys]


def _format_problem(model: type[Any], problem: ErrorDetails, sources: Sequence[Source]) -> str:
    """Format one problem: key, source, what is wrong, remedy."""
    key, kind, message = problem["loc"], problem["type"], problem["msg"]
    fields = fields_at(model, key[:-1] if kind == "extra_forbidden" else key)
    if kind == "missing":
        # Of a whole section, name the key that it cannot do without.
        key += tuple(name for name, field in fields.items() if field.is_required())[:1]
        message = f"is missing: set it {_ways_to_set(model, key, sources)}"
    elif kind == "extra_forbidden":
        message = "there is no such key"
        if fields:
            choice = f"choose one of {', '.join(sorted(fields))}"
            message += f"; {did_you_mean(str(key[-1]), fields) or choice}"
    elif kind == "model_type":
        message = f"this is a section, with keys below it: {', '.join(fields)}"
    source = next((source.name for source in sources if source.provides(key)), "")
    if source == ENVIRONMENT:
        source = f"environment variable {variable_name(model, key)}"
    place = f" ({source})" if source else ""
    return f"{'.'.join(map(str, key))}{place}: {message.removeprefix('Value error, ')}"


def _ways_to_set(model: type[Any], key: Key, sources: Sequence[Source]) -> str:
    ways = [
        "as an argument" if source.name == ARGUMENT else f"in {source.name}"
        for source in sources
        if source.name != ENVIRONMENT
    ]
    if not issubclass(model, BaseSettings):
        return ", or ".join(ways)
    variable = variable_name(model, key)
    similar = similar_variable(variable)
    hint = f"; {similar} is set, but its underscores are not those" if similar else ""
    return ", or ".join([*ways, f"as environment variable {variable}"]) + hint
