"""Where the product runs in these tests.

Over HTTP one gateway process and one database per module: tests tell each other apart by having merchants of their own. At the
terminal a database per test.
"""

from collections.abc import AsyncIterator
from uuid import uuid4

import pytest
import pytest_asyncio
from sqlalchemy.engine import make_url

from tests.conftest import Server
from tests.factories import engine, environment
from tests.flows import Desk, desk
from tests.stack import stack
from tests.terminal import Terminal
from tests.wire import Gateway


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def gateway(server: Server, template: str) -> AsyncIterator[Gateway]:
    """A gateway on a database that the tests of a module share."""
    name = f"module_{uuid4().hex}"
    owner_name = make_url(server.login_url).username
    await server.run(f'CREATE DATABASE {name} TEMPLATE {template} OWNER "{owner_name}" STRATEGY file_copy')
    try:
        async with stack(server.url(name)) as running:
            await running.start("gateway")
            owner = engine(running.database_url)
            yield Gateway(running, running.port, owner)
            await owner.dispose()
    finally:
        await server.run(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
async def floor(database_url: str) -> AsyncIterator[Desk]:
    """A migrated database."""
    async with desk(database_url) as opened:
        yield opened


@pytest.fixture
def terminal(database_url: str) -> Terminal:
    """Somebody who has everything in the environment."""
    return Terminal(environment(database_url))
