"""Mistakes of newcomers: each error says what happened, and what to write instead."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Annotated, Any

import pytest
from dependency_injector import containers, providers
from fastapi import FastAPI
from sqlalchemy import insert, select
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import defer
from sqlalchemy.orm.exc import DetachedInstanceError

from sessionwire import (
    DatabaseSessionManager,
    Propagation,
    TransactionManager,
    read_only,
    transactional,
)
from sessionwire.fastapi import Provide, inject

from .models import Note
from .sample_app import Container, Notebook


def told(error: BaseException) -> str:
    return "\n".join([str(error), *getattr(error, "__notes__", ())])


TRANSACTION: Any = DatabaseSessionManager("sqlite://").transaction
WAYS = {"a block": TRANSACTION, "a decorator": transactional}
MISTAKES: list[tuple[tuple[object, ...], dict[str, object], str]] = [
    (("NESTED",), {}, "'NESTED' is not a Propagation: write Propagation.NESTED"),
    (("requires_new",), {}, "write Propagation.REQUIRES_NEW"),
    (("NESTD",), {}, "did you mean Propagation.NESTED?"),
    (("SERIALIZABLE",), {}, "'SERIALIZABLE' is not a Propagation: write isolation='SERIALIZABLE'"),
    (("none such",), {}, "there are Propagation.REQUIRED, REQUIRES_NEW,"),
    (
        (),
        {"isolation_level": "SERIALIZABLE"},
        "a block has no option 'isolation_level': write isolation=",
    ),
    ((), {"read_onyl": True}, "a block has no option 'read_onyl': did you mean 'read_only'?"),
    ((), {"nested": True}, "write transaction(Propagation.NESTED)"),
    ((), {"frobnicate": 1}, "there are isolation, read_only, timeout, execution_options"),
]


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize(("arguments", "options", "message"), MISTAKES)
def test_an_invalid_option_of_a_block_is_explained(
    way: Callable[..., object],
    arguments: tuple[object, ...],
    options: dict[str, object],
    message: str,
) -> None:
    with pytest.raises(TypeError) as raised:
        way(*arguments, **options)
    assert message in str(raised.value)


def test_retries_of_a_block_are_refused_with_the_remedy() -> None:
    with pytest.raises(TypeError, match=r"'retries': only @transactional\(retries=…\) and run"):
        TRANSACTION(retries=3)
    with pytest.raises(ValueError, match="unknown isolation level 3"):
        TRANSACTION(isolation=3)
    with pytest.raises(TypeError, match="None is not a Propagation"):
        TRANSACTION(None)


@pytest.mark.parametrize("decorator", [transactional, read_only])
def test_a_decorator_above_a_wrong_object_is_explained(decorator: Any) -> None:
    class Shop: ...

    with pytest.raises(
        TypeError, match=r"write @.* above each method of Shop that is to be a block, not above"
    ):
        decorator(Shop)
    for given in (TRANSACTION, Container().db.transaction, 3):
        with pytest.raises(
            TypeError,
            match="without this argument, above 'async def'; "
            "the function's TransactionManager is found when",
        ):
            decorator(given)


class Slotted:
    __slots__ = ("_tx",)

    def __init__(self) -> None:
        self._tx = TRANSACTION

    @transactional
    async def work(self) -> None: ...


class Misnamed:
    def __init__(self) -> None:
        self.session, self.tx = object(), TRANSACTION

    @read_only
    async def work(self) -> None: ...


class Without:
    @transactional
    async def work(self) -> None: ...


async def test_a_missing_attribute_is_explained() -> None:
    with pytest.raises(
        TypeError, match="'transaction' of Slotted is missing: there is one in '_tx', so write"
    ):
        await Slotted().work()
    with pytest.raises(TypeError, match=r"there is one in 'tx', so write @read_only\(of='tx'\)"):
        await Misnamed().work()
    with pytest.raises(
        TypeError, match=r"of Without is missing: inject one, as db\.transaction provides"
    ):
        await Without().work()


async def test_a_function_that_is_not_wired_is_explained(manager: DatabaseSessionManager) -> None:
    @transactional
    async def work(transaction: TransactionManager = Provide["db.transaction"]) -> None: ...

    with pytest.raises(
        TypeError, match=r"@inject above @transactional, and wire\(\) the container"
    ):
        await work()


async def test_a_block_that_is_not_called_or_not_entered_is_explained(
    manager: DatabaseSessionManager,
) -> None:
    class Own(containers.DeclarativeContainer):
        transaction = providers.Factory(TransactionManager, manager)

    provided: Any = Own().transaction()
    with pytest.raises(
        TypeError,
        match=r"this is the TransactionManager, .* `async with container.db.transaction\(\)\(\):`",
    ):
        async with provided:
            pass
    blocks: list[Any] = [manager.transaction(), manager.session()]
    for block in blocks:
        with pytest.raises(
            AttributeError,
            match=r"'execute' was looked for in a block that is not entered: write `async",
        ):
            await block.execute(select(1))
        with pytest.raises(TypeError, match="entered with `async with`, not with `with`"), block:
            pass
        with (
            pytest.raises(TypeError, match="entered with `async with`, not with `with`"),
            ExitStack() as stack,
        ):
            stack.enter_context(block)
        assert not hasattr(block, "_none_such")
        async with block as session:
            assert await session.scalar(select(1)) == 1


@pytest.mark.parametrize("propagation", [Propagation.REQUIRED, Propagation.SUPPORTS])
async def test_a_write_in_a_read_only_block_is_explained(
    manager: DatabaseSessionManager, propagation: Propagation
) -> None:
    for by_hand in (False, True):
        with pytest.raises(DBAPIError) as raised:
            async with manager.transaction(propagation, read_only=True) as session:
                if by_hand:
                    await session.execute(insert(Note).values(text="a"))
                else:
                    session.add(Note(text="a"))
        assert "the enclosing block only reads, by read_only=True or @read_only: write in" in told(
            raised.value
        )


async def test_an_attribute_not_loaded_before_its_block_ended_is_explained(
    manager: DatabaseSessionManager,
) -> None:
    async with manager.transaction() as session:
        session.add(Note(text="child", parent=Note(text="parent")))
    async with manager.transaction() as session:
        query = select(Note).where(Note.text == "child").options(defer(Note.text))
        note = (await session.scalars(query)).one()
    with pytest.raises(DetachedInstanceError) as raised:
        _ = note.parent
    assert "Note.parent was not loaded when the block of its session ended: load it inside" in told(
        raised.value
    )
    assert "selectinload(Note.parent) in the query" in told(raised.value)
    with pytest.raises(DetachedInstanceError, match="deferred load") as raised:
        _ = note.text
    assert "Note.text was not loaded" in told(raised.value)
    assert "selectinload" not in told(raised.value)
    assert not getattr(DetachedInstanceError("of others"), "__notes__", None)


Given = Annotated[Notebook, Provide[Container.notebook]]


def test_an_endpoint_without_inject_is_explained() -> None:
    async def endpoint(notebook: Annotated[Notebook, Provide[Container.notebook]]) -> None: ...

    endpoint.__annotations__["notebook"] = Given
    with pytest.raises(
        TypeError,
        match="is on a parameter of an endpoint without @inject: write @inject below the route",
    ):
        FastAPI().get("/")(endpoint)


async def test_an_endpoint_that_is_not_wired_is_explained() -> None:
    @inject
    async def endpoint(notebook: Given) -> None:
        raise TypeError("its own")

    @inject
    def sync_endpoint(notebook: Given) -> None:
        raise TypeError("its own")

    unwired: list[Any] = [endpoint, sync_endpoint]
    for function in unwired:
        with pytest.raises(
            TypeError, match="missing 1 required positional argument: 'notebook'"
        ) as raised:
            await function()
        assert r"Nothing was injected: call container.wire(modules=[…])" in told(raised.value)
        with pytest.raises(TypeError, match="its own") as raised:
            await function(notebook=None)
        assert told(raised.value) == "its own"
