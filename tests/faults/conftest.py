"""What the fault tests share: the settings of a test's database, and the owner's way into it."""

from collections.abc import AsyncIterator

import pytest

from common.db.engine import Engine
from common.settings import Settings
from tests.broker import Broker
from tests.factories import engine, settings
from tests.faults.amqp_proxy import AmqpProxy, amqp_proxy
from tests.faults.patience import UNHURRIED_LOCKS
from tests.faults.scene import SHORT_LEASES, Scene, scene


@pytest.fixture
def config(database_url: str) -> Settings:
    """The settings that the processes on the test's database share."""
    return settings(database_url)


@pytest.fixture
async def owner(database_url: str) -> AsyncIterator[Engine]:
    """A pool that acts as the owner of everything, and waits for a row as long as a process that holds it may stand still."""
    pool = engine(database_url, **UNHURRIED_LOCKS)
    yield pool
    await pool.dispose()


@pytest.fixture
async def stage(database_url: str, broker: Broker, amqp_prefix: str) -> AsyncIterator[Scene]:
    """A scene on the session's broker, with leases that run out within a test."""
    async with scene(database_url, broker, amqp_prefix, **SHORT_LEASES) as there:
        yield there


@pytest.fixture
async def proxy(broker: Broker) -> AsyncIterator[AmqpProxy]:
    """A way to the session's broker that can be hurt."""
    async with amqp_proxy(broker.url) as between:
        yield between
