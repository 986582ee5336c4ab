"""Users' code, which mypy and pyright check in strict mode; it never runs."""

# pyright: reportUnnecessaryTypeIgnoreComment=true

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Coroutine
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Protocol, assert_type

from dependency_injector import containers, providers
from dependency_injector.wiring import Provide, inject
from fastapi import Depends, FastAPI
from sqlalchemy import MetaData, select
from sqlalchemy.engine import ScalarResult
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession
from sqlmodel import Field, SQLModel
from sqlmodel import select as select_models
from sqlmodel.ext.asyncio.session import AsyncSession as SQLModelSession

from sessionwire import (
    Credentials,
    CurrentSession,
    DatabaseContainer,
    DatabaseSessionManager,
    DatabaseSettings,
    Lifespan,
    PoolSettings,
    Propagation,
    TransactionManager,
    nested_container,
    read_only,
    sessionmanager,
    transactional,
)
from sessionwire import Settings as BaseSettings
from sessionwire import fastapi as web
from sessionwire.alembic import run_migrations
from sessionwire.asgi import ASGIApp, TransactionMiddleware
from sessionwire.testing import (
    DatabaseCopy,
    DatabaseTemplate,
    NullTransactionManager,
    SentStatement,
    count_statements,
    overriding,
)


class ShopSettings(BaseSettings):
    greeting: str = "hello"


class Service:
    def __init__(self, session: AsyncSession, transaction: TransactionManager) -> None:
        self.transaction = transaction
        self.archive = transaction

    @transactional
    async def price(self, item: int, *, currency: str = "EUR") -> float:
        return 1.0

    @transactional()
    async def with_parentheses(self, item: int, *, currency: str = "EUR") -> float:
        return 1.0

    @transactional(
        Propagation.NESTED,
        isolation="SERIALIZABLE",
        timeout=timedelta(seconds=1),
        durable=True,
        no_rollback_for=(LookupError, ValueError),
        retries=5,
        retry_on=(LookupError, TimeoutError),
        of="archive",
    )
    async def with_options(self, item: int, *, currency: str = "EUR") -> float:
        return 1.0

    @read_only
    async def names(self, *items: int) -> list[str]:
        return []

    @read_only()
    async def names_with_parentheses(self, *items: int) -> list[str]:
        return []

    @read_only(of="archive")
    async def names_of_the_archive(self, *items: int) -> list[str]:
        return []

    @classmethod
    @transactional
    async def of_the_class(cls, item: int) -> str:
        return ""

    @staticmethod
    @transactional
    async def of_nobody(item: int, transaction: TransactionManager) -> str:
        return ""


@inject
@transactional(retries=1)
async def over(item: int, transaction: TransactionManager = Provide["db.transaction"]) -> str:
    return ""


@transactional
@inject
async def under(item: int, transaction: TransactionManager = Provide["db.transaction"]) -> str:
    return ""


async def use_decorated(service: Service, transaction: TransactionManager) -> None:
    assert_type(await service.price(1, currency="CHF"), float)
    assert_type(await service.with_parentheses(1, currency="CHF"), float)
    assert_type(await service.with_options(item=1), float)
    assert_type(await service.names(1, 2), list[str])
    assert_type(await service.names_with_parentheses(1, 2), list[str])
    assert_type(await service.names_of_the_archive(), list[str])
    assert_type(await Service.of_the_class(1), str)
    assert_type(await Service.of_nobody(1, transaction), str)
    assert_type(await over(1), str)
    assert_type(await under(1, transaction=transaction), str)
    unbound: Callable[[Service, int], Coroutine[Any, Any, float]] = Service.with_parentheses
    assert_type(await unbound(service, 1), float)


async def use_wrongly(service: Service) -> None:
    """Each line is an error to both type checkers; so is an unneeded ignore."""
    await service.price("1")  # type: ignore[arg-type]
    await service.with_parentheses(1, "CHF")  # type: ignore[call-arg]
    await service.with_options(1, price=1)  # type: ignore[call-arg]
    await service.names("1")  # type: ignore[arg-type]
    await service.names_of_the_archive("1")  # type: ignore[arg-type]
    await over("1")  # type: ignore[arg-type]
    transactional(isolation_level="SERIALIZABLE")  # type: ignore[call-overload]
    transactional(retries=1, retry_on="LookupError")  # type: ignore[call-overload]
    read_only(retries=1)  # type: ignore[call-overload]


class Prices(Protocol):
    async def price(self, item: int, *, currency: str = "EUR") -> float: ...

    async def names(self, *items: int) -> list[str]: ...


class PricesWithNotes(Prices, Protocol):
    async def note(self, item: int) -> None: ...


class AbstractPrices(ABC):
    transaction: TransactionManager

    @abstractmethod
    async def price(self, item: int, *, currency: str = "EUR") -> float: ...

    @abstractmethod
    async def names(self, *items: int) -> list[str]: ...

    @transactional
    @abstractmethod
    async def note(self, item: int) -> None: ...


class ConcretePrices(AbstractPrices):
    @transactional(retries=1)
    async def price(self, item: int, *, currency: str = "EUR") -> float:
        return 1.0

    @read_only()
    async def names(self, *items: int) -> list[str]:
        return []

    async def note(self, item: int) -> None:
        """Overrides a decorated method by one without a decorator."""


class DearerPrices(ConcretePrices):
    @transactional
    async def price(self, item: int, *, currency: str = "EUR") -> float:
        return 2 * await super().price(item, currency=currency)

    @transactional
    async def names(self, *items: str) -> list[str]:  # type: ignore[override]
        return []


def use_protocols(service: Service, concrete: ConcretePrices, dearer: DearerPrices) -> None:
    prices: list[Prices] = [service, concrete]
    with_notes: list[PricesWithNotes] = [concrete]
    prices.extend(with_notes)
    with_notes.append(service)  # type: ignore[arg-type]
    prices.append(dearer)  # type: ignore[arg-type]


async def add(first: int, second: str) -> bytes:
    return b""


async def use_transactions(transaction: TransactionManager) -> None:
    assert_type(await transaction.run(add, 1, "2", retries=3, timeout=1.5), bytes)
    assert_type(await transaction.detached(add(1, "2")), bytes)
    await transaction.run(add, "1", "2")  # type: ignore[arg-type]
    async with transaction(
        Propagation.REQUIRES_NEW, read_only=True, timeout=timedelta(seconds=1)
    ) as session:
        assert_type(session, AsyncSession)
    transaction.on_commit(lambda: print("done"), robust=True)
    transaction.before_commit(lambda: print("nearly done"))
    transaction.on_commit(lambda: add(1, "2"))
    transaction.on_rollback(lambda: None)

    @transaction.on_begin
    async def set_tenant(connection: AsyncConnection) -> None:
        await connection.execute(select(1))

    assert_type(set_tenant, Callable[[AsyncConnection], Awaitable[object] | None])
    transaction.on_begin(lambda connection: None)

    @transaction.on_connect
    async def set_codec(connection: AsyncConnection) -> None:
        await connection.get_raw_connection()

    assert_type(set_codec, Callable[[AsyncConnection], Awaitable[object] | None])
    assert_type(transaction.active, bool)
    transaction.set_rollback_only()


async def lease() -> Credentials:
    return Credentials(username="shop", password="secret", expires_in=60)


async def use(manager: DatabaseSessionManager) -> None:
    DatabaseSettings(url="sqlite://", pool=PoolSettings(size=3))
    DatabaseSettings(host="db", password="secret", search_path=["shop", "public"])
    DatabaseSessionManager("postgresql://db/shop", credentials=lambda: "token")
    DatabaseSessionManager("postgresql://db/shop", credentials=lease)
    DatabaseSessionManager("postgresql://db/shop", credentials=lambda: 5)  # type: ignore
    assert_type(ShopSettings.load("config.yaml", greeting="hi"), ShopSettings)
    sessionmanager.init("postgresql://localhost/shop")
    service = Service(CurrentSession(manager), manager.transaction)
    assert_type(await service.price(1, currency="CHF"), float)
    async with (
        manager.session() as session,
        manager.transaction() as same,
        manager.connect() as connection,
    ):
        assert_type(session, AsyncSession)
        assert_type(same, AsyncSession)
        assert_type(connection, AsyncConnection)
    async with manager as opened:
        assert_type(opened, DatabaseSessionManager)


async def migrate(manager: DatabaseSessionManager) -> None:
    async with manager.connect() as connection:
        await manager.create_all(connection)


async def use_template() -> None:
    async with DatabaseTemplate("postgresql://localhost/shop", migrate, key="run 1") as template:
        async with template.copy() as copy:
            assert_type(copy, DatabaseCopy)
            await use(DatabaseSessionManager(copy.settings))
        assert_type(copy.connections_left, int)
    DatabaseTemplate("sqlite://", lambda url: print(url))  # type: ignore[arg-type,return-value]


app = FastAPI()


@app.get("/short")
@web.inject
async def short(item: int, service: Annotated[Service, web.Provide["service"]]) -> float:
    return await service.price(item)


@app.get("/depends")
@web.inject
async def depends(item: int, service: Annotated[Service, Depends(web.Provide["service"])]) -> float:
    return await service.price(item)


@app.get("/default")
@web.inject
async def default(item: int, service: Service = Depends(web.Provide["service"])) -> float:  # noqa: B008
    return await service.price(item)


async def use_web(service: Service, transaction: TransactionManager, other: ASGIApp) -> None:
    assert_type(await short(1, service), float)
    assert_type(await default(1), float)
    await short("1", service)  # type: ignore[arg-type]
    app.add_middleware(
        TransactionMiddleware, transaction=transaction, isolation="SERIALIZABLE", timeout=1.5
    )
    TransactionMiddleware(app, transaction=transaction, read_only=True)
    TransactionMiddleware(other, transaction=transaction, timeout=timedelta(seconds=1))
    TransactionMiddleware(app, transaction=transaction, retries=1)  # type: ignore[call-arg]


class Container(containers.DeclarativeContainer):
    service = providers.Dependency(instance_of=Service)


def use_testing(manager: DatabaseSessionManager, service: Service) -> None:
    Service(CurrentSession(manager), NullTransactionManager())
    with (
        overriding(Container(), service=service) as container,
        overriding(Container, service=service) as declared,
    ):
        assert_type(container, Container)
        assert_type(declared, type[Container])
    with count_statements(manager, at_most=3) as sent, count_statements(container):
        assert_type(sent, list[SentStatement])
        assert_type(sent[0].where, str)
    with overriding(service):  # type: ignore[type-var]
        pass


class Databases(containers.DeclarativeContainer):
    config = providers.Configuration()
    settings = providers.ThreadSafeSingleton(DatabaseSettings.load)
    shop = DatabaseContainer.nested(settings=settings)
    archive = DatabaseContainer.nested(config=config.archive)


class Application(containers.DeclarativeContainer):
    databases = nested_container(Databases)
    service = providers.Factory(
        Service, session=databases.shop.session, transaction=databases.archive.transaction
    )


class Plant(containers.DeclarativeContainer):
    application = nested_container(Application)


Shop = Annotated[DatabaseSessionManager, Provide[Application.databases.shop.sessionmanager]]


async def use_containers(plant: Plant, shop: Shop) -> None:
    databases = plant.application.databases
    assert_type(databases.shop.session(), CurrentSession)
    assert_type(databases.archive.transaction(), TransactionManager)
    assert_type(databases.shop.sessionmanager(), DatabaseSessionManager)
    assert_type(databases.shop.manager(), DatabaseSessionManager)
    assert_type(databases.shop.settings(), DatabaseSettings)
    assert_type(databases.shop.metadata(), MetaData)
    assert_type(plant.application.service(), Service)
    assert_type(Plant.application.databases.archive.session(), CurrentSession)
    async with databases.shop.transaction()() as session, Lifespan(plant) as opened:
        assert_type(session, AsyncSession)
        assert_type(opened, Plant)
    databases.archive.override(DatabaseContainer(settings="sqlite://"))
    with overriding(plant, application__databases__shop__settings="sqlite://"):
        databases.shop.sessionmanager().init("sqlite://")
    Service(databases.shop.transaction(), databases.shop.session())  # type: ignore[arg-type]
    nested_container(Service)  # type: ignore[type-var]


class Hero(SQLModel, table=True):
    id: int | None = Field(default=None, primary_key=True)
    name: str


class Heroes:
    def __init__(
        self, session: SQLModelSession, transaction: TransactionManager[SQLModelSession]
    ) -> None:
        self.session, self.transaction = session, transaction

    @transactional(retries=1)
    async def rename(self, name: str, new: str) -> Hero:
        hero = (await self.session.exec(select_models(Hero).where(Hero.name == name))).one()
        assert_type(hero, Hero)
        hero.name = new
        return hero


class HeroContainer(containers.DeclarativeContainer):
    db = DatabaseContainer.nested(
        settings="sqlite://",
        session_class=SQLModelSession,
        session_options={"autoflush": False},
        engine_options={"query_cache_size": 100},
        connect_args={"cached_statements": 100},
        metadata=SQLModel.metadata,
    )
    heroes = providers.Factory(Heroes, session=db.session, transaction=db.transaction)


HeroSession = Annotated[SQLModelSession, Provide[HeroContainer.db.session]]


async def use_a_session_class(container: HeroContainer, plain: TransactionManager) -> None:
    session, transaction = container.db.session(), container.db.transaction()
    assert_type(session, SQLModelSession)
    assert_type(transaction, TransactionManager[SQLModelSession])
    assert_type(container.db.sessionmanager(), DatabaseSessionManager[SQLModelSession])
    assert_type(await session.exec(select_models(Hero)), ScalarResult[Hero])
    assert_type(await container.heroes().rename("Ada", "Grace"), Hero)
    async with transaction() as opened, container.db.sessionmanager().session() as bare:
        assert_type((await opened.exec(select_models(Hero))).first(), Hero | None)
        assert_type(bare, SQLModelSession)
    manager = DatabaseSessionManager("sqlite://", session_class=SQLModelSession)
    assert_type(manager.transaction, TransactionManager[SQLModelSession])
    Heroes(session, manager.transaction)
    Service(session, manager.transaction)
    Heroes(session, plain)  # type: ignore[arg-type]
    with count_statements(manager):
        CurrentSession(manager)
    TransactionMiddleware(app, transaction=transaction)
    assert_type(DatabaseSessionManager("sqlite://"), DatabaseSessionManager)
    provided = DatabaseContainer.nested(session_class=providers.Object(SQLModelSession))
    assert_type(provided.session(), CurrentSession)
    DatabaseSessionManager("sqlite://", session_class=Hero)  # type: ignore[type-var]


class MigratedPlant(containers.DeclarativeContainer):
    db = DatabaseContainer.nested(settings="sqlite://", migrations="plant:migrations")


async def migrations_are_run_for_a_container_its_database_or_a_manager() -> None:
    plant = MigratedPlant()
    run_migrations(plant)
    run_migrations(plant.db, lock_timeout=None, compare_server_default=True)
    run_migrations(DatabaseSessionManager("sqlite://", migrations=Path("migrations")))
    async with Lifespan(plant, migrations="require") as opened:
        assert_type((await opened.db.sessionmanager().migrate()).pending, tuple[str, ...])
    Lifespan(plant, migrations="always")  # type: ignore[arg-type]
