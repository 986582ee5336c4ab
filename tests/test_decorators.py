"""`@transactional` and `@read_only`: the functions and options that they accept."""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any, ClassVar

import pytest
from dependency_injector import containers, providers
from dependency_injector.wiring import Provide, inject
from sqlalchemy import select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession

from sessionwire import (
    CurrentSession,
    DatabaseContainer,
    DatabaseSessionManager,
    DatabaseSettings,
    IncompatibleTransactionError,
    Lifespan,
    Propagation,
    TransactionManager,
    TransactionRequiredError,
    TransactionTimeoutError,
    read_only,
    transactional,
)

from .conftest import notes
from .models import Note
from .sample_app import Notes, create_tables


class Service:
    def __init__(self, manager: DatabaseSessionManager) -> None:
        self.session = CurrentSession(manager)
        self.transaction = manager.transaction

    async def add(self, text: str) -> str:
        assert self.transaction.active
        self.session.add(Note(text=text))
        await self.session.flush()
        if "wrong" in text:
            raise ZeroDivisionError
        return text

    @transactional
    async def bare(self, text: str) -> str:
        return await self.add(text)

    @transactional()
    async def with_parentheses(self, text: str) -> str:
        return await self.add(text)

    @transactional(Propagation.REQUIRED, timeout=30, retries=1)
    async def with_options(self, text: str) -> str:
        return await self.add(text)

    @transactional
    async def by_keyword_only(self, *, text: str) -> str:
        return await self.add(text)

    @read_only
    async def read(self) -> list[str]:
        return await self._texts()

    @read_only()
    async def read_with_parentheses(self) -> list[str]:
        return await self._texts()

    async def _texts(self) -> list[str]:
        return list(await self.session.scalars(select(Note.text).order_by(Note.text)))

    @read_only
    async def write_where_only_reading_is_allowed(self) -> None:
        await self.session.execute(text("INSERT INTO note (text) VALUES ('never')"))

    @read_only
    async def write_through_another_method(self) -> None:
        await self.bare("never")


@pytest.fixture
def service(manager: DatabaseSessionManager) -> Service:
    return Service(manager)


class TestMethods:
    @pytest.mark.parametrize("name", ["bare", "with_parentheses", "with_options"])
    async def test_transactional_works_with_and_without_parentheses(
        self, manager: DatabaseSessionManager, service: Service, name: str
    ) -> None:
        method = getattr(service, name)
        assert await method("a") == "a"
        assert await method(text="b") == "b"
        with pytest.raises(ZeroDivisionError):
            await method("wrong")
        assert not manager.transaction.active
        assert await notes(manager) == ["a", "b"]

    async def test_a_transactional_method_gets_its_keyword_only_arguments(
        self, manager: DatabaseSessionManager, service: Service
    ) -> None:
        assert await service.by_keyword_only(text="a") == "a"
        assert await notes(manager) == ["a"]

    async def test_a_transactional_method_uses_the_manager_of_its_object(
        self, manager: DatabaseSessionManager, settings: DatabaseSettings
    ) -> None:
        async with DatabaseSessionManager(settings) as other:
            await Service(other).bare("a")
            assert await Service.bare(Service(manager), "b") == "b"
        assert await notes(manager) == ["a", "b"]

    async def test_a_subclass_can_inherit_and_call_a_transactional_method(
        self, manager: DatabaseSessionManager
    ) -> None:
        class Careful(Service):
            @transactional
            async def bare(self, text: str) -> str:
                await super().bare(f"{text} before")
                return await super().bare(text)

        with pytest.raises(ZeroDivisionError):
            await Careful(manager).bare("wrong")
        assert await Careful(manager).bare("a") == "a"
        assert await notes(manager) == ["a", "a before"]

    async def test_the_manager_can_be_a_class_attribute_or_a_property(
        self, manager: DatabaseSessionManager
    ) -> None:
        class Shared:
            transaction: ClassVar[TransactionManager] = manager.transaction

            @transactional
            async def active(self) -> bool:
                return manager.transaction.active

            @classmethod
            @transactional
            async def of_class(cls) -> bool:
                return manager.transaction.active

            @staticmethod
            @transactional
            async def of_nobody(transaction: TransactionManager) -> bool:
                return transaction.active

        class Computed:
            @property
            def transaction(self) -> TransactionManager:
                return TransactionManager(manager)

            @transactional
            async def active(self) -> bool:
                return manager.transaction.active

        assert await Shared().active()
        assert await Shared.of_class()
        assert await Shared.of_nobody(manager.transaction)
        assert await Computed().active()

    async def test_concurrent_calls_of_a_transactional_method_are_separate_transactions(
        self, manager: DatabaseSessionManager, service: Service
    ) -> None:
        results = await asyncio.gather(
            *(service.bare(name) for name in ("a", "wrong", "b", "wrong again")),
            return_exceptions=True,
        )
        assert [type(result) for result in results] == [
            str,
            ZeroDivisionError,
            str,
            ZeroDivisionError,
        ]
        assert await notes(manager) == ["a", "b"]

    async def test_a_transactional_method_can_call_itself(
        self, manager: DatabaseSessionManager
    ) -> None:
        class Countdown(Service):
            @transactional
            async def run(self, number: int) -> int:
                await self.add(str(number))
                return number if number == 0 else await self.run(number - 1)

        assert await Countdown(manager).run(3) == 0
        assert await notes(manager) == ["0", "1", "2", "3"]


class TestReadOnly:
    @pytest.mark.parametrize("name", ["read", "read_with_parentheses"])
    async def test_a_read_only_method_reads_without_a_transaction(
        self, service: Service, name: str
    ) -> None:
        await service.bare("a")
        assert await getattr(service, name)() == ["a"]

    async def test_a_read_only_method_joins_a_transaction_and_sees_its_writes(
        self, manager: DatabaseSessionManager, service: Service
    ) -> None:
        async with manager.transaction() as session:
            session.add(Note(text="not yet committed"))
            assert await service.read() == ["not yet committed"]
            manager.transaction.set_rollback_only()
        assert await service.read() == []

    async def test_a_read_only_method_joins_a_session(
        self, manager: DatabaseSessionManager, service: Service
    ) -> None:
        async with manager.session() as session:
            session.add(Note(text="not yet committed"))
            assert await service.read() == ["not yet committed"]
            await session.rollback()

    async def test_the_database_refuses_a_write_in_a_read_only_method(
        self, manager: DatabaseSessionManager, service: Service
    ) -> None:
        with pytest.raises(DBAPIError, match=r"read-?only"):
            await service.write_where_only_reading_is_allowed()
        assert await notes(manager) == []

    async def test_a_read_only_method_cannot_call_a_transactional_method(
        self, manager: DatabaseSessionManager, service: Service
    ) -> None:
        with pytest.raises(IncompatibleTransactionError, match="make the outer call transactional"):
            await service.write_through_another_method()
        assert await notes(manager) == []

    async def test_many_read_only_methods_read_concurrently(
        self, manager: DatabaseSessionManager, service: Service
    ) -> None:
        await service.bare("a")

        class Report(Service):
            @read_only
            async def many(self) -> list[list[str]]:
                return await asyncio.gather(*(self.read() for _ in range(4)))

        assert await Report(manager).many() == [["a"]] * 4


class TestFunctions:
    async def test_a_transactional_function_finds_its_manager_in_any_parameter(
        self, manager: DatabaseSessionManager
    ) -> None:
        @transactional
        async def first(transaction: TransactionManager, text: str) -> bool:
            return manager.transaction.active

        @transactional
        async def last(text: str, transaction: TransactionManager) -> bool:
            return manager.transaction.active

        @transactional
        async def by_position_only(text: str, transaction: TransactionManager, /) -> bool:
            return manager.transaction.active

        @transactional
        async def by_keyword_only(*texts: str, transaction: TransactionManager) -> bool:
            return manager.transaction.active

        @read_only
        async def reading(transaction: TransactionManager) -> bool:
            return manager.transaction.active

        assert await first(manager.transaction, "a")
        assert await first(text="a", transaction=manager.transaction)
        assert await last("a", manager.transaction)
        assert await by_position_only("a", manager.transaction)
        assert await by_keyword_only("a", "b", transaction=manager.transaction)
        assert not await reading(manager.transaction)

    async def test_a_manager_as_parameter_takes_precedence_over_an_attribute(
        self, manager: DatabaseSessionManager, settings: DatabaseSettings
    ) -> None:
        class Both:
            transaction = manager.transaction

            @transactional
            async def work(self, transaction: TransactionManager) -> tuple[bool, bool]:
                return manager.transaction.active, transaction.active

        async with DatabaseSessionManager(settings) as other:
            assert await Both().work(other.transaction) == (False, True)

    async def test_transactional_works_above_and_below_other_decorators(
        self, manager: DatabaseSessionManager
    ) -> None:
        def loud(
            function: Callable[..., Coroutine[Any, Any, str]],
        ) -> Callable[..., Coroutine[Any, Any, str]]:
            @functools.wraps(function)
            async def wrapper(*args: Any, **kwargs: Any) -> str:
                return (await function(*args, **kwargs)).upper()

            return wrapper

        class Loud(Service):
            @transactional
            @loud
            async def under(self, text: str) -> str:
                return await self.add(text)

            @loud
            @transactional
            async def over(self, text: str) -> str:
                return await self.add(text)

        assert await Loud(manager).under("a") == "A"
        assert await Loud(manager).over("b") == "B"
        assert await notes(manager) == ["a", "b"]


class TestOptions:
    async def test_the_options_of_transactional_reach_the_transaction(
        self, manager: DatabaseSessionManager, backend: str
    ) -> None:
        class Strict(Service):
            @transactional(isolation="serializable", execution_options={"answer": 42})
            async def look(self) -> tuple[object, object]:
                connection = await self.session.connection()
                level = (
                    await self.session.scalar(text("SHOW transaction_isolation"))
                    if backend != "sqlite"
                    else None
                )
                return level, connection.engine.get_execution_options()["answer"]

            @transactional(read_only=True)
            async def only_read(self) -> None:
                await self.session.execute(text("INSERT INTO note (text) VALUES ('never')"))

            @transactional(Propagation.MANDATORY)
            async def only_joined(self) -> None: ...

            @transactional(propagation=Propagation.NESTED)
            async def undoable(self) -> None:
                await self.add("wrong")

            @transactional(timeout=0.05)
            async def slow(self) -> None:
                await asyncio.sleep(60)

        strict = Strict(manager)
        assert await strict.look() == ("serializable" if backend != "sqlite" else None, 42)
        with pytest.raises(DBAPIError, match=r"read-?only"):
            await strict.only_read()
        with pytest.raises(TransactionRequiredError):
            await strict.only_joined()
        with pytest.raises(TransactionTimeoutError):
            await strict.slow()
        async with manager.transaction() as session:
            await strict.only_joined()
            with pytest.raises(ZeroDivisionError):
                await strict.undoable()
            session.add(Note(text="kept"))
        assert await notes(manager) == ["kept"]

    def test_an_unknown_option_of_transactional_is_refused(self) -> None:
        with pytest.raises(TypeError, match="isolation_level"):

            @transactional(isolation_level="SERIALIZABLE")  # type: ignore[call-overload, untyped-decorator]
            async def work(transaction: TransactionManager) -> None: ...

    @pytest.mark.parametrize(
        "mode", [Propagation.SUPPORTS, Propagation.NOT_SUPPORTED, Propagation.NEVER]
    )
    def test_transactional_refuses_an_isolation_level_without_a_transaction(
        self, mode: Propagation
    ) -> None:
        with pytest.raises(
            ValueError, match=f"{mode.name} may run without a transaction.*use REQUIRED"
        ):
            transactional(mode, isolation="SERIALIZABLE")

    def test_transactional_refuses_an_unknown_isolation_level(self) -> None:
        with pytest.raises(
            ValueError, match="unknown isolation level 'SERIALISABLE'; choose one of"
        ):

            @transactional(isolation="SERIALISABLE")
            async def work(transaction: TransactionManager) -> None: ...


class TestSecondDatabase:
    """`of=` names the attribute or parameter that holds the manager."""

    @pytest.fixture
    async def archive(self, tmp_path: Path) -> AsyncIterator[DatabaseSessionManager]:
        async with DatabaseSessionManager(f"sqlite:///{tmp_path / 'archive.db'}") as archive:
            await create_tables(archive)
            yield archive

    async def test_the_manager_named_by_of_is_found_as_attribute_and_as_parameter(
        self, manager: DatabaseSessionManager, archive: DatabaseSessionManager
    ) -> None:
        class Archivist:
            def __init__(self) -> None:
                self.transaction = manager.transaction
                self.archive = archive.transaction

            @transactional(of="archive")
            async def store(self, text: str) -> tuple[bool, bool]:
                CurrentSession(archive).add(Note(text=text))
                return manager.transaction.active, archive.transaction.active

            @transactional
            async def move(self, text: str) -> None:
                assert await self.store(text) == (True, True)
                CurrentSession(manager).add(Note(text=f"moved {text}"))

            @read_only(of="archive")
            async def look(self) -> list[str]:
                return list(
                    await CurrentSession(archive).scalars(select(Note.text).order_by(Note.text))
                )

        @transactional(of="second")
        async def store(text: str, *, second: TransactionManager) -> tuple[bool, bool]:
            CurrentSession(archive).add(Note(text=text))
            return manager.transaction.active, second.active

        archivist = Archivist()
        assert await archivist.store("a") == (False, True)
        assert await store("b", second=archive.transaction) == (False, True)
        await archivist.move("c")
        assert await archivist.look() == ["a", "b", "c"]
        assert await notes(archive) == ["a", "b", "c"]
        assert await notes(manager) == ["moved c"]

    async def test_decorators_of_two_databases_can_be_stacked(
        self, manager: DatabaseSessionManager, archive: DatabaseSessionManager
    ) -> None:
        class Archivist:
            transaction = manager.transaction
            archive = manager.transaction

            @transactional
            @transactional(of="archive")
            async def both(self) -> tuple[bool, bool]:
                return manager.transaction.active, archive.transaction.active

        archivist = Archivist()
        archivist.archive = archive.transaction
        assert await archivist.both() == (True, True)

    async def test_an_error_names_the_manager_that_of_names(self) -> None:
        class Incomplete:
            transaction = None

            @transactional(of="archive")
            async def store(self) -> None: ...

        with pytest.raises(TypeError, match="the attribute 'archive' of Incomplete"):
            await Incomplete().store()


# Wired functions, as they stand in a module


class TwoDatabases(containers.DeclarativeContainer):
    settings = providers.Dependency(instance_of=DatabaseSettings)
    archive_settings = providers.Dependency(instance_of=DatabaseSettings)
    db = providers.Container(DatabaseContainer, settings=settings)
    archive = providers.Container(DatabaseContainer, settings=archive_settings)
    notes = providers.Factory(Notes, session=db.session)


@inject
@transactional(retries=1)
async def wired_over(
    text: str,
    notes: Notes = Provide[TwoDatabases.notes],
    transaction: TransactionManager = Provide[TwoDatabases.db.transaction],
) -> bool:
    """Write it down."""
    await notes.add(text)
    return transaction.active


@transactional
@inject
async def wired_under(
    text: str,
    notes: Notes = Provide[TwoDatabases.notes],
    transaction: TransactionManager = Provide[TwoDatabases.db.transaction],
) -> bool:
    """Write it down."""
    await notes.add(text)
    return transaction.active


@inject
@read_only(of="second")
async def wired_reader(
    session: AsyncSession = Provide[TwoDatabases.archive.session],
    second: TransactionManager = Provide[TwoDatabases.archive.transaction],
) -> list[str]:
    return list(await session.scalars(select(Note.text)))


class TestWired:
    @pytest.fixture
    async def container(self, tmp_path: Path) -> AsyncIterator[TwoDatabases]:
        container = TwoDatabases(
            settings=DatabaseSettings(url=f"sqlite:///{tmp_path / 'main.db'}"),
            archive_settings=DatabaseSettings(url=f"sqlite:///{tmp_path / 'archive.db'}"),
        )
        async with Lifespan(container):
            await create_tables(container.db.sessionmanager())
            await create_tables(container.archive.sessionmanager())
            container.wire(modules=[__name__])
            yield container
            container.unwire()

    @pytest.mark.parametrize("name", ["wired_over", "wired_under"])
    async def test_transactional_works_above_and_below_inject(
        self, container: TwoDatabases, name: str
    ) -> None:
        function = globals()[name]
        assert await function("a")
        assert await function(text="b")
        with pytest.raises(DBAPIError):
            await function("a")
        assert await notes(container.db.sessionmanager()) == ["a", "b"]
        assert await notes(container.archive.sessionmanager()) == []

    async def test_transactional_of_a_second_database_works_with_inject(
        self, container: TwoDatabases
    ) -> None:
        archive = container.archive.sessionmanager()
        async with archive.transaction() as session:
            session.add(Note(text="old"))
        assert await wired_reader() == ["old"]

    async def test_an_injected_argument_can_also_be_passed(self, container: TwoDatabases) -> None:
        archive = container.archive.sessionmanager()
        assert await wired_over(
            "a", notes=Notes(container.archive.session()), transaction=archive.transaction
        )
        assert await notes(archive) == ["a"]

    @pytest.mark.parametrize("name", ["wired_over", "wired_under"])
    def test_transactional_with_inject_keeps_name_docstring_and_signature(self, name: str) -> None:
        function = globals()[name]
        assert (function.__name__, function.__doc__) == (name, "Write it down.")
        assert list(inspect.signature(function).parameters) == ["text", "notes", "transaction"]

    async def test_a_transactional_function_that_is_not_wired_says_what_to_do(self) -> None:
        @transactional
        async def work(
            transaction: TransactionManager = Provide[TwoDatabases.db.transaction],
        ) -> None: ...

        with pytest.raises(
            TypeError,
            match=r"the argument 'transaction' is Provide, not a TransactionManager.*@inject",
        ):
            await work()


class TestIdentity:
    @pytest.mark.parametrize(
        "decorate",
        [transactional, transactional(), transactional(retries=2), read_only, read_only()],
    )
    def test_transactional_keeps_name_docstring_signature_and_annotations(
        self, decorate: Callable[[Any], Any]
    ) -> None:
        async def write(
            self: object, text: str, *more: str, strict: bool = False, **options: int
        ) -> list[int]:
            """Write it down."""
            raise NotImplementedError

        decorated = decorate(write)
        assert decorated.__name__ == "write"
        assert decorated.__qualname__ == write.__qualname__
        assert decorated.__doc__ == "Write it down."
        assert decorated.__module__ == __name__
        assert inspect.signature(decorated) == inspect.signature(write)
        assert decorated.__annotations__ == write.__annotations__
        assert inspect.iscoroutinefunction(decorated)


class TestRefusals:
    """When it is decorated where that can be seen, else at the first call."""

    @pytest.mark.parametrize(
        "decorate", [transactional, transactional(), read_only, read_only(of="archive")]
    )
    def test_transactional_refuses_anything_but_a_coroutine_function(
        self, decorate: Callable[[Any], Any]
    ) -> None:
        def sync(self: object) -> None: ...

        async def generator(self: object) -> AsyncIterator[int]:
            yield 1

        class Callable_:
            async def __call__(self) -> None: ...

        for wrong in (sync, generator, Callable_, Callable_(), 42, "name", len):
            with pytest.raises(
                TypeError, match=r"takes a coroutine function|'name' is not a Propagation"
            ):
                decorate(wrong)

    def test_the_error_of_a_refused_decoration_names_decorator_and_function(self) -> None:
        with pytest.raises(TypeError, match=r"@transactional .*sync"):

            @transactional  # type: ignore[arg-type]
            def sync(self: object) -> None: ...

        with pytest.raises(
            TypeError, match=r"@read_only .*stream\(\) would keep .* open between its items"
        ):

            @read_only  # type: ignore[arg-type]
            async def stream(self: object) -> AsyncIterator[int]:
                yield 1

    def test_transactional_above_classmethod_is_refused(self) -> None:
        with pytest.raises(TypeError, match="write @transactional below @classmethod"):

            class Wrong:
                @transactional
                @classmethod
                async def work(cls) -> None: ...

    def test_a_function_that_cannot_have_a_manager_is_refused_when_decorated(self) -> None:
        async def work() -> None: ...

        for decorate in (transactional, read_only):
            with pytest.raises(
                TypeError, match=r"work\(\) has neither a parameter 'transaction' nor a self"
            ):
                decorate(work)
        with pytest.raises(TypeError, match="'archive'"):
            transactional(of="archive")(work)

    async def test_a_call_names_the_missing_attribute(self) -> None:
        class Incomplete:
            @transactional
            async def write(self) -> None: ...

            @read_only
            async def read(self) -> None: ...

        with pytest.raises(
            TypeError, match=r"write\(\) is @transactional.*attribute 'transaction' of Incomplete"
        ):
            await Incomplete().write()
        with pytest.raises(
            TypeError, match=r"read\(\) is @read_only.*attribute 'transaction' of Incomplete"
        ):
            await Incomplete().read()

    async def test_a_call_names_an_attribute_of_a_wrong_type_with_its_type(
        self, manager: DatabaseSessionManager
    ) -> None:
        class Confused:
            def __init__(self, transaction: object) -> None:
                self.transaction = transaction

            @transactional
            async def write(self) -> None: ...

        with pytest.raises(TypeError, match="is DatabaseSessionManager, not a TransactionManager"):
            await Confused(manager).write()
        with pytest.raises(TypeError, match="is TransactionBlock, not a TransactionManager"):
            await Confused(manager.transaction()).write()

    async def test_a_call_names_the_missing_argument(self, manager: DatabaseSessionManager) -> None:
        @transactional
        async def write(text: str, transaction: TransactionManager | None = None) -> bool:
            return manager.transaction.active

        @transactional
        async def write_always(transaction: TransactionManager) -> None: ...

        with pytest.raises(TypeError, match="the argument 'transaction' is NoneType"):
            await write("a")
        assert await write("a", manager.transaction)
        with pytest.raises(TypeError, match="the argument 'transaction' is missing"):
            await write_always()  # type: ignore[call-arg]

    async def test_a_call_with_wrong_arguments_raises_pythons_own_error(
        self, manager: DatabaseSessionManager, service: Service
    ) -> None:
        with pytest.raises(TypeError, match="missing 1 required positional argument: 'text'"):
            await service.bare()  # type: ignore[call-arg]
        with pytest.raises(TypeError, match="unexpected keyword argument 'txt'"):
            await service.bare(txt="a")  # type: ignore[call-arg]
        assert await notes(manager) == []
