"""Settings: typed, validated, and loaded from several sources."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, cast

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    PlainSerializer,
    PlainValidator,
    SecretStr,
    ValidationError,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticUndefined
from pydantic_settings import BaseSettings, SettingsConfigDict
from sqlalchemy import URL

from ._config.engine_options import check_connect_args, check_engine_options
from ._config.keys import models_in
from ._config.report import ConfigurationErrorMeta, build
from ._config.sources import (
    ARGUMENT,
    Source,
    environment_source,
    merge,
    raw_source,
    secrets_source,
)
from ._config.url import DatabaseURL, mask_url, parse_url
from ._config.url_parts import (
    check_keys,
    check_password_file,
    complete_url,
    fill_up_url,
    mask_secret,
    parse_secret,
)
from ._config.yaml_files import read_yaml
from .errors import ConfigurationError

LONGEST = 2_000_000  # seconds; the server counts milliseconds in 32 bits
# Keys that only PostgreSQL understands.
SERVER_SETTINGS = (
    "search_path",
    "statement_timeout",
    "lock_timeout",
    "idle_in_transaction_timeout",
    "pooler",
    "migrations_url",
)


class _Frozen:
    """Refuse changes. pydantic does too, but its error shows the value."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not name.startswith("_"):
            raise AttributeError(
                f"{type(self).__name__} is frozen: {name} cannot be changed, make another"
            )
        super().__setattr__(name, value)


class _Model(_Frozen, BaseModel, metaclass=ConfigurationErrorMeta):
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    @model_validator(mode="wrap")
    @classmethod
    def _hide_input(cls, values: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """Mask the input in errors: a user's model around this one would show it."""
        try:
            return handler(values)
        except ValidationError as error:
            problems = [
                InitErrorDetails(
                    type=problem["type"],
                    loc=problem["loc"],
                    input="***",
                    ctx=problem.get("ctx", {}),
                )
                for problem in error.errors()
            ]
        raise ValidationError.from_exception_data(cls.__name__, problems, hide_input=True)


class PoolSettings(_Model):
    """Configure the connection pool. Durations are in seconds.

    Raises:
        ConfigurationError: A value is wrong; the message names key, source and remedy.
    """

    size: int = Field(5, ge=1, description="connections that are kept open")
    max_overflow: int = Field(
        10, ge=0, description="further connections under load, closed when released"
    )
    timeout: float = Field(
        30,
        gt=0,
        description="how long to wait for a connection; on SQLite, for the write lock too",
    )
    ping_after: float = Field(
        1,
        ge=0,
        description="idle time after which a connection is checked before its use; PostgreSQL",
    )
    max_lifetime: float | None = Field(
        None,
        gt=0,
        description="age at which a connection is replaced, some a little earlier; none: never",
    )
    warn_held_after: float | None = Field(
        None,
        gt=0,
        description="time after which it is logged who holds a connection; none: never",
    )


class DatabaseSettings(_Model):
    """Configure one database. Durations are in seconds.

    Raises:
        ConfigurationError: A value is wrong, missing or unknown; the message names key,
            source and remedy, and shows no password.
    """

    # It is required, but for a type checker `host` or `database` can do without.
    url: Annotated[str | URL, PlainValidator(parse_url), PlainSerializer(mask_url)] = Field(
        default=cast("str | URL", PydanticUndefined),
        description=(
            "postgresql://…, sqlite:///file.db, sqlite:// (a temporary file) "
            "or embedded:./directory; not needed beside host or database"
        ),
    )
    host: str | None = Field(
        None,
        min_length=1,
        description="in place of the url's; several: one:5432,two:5432; or a socket's directory",
    )
    port: int | None = Field(None, ge=1, le=65535, description="in place of the url's")
    username: str | None = Field(None, min_length=1, description="in place of the url's")
    password: Annotated[
        str | SecretStr | None, PlainValidator(parse_secret), PlainSerializer(mask_secret)
    ] = Field(None, description="in place of the url's; not percent-encoded")
    password_file: Annotated[str | Path | None, AfterValidator(check_password_file)] = Field(
        None, description="a file with the password, read for each new connection"
    )
    database: str | None = Field(None, min_length=1, description="in place of the url's")
    pool: PoolSettings = PoolSettings()
    connect_timeout: float = Field(10, gt=0, description="for open(), and for each new connection")
    wait_for_database: float = Field(
        0,
        ge=0,
        description="how long open() waits for a server that is not there yet; PostgreSQL",
    )
    drain_timeout: float = Field(10, ge=0, description="how long close() waits for open scopes")
    commit_timeout: float = Field(
        10, gt=0, description="how long to wait for the answer to a commit"
    )
    resolve_commits: bool = Field(
        True,
        description=(
            "look up the outcome of a commit whose answer was lost; "
            "with asyncpg it needs the pipeline; PostgreSQL"
        ),
    )
    rollback_timeout: float = Field(
        5, gt=0, description="how long to wait for a rollback before closing the connection"
    )
    tcp_timeout: float = Field(
        30,
        ge=0,
        description=(
            "silence of the network after which the server is lost; "
            "0: the system's default; PostgreSQL"
        ),
    )
    pipeline: bool = Field(
        True,
        description="send ahead what needs no answer, such as BEGIN; PostgreSQL with asyncpg",
    )
    pooler: Literal["transaction", "session"] | None = Field(
        None,
        description=(
            "what is in front of the server, such as PgBouncer, by its pool_mode; "
            "none: nothing; PostgreSQL"
        ),
    )
    migrations_url: Annotated[
        str | URL | None,
        PlainValidator(lambda value: value and parse_url(value)),
        PlainSerializer(lambda url: url and mask_url(url)),
    ] = Field(
        None,
        description=(
            "the way to the server past the pooler, for migrations; user, password and database "
            "are those of url unless it names others; PostgreSQL"
        ),
    )
    uncertified_driver: bool = Field(
        False, description="let a driver pass on which less holds, with a warning that says what"
    )
    echo: bool = Field(False, description="log each statement")
    slow_statement: float | None = Field(
        None, gt=0, description="time after which a statement is logged as slow; none: never"
    )
    slow_block: float | None = Field(
        None, gt=0, description="time after which a block is logged as slow; none: never"
    )
    annotate_statements: bool = Field(
        False, description="add the name of the block's function to each statement, as a comment"
    )
    application_name: str | None = Field(
        None, description="the name shown in PostgreSQL's pg_stat_activity"
    )
    search_path: str | list[str] | None = Field(
        None, min_length=1, description="the server's setting, or a list of schemas; PostgreSQL"
    )
    statement_timeout: float | None = Field(
        None,
        gt=0,
        le=LONGEST,
        description="how long the server lets a statement run; PostgreSQL",
    )
    lock_timeout: float | None = Field(
        None,
        gt=0,
        le=LONGEST,
        description="how long the server lets a statement wait for a lock; PostgreSQL",
    )
    idle_in_transaction_timeout: float | None = Field(
        None,
        gt=0,
        le=LONGEST,
        description="idle time after which the server ends a transaction; PostgreSQL",
    )

    @model_validator(mode="before")
    @classmethod
    def _do_without_url(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        given = cast("Mapping[str, Any]", values)
        is_enough = given.get("host") is not None or given.get("database") is not None
        if given.get("url") is None and is_enough:
            return {**given, "url": "postgresql://"}
        return given

    @model_validator(mode="after")
    def _complete_url(self) -> Self:
        """Make the URL a whole one: the rest of the code reads no part of it elsewhere."""
        url = cast("DatabaseURL", self.url)
        keys = {key: value for key, value in self if value is not None}
        problems = dict(check_keys(url, keys, of_postgresql=SERVER_SETTINGS))
        if not problems:
            try:
                vars(self)["url"] = complete_url(url, keys)
                if direct := cast("DatabaseURL | None", self.migrations_url):
                    vars(self)["migrations_url"] = fill_up_url(direct, cast(URL, self.url))
            except ValueError as error:
                problems = {"port" if self.host is None else "host": str(error)}
        if problems:
            raise ValidationError.from_exception_data(
                type(self).__name__,
                [
                    InitErrorDetails(
                        type="value_error",
                        loc=(key,),
                        input="***",
                        ctx={"error": ValueError(problem)},
                    )
                    for key, problem in problems.items()
                ],
            )
        return self

    engine: Annotated[dict[str, Any], AfterValidator(check_engine_options)] = Field(
        {}, description="further options for SQLAlchemy's engine, such as query_cache_size"
    )
    connect: Annotated[dict[str, Any], AfterValidator(check_connect_args)] = Field(
        {}, description="further arguments for the driver, such as command_timeout"
    )

    def __hash__(self) -> int:
        return hash(self.url)

    @classmethod
    def load(cls, raw: Mapping[str, Any] | None) -> Self:
        """Build settings from the raw values of a `Configuration` provider.

        Args:
            raw: Nested mappings; a value that is None counts as not set.

        Raises:
            ConfigurationError: A value is wrong, missing or unknown.
        """
        source = raw_source(raw)
        return build(cls, source.values, source)


class Settings(_Frozen, BaseSettings, metaclass=ConfigurationErrorMeta):
    """Hold all settings of a service; subclass it to add sections or an `env_prefix`.

    Raises:
        ConfigurationError: A value is wrong, missing or unknown; the message names key,
            source and remedy, and shows no password.
    """

    model_config = SettingsConfigDict(
        env_nested_delimiter="__", extra="forbid", frozen=True, hide_input_in_errors=True
    )

    database: DatabaseSettings

    @classmethod
    def load(
        cls,
        path: str | Path | None = None,
        *,
        secrets_dir: str | Path | None = None,
        **arguments: Any,
    ) -> Self:
        """Load settings from several sources, merged key by key.

        Arguments take precedence over environment variables, these over the secrets
        directory, that over the YAML file, and the file over defaults.

        Args:
            path: The YAML file.
            secrets_dir: A directory with one file per value, named as its environment
                variable.
            arguments: Values, or mappings of them, by the names of the fields.

        Raises:
            ConfigurationError: A source cannot be read, or a value is wrong, missing or
                unknown.
        """
        sources = [Source(ARGUMENT, arguments), environment_source(cls)]
        if secrets_dir:
            sources.append(secrets_source(cls, secrets_dir))
        if path:
            sources.append(Source(str(path), read_yaml(Path(path))))
        return build(cls, merge(*(source.values for source in sources)), *sources)


def as_settings(given: object) -> DatabaseSettings:
    """Convert a URL or raw values to settings; settings are returned unchanged.

    Raises:
        ConfigurationError: A value is wrong, missing or unknown, or the settings of a
            whole service were given.
    """
    if isinstance(given, DatabaseSettings):
        return given
    if isinstance(given, Mapping):
        return DatabaseSettings.load(cast("Mapping[str, Any]", given))
    if isinstance(given, BaseModel):
        fields = type(given).model_fields.items()
        databases = (
            name for name, field in fields if DatabaseSettings in models_in(field.annotation)
        )
        section = next(databases, "database")
        raise ConfigurationError(
            f"settings: these are all of {type(given).__name__}; give the section of the database: "
            f"settings.{section}, or of a provider settings.provided.{section}"
        )
    return DatabaseSettings(url=cast("str | URL", given))
