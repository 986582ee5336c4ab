"""Typed, validated settings: from arguments, the environment, a secrets directory and YAML, in this order."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, Self, Union, cast, get_args, get_origin

import yaml
from pydantic import (
    AliasChoices,
    AliasPath,
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    PlainSerializer,
    PlainValidator,
    ValidationError,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, InitErrorDetails
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    NestedSecretsSettingsSource,
    SecretsSettingsSource,
    SettingsConfigDict,
    SettingsError,
)
from sqlalchemy import URL

from ._config.url import parse_url, show_url
from .errors import ConfigurationError

if TYPE_CHECKING:
    from pydantic._internal._model_construction import ModelMetaclass
else:
    ModelMetaclass = type(BaseModel)

ARGUMENT, ENVIRONMENT, CONFIG = "argument", "environment", "config"  # where a value came from, if not from a file


class Source(NamedTuple):
    """Where values came from, and what stood there."""

    name: str
    values: Mapping[str, Any]

    def gave(self, key: tuple[str | int, ...]) -> bool:
        value: object = self.values
        for part in key:
            if not isinstance(value, Mapping):
                return True  # what stands there came from here as a whole
            value = {str(name): below for name, below in cast("Mapping[object, object]", value).items()}
            if str(part) not in value:
                return False
            value = value[str(part)]
        return True


class ReportsConfigurationErrors(ModelMetaclass):
    """Makes `Model(…)` raise `ConfigurationError`; a nested model leaves the report to the outer one."""

    if not TYPE_CHECKING:  # a checker is to see the model's own signature

        def __call__(cls, *args, **values):
            if args:
                return super().__call__(*args, **values)
            further = [Source(ENVIRONMENT, _Environment(cls)())] if issubclass(cls, BaseSettings) else []
            return cls.validated(values, Source(ARGUMENT, values), *further)

    def validated(cls, values: Mapping[str, Any], *sources: Source) -> Any:
        """The model of these values, with their sources for the report. Raises `ConfigurationError`."""
        problems: list[ErrorDetails] = []
        if issubclass(cls, BaseSettings):
            _check_variables(cls)
            problems = _unknown_in_sections(cls, sources)
        try:
            model = super().__call__(**{str(key): value for key, value in values.items()})
            if not problems:
                return model
        except ValidationError as error:
            problems = error.errors(include_url=False, include_input=False, include_context=False) + problems
        raise ConfigurationError("\n".join(_explain(cls, problem, sources) for problem in problems))


class _Frozen:
    """Refuses changes; pydantic would too, but shows the value."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not name.startswith("_"):
            raise AttributeError(f"{type(self).__name__} is frozen: {name} cannot be changed, make another")
        super().__setattr__(name, value)


class _Model(_Frozen, BaseModel, metaclass=ReportsConfigurationErrors):
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    @model_validator(mode="wrap")
    @classmethod
    def _hide_input(cls, values: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """Keep what was given out of the error, which a model of the user's own around this one would show."""
        try:
            return handler(values)
        except ValidationError as error:
            problems = error.errors(include_url=False)
        raise ValidationError.from_exception_data(
            cls.__name__,
            [
                InitErrorDetails(type=each["type"], loc=each["loc"], input="***", ctx=each.get("ctx", {}))
                for each in problems
            ],
            hide_input=True,
        )


class PoolSettings(_Model):
    """The pool of connections; durations in seconds."""

    size: int = Field(5, ge=1, description="connections that are kept open")
    max_overflow: int = Field(10, ge=0, description="further connections under load, closed when given back")
    timeout: float = Field(30, gt=0, description="how long to wait for a connection; on SQLite, for the write lock too")
    ping_after: float = Field(1, ge=0, description="one that idled longer is asked whether it lives; PostgreSQL")
    max_lifetime: float | None = Field(
        None, gt=0, description="the age by which a connection is replaced, some a little earlier; none: never"
    )


class DatabaseSettings(_Model):
    """One database; durations in seconds. Raises `ConfigurationError`."""

    url: Annotated[str | URL, PlainValidator(parse_url), PlainSerializer(show_url)] = Field(
        description="postgresql://…, sqlite:///file.db, sqlite:// (a temporary file) or embedded:./directory"
    )
    pool: PoolSettings = PoolSettings()
    connect_timeout: float = Field(10, gt=0, description="for open(), and for each new connection")
    drain_timeout: float = Field(10, ge=0, description="how long close() waits for open scopes")
    commit_timeout: float = Field(10, gt=0, description="how long a commit that was sent is waited for")
    rollback_timeout: float = Field(5, gt=0, description="a rollback that takes longer costs the connection")
    tcp_timeout: float = Field(
        30, ge=0, description="a server that TCP hears nothing of for so long is gone; 0: as the system; PostgreSQL"
    )
    read_only_connections: bool = Field(
        True, description="read scopes have connections of their own; false: READ ONLY transactions, as a pooler needs"
    )
    echo: bool = Field(False, description="log each statement")
    application_name: str | None = Field(None, description="the name shown in PostgreSQL's pg_stat_activity")

    @classmethod
    def load(cls, raw: Mapping[str, Any] | None) -> Self:
        """From raw values, as a `Configuration` provider holds them; there, None is what was not set.

        Raises `ConfigurationError`.
        """
        try:
            given = _without_none(raw or {})
        except RecursionError:
            raise ConfigurationError(f"{CONFIG}: {TOO_DEEP}") from None
        if not isinstance(given, dict):
            raise ConfigurationError(f"{CONFIG}: keys such as url and pool are expected, not a {type(raw).__name__}")
        values = cast("dict[str, Any]", given)
        loaded: Self = cls.validated(values, Source(CONFIG, values))
        return loaded


def _without_none(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    items = cast("Mapping[str, Any]", value).items()
    return {key: _without_none(below) for key, below in items if below is not None}


class Settings(_Frozen, BaseSettings, metaclass=ReportsConfigurationErrors):
    """What a service reads at its start. Subclass it for further sections, or for a prefix in the environment."""

    model_config = SettingsConfigDict(env_nested_delimiter="__", extra="forbid", frozen=True, hide_input_in_errors=True)

    database: DatabaseSettings

    @classmethod
    def load(cls, path: str | Path | None = None, *, secrets_dir: str | Path | None = None, **arguments: Any) -> Self:
        """Arguments over environment over secrets directory over the YAML file at `path` over defaults.

        A secrets directory holds a file per value, named as its environment variable would be. Raises
        `ConfigurationError`.
        """
        sources = [Source(ARGUMENT, arguments), Source(ENVIRONMENT, _Environment(cls)())]
        if secrets_dir:
            secrets = _read_secrets(cls, secrets_dir)
            _check_names(cls, os.listdir(secrets_dir), f"{Path(secrets_dir)}{os.sep}")
            sources.append(Source(f"secrets in {secrets_dir}", secrets))
        if path:
            sources.append(Source(str(path), _read_yaml(Path(path))))
        loaded: Self = cls.validated(_merged(*(source.values for source in sources)), *sources)
        return loaded


class _Environment(EnvSettingsSource):
    """Names the section that cannot be parsed."""

    def prepare_field_value(self, field_name: str, field: FieldInfo, value: Any, value_is_complex: bool) -> Any:
        try:
            return super().prepare_field_value(field_name, field, value, value_is_complex)
        except (ValueError, RecursionError):
            variable = _variable(self.settings_cls, (field_name,))
            raise ConfigurationError(
                f"{field_name} (environment variable {variable}, or one below it): this is not JSON; write it so, or "
                f"set it key by key, as {variable}__…"
            ) from None


def _read_secrets(settings: type[Settings], directory: str | Path) -> Mapping[str, Any]:
    try:
        files = SecretsSettingsSource(settings, directory)
        return NestedSecretsSettingsSource(files, secrets_dir_missing="error")()
    except SettingsError as error:
        raise ConfigurationError(f"secrets_dir: {error}; it is to hold a file per value") from None


MAX_DEPTH, MAX_SIZE = 100, 100_000  # of what a file holds
TOO_DEEP = "it is nested too deeply, or its aliases repeat too much"
# as dependency-injector's `Configuration` reads them
VARIABLE = re.compile(r"\$\{(?P<name>[^}^{:]+)(?P<separator>:?)(?P<default>.*?)\}")
STAND_IN = re.compile("\ue000([0-9]+)\ue001*\ue002")


class _Loader(yaml.SafeLoader):
    """Expands `${VARIABLE}` and `${VARIABLE:default}` where a scalar has it. What a variable holds is not read as YAML.

    A plain scalar has the type of what it becomes: `${SIZE}` may be a number.
    """

    def __init__(self, text: str) -> None:
        self._variables: list[re.Match[str]] = []
        super().__init__(VARIABLE.sub(self._stand_in, text))

    def _stand_in(self, variable: re.Match[str]) -> str:
        """What is read in its place, of the same length: braces and colons have a meaning in YAML."""
        self._variables.append(variable)
        return f"\ue000{len(self._variables) - 1}".ljust(len(variable[0]) - 1, "\ue001") + "\ue002"

    def _value(self, stand_in: re.Match[str]) -> str:
        name, separator, default = self._variables[int(stand_in[1])].groups()
        if name not in os.environ and not separator:
            problem = f"environment variable {name} is not set; set it, or write a default, as ${{{name}:default}}"
            raise _RefusedError(problem=problem, problem_mark=cast(Any, self._event().start_mark))
        return os.environ.get(name, default)

    def compose_scalar_node(self, anchor: Any) -> yaml.ScalarNode:
        self._event().value = STAND_IN.sub(self._value, self._event().value)
        return super().compose_scalar_node(anchor)

    def _event(self) -> yaml.ScalarEvent:
        return cast(Any, self).peek_event()  # type: ignore[no-any-return]

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None:
            _size(node)
        return node


class _RefusedError(yaml.MarkedYAMLError):
    """It is YAML, and not to be read all the same."""


def _size(node: yaml.Node, depth: int = 0) -> int:
    """The number of its nodes, those of an alias counted wherever it stands."""
    parts: list[Any] = node.value if isinstance(node, yaml.CollectionNode) else []
    if isinstance(node, yaml.MappingNode):
        parts = [part for pair in parts for part in pair]
    size = 1
    for part in parts:
        size += _size(part, depth + 1)
        if depth > MAX_DEPTH or size > MAX_SIZE:
            raise _RefusedError(problem=TOO_DEEP, problem_mark=node.start_mark)
    return size


def _read_yaml(path: Path) -> Mapping[str, Any]:
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise ConfigurationError(f"{path}: {error.strerror}; the path is relative to {Path.cwd()}") from None
    except RecursionError:
        raise ConfigurationError(f"{path}: {TOO_DEEP}") from None
    except Exception as error:  # for a tag that a value does not suit PyYAML has errors of any kind
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        if isinstance(error, _RefusedError):
            raise ConfigurationError(f"{path}{where}: {error.problem}") from None
        problem = getattr(error, "problem", None) or "a value in it cannot be read"
        problem = re.sub(r" (['\"])(?!<).{2,}\1", "", problem)  # what is quoted from the file
        raise ConfigurationError(
            f"{path}{where}: this is not YAML in UTF-8: {problem}; check indentation, colons and quotes there"
        ) from None
    if values is not None and not isinstance(values, Mapping):
        raise ConfigurationError(f"{path}: 'key: value' lines are expected, such as 'database:' and below it 'url: …'")
    return cast("Mapping[str, Any]", values or {})


def _merged(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """The first layer that names a key has the word; mappings are merged key by key."""
    merged: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
                merged[key] = _merged(merged[key], cast("Mapping[str, Any]", value))
            else:
                merged.setdefault(key, value)
    return merged


def _check_variables(settings: type[BaseSettings]) -> None:
    """A misspelt section goes unseen by pydantic-settings; with a prefix of its own it can be told."""
    _check_names(settings, os.environ, "environment variable ")
    prefix, delimiter = _variable(settings, ()), _delimiter(settings)
    sections = [name.upper() for name in settings.model_fields]
    for variable in os.environ:
        section, nested, _ = variable.upper().removeprefix(prefix).partition(delimiter)
        if prefix and nested and variable.upper().startswith(prefix) and section not in sections:
            raise ConfigurationError(
                f"environment variable {variable}: there is no section {section!r}{_did_you_mean(section, sections)}"
            )


def _check_names(settings: type[BaseSettings], names: Iterable[str], place: str) -> None:
    """Refuse the name of a key, letter for letter, with other underscores: it would not be read."""
    prefix, delimiter = _variable(settings, ()), _delimiter(settings)
    roots = {
        str(field.validation_alias or prefix + name).upper(): field
        for name, field in settings.model_fields.items()
        if not isinstance(field.validation_alias, AliasChoices | AliasPath)
    }
    found = {name.upper(): name for name in names}
    for upper, name in found.items():
        if prefix and (upper.startswith(prefix) or delimiter in upper):
            meant = delimiter.join(_key_of(upper.replace("_", ""), roots)).upper()
            if meant and meant not in found:
                raise ConfigurationError(f"{place}{name} is not read: its underscores are not those of {meant}")


def _key_of(letters: str, fields: Mapping[str, FieldInfo]) -> tuple[str, ...]:
    """The key that has these letters, but for underscores."""
    for name, field in fields.items():
        head, models = name.upper().replace("_", ""), _models_in(field.annotation)
        if letters == head:
            return (name,)
        below = letters.removeprefix(head)
        if below != letters and len(models) == 1 and (key := _key_of(below, models[0].model_fields)):
            return (name, *key)
    return ()


def _near(variable: str) -> str:
    """A variable that is set and has these letters, but for underscores."""
    return next((name for name in os.environ if name.upper().replace("_", "") == variable.replace("_", "")), "")


def _delimiter(settings: type[BaseSettings]) -> str:
    return settings.model_config.get("env_nested_delimiter") or "__"


def _variable(settings: type[BaseSettings], key: Sequence[str | int]) -> str:
    return (settings.model_config.get("env_prefix", "") + _delimiter(settings).join(map(str, key))).upper()


def _explain(model: type[Any], problem: ErrorDetails, sources: Sequence[Source]) -> str:
    """One line: key, source, problem, remedy."""
    key, kind, message = problem["loc"], problem["type"], problem["msg"].removeprefix("Value error, ")
    fields = _fields_at(model, key[:-1] if kind == "extra_forbidden" else key)
    if kind == "missing":  # of a section, name what it can't do without
        key += tuple(name for name, field in fields.items() if field.is_required())[:1]
    place = next((source.name for source in sources if source.gave(key)), "")
    ways = ["as an argument" if source.name == ARGUMENT else f"in {source.name}" for source in sources]
    if issubclass(model, BaseSettings):
        variable = f"environment variable {_variable(model, key)}"
        place = variable if place == ENVIRONMENT else place
        ways = [way for way in ways if way != f"in {ENVIRONMENT}"] + [f"as {variable}"]
    if kind == "missing":
        message = f"is missing: set it {', or '.join(ways)}"
        if issubclass(model, BaseSettings) and (near := _near(_variable(model, key))):
            message += f"; {near} is set, but its underscores are not those"
    elif kind == "extra_forbidden":
        message = "there is no such key" + _did_you_mean(str(key[-1]), list(fields))
    elif kind == "model_type":
        message = f"this is a section, with keys below it: {', '.join(fields)}"
    return f"{'.'.join(map(str, key))}{f' ({place})' if place else ''}: {message}"


def _unknown_in_sections(model: type[BaseModel], sources: Sequence[Source]) -> list[ErrorDetails]:
    """Keys that no section has. pydantic passes them by where a section of the user's own does not say otherwise."""
    keys = dict.fromkeys(key for source in sources for key in _unknown(model, source.values, ()))
    return [ErrorDetails(type="extra_forbidden", loc=key, msg="", input=None) for key in keys]


def _unknown(annotation: Any, value: Any, key: tuple[str | int, ...]) -> Iterator[tuple[str | int, ...]]:
    items: Iterable[tuple[str | int, object]] = ()
    if isinstance(value, Mapping):
        items = cast("Mapping[str | int, object]", value).items()
    elif isinstance(value, list | tuple):
        items = enumerate(cast("Sequence[object]", value))
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        validators = annotation.__pydantic_decorators__.model_validators.values()
        takes_others = "extra" in annotation.model_config or any(each.info.mode != "after" for each in validators)
        for name, below in items if isinstance(value, Mapping) else ():
            fields = [field for known, field in annotation.model_fields.items() if name in _names(known, field)]
            for field in fields[:1]:
                yield from _unknown(field.annotation, below, (*key, name))
            if not fields and not takes_others:
                yield (*key, str(name))
        return
    parts = [part for part in get_args(annotation) if _models_in(part)]
    if len(parts) == 1 and get_origin(annotation) in (Union, UnionType, Annotated):
        yield from _unknown(parts[0], value, key)
    elif len(parts) == 1:  # in a list or a dict
        for name, below in items:
            yield from _unknown(parts[0], below, (*key, name))


def _names(name: str, field: FieldInfo) -> set[str | int]:
    alias = field.validation_alias
    if isinstance(alias, AliasChoices):
        return {name, *(path[0] for path in alias.convert_to_aliases())}
    return {name, alias.path[0] if isinstance(alias, AliasPath) else alias or name}


def _fields_at(model: type[BaseModel], key: Sequence[str | int]) -> dict[str, FieldInfo]:
    """The fields of the section that this key points to; none where it points to something else."""
    fields = model.model_fields
    for part in key:
        for field in [field for name, field in fields.items() if part in (name, field.validation_alias)]:
            models = _models_in(field.annotation)  # of a list or a dict too, whose indexes and keys are passed over
            fields = models[0].model_fields if len(models) == 1 else {}
    return fields


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models_in(part)]


def _did_you_mean(name: str, names: list[str]) -> str:
    close = difflib.get_close_matches(name, names, 1)
    others = f"; there are {', '.join(sorted(names))}" if names else ""
    return f"; did you mean {close[0]!r}?" if close else others


def settings_of(given: object) -> DatabaseSettings:
    """What a manager, a container or a template was given: settings, their raw values, or a URL alone."""
    if isinstance(given, DatabaseSettings):
        return given
    if isinstance(given, Mapping):
        return DatabaseSettings.load(cast("Mapping[str, Any]", given))
    if isinstance(given, BaseModel):
        kind = type(given)
        names = [name for name, field in kind.model_fields.items() if DatabaseSettings in _models_in(field.annotation)]
        section = names[0] if names else "database"
        raise ConfigurationError(
            f"settings: these are all of {kind.__name__}, and the section of the database is expected: "
            f"settings.{section}, or of a provider settings.provided.{section}"
        )
    return DatabaseSettings(url=cast("str | URL", given))
