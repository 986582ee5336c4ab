"""The pytest plugin in projects of its users, tested by another pytest process."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.conftest import Postgres

CHECKOUT = Path(__file__).parents[2]
CONFTEST = """
import pytest
from shop import Container

@pytest.fixture(scope="session")
def sessionwire_container():
    return Container
"""
SHOP = """
from dependency_injector import containers, providers
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from sessionwire import DatabaseContainer, TransactionManager, transactional


class Base(DeclarativeBase):
    pass


class Item(Base):
    __tablename__ = "item"
    name: Mapped[str] = mapped_column(primary_key=True)


class Items:
    def __init__(self, session: AsyncSession, transaction: TransactionManager) -> None:
        self.session, self.transaction = session, transaction

    @transactional
    async def add(self, name: str) -> None:
        self.session.add(Item(name=name))

    @transactional
    async def has(self, name: str) -> bool:
        return await self.session.get(Item, name) is not None


class Container(containers.DeclarativeContainer):
    db = providers.Container(DatabaseContainer, metadata=Base.metadata)
    items = providers.Factory(Items, db.session, db.transaction)
"""
# each adds the same key, which only one could if anything were left
ADDS = """
{mark}
@pytest.mark.parametrize("number", range(2))
async def test_adds_{name}(container, number):
    assert not await container.items().has("pen")
    await container.items().add("pen")
    assert await container.items().has("pen")
"""
UNUSED = (
    "-p",
    "no:faker",
    "-p",
    "no:hypothesispytest",
)  # by these tests, and each takes a second to load
LOOPS = ("function", "class", "module", "package", "session")


class Project:
    def __init__(self, directory: Path, url: str) -> None:
        self.directory = directory
        self.url = url
        self.write("shop.py", SHOP)
        self.write("conftest.py", CONFTEST)

    def write(self, name: str, text: str) -> None:
        (self.directory / name).write_text(text, encoding="utf-8")

    def run(self, *arguments: str, url: str | None = None) -> subprocess.CompletedProcess[str]:
        own = (
            "-c",
            os.devnull,
            "--rootdir",
            str(self.directory),
            "-o",
            "asyncio_default_fixture_loop_scope=function",
        )
        return pytest_run(self.directory, *own, f"--sessionwire-url={url or self.url}", *arguments)


def pytest_run(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("PYTEST")
    }
    return subprocess.run(
        [sys.executable, "-m", "pytest", *plugin(), *UNUSED, "-q", *arguments],
        cwd=directory,
        env=environment | {"PYTHONPATH": f"{CHECKOUT / 'src'}{os.pathsep}{directory}"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def plugin() -> list[str]:
    """Register the plugin if sessionwire is imported without being installed."""
    from importlib.metadata import entry_points

    known = any(
        point.value == "sessionwire.pytest_plugin" for point in entry_points(group="pytest11")
    )
    return [] if known else ["-p", "sessionwire.pytest_plugin"]


@pytest.fixture
def project(backend: str, request: pytest.FixtureRequest, tmp_path: Path) -> Project:
    url = "sqlite://"
    if backend == "postgresql":
        server: Postgres = request.getfixturevalue("postgres")
        url = server.url("postgres")
    return Project(tmp_path, url)


def assert_passed(finished: subprocess.CompletedProcess[str], count: int) -> None:
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert f"{count} passed" in finished.stdout


@pytest.mark.long
@pytest.mark.parametrize(
    ("backend", "isolation"),
    [("sqlite", "sandbox"), ("postgresql", "sandbox"), ("postgresql", "database")],
)
def test_each_test_of_the_plugin_finds_a_clean_database_in_any_event_loop(
    project: Project, isolation: str
) -> None:
    marks = {scope: f'@pytest.mark.asyncio(loop_scope="{scope}")' for scope in LOOPS} | {
        "anyio": "@pytest.mark.anyio"
    }
    tests = "".join(ADDS.format(name=name, mark=mark) for name, mark in marks.items())
    backend = "\n@pytest.fixture\ndef anyio_backend():\n    return 'asyncio'\n"
    project.write("test_shop.py", "import pytest\n" + backend + tests)

    assert_passed(
        project.run("-o", "asyncio_mode=strict", f"--sessionwire-isolation={isolation}"),
        2 * len(marks),
    )


USES_CONTAINER = """
from shop import Container

{before}

async def test_adds(container):
    await container.items().add("pen")
"""


@pytest.mark.long
@pytest.mark.parametrize("settings", ["", ", settings='postgresql://shop@db.invalid/shop'"])
def test_a_database_of_the_plugin_is_asked_for_no_credentials_of_the_container(
    project: Project, settings: str
) -> None:
    asked = f"metadata=Base.metadata, credentials=lambda: 1 / 0{settings}"
    project.write("shop.py", SHOP.replace("metadata=Base.metadata", asked))
    # A module may have the manager of a container class from its import on.
    before = "Container.db.sessionmanager()" if settings else ""
    project.write("test_shop.py", USES_CONTAINER.format(before=before))
    for isolation in ("sandbox", "database"):
        assert_passed(
            project.run("-o", "asyncio_mode=auto", f"--sessionwire-isolation={isolation}"), 1
        )


KILLED = """
import os, signal
from sqlalchemy import text

async def test_is_killed(container):
    async with container.db.sessionmanager().connect() as connection:
        print(await connection.scalar(text("SELECT pg_read_file('postmaster.pid')")), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.long
def test_workers_share_an_embedded_server_and_stop_that_of_a_killed_run(
    tmp_path: Path,
) -> None:
    project = Project(tmp_path, "embedded")
    project.write("test_killed.py", KILLED)
    project.write(
        "test_shop.py", "import pytest\n" + "".join(ADDS.format(name=n, mark="") for n in range(4))
    )

    killed = project.run("-o", "asyncio_mode=auto", "-s", "test_killed.py")
    assert killed.returncode == -signal.SIGKILL
    server, data, *_ = killed.stdout.split()

    assert_passed(project.run("-o", "asyncio_mode=auto", "-n", "2", "test_shop.py"), 8)
    deadline = time.monotonic() + 10
    while psutil.pid_exists(int(server)) and time.monotonic() < deadline:
        time.sleep(0.01)  # An ended process exists until its parent notices.
    assert not psutil.pid_exists(int(server))
    assert not Path(data).parent.exists()


LEAKS = """
import asyncio
from sessionwire import transactional

left = []

async def test_a_session(container):
    await container.db.sessionmanager().session().__aenter__()  # told

async def test_a_task(container):
    async def never_ends():
        await asyncio.Event().wait()  # told
    asyncio.create_task(never_ends())

async def test_a_transaction(container):
    session = await container.db.sessionmanager().transaction().__aenter__()  # told
    await session.connection()

async def test_a_connection(container):
    left.append(await container.db.sessionmanager().engine.connect())  # told

async def test_one_that_was_opened_anew(container):
    manager = container.db.sessionmanager()
    await manager.close()
    await manager.open()
    await manager.session().__aenter__()  # told

async def test_a_task_in_a_method(container):
    asyncio.create_task(never_adds(container.db.transaction()))

@transactional
async def never_adds(transaction):
    await asyncio.gather(asyncio.Event().wait())  # told

async def test_one_that_was_closed(container):
    await container.db.sessionmanager().close()

async def test_nothing(container):
    assert not await container.items().has("pen")
"""


@pytest.mark.long
@pytest.mark.parametrize(
    ("backend", "isolation"), [("sqlite", "sandbox"), ("postgresql", "database")]
)
def test_a_test_that_leaves_something_open_fails_with_its_line(
    project: Project, isolation: str
) -> None:
    project.write("test_leaks.py", LEAKS)

    finished = project.run("-o", "asyncio_mode=auto", f"--sessionwire-isolation={isolation}")

    assert "8 passed, 6 errors" in finished.stdout, finished.stdout + finished.stderr
    told = {int(line) for line in re.findall(r"test_leaks\.py:(\d+)", finished.stdout)}
    assert told == {
        number for number, line in enumerate(LEAKS.splitlines(), 1) if line.endswith("# told")
    }


@pytest.mark.long
@pytest.mark.parametrize("backend", ["sqlite"])
def test_the_plugin_explains_errors_of_its_use_with_the_remedy(project: Project) -> None:
    project.write("test_shop.py", "async def test_it(container): pass")
    project.write(
        "app.py", f"{APP}container.db.sessionmanager().init('sqlite:///of-the-application.db')"
    )
    project.write("test_app.py", OF_A_MODULE + "async def test_it(container): pass")
    (project.directory / "conftest.py").unlink()
    said = project.run("-o", "asyncio_mode=auto").stdout
    assert "def sessionwire_container():" in said
    assert "was initialized before the test" in said
    assert "'sandbox' or 'database'" in project.run("--sessionwire-isolation=box").stderr


TWO = """
from dependency_injector import containers, providers
from sqlalchemy import Column, Integer, MetaData, Table
from sessionwire import DatabaseContainer

here, there = MetaData(), MetaData()
a, b = Table("a", here, Column("id", Integer)), Table("b", there, Column("id", Integer))

class Container(containers.DeclarativeContainer):
    here = providers.Container(DatabaseContainer, metadata=here)
    there = providers.Container(DatabaseContainer, metadata=there)
"""
USES_BOTH = """
import pytest
from sqlalchemy import insert
from shop import a, b

@pytest.mark.parametrize("number", range(6))
async def test_both(container, number):
    for database, table in ((container.here, a), (container.there, b)):
        async with database.transaction()() as session:
            await session.execute(insert(table).values(id=1))
"""


@pytest.mark.long
@pytest.mark.parametrize(
    ("backend", "isolation"), [("sqlite", "database"), ("postgresql", "sandbox")]
)
def test_two_databases_of_the_plugin_each_have_their_own_tables(
    project: Project, isolation: str
) -> None:
    project.write("shop.py", TWO)
    project.write("test_both.py", USES_BOTH)

    assert_passed(project.run("-o", "asyncio_mode=auto", f"--sessionwire-isolation={isolation}"), 6)


CUTS = """
import asyncio
import pytest
from sqlalchemy import text

COUNT = (
    "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 20000000) "
    "SELECT count(*) FROM n"
)

async def test_a_deadline(container):
    with pytest.raises(TimeoutError):
        async with container.db.transaction()(timeout=0.05) as session:
            await session.execute(text(COUNT))

async def test_a_task_that_is_cancelled_at_the_end(container):
    async def count():
        async with container.db.sessionmanager().session() as session:
            await session.execute(text(COUNT))
    task = asyncio.create_task(count())
    await asyncio.sleep(0.05)
    task.cancel()

async def test_tasks_that_end_one_after_the_other(container):
    async def last():
        await asyncio.sleep(0.1)
    async def first():
        await asyncio.sleep(0.1)
        later.append(asyncio.create_task(last()))
    later = [asyncio.create_task(first())]
"""


@pytest.mark.long
@pytest.mark.parametrize(("backend", "isolation"), [("sqlite", "sandbox"), ("sqlite", "database")])
def test_the_plugin_waits_for_work_that_ends_soon_after_the_test(
    project: Project, isolation: str
) -> None:
    project.write("test_cuts.py", CUTS)

    assert_passed(project.run("-o", "asyncio_mode=auto", f"--sessionwire-isolation={isolation}"), 3)


APP = """
from shop import Container, Items

container = Container()
container.db.config.from_dict({"url": "sqlite:///of-the-application.db"})
items = Items(container.db.session(), container.db.transaction())
"""
OF_A_MODULE = CONFTEST.replace("from shop import C", "from app import c").replace(
    "return C", "return c"
)
OF_THE_MODULE = """
import pytest
from app import container as of_the_module, items

@pytest.mark.parametrize("number", range(2))
async def test_it(container, number):
    assert container is of_the_module
    await items.add("pen")
    assert await container.items().has("pen")
"""


@pytest.mark.long
@pytest.mark.parametrize(
    ("backend", "isolation"), [("sqlite", "sandbox"), ("postgresql", "database")]
)
def test_objects_that_a_module_took_from_its_container_work_in_tests(
    project: Project, isolation: str
) -> None:
    project.write("app.py", APP)
    project.write("conftest.py", OF_A_MODULE)
    project.write("test_app.py", OF_THE_MODULE)

    assert_passed(project.run("-o", "asyncio_mode=auto", f"--sessionwire-isolation={isolation}"), 2)
    assert not (project.directory / "of-the-application.db").exists()


TERMS = """
import asyncio
import pytest
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError
from sessionwire import SandboxError

async def test_a_deferred_constraint(container):
    with pytest.raises(IntegrityError):
        async with container.db.transaction()() as session:
            await session.execute(text("CREATE TABLE parent (id INTEGER PRIMARY KEY)"))
            reference = "REFERENCES parent (id) DEFERRABLE INITIALLY DEFERRED"
            await session.execute(text(f"CREATE TABLE child (parent INTEGER {reference})"))
            await session.execute(text("INSERT INTO child VALUES (7)"))

async def test_patience(container):
    async def hold():
        async with container.db.transaction()() as session:
            await session.execute(text("SELECT 1"))
            await asyncio.sleep(60)
    holder = asyncio.create_task(hold())
    await asyncio.sleep(0.01)
    async with asyncio.timeout(3):
        with pytest.raises(SandboxError, match="nothing has happened for 0.1 s"):
            await container.items().has("pen")
    holder.cancel()
"""


@pytest.mark.long
@pytest.mark.parametrize("backend", ["sqlite"])
def test_the_options_of_a_sandbox_are_ini_keys(project: Project) -> None:
    project.write("test_terms.py", TERMS)
    terms = "-o", "sessionwire_check_deferred=true", "-o", "sessionwire_patience=0.1"

    assert_passed(project.run("-o", "asyncio_mode=auto", *terms), 2)
