"""Settings of the server that hold for one transaction."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import pytest
from dependency_injector import containers, providers
from sqlalchemy import select, text
from sqlalchemy.exc import DBAPIError, PendingRollbackError
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
    read_only,
    transactional,
)
from sessionwire.testing import count_statements, sandbox

from .models import Note
from .postgres import OnPostgres

TENANT = text("SELECT current_setting('app.tenant', true)")
BY_MANAGER: dict[str, object] = {"app.tenant": "of the manager"}


async def tenant_of(session: AsyncSession | Any) -> str:
    return str(await session.scalar(TENANT))


PIPELINE = pytest.param(
    True, marks=pytest.mark.asyncpg_only("nothing is sent ahead"), id="pipeline"
)


@pytest.fixture(params=[PIPELINE, pytest.param(False, id="no pipeline")])
def settings(database_url: str, request: pytest.FixtureRequest) -> DatabaseSettings:
    return DatabaseSettings(url=database_url, pipeline=request.param)


@pytest.fixture
def current() -> dict[str, object]:
    """Return what `session_settings` returns."""
    return dict(BY_MANAGER)


@pytest.fixture
def asked() -> list[None]:
    return []


@pytest.fixture
async def tenants(
    settings: DatabaseSettings, current: dict[str, object], asked: list[None]
) -> AsyncIterator[DatabaseSessionManager]:
    """Yield an open manager with `session_settings`."""

    def ask() -> Mapping[str, object]:
        asked.append(None)
        return current

    async with DatabaseSessionManager(settings, session_settings=ask) as manager:
        yield manager


class TestOfOneBlock(OnPostgres):
    async def test_they_hold_until_the_transaction_ends(
        self, manager: DatabaseSessionManager
    ) -> None:
        given = {"app.tenant": 7, "statement_timeout": "2s", "app.flag": True, "app.rate": 0.5}
        async with manager.transaction(settings=given) as session:
            for name, shown in (
                ("app.tenant", "7"),
                ("statement_timeout", "2s"),
                ("app.flag", "on"),
                ("app.rate", "0.5"),
            ):
                assert await session.scalar(text(f"SELECT current_setting('{name}')")) == shown
        async with manager.engine.connect() as connection:
            assert await tenant_of(connection) == ""
            assert await connection.scalar(text("SHOW statement_timeout")) == "0"

    async def test_a_value_is_data_and_never_sql(self, manager: DatabaseSessionManager) -> None:
        value = "'); DROP TABLE note; --"
        async with manager.transaction(settings={"app.tenant": value}) as session:
            assert await tenant_of(session) == value
            assert await session.scalar(text("SELECT count(*) FROM note")) == 0

    @pytest.mark.parametrize("mode", [Propagation.SUPPORTS, Propagation.NOT_SUPPORTED])
    @pytest.mark.parametrize("reads", [True, False])
    async def test_they_hold_for_each_statement_without_a_transaction(
        self, manager: DatabaseSessionManager, mode: Propagation, reads: bool
    ) -> None:
        options: Any = {"read_only": reads, "settings": {"app.tenant": "here"}}
        async with manager.transaction(mode, **options) as session:
            for _ in range(3):
                assert await tenant_of(session) == "here"
        async with manager.engine.connect() as connection:
            assert await tenant_of(connection) == ""

    @pytest.mark.several_connections("REQUIRES_NEW takes another")
    async def test_a_block_that_joins_may_ask_for_them_and_not_for_others(
        self, manager: DatabaseSessionManager
    ) -> None:
        async with manager.transaction(settings={"app.tenant": "a"}) as session:
            for mode in (Propagation.REQUIRED, Propagation.NESTED):
                async with manager.transaction(mode, settings={"app.tenant": "a"}):
                    assert await tenant_of(session) == "a"
                with pytest.raises(IncompatibleTransactionError, match=r"settings=\{'app.tenant'"):
                    async with manager.transaction(mode, settings={"app.tenant": "b"}):
                        pass
            new = manager.transaction(Propagation.REQUIRES_NEW, settings={"app.tenant": "b"})
            async with new as other:
                assert await tenant_of(other) == "b"
            assert await tenant_of(session) == "a"

    async def test_a_wrong_value_is_the_error_of_the_first_statement(
        self, manager: DatabaseSessionManager, settings: DatabaseSettings
    ) -> None:
        for _ in range(2):
            with pytest.raises(DBAPIError, match="invalid value for parameter") as caught:
                async with manager.transaction(settings={"statement_timeout": "soon"}) as session:
                    await session.execute(text("INSERT INTO note (text) VALUES ('never')"))
            if settings.pipeline:
                assert "set_config" in caught.value.__notes__[0]
        async with manager.transaction() as session:
            assert await session.scalar(text("SELECT count(*) FROM note")) == 0

    async def test_a_decorated_method_takes_them(self, manager: DatabaseSessionManager) -> None:
        class Service:
            transaction, session = manager.transaction, CurrentSession(manager)

            @transactional(settings={"app.tenant": "7"})
            async def show(self) -> str:
                return await tenant_of(self.session)

        assert await Service().show() == "7"


class TestOfAManager(OnPostgres):
    async def test_they_hold_in_each_block_and_not_on_the_engine(
        self, tenants: DatabaseSessionManager, current: dict[str, object]
    ) -> None:
        for name in ("a", "b"):
            current["app.tenant"] = name
            async with tenants.transaction() as session:
                assert await tenant_of(session) == name
            async with tenants.session() as session:
                assert await tenant_of(session) == name
            async with tenants.connect() as connection:
                assert await tenant_of(connection) == name
            for mode in (Propagation.SUPPORTS, Propagation.NOT_SUPPORTED, Propagation.NEVER):
                for reads in (True, False):
                    async with tenants.transaction(mode, read_only=reads) as session:
                        assert await tenant_of(session) == name
            async with tenants.transaction(read_only=True, isolation="SERIALIZABLE") as session:
                assert await tenant_of(session) == name
        async with tenants.engine.connect() as connection:
            assert await tenant_of(connection) == ""

    async def test_those_of_a_block_come_first(self, tenants: DatabaseSessionManager) -> None:
        async with tenants.transaction(settings={"app.tenant": "of the block"}) as session:
            assert await tenant_of(session) == "of the block"

    @pytest.mark.several_connections("REQUIRES_NEW takes another")
    async def test_they_are_asked_for_at_each_begin_and_at_no_joined_block(
        self, tenants: DatabaseSessionManager, asked: list[None]
    ) -> None:
        async with tenants.transaction() as session:
            await session.scalar(select(1))
            async with tenants.transaction(), tenants.transaction(Propagation.NESTED):
                await session.scalar(select(1))
            assert len(asked) == 1
            async with tenants.transaction(Propagation.REQUIRES_NEW) as other:
                await other.scalar(select(1))
            assert len(asked) == 2
        async with tenants.session() as session:
            for _ in range(2):
                await session.scalar(select(1))
                await session.commit()
        assert len(asked) == 4

    async def test_nothing_is_sent_without_them_if_they_cannot_be_told(
        self, settings: DatabaseSettings
    ) -> None:
        def fail() -> Mapping[str, object]:
            raise LookupError("no tenant is set")

        async with DatabaseSessionManager(settings, session_settings=fail) as manager:
            for options in ({}, {"propagation": Propagation.SUPPORTS, "read_only": True}):
                block: Any = manager.transaction(**options)
                with (
                    count_statements(manager) as sent,
                    pytest.raises(PendingRollbackError),
                ):
                    async with block as session:
                        with pytest.raises(LookupError, match="no tenant"):
                            await session.scalar(select(1))
                        await session.scalar(select(1))  # though the error was swallowed
                assert sent == []

    async def test_what_takes_no_settings_is_refused_unless_the_block_does_without(
        self, tenants: DatabaseSessionManager, settings: DatabaseSettings
    ) -> None:
        without: Any = {"execution_options": {"sessionwire_without_hooks": True}}
        async with tenants.transaction(Propagation.NOT_SUPPORTED) as session:
            with pytest.raises(DBAPIError, match="VACUUM cannot") as caught:
                await session.execute(text("VACUUM"))
        if settings.pipeline:
            assert any("sessionwire_without_hooks" in note for note in caught.value.__notes__)
        async with tenants.transaction(Propagation.NOT_SUPPORTED, **without) as session:
            await session.execute(text("VACUUM"))

    async def test_a_session_put_into_autocommit_by_hand_is_refused(
        self, tenants: DatabaseSessionManager
    ) -> None:
        by_hand = {"isolation_level": "AUTOCOMMIT"}
        async with tenants.session() as session:
            with pytest.raises(IncompatibleTransactionError, match="in AUTOCOMMIT"):
                await session.connection(execution_options=by_hand)

    async def test_on_begin_hooks_run_after_them(self, tenants: DatabaseSessionManager) -> None:
        seen: list[str] = []

        @tenants.transaction.on_begin
        async def look(connection: Any) -> None:
            seen.append(await tenant_of(connection))

        for mode in (Propagation.REQUIRED, Propagation.NOT_SUPPORTED):
            async with tenants.transaction(mode) as session:
                assert await tenant_of(session) == "of the manager"
        assert seen == ["of the manager"] * 2

    async def test_row_level_security_holds_for_writes_and_reads_and_bulk_writes(
        self, tenants: DatabaseSessionManager, current: dict[str, object]
    ) -> None:
        async with tenants.connect() as connection:
            for sql in (
                "CREATE TABLE parcel (id serial, owner text "
                "DEFAULT nullif(current_setting('app.tenant', true), ''), content text)",
                "ALTER TABLE parcel ENABLE ROW LEVEL SECURITY",
                "CREATE POLICY own ON parcel "
                "USING (owner = nullif(current_setting('app.tenant', true), ''))",
                "DROP ROLE IF EXISTS clerk",
                "CREATE ROLE clerk",
                "GRANT ALL ON parcel, parcel_id_seq TO clerk",
            ):
                await connection.execute(text(sql))
        current["role"] = "clerk"  # a superuser is bound by no policy
        count = text("SELECT count(*) FROM parcel")
        for name, expected in (("north", 3), ("south", 3), ("", 0)):
            current["app.tenant"] = name
            if name:
                async with tenants.transaction() as session:
                    insert = text("INSERT INTO parcel (content) VALUES (:content)")
                    await session.execute(insert, [{"content": "a"}, {"content": "b"}])
                    await session.execute(insert, {"content": "c"})
            reading = tenants.transaction(Propagation.SUPPORTS, read_only=True)
            async with reading as session:
                assert await session.scalar(count) == expected
        current.clear()
        async with tenants.connect() as connection:
            assert await connection.scalar(count) == 6
            await connection.execute(text("DROP OWNED BY clerk"))
            await connection.execute(text("DROP ROLE clerk"))

    @pytest.mark.parametrize("source", ["7", 7])
    async def test_a_source_that_cannot_be_called_is_refused(self, source: Any) -> None:
        with pytest.raises(TypeError, match="session_settings takes a function"):
            DatabaseSessionManager("sqlite://", session_settings=source)

    async def test_a_coroutine_function_is_no_source(self, settings: DatabaseSettings) -> None:
        async def ask() -> dict[str, str]:
            return {}

        wrong: Any = ask
        with pytest.raises(TypeError, match="session_settings"):
            DatabaseSessionManager(settings, session_settings=wrong)


class TestInASandbox(OnPostgres):
    @pytest.mark.several_connections("REQUIRES_NEW takes another")
    async def test_each_transaction_has_its_own(self, tenants: DatabaseSessionManager) -> None:
        async with sandbox(tenants):
            async with tenants.transaction(settings={"app.tenant": "a"}) as session:
                assert await tenant_of(session) == "a"
                async with tenants.transaction(Propagation.REQUIRES_NEW) as other:
                    assert await tenant_of(other) == "of the manager"
                assert await tenant_of(session) == "a"
            async with tenants.transaction(Propagation.SUPPORTS, read_only=True) as session:
                assert await tenant_of(session) == "of the manager"
            async with tenants.engine.connect() as connection:
                assert await tenant_of(connection) == ""


class TestInAContainer(OnPostgres):
    async def test_they_are_provided_and_overridden(
        self, settings: DatabaseSettings, current: dict[str, object]
    ) -> None:
        class Tenants:
            def __init__(self, name: str) -> None:
                self.name = name

            def settings(self) -> dict[str, object]:
                return {"app.tenant": self.name}

        class Service:
            def __init__(self, session: CurrentSession, transaction: TransactionManager) -> None:
                self.session, self.transaction = session, transaction

            @read_only
            async def show(self) -> str:
                return await tenant_of(self.session)

        class Container(containers.DeclarativeContainer):
            given = providers.Object(settings)
            tenants = providers.Singleton(Tenants, "injected")
            db = providers.Container(
                DatabaseContainer, settings=given, session_settings=tenants.provided.settings
            )
            service = providers.Factory(Service, db.session, db.transaction)

        async with Lifespan(Container()) as container:
            assert await container.service().show() == "injected"
        container = Container()
        with container.db.session_settings.override(providers.Object(lambda: current)):
            async with Lifespan(container):
                assert await container.service().show() == "of the manager"


REFUSED: list[tuple[Any, type[Exception], str]] = [
    ("app.tenant=7", TypeError, "settings are a mapping"),
    ({"app tenant": "7"}, ValueError, "no name of a setting"),
    ({7: "7"}, ValueError, "no name of a setting"),
    ({"app.tenant": None}, TypeError, "'app.tenant' has the value None"),
    ({"transaction_read_only": "on"}, ValueError, "read_only=True"),
    ({"transaction_isolation": "serializable"}, ValueError, "isolation="),
]


@pytest.mark.parametrize(("given", "error", "message"), REFUSED)
async def test_what_cannot_be_settings_is_refused_at_the_call(
    given: Any, error: type[Exception], message: str
) -> None:
    manager = DatabaseSessionManager("sqlite://")
    with pytest.raises(error, match=message):
        manager.transaction(settings=given)
    with pytest.raises(error, match=message):
        transactional(settings=given)


async def test_sqlite_has_no_settings_and_takes_none(tmp_path: Any) -> None:
    source: Callable[[], dict[str, object]] = dict
    manager = DatabaseSessionManager(f"sqlite:///{tmp_path}/a.db", session_settings=source)
    async with manager:
        async with manager.connect() as connection:
            await manager.create_all(connection)
        async with manager.transaction() as session:
            session.add(Note(text="kept"))
        for mode in (Propagation.REQUIRED, Propagation.NOT_SUPPORTED):
            with pytest.raises(IncompatibleTransactionError, match="settings are PostgreSQL's"):
                async with manager.transaction(mode, settings={"app.tenant": "7"}) as session:
                    await session.scalar(select(1))
