"""`overriding` replaces providers and what depends on them inside its block only."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from dependency_injector import containers, providers
from dependency_injector.wiring import Provide, inject

from sessionwire import ConfigurationError, DatabaseSessionManager, DatabaseSettings, Lifespan
from sessionwire.testing import overriding
from tests import sample_app
from tests.conftest import notes

numbers = count()


class Clock:
    time = "real"


class FakeClock(Clock):
    time = "fake"


class Mailer:
    def __init__(self, clock: Clock, sender: str = "") -> None:
        self.clock, self.sender = clock, sender
        self.number = next(numbers)


class Shop:
    def __init__(self, mailer: Mailer) -> None:
        self.mailer = mailer


class Office(containers.DeclarativeContainer):
    config = providers.Configuration()
    clock = providers.Factory(Clock)
    mailer = providers.Singleton(Mailer, clock, sender=config.mail.sender)
    archive = providers.Singleton(object)


class Application(containers.DeclarativeContainer):
    office = providers.Container(Office)
    shop = providers.Singleton(Shop, office.mailer)
    unrelated = providers.Singleton(object)


@pytest.fixture
def container() -> Application:
    container = Application()
    container.office.config.from_dict({"mail": {"sender": "real"}})
    return container


# What is overridden


def test_overriding_replaces_several_providers_inside_its_block_only(
    container: Application,
) -> None:
    shop = Shop(Mailer(FakeClock()))
    with overriding(container, shop=shop, office__clock=providers.Factory(FakeClock)) as same:
        assert same is container
        assert container.shop() is shop
        assert isinstance(container.office.clock(), FakeClock)
        assert container.office.clock() is not container.office.clock()
    assert container.shop() is not shop
    assert type(container.office.clock()) is Clock
    assert not container.shop.overridden


def test_overriding_restores_providers_after_an_error(container: Application) -> None:
    with pytest.raises(ZeroDivisionError), overriding(container, office__clock=FakeClock()):
        raise ZeroDivisionError
    assert container.office.clock().time == container.shop().mailer.clock.time == "real"


def test_overriding_restores_earlier_overrides_and_resets_later_ones(
    container: Application,
) -> None:
    container.office.clock.override(FakeClock())
    with overriding(container, office__clock=Clock()):
        container.office.clock.override(None)
        assert container.office.clock() is None
    assert container.office.clock().time == "fake"
    with overriding(container, office__clock=Clock()):
        container.office.clock.reset_override()
    assert container.office.clock().time == "fake"


def test_blocks_of_overriding_can_be_nested(container: Application) -> None:
    with overriding(container, office__clock=FakeClock()):
        outer = container.shop()
        with overriding(container, office__clock=Clock()):
            assert container.shop().mailer.clock.time == "real"
        assert container.shop() is outer
        assert outer.mailer.clock.time == "fake"
    assert container.shop().mailer.clock.time == "real"


class OfficeWithoutTime(containers.DeclarativeContainer):
    clock = providers.Object(None)


def test_overriding_can_replace_a_part_of_a_nested_container(container: Application) -> None:
    container.office.archive.override("of before")
    with overriding(container, office=OfficeWithoutTime()):
        assert container.office.clock() is container.shop().mailer.clock is None
        assert container.office.archive() == "of before"
    assert container.shop().mailer.clock.time == "real"
    assert container.office.archive() == "of before"


def test_overriding_works_on_a_container_class(container: Application) -> None:
    with overriding(Application, office__clock=FakeClock()) as same:
        assert same is Application
        assert Application().office.clock().time == "fake"
    assert Application().office.clock().time == container.office.clock().time == "real"


class Stubborn(providers.Factory[Any]):
    def reset_last_overriding(self) -> None:
        super().reset_last_overriding()
        raise ZeroDivisionError


def test_an_override_that_cannot_be_reset_does_not_keep_the_others(container: Application) -> None:
    container.stubborn = Stubborn(object)
    with (
        pytest.raises(ZeroDivisionError),
        overriding(container, shop=None, stubborn=None, unrelated=None),
    ):
        assert container.shop() is container.stubborn() is container.unrelated() is None
    assert container.shop() is not None
    assert container.unrelated() is not None


def test_a_provider_that_cannot_be_overridden_leaves_nothing_overridden(
    container: Application,
) -> None:
    with (
        pytest.raises(Exception, match="only by providers container"),
        overriding(container, shop=None, office=1),
    ):
        pass
    assert container.shop() is not None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "shopp",
            "Application has no provider 'shopp': did you mean 'shop'? "
            "It has office, office__archive, ",
        ),
        (
            "office__clok",
            "Application has no provider 'office__clok': did you mean 'office__clock'? It has ",
        ),
        (
            "xyz",
            "Application has no provider 'xyz'. "
            "It has office, office__archive, office__clock, office__config, ",
        ),
    ],
)
@pytest.mark.parametrize("of", [Application, Application()], ids=["the class", "an instance"])
def test_overriding_refuses_an_unknown_name_before_it_overrides_anything(
    of: Application | type[Application], name: str, message: str
) -> None:
    with pytest.raises(ConfigurationError) as refused, overriding(of, shop=None, **{name: None}):
        pass
    assert str(refused.value).startswith(message)
    assert not of.shop.overridden


# What is built from it

SINGLETONS: list[Callable[..., providers.BaseSingleton[Any]]] = [
    providers.Singleton,
    providers.ThreadSafeSingleton,
    providers.ThreadLocalSingleton,
    providers.ContextLocalSingleton,
]


@pytest.mark.parametrize("built", [True, False], ids=["built before", "not built before"])
@pytest.mark.parametrize("singleton", SINGLETONS)
def test_a_singleton_that_depends_on_an_override_is_built_again_inside_only(
    container: Application, singleton: Callable[..., providers.BaseSingleton[Any]], built: bool
) -> None:
    container.door = singleton(Shop, mailer=container.office.mailer)
    before = container.door() if built else None
    with overriding(container, office__clock=FakeClock()):
        inside = container.door()
        assert inside.mailer.clock.time == "fake"
        assert container.door() is inside
        assert container.office.mailer() is inside.mailer
    after = container.door()
    assert after.mailer.clock.time == "real"
    assert after is not inside
    if built:
        assert after is before


def test_a_singleton_that_does_not_depend_on_an_override_is_kept(
    container: Application,
) -> None:
    before = container.unrelated()
    with overriding(container, office__clock=FakeClock()):
        assert container.unrelated() is before
    assert container.unrelated() is before


@pytest.mark.parametrize("singleton", SINGLETONS)
def test_a_singleton_first_built_inside_overriding_is_reset_at_its_end(
    container: Application, singleton: Callable[..., providers.BaseSingleton[Any]]
) -> None:
    container.time = singleton(lambda: container.office.clock().time)
    with overriding(container, office__clock=FakeClock()):
        assert container.time() == container.time() == "fake"
    assert container.time() == "real"
    with overriding(container, office__clock=FakeClock()):
        assert container.time() == "real"
    assert container.time() == "real"


def test_overriding_works_with_a_provider_restricted_to_some_classes(
    container: Application,
) -> None:
    class OfShops(providers.Singleton[Shop]):
        provided_type = Shop

    container.closed = OfShops(Shop, "no mailer")
    with overriding(container, office__clock=FakeClock()):
        inside = container.closed()
    assert container.closed() is inside


def test_a_singleton_that_depends_on_an_overridden_option_is_built_again(
    container: Application,
) -> None:
    before = container.shop()
    with overriding(container, office__config={"mail": {"sender": "fake"}}):
        assert container.shop().mailer.sender == "fake"
    assert container.shop() is before
    assert before.mailer.sender == "real"


def test_a_singleton_that_depends_on_an_attribute_of_an_override_is_built_again(
    container: Application,
) -> None:
    container.time = providers.Singleton(str, container.office.clock.provided.time)
    assert container.time() == "real"
    with overriding(container, office__clock=FakeClock()):
        assert container.time() == "fake"
    assert container.time() == "real"


def test_an_overriding_singleton_that_depends_on_an_override_is_built_again(
    container: Application,
) -> None:
    container.shop.override(providers.Singleton(Shop, container.office.mailer))
    before = container.shop()
    with overriding(container, office__clock=FakeClock()):
        assert container.shop().mailer.clock.time == "fake"
    assert container.shop() is before


# With a database


@inject
async def write(
    text: str, notebook: sample_app.Notebook = Provide[sample_app.Container.notebook]
) -> None:
    await notebook.write(text)


async def test_services_work_with_an_overriding_manager(
    manager: DatabaseSessionManager, tmp_path: Path
) -> None:
    container = sample_app.Container(
        settings=DatabaseSettings(url=f"sqlite:///{tmp_path / 'own.db'}")
    )
    container.wire(modules=[__name__])
    async with sample_app.started(container):
        await write("own")
        with overriding(container, db__sessionmanager=manager):
            await write("instead")
        await write("own again")
        assert await notes(container.db.sessionmanager()) == ["own", "own again"]
    container.unwire()
    assert await notes(manager) == ["instead"]


async def test_a_manager_of_overridden_settings_can_be_opened_inside_overriding(
    settings: DatabaseSettings, tmp_path: Path
) -> None:
    container = sample_app.Container(
        settings=DatabaseSettings(url=f"sqlite:///{tmp_path / 'own.db'}")
    )
    own = container.db.sessionmanager()
    with overriding(container, settings=settings):
        assert container.db.sessionmanager() is not own
        async with sample_app.started(container):
            await container.notebook().write("instead")
    assert container.db.sessionmanager() is own
    async with sample_app.started(container):
        assert await container.notebook().read() == []
    with overriding(container, settings=settings):
        async with Lifespan(container):
            assert await container.notebook().read() == ["instead"]
