"""Wiring: `@inject` and `Provide`, together with `@transactional`."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Coroutine, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from dependency_injector import containers, providers
from dependency_injector.wiring import (
    Closing,
    Provide,
    Provider,
    inject,
    register_loader_containers,
    unregister_loader_containers,
)
from sqlalchemy.ext.asyncio import AsyncSession

from sessionwire import (
    CurrentSession,
    DatabaseSessionManager,
    DatabaseSettings,
    Lifespan,
    TransactionManager,
    transactional,
)

from .conftest import notes
from .models import Note
from .sample_app import Container, Notebook, Notes, create_tables

Write = Callable[..., Coroutine[Any, Any, None]]


@pytest.fixture(scope="session")
def sessionwire_settings() -> DatabaseSettings:
    """Use SQLite: the database plays no role here."""
    return DatabaseSettings(url="sqlite://")


@pytest.fixture
def settings(tmp_path: Path) -> DatabaseSettings:
    """Return settings of a database for containers that a test starts itself."""
    return DatabaseSettings(url=f"sqlite:///{tmp_path / 'test.db'}")


@pytest.fixture(scope="session")
def sessionwire_container(sessionwire_settings: DatabaseSettings) -> Callable[[], Container]:
    return partial(Container, settings=sessionwire_settings)


@pytest.fixture
def container(container: Container) -> Iterator[Container]:
    """Yield a container in a sandbox, with its tables, not yet wired."""
    yield container
    container.unwire()


# In all kinds of functions


@inject
async def of_function(text: str, notebook: Notebook = Provide[Container.notebook]) -> None:
    await notebook.write(text)


@inject
async def of_keyword(text: str, *, notebook: Notebook = Provide[Container.notebook]) -> None:
    await notebook.write(text)


@inject
async def of_string(text: str, notebook: Notebook = Provide["notebook"]) -> None:
    await notebook.write(text)


@inject
async def of_nested_strings(
    text: str,
    session: AsyncSession = Provide["db.session"],
    transaction: TransactionManager = Provide["db.transaction"],
) -> None:
    await Notebook(Notes(session), transaction).write(text)


@inject
async def of_nested_provider(
    text: str,
    session: AsyncSession = Provide[Container.db.session],
    transaction: TransactionManager = Provide[Container.db.transaction],
) -> None:
    assert isinstance(session, CurrentSession)
    async with transaction():
        session.add(Note(text=text))


@inject
async def of_manager(
    text: str, manager: DatabaseSessionManager = Provide[Container.db.container.sessionmanager]
) -> None:
    async with manager.session() as session:
        session.add(Note(text=text))
        await session.commit()


@inject
async def of_the_provider_itself(
    text: str, build: providers.Factory[Notebook] = Provider[Container.notebook]
) -> None:
    assert build() is not build()
    await build().write(text)


@inject
def of_synchronous_function(
    text: str, notebook: Notebook = Provide[Container.notebook]
) -> Coroutine[Any, Any, None]:
    return notebook.write(text)


class Desk:
    @inject
    def __init__(self, notebook: Notebook = Provide[Container.notebook]) -> None:
        self.notebook = notebook

    async def of_constructor(self, text: str) -> None:
        await self.notebook.write(text)

    @inject
    async def of_method(self, text: str, notebook: Notebook = Provide[Container.notebook]) -> None:
        await notebook.write(text)

    @classmethod
    @inject
    async def of_class_method(
        cls, text: str, notebook: Notebook = Provide[Container.notebook]
    ) -> None:
        await notebook.write(text)

    @staticmethod
    @inject
    async def of_static_method(text: str, notebook: Notebook = Provide[Container.notebook]) -> None:
        await notebook.write(text)


async def of_constructed(text: str) -> None:
    await Desk().of_constructor(text)


async def of_method(text: str) -> None:
    await Desk().of_method(text)


async def of_class_method(text: str) -> None:
    await Desk.of_class_method(text)


async def of_static_method(text: str) -> None:
    await Desk.of_static_method(text)


KINDS: list[Write] = [
    of_function,
    of_keyword,
    of_string,
    of_nested_strings,
    of_nested_provider,
    of_manager,
    of_the_provider_itself,
    of_synchronous_function,
    of_constructed,
    of_method,
    of_class_method,
    of_static_method,
]


@pytest.mark.parametrize("write", KINDS)
async def test_all_kinds_of_functions_are_injected(write: Write, container: Container) -> None:
    container.wire(modules=[__name__])
    await write("a")
    assert await notes(container.db.sessionmanager()) == ["a"]


# With @transactional


@inject
@transactional
async def inject_over_transactional(
    *texts: str,
    transaction: TransactionManager = Provide[Container.db.transaction],
    notes: Notes = Provide[Container.notes],
) -> None:
    for text in texts:
        await notes.add(text)
        if text == "wrong":
            raise ZeroDivisionError


@transactional
@inject
async def transactional_over_inject(
    *texts: str,
    transaction: TransactionManager = Provide[Container.db.transaction],
    notes: Notes = Provide[Container.notes],
) -> None:
    for text in texts:
        await notes.add(text)
        if text == "wrong":
            raise ZeroDivisionError


IMPORTED_BEFORE_WIRING: tuple[Write, Write] = (inject_over_transactional, transactional_over_inject)


class Clerk:
    def __init__(self, transaction: TransactionManager) -> None:
        self.transaction = transaction

    @inject
    @transactional
    async def inject_over_transactional(
        self, *texts: str, notes: Notes = Provide[Container.notes]
    ) -> None:
        for text in texts:
            await notes.add(text)
            if text == "wrong":
                raise ZeroDivisionError

    @transactional
    @inject
    async def transactional_over_inject(
        self, *texts: str, notes: Notes = Provide[Container.notes]
    ) -> None:
        for text in texts:
            await notes.add(text)
            if text == "wrong":
                raise ZeroDivisionError


@pytest.mark.parametrize("name", ["inject_over_transactional", "transactional_over_inject"])
@pytest.mark.parametrize("owner", ["module", "object"])
async def test_inject_and_transactional_work_together(
    name: str, owner: str, container: Container
) -> None:
    container.wire(modules=[__name__])
    holder = Clerk(container.db.transaction()) if owner == "object" else sys.modules[__name__]
    write: Write = getattr(holder, name)
    await write("a", "b")
    with pytest.raises(ZeroDivisionError):
        await write("c", "wrong")
    assert await notes(container.db.sessionmanager()) == ["a", "b"]


async def test_inject_belongs_above_transactional_in_modules_imported_before_wiring(
    container: Container,
) -> None:
    over, under = IMPORTED_BEFORE_WIRING
    container.wire(modules=[__name__])
    await over("a")
    with pytest.raises(TypeError, match="with @inject above @transactional"):
        await under("b")
    await under("c", transaction=container.db.transaction())
    assert await notes(container.db.sessionmanager()) == ["a", "c"]


async def test_an_argument_takes_precedence_over_injection(
    container: Container, tmp_path: Path
) -> None:
    container.wire(modules=[__name__])
    other = Container(settings=DatabaseSettings(url=f"sqlite:///{tmp_path / 'other.db'}"))
    async with Lifespan(other):
        await create_tables(other.db.sessionmanager())
        await inject_over_transactional(
            "a", transaction=other.db.transaction(), notes=other.notes()
        )
        await of_keyword("b", notebook=other.notebook())
        assert await notes(other.db.sessionmanager()) == ["a", "b"]
    assert await notes(container.db.sessionmanager()) == []


async def test_a_transaction_manager_can_be_the_default_of_its_parameter(
    container: Container,
) -> None:
    manager = container.db.sessionmanager()

    @transactional
    async def write(text: str, *, transaction: TransactionManager = manager.transaction) -> None:
        assert transaction.active
        CurrentSession(manager).add(Note(text=text))

    await write("a")
    assert await notes(manager) == ["a"]


@pytest.mark.parametrize(
    "function", [of_function, inject_over_transactional, transactional_over_inject]
)
def test_an_injected_function_stays_a_coroutine_function_with_its_signature(
    function: Write,
) -> None:
    assert inspect.iscoroutinefunction(function)
    assert "text" in next(iter(inspect.signature(function).parameters))


async def test_a_closing_marker_closes_neither_session_nor_database(
    container: Container,
) -> None:
    @inject
    async def write(text: str, notebook: Notebook = Closing[Provide[Container.notebook]]) -> None:
        await notebook.write(text)

    container.wire(modules=[__name__])
    async with container.db.transaction()():
        await write("a")
        await write("b")
    await write("c")
    assert await notes(container.db.sessionmanager()) == ["a", "b", "c"]


# Modules


MODULE = """
from typing import Annotated

from dependency_injector.wiring import Provide, inject

from tests.sample_app import Container, Notebook

NOTEBOOK: Notebook = Provide[Container.notebook]


@inject
async def write(text: str, notebook: Annotated[Notebook, Provide[Container.notebook]]) -> None:
    await notebook.write(text)


async def write_without_function(text: str) -> None:
    await NOTEBOOK.write(text)
"""


class Modules:
    """A package of this test's own."""

    def __init__(self, directory: Path) -> None:
        self.package = f"shop_{directory.name}"
        (directory / self.package).mkdir()
        for name in ("__init__", "desk"):
            (directory / self.package / f"{name}.py").write_text(MODULE)

    @property
    def module(self) -> str:
        return f"{self.package}.desk"


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Modules]:
    monkeypatch.syspath_prepend(tmp_path)
    modules = Modules(tmp_path)
    yield modules
    for name in (modules.package, modules.module):
        sys.modules.pop(name, None)


async def test_a_module_can_be_wired_after_its_import(
    modules: Modules, container: Container
) -> None:
    module = importlib.import_module(modules.module)
    write = module.write  # as another module has it that imported it before
    container.wire(modules=[module])
    await write("a")
    await module.write("b")
    await module.write_without_function("c")
    assert await notes(container.db.sessionmanager()) == ["a", "b", "c"]


async def test_a_module_can_be_wired_before_its_import(
    modules: Modules, container: Container
) -> None:
    container.wire(modules=[modules.module])
    await importlib.import_module(modules.module).write("a")
    assert await notes(container.db.sessionmanager()) == ["a"]


async def test_wiring_a_package_wires_its_modules(modules: Modules, container: Container) -> None:
    container.wire(packages=[modules.package])
    await importlib.import_module(modules.package).write("a")
    await importlib.import_module(modules.module).write("b")
    assert await notes(container.db.sessionmanager()) == ["a", "b"]


async def test_a_loader_wires_modules_imported_later(
    modules: Modules, container: Container
) -> None:
    register_loader_containers(container)
    try:
        module = importlib.import_module(modules.module)
    finally:
        unregister_loader_containers(container)
    await module.write("a")
    assert await notes(container.db.sessionmanager()) == ["a"]


async def test_a_container_can_wire_itself_when_it_is_built(
    modules: Modules, settings: DatabaseSettings
) -> None:
    class SelfWired(Container):
        wiring_config = containers.WiringConfiguration(modules=[modules.module])

    container = SelfWired(settings=settings)
    module = importlib.import_module(modules.module)
    async with Lifespan(container):
        await create_tables(container.db.sessionmanager())
        await module.write("a")
        assert await notes(container.db.sessionmanager()) == ["a"]
    container.unwire()


async def test_functions_wired_before_the_start_work_after_it_and_after_a_restart(
    modules: Modules, settings: DatabaseSettings
) -> None:
    container = Container(settings=settings)
    container.wire(modules=[modules.module])
    module = importlib.import_module(modules.module)
    for text in ("a", "b"):
        async with Lifespan(container):
            await create_tables(container.db.sessionmanager())
            await module.write(text)
            await module.write_without_function(f"{text} again")
    async with Lifespan(container):
        assert await notes(container.db.sessionmanager()) == ["a", "a again", "b", "b again"]
    container.unwire()


async def test_wiring_can_be_undone_and_moved_to_another_container(
    modules: Modules, container: Container, tmp_path: Path
) -> None:
    module = importlib.import_module(modules.module)
    container.wire(modules=[module])
    await module.write("a")
    container.unwire()
    other = Container(settings=DatabaseSettings(url=f"sqlite:///{tmp_path / 'other.db'}"))
    other.wire(modules=[module])
    async with Lifespan(other):
        await create_tables(other.db.sessionmanager())
        await module.write("b")
        assert await notes(other.db.sessionmanager()) == ["b"]
    other.unwire()
    assert await notes(container.db.sessionmanager()) == ["a"]


async def test_services_injected_in_one_call_share_its_transaction(
    container: Container,
) -> None:
    container.wire(modules=[__name__])
    with pytest.raises(ZeroDivisionError):
        async with container.db.transaction()():
            await of_function("a")
            await of_nested_strings("b")
            await Desk().of_method("c")
            await inject_over_transactional("d")
            raise ZeroDivisionError
    assert await notes(container.db.sessionmanager()) == []
