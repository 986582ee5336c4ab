"""Sources of settings: variables in YAML, misspelt names, and wrong objects."""

from __future__ import annotations

import json
import traceback
from pathlib import Path
from typing import Annotated, Any

import pytest
from dependency_injector import containers, providers
from pydantic import (
    AliasChoices,
    AliasPath,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)
from pydantic_settings import SettingsConfigDict

from sessionwire import (
    ConfigurationError,
    DatabaseContainer,
    DatabaseSessionManager,
    DatabaseSettings,
    Lifespan,
    PoolSettings,
    Settings,
)

SECRET = "hunter2"


class Cache(BaseModel):
    """A section as most write one: it says nothing about keys that it does not have."""

    host: str = "localhost"
    max_size: int = 1


class Open(Cache):
    model_config = ConfigDict(extra="ignore")


class Converted(Cache):
    @model_validator(mode="before")
    @classmethod
    def from_old_names(cls, values: dict[str, Any]) -> dict[str, Any]:
        return {"host": values.get("server", "localhost")}


class ShopSettings(Settings):
    model_config = SettingsConfigDict(env_prefix="SHOP_")

    greeting: str = "default"
    limit: int | None = None
    cache: Cache = Cache()
    spare: Annotated[Cache | None, Field(description="a further one")] = None
    caches: list[Cache] = Field(default_factory=list)
    by_name: dict[str, Cache] = Field(default_factory=dict)
    open: Open = Open()
    converted: Converted = Converted()
    basket: Cache = Field(Cache(), alias="shop_trolley")
    anything: dict[str, Any] = Field(default_factory=dict)


@pytest.fixture(autouse=True)
def empty_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("DATABASE__URL", "DATABASE_URL"):
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "shop.yaml"


def load(file: Path, content: str, **others: Any) -> ShopSettings:
    file.write_text(content)
    return ShopSettings.load(file, **{"database": {"url": "sqlite://"}, **others})


def refusal(file: Path, content: str) -> str:
    with pytest.raises(ConfigurationError) as refused:
        load(file, content)
    assert SECRET not in "".join(traceback.format_exception(refused.value))
    return str(refused.value)


# Variables in YAML


@pytest.mark.parametrize(
    ("content", "greeting"),
    [
        ("greeting: ${WORD}", "hello"),
        ("greeting: '${WORD}'", "hello"),
        ('greeting: "<${WORD}>"', "<hello>"),
        ("{greeting: ${WORD}, limit: ${NUMBER}}", "hello"),
        ("greeting: ${WORD} ${NUMBER}", "hello 5"),
        ("greeting: ${WORD:other}", "hello"),
        ("greeting: ${UNSET:other}", "other"),
        ("greeting: ${UNSET:sqlite:///a b.db}", "sqlite:///a b.db"),
        ("greeting: '${UNSET:}'", ""),
        ("greeting: >\n  ${WORD}\n  ${WORD}", "hello hello"),
        ("${KEY}: x", "x"),
        ("greeting: hi # ${UNSET}", "hi"),
        ("greeting: $WORD {WORD} $ {WORD}", "$WORD {WORD} $ {WORD}"),
    ],
)
def test_variables_in_yaml_are_expanded_as_a_configuration_provider_does(
    content: str, greeting: str, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable, value in {"WORD": "hello", "NUMBER": "5", "KEY": "greeting"}.items():
        monkeypatch.setenv(variable, value)
    assert load(file, content).greeting == greeting
    provider = providers.Configuration()
    provider.from_yaml(str(file))
    assert provider()["greeting"] == greeting


@pytest.mark.parametrize(("given", "limit"), [("5", 5), ("", None), ("null", None)])
def test_a_variable_has_the_type_that_it_would_have_in_the_file(
    given: str, limit: int | None, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIMIT", given)
    loaded = load(file, "limit: ${LIMIT}\nanything: {limit: ${LIMIT}, text: '${LIMIT}'}")
    assert loaded.limit == limit
    assert loaded.anything == {"limit": limit, "text": given}


@pytest.mark.parametrize(
    "password",
    ["a #b", "a: b", "'", '"', "{a", "[a", "*a", "!a", "&a", "- a", "%a", "a\n b", "${X}"],
)
def test_the_value_of_a_variable_is_never_read_as_yaml(
    password: str, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PASSWORD", password)
    assert load(file, "greeting: ${PASSWORD}").greeting == password
    assert load(file, "greeting: <${PASSWORD}>").greeting == f"<{password}>"


def test_an_error_names_the_variable_that_is_not_set_and_its_line(file: Path) -> None:
    message = refusal(file, "anything: {}\ngreeting: hi ${NO_SUCH}")
    assert message.startswith(f"{file}, line 2, column 11: environment variable NO_SUCH is not set")
    assert "${NO_SUCH:default}" in message


# YAML that cannot be read

TOO_DEEP = {
    "sequences": "anything: " + "[" * 1000,
    "sequences that end": "anything: {a: " + "[" * 150 + "]" * 150 + "}",
    "mappings": "".join(" " * i + "a:\n" for i in range(400)),
    "an alias of itself": "anything: &a {a: *a}",
    "an alias of itself, in a list": "anything: &a {a: [*a]}",
    "aliases of aliases": "x: &a0 [x]\n"
    + "".join(f"y{i}: &a{i + 1} [{', '.join([f'*a{i}'] * 10)}]\n" for i in range(9)),
    "merged aliases": "x: &a0 {x: 1}\n"
    + "".join(f"y{i}: &a{i + 1} {{<<: [{', '.join([f'*a{i}'] * 10)}]}}\n" for i in range(9)),
}


@pytest.mark.parametrize("content", TOO_DEEP.values(), ids=TOO_DEEP)
def test_yaml_nested_too_deeply_is_refused(content: str, file: Path) -> None:
    message = refusal(file, content)
    assert message.startswith(str(file))
    assert "nested too deeply, or its aliases repeat too much" in message


def test_a_moderate_number_of_yaml_aliases_and_merges_is_read(file: Path) -> None:
    content = (
        "anything: &a {a: 1, b: 2}\ncache: {<<: {host: x}, max_size: 5}\nby_name: {}\nopen: *a"
    )
    loaded = load(file, content)
    assert (loaded.cache.host, loaded.cache.max_size, loaded.anything) == ("x", 5, {"a": 1, "b": 2})


@pytest.mark.parametrize(
    "tag", ["!!bool", "!!timestamp", "!!float", "!!int", "!!binary", f"!<it's {SECRET}>", "!it's"]
)
def test_a_yaml_tag_that_does_not_fit_its_value_is_an_error(tag: str, file: Path) -> None:
    assert "this is not YAML in UTF-8" in refusal(file, f"greeting: {tag} {SECRET}é")


def test_json_in_the_environment_nested_too_deeply_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SHOP_DATABASE", "[" * 100_000)
    for made in (ShopSettings.load, ShopSettings):
        with pytest.raises(ConfigurationError, match="environment variable SHOP_DATABASE"):
            made()


def test_raw_values_that_contain_themselves_are_refused() -> None:
    raw: dict[str, Any] = {"url": "sqlite://"}
    raw["pool"] = raw
    with pytest.raises(ConfigurationError, match="config: it is nested too deeply"):
        DatabaseSettings.load(raw)


# Names that are nearly right

NEARLY = {
    "SHOP_DATABASE_URL": "SHOP_DATABASE__URL",
    "shop_database_url": "SHOP_DATABASE__URL",
    "SHOP_DATABASE___URL": "SHOP_DATABASE__URL",
    "SHOP__DATABASE__URL": "SHOP_DATABASE__URL",
    "SHOPDATABASE__URL": "SHOP_DATABASE__URL",
    "SHOP_DATABASE_POOL_MAX_OVERFLOW": "SHOP_DATABASE__POOL__MAX_OVERFLOW",
    "SHOP_DATABASE__POOL_SIZE": "SHOP_DATABASE__POOL__SIZE",
    "SHOP_DATABASE__POOL__MAX__OVERFLOW": "SHOP_DATABASE__POOL__MAX_OVERFLOW",
    "SHOP_DATABASE__CONNECTTIMEOUT": "SHOP_DATABASE__CONNECT_TIMEOUT",
    "SHOP__GREETING": "SHOP_GREETING",
    "SHOP_CACHE_HOST": "SHOP_CACHE__HOST",
    "SHOP_SPARE_HOST": "SHOP_SPARE__HOST",
    "SHOP_TROLLEY_HOST": "SHOP_TROLLEY__HOST",
}


@pytest.mark.parametrize(("name", "meant"), NEARLY.items(), ids=NEARLY)
@pytest.mark.parametrize("made", [ShopSettings.load, ShopSettings])
def test_a_variable_with_a_wrong_number_of_underscores_is_refused(
    name: str, meant: str, made: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "1")
    with pytest.raises(
        ConfigurationError, match=f"^environment variable {name} is not read.* those of {meant}$"
    ):
        made(database={"url": "sqlite://"})


@pytest.mark.parametrize(("name", "meant"), NEARLY.items(), ids=NEARLY)
def test_a_secret_with_a_wrong_number_of_underscores_is_refused(
    name: str, meant: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text("1")
    with pytest.raises(ConfigurationError, match=f"{name} is not read.* those of {meant}$"):
        ShopSettings.load(secrets_dir=tmp_path, database={"url": "sqlite://"})


@pytest.mark.parametrize(
    "variables",
    [
        {
            "SHOP_HOME": "/srv",
            "SHOP_DATABASE_PORT": "tcp://1.2.3.4",
            "SHOP_DATABASE_SERVICE_HOST": "1.2.3.4",
        },
        {"DATABASE_URL": "of another", "DATABASE__URL": "of another", "SHOPGREETING": "of another"},
        {"SHOP_DATABASE_URL": "of another tool", "SHOP_DATABASE__URL": "sqlite://"},
    ],
)
def test_variables_that_may_belong_to_others_are_ignored(
    variables: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert ShopSettings.load(database={"url": "sqlite://"}).greeting == "default"


def test_a_section_with_an_alias_has_the_variable_of_its_alias(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SHOP_TROLLEY__HOST", "of-variable")
    (tmp_path / "shop_trolley__max_size").write_text("2")
    loaded = ShopSettings.load(secrets_dir=tmp_path, database={"url": "sqlite://"})
    assert loaded.basket == Cache(host="of-variable", max_size=2)
    assert ShopSettings(database=SETTINGS).basket.host == "of-variable"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("SHOP_BASKET__HOST", "there is no section 'BASKET'; choose one of .*TROLLEY"),
        ("SHOP_SHOP_TROLLEY__HOST", "there is no section 'SHOP_TROLLEY'; did you mean 'TROLLEY'"),
    ],
)
def test_no_other_variable_of_a_section_with_an_alias_is_quietly_ignored(
    name: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "x")
    with pytest.raises(ConfigurationError, match=f"^environment variable {name}: {message}"):
        ShopSettings.load(database={"url": "sqlite://"})


def test_a_section_with_several_names_has_the_variable_of_each(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Renamed(Settings):
        model_config = SettingsConfigDict(env_prefix="SHOP_", populate_by_name=True)

        limit: int = Field(0, alias="shop_items__limit")

        cart: Cache = Field(
            Cache(), validation_alias=AliasChoices("shop_trolley", AliasPath("shop_bag", "cart"))
        )

    monkeypatch.setenv("SHOP_ITEMS__LIMIT", "5")
    assert Renamed.load(database={"url": "sqlite://"}).limit == 5
    for name in ("SHOP_TROLLEY__HOST", "SHOP_CART__HOST"):
        monkeypatch.setenv(name, name)
        assert Renamed.load(database={"url": "sqlite://"}).cart.host == name
        monkeypatch.delenv(name)
    monkeypatch.setenv("SHOP_TROLLEY_HOST", "x")
    with pytest.raises(ConfigurationError, match=r"is not read.* those of SHOP_TROLLEY__HOST$"):
        Renamed.load(database={"url": "sqlite://"})


def test_an_error_below_an_alias_names_the_variable_that_is_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SHOP_TROLLEY__MAX_SIZE", "many")
    with pytest.raises(
        ConfigurationError,
        match=r"^shop_trolley\.max_size \(environment variable SHOP_TROLLEY__MAX_SIZE\): ",
    ):
        ShopSettings.load(database={"url": "sqlite://"})


def test_another_delimiter_for_nested_variables_is_respected(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Dotted(Settings):
        model_config = SettingsConfigDict(env_prefix="SHOP_", env_nested_delimiter="_")

    monkeypatch.setenv("SHOP_DATABASE_URL", "sqlite:///of-variable.db")
    monkeypatch.setenv("SHOP_", "of another")
    assert "of-variable.db" in str(Dotted.load().database.url)


def test_without_a_prefix_the_error_of_a_missing_key_names_the_variable_that_is_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DATABASE_URL", f"postgresql://shop:{SECRET}@db/shop")
    with pytest.raises(
        ConfigurationError, match="environment variable DATABASE__URL; DATABASE_URL is set, but"
    ) as refused:
        Settings.load()
    assert SECRET not in str(refused.value)


MISSPELT = {
    "cache: {hots: x}": "cache.hots",
    "spare: {hots: x}": "spare.hots",
    "caches: [{host: a}, {hots: x}]": "caches.1.hots",
    "by_name: {a: {hots: x}}": "by_name.a.hots",
    "shop_trolley: {hots: x}": "shop_trolley.hots",
}


@pytest.mark.parametrize(("content", "key"), MISSPELT.items(), ids=MISSPELT)
def test_a_misspelt_key_in_a_users_own_section_is_refused(
    content: str, key: str, file: Path
) -> None:
    assert refusal(file, content) == f"{key} ({file}): there is no such key; did you mean 'host'?"


@pytest.mark.parametrize("made", [ShopSettings.load, ShopSettings])
def test_a_misspelt_key_of_a_users_own_section_is_refused_in_the_environment(
    made: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHOP_CACHE__HOTS", "x")
    with pytest.raises(
        ConfigurationError,
        match=r"SHOP_CACHE__HOTS\): there is no such key; did you mean 'host'\?$",
    ):
        made(database={"url": "sqlite://"})


def test_a_section_decides_about_its_unknown_keys(file: Path) -> None:
    loaded = load(file, "open: {hots: x}\nconverted: {server: x}\nanything: {a: {hots: x}}")
    assert (loaded.open.host, loaded.converted.host, loaded.anything) == (
        "localhost",
        "x",
        {"a": {"hots": "x"}},
    )


@pytest.mark.parametrize(
    "given",
    [
        SECRET,
        {"url": f"postgresql+psycopg2://shop:{SECRET}@db/shop"},
        {"url": "sqlite://", "password": SECRET},
        {"url": "sqlite://", "pool": {"size": SECRET}},
        {"url": "sqlite://", "pool": {"size": 0, "sizes": SECRET}},
    ],
)
def test_a_users_own_model_around_settings_shows_no_password_in_its_error(given: Any) -> None:
    class Application(BaseModel):
        database: DatabaseSettings

    with pytest.raises(ValidationError, match="for Application\ndatabase") as refused:
        Application(database=given)
    assert SECRET not in f"{refused.value} {refused.value.errors()} {refused.value.json()}"
    assert SECRET not in "".join(traceback.format_exception(refused.value))


# What is given in place of settings

SETTINGS = DatabaseSettings(url="sqlite://", pool=PoolSettings(size=1))


@pytest.mark.parametrize(
    ("given", "pool"),
    [
        ("sqlite://", PoolSettings().size),
        ({"url": "sqlite://", "pool": {"size": 1, "timeout": None}}, 1),
        (SETTINGS, 1),
    ],
    ids=["a URL", "a dict", "settings"],
)
async def test_a_container_accepts_settings_a_url_and_a_dict(given: Any, pool: int) -> None:
    class Container(containers.DeclarativeContainer):
        db = providers.Container(DatabaseContainer, settings=given)

    for container in (Container().db, DatabaseContainer(settings=given)):
        async with Lifespan(container):
            assert container.sessionmanager().settings.pool.size == pool


@pytest.mark.parametrize(
    "make",
    [DatabaseSessionManager, lambda given: DatabaseContainer(settings=given).sessionmanager()],
)
def test_settings_in_place_of_a_section_are_refused_with_the_remedy(make: Any) -> None:
    class Archive(Settings):
        archive: DatabaseSettings = SETTINGS

    with pytest.raises(
        ConfigurationError, match=r"all of ShopSettings.* settings\.provided\.database$"
    ):
        make(ShopSettings(database=SETTINGS))
    with pytest.raises(ConfigurationError, match="all of Archive"):
        make(Archive(database=SETTINGS))


async def test_a_wrong_dict_is_refused_and_its_keys_are_named() -> None:
    with pytest.raises(ConfigurationError, match=r"urll .*did you mean 'url'"):
        async with Lifespan(DatabaseContainer(settings={"urll": "sqlite://"})):
            pass


@pytest.mark.parametrize(
    ("given", "remedy"),
    [
        (
            DatabaseContainer,
            r"DatabaseContainer is a class: write Lifespan\(DatabaseContainer\(\)\)",
        ),
        (SETTINGS, "of type DatabaseSettings"),
        (None, "of type NoneType"),
    ],
)
def test_a_lifespan_of_anything_but_a_container_is_refused_with_the_remedy(
    given: Any, remedy: str
) -> None:
    with pytest.raises(ConfigurationError, match=remedy):
        Lifespan(given)


def test_settings_from_json_equal_settings_from_yaml(file: Path) -> None:
    values = {"greeting": "hi", "cache": {"host": "x"}}
    assert load(file, json.dumps(values)) == ShopSettings.load(
        database={"url": "sqlite://"}, **values
    )
