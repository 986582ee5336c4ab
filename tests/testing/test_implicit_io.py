"""Lazy loads without await: the error names the remedy, and does no harm."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from sqlalchemy import ForeignKey, select
from sqlalchemy.exc import MissingGreenlet
from sqlalchemy.ext.asyncio import AsyncAttrs, AsyncConnection, AsyncSession
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    mapped_column,
    relationship,
    selectinload,
    undefer,
)

from sessionwire import DatabaseSessionManager, DatabaseSettings, ImplicitIOError, ScopeError
from tests.models import Note


class Library(AsyncAttrs, DeclarativeBase):
    pass


class Author(Library):
    __tablename__ = "author"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    life: Mapped[str] = mapped_column(deferred=True)
    books: Mapped[list[Book]] = relationship(back_populates="author")


class Book(Library):
    __tablename__ = "book"

    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str]
    author_id: Mapped[int] = mapped_column(ForeignKey("author.id"))
    author: Mapped[Author] = relationship(back_populates="books")


class Other(DeclarativeBase):
    """Without SQLAlchemy's `AsyncAttrs`."""


class Writer(Other):
    __tablename__ = "author"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(deferred=True)


@pytest.fixture
async def manager(settings: DatabaseSettings) -> AsyncIterator[DatabaseSessionManager]:
    """Yield a manager of a database with an author and a book."""
    async with DatabaseSessionManager(settings, metadata=Library.metadata) as manager:
        async with manager.connect() as connection:
            await manager.create_all(connection)
        async with manager.transaction() as session:
            session.add(Book(title="Emma", author=Author(name="Jane Austen", life="1775 to 1817")))
        yield manager


async def titles(manager: DatabaseSessionManager) -> list[str]:
    async with manager.connect() as connection:
        return list(await connection.scalars(select(Book.title).order_by(Book.title)))


async def author(session: AsyncSession) -> Author:
    return (await session.scalars(select(Author))).one()


async def book(session: AsyncSession) -> Book:
    return (await session.scalars(select(Book).where(Book.title == "Emma"))).one()


async def expired_author(session: AsyncSession) -> Author:
    found = await author(session)
    session.expire(found)
    return found


def replace_books(author: Author) -> None:
    author.books = []


Find = Callable[[AsyncSession], Awaitable[Author | Book]]
USES: dict[str, tuple[Find, Callable[..., object], str]] = {
    "a collection": (
        author,
        lambda author: author.books,
        "Author.books is not loaded, and this would load it without await: "
        "use selectinload(Author.books) in the "
        'query, or await obj.awaitable_attrs.books, or await session.refresh(obj, ["books"])',
    ),
    "a collection that is replaced": (author, replace_books, "Author.books is not loaded"),
    "a reference": (
        book,
        lambda book: book.author,
        "use selectinload(Book.author) in the query, or await obj.",
    ),
    "a deferred column": (
        author,
        lambda author: author.life,
        "Author.life is not loaded, and this would load it without await: "
        "use undefer(Author.life) in the query, "
        'or await obj.awaitable_attrs.life, or await session.refresh(obj, ["life"])',
    ),
    "an expired column": (
        expired_author,
        lambda author: author.name,
        "Author.name is not loaded, and this would load it without await: "
        "use await obj.awaitable_attrs.name, "
        'or await session.refresh(obj, ["name"])',
    ),
}


@pytest.mark.parametrize("connection", ["in use", "idle", "none"])
@pytest.mark.parametrize("block", ["session", "transaction"])
@pytest.mark.parametrize(("find", "use", "message"), USES.values(), ids=USES)
async def test_the_error_of_a_lazy_load_names_the_attribute_and_the_remedy(
    manager: DatabaseSessionManager,
    find: Find,
    use: Callable[..., object],
    message: str,
    block: str,
    connection: str,
) -> None:
    async with manager.session() as session:
        found = await find(session)
        session.expunge(found)
    if connection == "none":
        await manager.engine.dispose()
    async with manager.session() if block == "session" else manager.transaction() as session:
        session.add(found)
        if connection == "in use":
            session.add(Book(title="Before", author_id=1))
            await session.flush()
        session.add(Book(title="Pending", author_id=1))
        with pytest.raises(ImplicitIOError) as refused:
            use(found)
        assert message in str(refused.value)

        session.add(Book(title="After", author_id=1))
        await session.refresh(found)
        if block == "session":
            await session.commit()
    assert await titles(manager) == [
        "After",
        *(["Before"] if connection == "in use" else []),
        "Emma",
        "Pending",
    ]


@pytest.mark.parametrize("handler", [MissingGreenlet, ScopeError])
async def test_the_error_of_a_lazy_load_is_also_sqlalchemys_missing_greenlet(
    manager: DatabaseSessionManager, handler: type[Exception]
) -> None:
    async with manager.session() as session:
        found = await book(session)
        with pytest.raises(handler):
            _ = found.author


async def test_a_lazy_load_whose_error_leaves_the_block_rolls_back(
    manager: DatabaseSessionManager,
) -> None:
    with pytest.raises(ImplicitIOError):
        async with manager.transaction() as session:
            session.add(Book(title="Undone", author_id=1))
            _ = (await book(session)).author
    assert await titles(manager) == ["Emma"]


async def test_a_read_only_block_goes_on_after_a_refused_lazy_load(
    manager: DatabaseSessionManager,
) -> None:
    async with manager.transaction(read_only=True) as session:
        found = await book(session)
        with pytest.raises(ImplicitIOError):
            _ = found.author
        assert (await found.awaitable_attrs.author).name == "Jane Austen"


async def test_a_refused_lazy_load_begins_no_transaction(manager: DatabaseSessionManager) -> None:
    begun = []

    async def note_begin(connection: AsyncConnection) -> None:
        begun.append(await connection.scalar(select(1)))

    async with manager.session() as session:
        found = await book(session)
        session.expunge(found)
    manager.transaction.on_begin(note_begin)
    async with manager.transaction() as session:
        session.add(found)
        with pytest.raises(ImplicitIOError):
            _ = found.author
        assert begun == []
        assert await found.awaitable_attrs.author
    assert begun == [1]


async def test_each_remedy_that_the_error_offers_loads_the_attribute(
    manager: DatabaseSessionManager,
) -> None:
    async with manager.session() as session:
        assert (
            (await session.scalars(select(Author).options(selectinload(Author.books)))).one().books
        )
    async with manager.session() as session:
        assert (await session.scalars(select(Author).options(undefer(Author.life)))).one().life
    for key in ("name", "life", "books"):
        async with manager.session() as session:
            assert await getattr((await expired_author(session)).awaitable_attrs, key)
        async with manager.session() as session:
            found = await expired_author(session)
            await session.refresh(found, [key])
            assert getattr(found, key)


async def test_the_error_of_a_lazy_load_offers_no_useless_remedy(
    manager: DatabaseSessionManager,
) -> None:
    async with manager.session() as session:
        writer = (await session.scalars(select(Writer))).one()
        with pytest.raises(
            ImplicitIOError, match=r"undefer\(Writer\.name\) in the query, or await session"
        ) as refused:
            _ = writer.name
    assert "awaitable_attrs" not in str(refused.value)
    async with manager.connect() as connection:
        await connection.run_sync(Note.metadata.create_all)
    async with manager.session() as session:
        session.add(Note(text="child", parent=Note(text="parent")))
        await session.commit()
    async with manager.session() as session:
        child = (await session.scalars(select(Note).where(Note.text == "child"))).one()
        with pytest.raises(
            ImplicitIOError, match=r"selectinload\(Note\.parent\).*awaitable_attrs"
        ) as refused:
            _ = child.parent
    # SQLAlchemy's refresh() loads no row of the same table.
    assert "refresh" not in str(refused.value)


async def test_a_statement_without_await_is_refused_with_the_remedy(
    manager: DatabaseSessionManager,
) -> None:
    async with manager.session() as session:
        with pytest.raises(
            ImplicitIOError, match=r"the AsyncSession's own methods, or .* session\.run_sync\(\)"
        ):
            session.sync_session.execute(select(Book))
        assert await session.run_sync(lambda sync: len(sync.scalars(select(Book)).all())) == 1
