"""fastapi-users: its adapter commits itself, so it works in `session()`."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from typing import Any

import pytest
from fastapi import Depends, FastAPI
from sqlalchemy.orm import DeclarativeBase

from sessionwire import DatabaseSessionManager, DatabaseSettings, ScopeOwnsTransactionError
from tests.http_server import served

pytestmark = pytest.mark.long
adapter: Any = pytest.importorskip(
    "fastapi_users_db_sqlalchemy", reason="it refuses SQLAlchemy 2.1, so .ci/lowest tries it"
)
fastapi_users: Any = pytest.importorskip("fastapi_users")
authentication: Any = pytest.importorskip("fastapi_users.authentication")
schemas: Any = fastapi_users.schemas

SECRET = "of this test only, and long enough"
ADA = {"email": "ada@example.org", "password": "an engine of brass"}


class Base(DeclarativeBase):
    pass


class User(adapter.SQLAlchemyBaseUserTableUUID, Base):
    pass


class UserManager(fastapi_users.UUIDIDMixin, fastapi_users.BaseUserManager):
    reset_password_token_secret = verification_token_secret = SECRET


class UserRead(schemas.BaseUser[uuid.UUID]):
    pass


class UserCreate(schemas.BaseUserCreate):
    pass


def create_app(manager: DatabaseSessionManager) -> FastAPI:
    async def get_user_manager() -> AsyncIterator[Any]:
        async with manager.session() as session:
            yield UserManager(adapter.SQLAlchemyUserDatabase(session, User))

    backend = authentication.AuthenticationBackend(
        name="jwt",
        transport=authentication.BearerTransport(tokenUrl="login"),
        get_strategy=lambda: authentication.JWTStrategy(SECRET, lifetime_seconds=60),
    )
    users = fastapi_users.FastAPIUsers(get_user_manager, [backend])
    app = FastAPI()
    app.include_router(users.get_register_router(UserRead, UserCreate))
    app.include_router(users.get_auth_router(backend))

    async def me(user: Any) -> str:
        return str(user.email)

    me.__annotations__["user"] = Any
    me.__defaults__ = (Depends(users.current_user(active=True)),)
    app.get("/me")(me)
    return app


@pytest.fixture
async def users(settings: DatabaseSettings) -> AsyncIterator[DatabaseSessionManager]:
    async with DatabaseSessionManager(settings, metadata=Base.metadata) as manager:
        async with manager.connect() as connection:
            await manager.create_all(connection)
        yield manager


async def test_a_user_registers_and_logs_in(users: DatabaseSessionManager) -> None:
    async with served(create_app(users)) as client:
        registered = await client.post("/register", json=ADA)
        assert registered.status_code == 201, registered.text
        again = await client.post("/register", json=ADA)
        assert again.json() == {"detail": "REGISTER_USER_ALREADY_EXISTS"}
        login = {"username": ADA["email"], "password": ADA["password"]}
        token = (await client.post("/login", data=login)).json()["access_token"]

        answer = await client.get("/me", headers={"Authorization": f"Bearer {token}"})
    assert answer.json() == ADA["email"]


async def test_its_adapter_is_refused_in_a_transaction(users: DatabaseSessionManager) -> None:
    with pytest.raises(ScopeOwnsTransactionError):
        async with users.transaction() as session:
            database = adapter.SQLAlchemyUserDatabase(session, User)
            await database.create({"email": ADA["email"], "hashed_password": ""})
