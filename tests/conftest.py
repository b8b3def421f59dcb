"""Real PostgreSQL for the tests: one server per session, one migrated template, a clone of it per test.

`TEST_DATABASE_URL` names a server to use instead of our own; its login must be allowed to create databases and roles.
"""

import asyncio
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from uuid import uuid4

import asyncpg
import psutil
import pytest
from hypothesis import HealthCheck, settings
from sqlalchemy.engine import make_url

from migrations.run import upgrade
from ops.postgres import DATABASE, Cluster, choose_home

pytest_plugins = ["tests.broker"]

# No test is about how fast an example is made or judged, on a machine that others use too.
settings.register_profile("tests", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tests")

_FOLDER: Final = "payouts-tests-"

MakeCluster = Callable[..., Awaitable[Cluster]]


@dataclass(frozen=True, slots=True)
class Server:
    """Where the tests' databases are made: `admin_url` may create and drop them, `login_url` owns and uses them."""

    admin_url: str
    login_url: str

    def url(self, database: str) -> str:
        """The login's URL of a database."""
        return make_url(self.login_url).set(database=database).render_as_string(hide_password=False)

    async def create(self, name: str, template: str) -> None:
        """Make a database of the login's, as a copy of a template that nobody is connected to."""
        owner = make_url(self.login_url).username
        await self.run(f'CREATE DATABASE {name} TEMPLATE {template} OWNER "{owner}" STRATEGY file_copy')

    async def drop(self, name: str) -> None:
        """Remove a database, whoever is still connected."""
        await self.run(f"DROP DATABASE {name} WITH (FORCE)")

    async def run(self, statement: str) -> None:
        """Run a statement that no transaction can hold, such as CREATE DATABASE."""
        connection = await asyncpg.connect(self.admin_url)
        try:
            await connection.execute(statement)
        finally:
            await connection.close()


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """The session's server: ours, without fsync, or the one of `TEST_DATABASE_URL`."""
    given = os.environ.get("TEST_DATABASE_URL")
    if given:
        yield Server(given, given)
        return
    cluster = _cluster("session", durable=False)
    try:
        cluster.start()
        yield Server(cluster.url("postgres", "postgres"), cluster.url(DATABASE))
    finally:
        cluster.stop()
        shutil.rmtree(cluster.home)


@pytest.fixture(scope="session")
def template(server: Server) -> Iterator[str]:
    """The name of a database with the newest schema and no rows, to clone and not to connect to."""
    name = f"template_{uuid4().hex}"
    asyncio.run(server.create(name, "template0"))
    asyncio.run(upgrade(server.url(name)))
    yield name
    asyncio.run(server.drop(name))


@pytest.fixture
async def database_url(server: Server, template: str) -> AsyncIterator[str]:
    """The URL of a database of this test's own, with the newest schema and no rows."""
    name = f"test_{uuid4().hex}"
    await server.create(name, template)
    yield server.url(name)
    await server.drop(name)


@pytest.fixture
async def superuser(server: Server, database_url: str) -> AsyncIterator["asyncpg.Connection[asyncpg.Record]"]:
    """A connection to the test's database that may see and end everybody's sessions."""
    database = make_url(database_url).database
    url = make_url(server.admin_url).set(database=database).render_as_string(hide_password=False)
    connection = await asyncpg.connect(url)
    yield connection
    await connection.close()


@pytest.fixture
async def make_cluster() -> AsyncIterator[MakeCluster]:
    """Makes servers of this test's own, migrated, to be killed at will: `cluster = await make_cluster(durable=True)`.

    `started=False`: there is nothing but its name yet.

    `cluster.url("payouts")` is the database. `kill`, `start` and `stop` block: call them through `asyncio.to_thread`.
    """
    async with AsyncExitStack() as stack:

        async def make(*, durable: bool, started: bool = True) -> Cluster:
            cluster = _cluster(uuid4().hex, durable=durable)
            stack.callback(shutil.rmtree, cluster.home, ignore_errors=True)
            stack.callback(cluster.stop)
            if started:
                await upgrade(await asyncio.to_thread(cluster.start))
            return cluster

        yield make


def _cluster(name: str, *, durable: bool) -> Cluster:
    """A cluster in a temporary folder that carries the number of this process."""
    home = choose_home(Path(tempfile.gettempdir()) / f"{_FOLDER}{os.getpid()}-{name}")
    return Cluster(home, home / "postgresql.log", durable=durable)


def pytest_sessionstart() -> None:
    """Stop servers of sessions that were killed, and remove their folders."""
    for home in Path(tempfile.gettempdir()).glob(f"{_FOLDER}[0-9]*-*"):
        owner = home.name.removeprefix(_FOLDER).partition("-")[0]
        if not psutil.pid_exists(int(owner)):
            Cluster(home, home / "postgresql.log").stop()
            shutil.rmtree(home, ignore_errors=True)
