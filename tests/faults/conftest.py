"""What the fault tests share: the settings of a test's database, and the owner's way into it."""

from collections.abc import AsyncIterator
from typing import TypeAlias

import asyncpg
import pytest
from sqlalchemy.engine import make_url

from common.db.engine import Engine
from common.settings import Settings
from tests.conftest import Server
from tests.factories import engine, settings


@pytest.fixture
def config(database_url: str) -> Settings:
    """The settings that the processes on the test's database share."""
    return settings(database_url)


@pytest.fixture
async def owner(database_url: str) -> AsyncIterator[Engine]:
    """A pool that acts as the owner of everything."""
    pool = engine(database_url)
    yield pool
    await pool.dispose()


Superuser: TypeAlias = "asyncpg.Connection[asyncpg.Record]"


@pytest.fixture
async def superuser(server: Server, database_url: str) -> AsyncIterator[Superuser]:
    """A connection to the test's database that may see and end everybody's sessions."""
    database = make_url(database_url).database
    url = make_url(server.admin_url).set(database=database).render_as_string(hide_password=False)
    connection = await asyncpg.connect(url)
    yield connection
    await connection.close()
