"""Sessions of a user's own class: they have what the class has, and keep their scope's rules."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import cached_property
from typing import Any

import pytest
from dependency_injector import containers, providers
from sqlalchemy import bindparam, event, insert, select, text, update
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import Session
from sqlmodel import Field, SQLModel
from sqlmodel import select as select_models
from sqlmodel.ext.asyncio.session import AsyncSession as SQLModelSession

from sessionwire import (
    ConcurrentSessionError,
    ConfigurationError,
    CurrentSession,
    DatabaseContainer,
    DatabaseSessionManager,
    DatabaseSettings,
    ImplicitIOError,
    IncompatibleTransactionError,
    Lifespan,
    NoSessionError,
    Propagation,
    ScopeOwnsTransactionError,
    UnexpectedRollbackError,
)
from sessionwire.testing import sandbox

from .conftest import assert_all_returned, notes
from .models import Note


class CountingSession(Session):
    """Counts statements, and has a method that writes by `super()`."""

    statements = 0

    def execute(self, *args: Any, **options: Any) -> Any:
        self.statements += 1
        return super().execute(*args, **options)

    def write(self, note: str) -> None:
        super().execute(insert(Note).values(text=note))

    def commit_anyway(self) -> None:
        super().commit()


class ShopSession(AsyncSession):
    sync_session_class = CountingSession

    def __init__(self, *args: Any, tenant: str = "nobody", **options: Any) -> None:
        super().__init__(*args, **options)
        self.tenant = tenant

    async def execute(self, *args: Any, **options: Any) -> Any:
        self.info["executed"] = self.info.get("executed", 0) + 1
        return await super().execute(*args, **options)

    async def texts(self) -> list[str]:
        return list((await self.execute(select(Note.text).order_by(Note.text))).scalars())

    async def write(self, note: str) -> None:
        await self.run_sync(lambda session: session.write(note))  # type: ignore[attr-defined]

    async def commit_anyway(self) -> None:
        await super().commit()

    def rename(self, tenant: str) -> None:
        self.tenant = tenant

    @property
    def statements(self) -> int:
        return self.sync_session.statements  # type: ignore[attr-defined,no-any-return]

    @cached_property
    def identity(self) -> int:
        return id(self)

    @staticmethod
    def double(number: int) -> int:
        return 2 * number

    @classmethod
    def name_of_class(cls) -> str:
        return cls.__name__


@pytest.fixture
async def shop(settings: DatabaseSettings) -> AsyncGenerator[DatabaseSessionManager[ShopSession]]:
    manager = DatabaseSessionManager(
        settings, session_class=ShopSession, session_options={"tenant": "tea"}
    )
    async with manager:
        async with manager.connect() as connection:
            await connection.run_sync(Note.metadata.create_all)
        yield manager
        await assert_all_returned(manager)


def current(manager: DatabaseSessionManager[Any]) -> Any:
    return CurrentSession(manager)


Shop = DatabaseSessionManager[ShopSession]


# What the class has


async def test_a_block_gives_a_session_of_the_class_with_the_options(shop: Shop) -> None:
    async with shop.transaction() as session:
        assert isinstance(session, ShopSession)
        assert session.tenant == "tea"
        assert isinstance(session.sync_session, CountingSession)
    async with shop.session() as session:
        assert session.tenant == "tea"


async def test_the_stand_in_is_one_of_the_class_and_has_its_methods(shop: Shop) -> None:
    stand_in = current(shop)
    assert isinstance(stand_in, ShopSession)
    assert isinstance(stand_in, CurrentSession)
    async with shop.transaction():
        await stand_in.write("milk")
        assert await stand_in.texts() == ["milk"]
    assert await notes(shop) == ["milk"]


async def test_the_stand_in_has_properties_and_what_the_constructor_sets(shop: Shop) -> None:
    stand_in = current(shop)
    async with shop.transaction() as session:
        assert stand_in.tenant == "tea"
        await stand_in.texts()
        assert stand_in.statements == session.statements == 1
        assert stand_in.info["executed"] == 1
        assert stand_in.identity == id(session)
    async with shop.session() as session:
        assert stand_in.identity == id(session)
    assert stand_in.double(3) == 6
    assert "ShopSession" in stand_in.name_of_class()


async def test_what_is_set_on_the_stand_in_belongs_to_the_session_of_the_scope(shop: Shop) -> None:
    stand_in = current(shop)
    async with shop.session() as session:
        stand_in.tenant = "coffee"
        assert session.tenant == "coffee"
        stand_in.rename("milk")
        assert session.tenant == stand_in.tenant == "milk"
        stand_in.note = 1
        del stand_in.note
        assert not hasattr(session, "note")
    async with shop.session() as session:
        assert stand_in.tenant == session.tenant == "tea"


async def test_each_scope_has_its_own_session_behind_one_stand_in(shop: Shop) -> None:
    stand_in = current(shop)

    async def tenant_of(name: str) -> str:
        async with shop.session():
            stand_in.rename(name)
            await asyncio.sleep(0)
            return str(stand_in.tenant)

    assert await asyncio.gather(*map(tenant_of, "abc")) == ["a", "b", "c"]


async def test_outside_of_a_block_the_stand_in_says_that_no_session_is_open(shop: Shop) -> None:
    stand_in = current(shop)
    assert callable(stand_in.texts)
    with pytest.raises(NoSessionError):
        await stand_in.texts()
    with pytest.raises(NoSessionError):
        stand_in.rename("milk")
    with pytest.raises(NoSessionError):
        _ = stand_in.statements
    with pytest.raises(AttributeError, match="outside of a block"):
        _ = stand_in.tenant
    async with shop.session():
        assert not hasattr(stand_in, "unknown")


async def test_a_method_that_was_taken_from_the_stand_in_follows_the_scope(shop: Shop) -> None:
    async with shop.transaction():
        texts = current(shop).texts
        await current(shop).write("milk")
    with pytest.raises(NoSessionError):
        await texts()
    async with shop.transaction():
        assert await texts() == ["milk"]


async def test_a_stand_in_can_be_copied_and_derived_from(shop: Shop) -> None:
    class Mine(CurrentSession):
        def __init__(self, manager: Any, label: str) -> None:
            super().__init__(manager)
            vars(self)["label"] = label

    mine: Any = Mine(shop, "mine")
    for stand_in in (copy.copy(current(shop)), copy.deepcopy(current(shop)), mine):
        async with shop.session():
            assert await stand_in.texts() == []
    assert isinstance(mine, Mine)
    assert isinstance(mine, ShopSession)
    assert mine.label == "mine"


async def test_objects_stay_readable_after_the_commit(shop: Shop) -> None:
    async with shop.transaction() as session:
        note = Note(text="milk")
        session.add(note)
    assert note.text == "milk"


async def test_listeners_of_the_class_hear_its_sessions(shop: Shop) -> None:
    heard: list[str] = []

    def listener(_session: Session) -> None:
        heard.append("commit")

    event.listen(CountingSession, "before_commit", listener)
    try:
        async with shop.transaction() as session:
            await session.write("milk")
    finally:
        event.remove(CountingSession, "before_commit", listener)
    assert heard == ["commit"]


class Narrow(AsyncSession):
    """Its constructor takes no options of a session."""

    def __init__(self, engine: AsyncEngine, label: str) -> None:
        super().__init__(engine)
        self.label = label


async def test_a_constructor_needs_to_take_no_more_than_the_engine(
    settings: DatabaseSettings,
) -> None:
    options = {"label": "narrow"}
    async with (
        DatabaseSessionManager(settings, session_class=Narrow, session_options=options) as manager,
        manager.transaction() as session,
    ):
        assert session.label == "narrow"
        assert not session.sync_session.expire_on_commit
        assert await session.scalar(text("SELECT 1")) == 1


# The rules of a scope


async def test_the_class_can_not_commit_inside_of_a_transaction(shop: Shop) -> None:
    async with shop.transaction() as session:
        await session.write("milk")
        for commit in (
            session.commit_anyway,
            current(shop).commit_anyway,
            lambda: session.run_sync(lambda inner: inner.commit_anyway()),  # type: ignore[attr-defined]
        ):
            with pytest.raises(ScopeOwnsTransactionError):
                await commit()
        shop.transaction.set_rollback_only()
    assert await notes(shop) == []


async def test_the_class_commits_in_a_session_block(shop: Shop) -> None:
    async with shop.session() as session:
        await session.write("milk")
        await session.commit_anyway()
    assert await notes(shop) == ["milk"]


async def test_a_write_of_the_class_counts_as_one(shop: Shop) -> None:
    with pytest.warns(UserWarning, match="changes that are now lost"):
        async with shop.session() as session:
            await session.write("milk")


async def test_a_failure_in_the_class_rolls_the_block_back(shop: Shop) -> None:
    with pytest.raises(UnexpectedRollbackError):
        async with shop.transaction() as session:
            await session.write("milk")
            with pytest.raises(IntegrityError):
                await session.write("milk")
    assert await notes(shop) == []


async def test_a_savepoint_of_the_class_is_rolled_back_alone(shop: Shop) -> None:
    async with shop.transaction() as session:
        await session.write("milk")
        with pytest.raises(IntegrityError):
            async with shop.transaction(Propagation.NESTED):
                await session.write("milk")
    assert await notes(shop) == ["milk"]


async def test_a_session_of_the_class_serves_one_operation_at_a_time(shop: Shop) -> None:
    async with shop.session() as session:
        results = await asyncio.gather(
            session.texts(), current(shop).texts(), return_exceptions=True
        )
    assert sum(isinstance(result, ConcurrentSessionError) for result in results) == 1


async def test_the_class_sends_nothing_without_await(shop: Shop) -> None:
    async with shop.session() as session:
        with pytest.raises(ImplicitIOError):
            session.sync_session.write("milk")  # type: ignore[attr-defined]


async def test_a_session_of_the_class_ends_with_its_block(shop: Shop) -> None:
    async with shop.session() as session:
        pass
    with pytest.raises(NoSessionError):
        await session.texts()


async def test_the_class_may_not_write_in_the_loop_over_a_generator(shop: Shop) -> None:
    stand_in = current(shop)

    async def numbers() -> AsyncGenerator[int]:
        async with shop.session():
            yield 1

    async with shop.transaction(), aclosing(numbers()) as rows:
        async for _ in rows:
            with pytest.raises(IncompatibleTransactionError, match="write"):
                await stand_in.write("milk")
            assert await stand_in.texts() == []
            assert stand_in.tenant == "tea"
    assert await notes(shop) == []


@pytest.mark.parametrize("read_only", [True, False])
async def test_the_class_only_reads_in_a_block_that_only_reads(shop: Shop, read_only: bool) -> None:
    async def write() -> None:
        async with shop.transaction(read_only=read_only) as session:
            await session.write("milk")

    if read_only:
        with pytest.raises(Exception, match=r"read.?only"):
            await write()
    else:
        await write()
    assert await notes(shop) == [] if read_only else ["milk"]


# Options


async def test_autoflush_and_info_go_through(manager: DatabaseSessionManager) -> None:
    options = {"autoflush": False, "info": {"place": "here"}, "expire_on_commit": False}
    async with (
        DatabaseSessionManager(manager.settings, session_options=options) as other,
        other.transaction() as session,
    ):
        assert session.info == {"place": "here"}
        session.add(Note(text="milk"))
        assert (await session.scalars(select(Note))).all() == []
        session.info["place"] = "there"
    async with other, other.session() as session:
        assert session.info == {"place": "here"}
        assert (await session.scalars(select(Note.text))).all() == ["milk"]


class OtherEngine(AsyncSession):
    def __init__(self, *_: Any, **options: Any) -> None:
        super().__init__(create_async_engine("sqlite+aiosqlite://"), **options)


class SeveralEngines(AsyncSession):
    def __init__(self, engine: AsyncEngine, **options: Any) -> None:
        super().__init__(engine, binds={Note: engine}, **options)


class Unguarded(AsyncSession):
    def __init__(self, engine: AsyncEngine, **options: Any) -> None:
        super().__init__(engine, sync_session_class=Session, **options)


class Routing(Session):
    def get_bind(self, *args: Any, **options: Any) -> Any:
        return super().get_bind(*args, **options)


class Routed(AsyncSession):
    sync_session_class = Routing


class TwoPhases(AsyncSession):
    def __init__(self, engine: AsyncEngine, **options: Any) -> None:
        super().__init__(engine, twophase=True, **options)


class WithAScope(Session):
    scope = "mine"


class Scoped(AsyncSession):
    sync_session_class = WithAScope


class SettingAScope(Session):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.scope = "mine"


class ScopedLater(AsyncSession):
    sync_session_class = SettingAScope


class WithFunction(AsyncSession):
    sync_session_class = staticmethod(lambda **options: Session(**options))  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"session_class": Session}, "expected a subclass of sqlalchemy.ext.asyncio.AsyncSession"),
        ({"session_class": "Session"}, "expected a subclass"),
        ({"session_class": OtherEngine}, "sets bind: a scope has one engine"),
        ({"session_class": SeveralEngines}, "sets binds: a scope has one engine"),
        ({"session_class": Unguarded}, "write it into the class"),
        ({"session_class": Routed}, r"Routing.get_bind\(\): a scope has one engine"),
        ({"session_class": TwoPhases}, "sets twophase: blocks commit in one phase"),
        ({"session_class": Scoped}, r"WithAScope.scope: .* choose another one"),
        ({"session_class": ScopedLater}, r"SettingAScope.scope: .* choose another one"),
        ({"session_class": WithFunction}, "must be a subclass of sqlalchemy.orm.Session"),
        ({"session_options": {"expire_on_commit": True}}, "expire_on_commit: objects stay"),
        ({"session_options": {"autobegin": False}}, "autobegin: blocks begin"),
        ({"session_options": {"twophase": True}}, "twophase: blocks commit"),
        ({"session_options": {"bind": "sqlite"}}, "bind: a scope has one engine"),
        ({"session_options": {"binds": {Note: "sqlite"}}}, "binds: a scope has one engine"),
        ({"session_options": {"sync_session_class": Routing}}, "write it into the class"),
        ({"session_options": {"autoflsh": True}}, "session_options: .*'autoflsh'"),
        ({"session_options": ["autoflush"]}, "session_options: expected a mapping, got list"),
    ],
    ids=str,
)
def test_what_breaks_the_rules_is_refused_before_the_first_session(
    arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        DatabaseSessionManager(**arguments).init("sqlite://")


# Containers


class Texts:
    def __init__(self, session: ShopSession) -> None:
        self.session = session

    async def all(self) -> list[str]:
        return await self.session.texts()


class Container(containers.DeclarativeContainer):
    settings = providers.Dependency(instance_of=DatabaseSettings)
    db = DatabaseContainer.nested(
        settings=settings, session_class=ShopSession, session_options={"tenant": "tea"}
    )
    texts = providers.Factory(Texts, session=db.session)


async def test_a_container_gives_the_class_to_repositories(manager: DatabaseSessionManager) -> None:
    container = Container(settings=manager.settings)
    async with Lifespan(container), container.db.transaction()() as session:
        assert session.tenant == "tea"
        await session.write("milk")
        assert await container.texts().all() == ["milk"]


async def test_the_class_of_a_container_can_be_overridden(manager: DatabaseSessionManager) -> None:
    container = Container(settings=manager.settings)
    container.db.session_class.override(providers.Object(AsyncSession))
    container.db.session_options.override(providers.Dict(info=providers.Dict(place="here")))
    async with Lifespan(container), container.db.transaction()() as session:
        assert type(session) is AsyncSession
        assert session.info == {"place": "here"}


async def test_a_class_that_is_overridden_too_late_is_refused() -> None:
    container = Container(settings=DatabaseSettings(url="sqlite://"))
    container.db.sessionmanager()
    container.db.session_class.override(providers.Object(AsyncSession))
    with pytest.raises(ConfigurationError, match=r"db\.session_class was overridden .*reset"):
        async with Lifespan(container):
            raise AssertionError("it was started")


@pytest.mark.several_connections("a sandbox's manager and the checks use some")
async def test_a_sandbox_has_sessions_of_the_class_and_options_of_the_engine(
    manager: DatabaseSessionManager,
) -> None:
    container = Container(settings=manager.settings)
    elsewhere = {"schema_translate_map": {None: "elsewhere"}}
    container.db.engine_options.override({"execution_options": elsewhere})
    async with sandbox(container), Lifespan(container):
        async with container.db.transaction()() as session:
            assert session.tenant == "tea"
        with pytest.raises(DBAPIError, match="elsewhere"):
            async with container.db.transaction()() as session:
                await session.texts()


# SQLModel


class Hero(SQLModel, table=True):
    id: int | None = Field(default=None, primary_key=True)
    name: str = Field(unique=True)


class Heroes(containers.DeclarativeContainer):
    settings = providers.Dependency(instance_of=DatabaseSettings)
    db = DatabaseContainer.nested(
        settings=settings, session_class=SQLModelSession, metadata=SQLModel.metadata
    )


@pytest.fixture
async def heroes(settings: DatabaseSettings) -> AsyncGenerator[Heroes]:
    async with Lifespan(Heroes(settings=settings)) as container:
        manager = container.db.sessionmanager()
        async with manager.connect() as connection:
            await connection.run_sync(Hero.__table__.create)  # type: ignore[attr-defined]
        yield container
        await assert_all_returned(manager)


async def test_sqlmodels_exec_runs_on_the_current_session(heroes: Heroes) -> None:
    session = heroes.db.session()
    async with heroes.db.transaction()() as opened:
        opened.add(Hero(name="Ada"))
        found = (await session.exec(select_models(Hero))).one()
        assert found.name == "Ada"
        assert (await opened.exec(select_models(Hero.name, Hero.id))).all() == [("Ada", found.id)]
        await session.exec(update(Hero).values(name=bindparam("new")), params={"new": "Grace"})
    async with heroes.db.transaction()(read_only=True):
        assert (await session.exec(select_models(Hero.name))).all() == ["Grace"]


async def test_sqlmodels_exec_keeps_the_rules_of_the_scope(heroes: Heroes) -> None:
    session = heroes.db.session()
    with pytest.raises(NoSessionError):
        await session.exec(select_models(Hero))
    async with heroes.db.transaction()():
        results = await asyncio.gather(
            session.exec(select_models(Hero)),
            session.exec(select_models(Hero)),
            return_exceptions=True,
        )
        assert sum(isinstance(result, ConcurrentSessionError) for result in results) == 1
        with pytest.raises(ScopeOwnsTransactionError):
            await session.commit()

    async def rows() -> AsyncGenerator[int]:
        async with heroes.db.sessionmanager().session():
            yield 1

    async with heroes.db.transaction()(), aclosing(rows()) as numbers:
        async for _ in numbers:
            with pytest.raises(IncompatibleTransactionError, match="write"):
                await session.exec(update(Hero).values(name="Ada"))


async def test_a_failed_exec_of_sqlmodel_rolls_the_block_back(heroes: Heroes) -> None:
    transaction, session = heroes.db.transaction(), heroes.db.session()
    async with transaction():
        session.add(Hero(name="Ada"))
    with pytest.raises(UnexpectedRollbackError):
        async with transaction():
            await session.exec(insert(Hero).values(name="Grace"))
            with pytest.raises(IntegrityError):
                await session.exec(insert(Hero).values(name="Ada"))
    async with transaction(read_only=True):
        assert (await session.exec(select_models(Hero.name))).all() == ["Ada"]
