"""The way from a command to the broker: the one of AMQP_URL; without a DATABASE_URL that of the stack on this machine."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from aio_pika.abc import AbstractConnection
from aio_pika.exceptions import AMQPError, ChannelInvalidStateError

from common.settings import Settings
from ops.broker import CONNECT_ERRORS, BrokerUnusable, connect_any, name_error
from ops.cli.errors import NeverReached, Refused, Unreachable


@asynccontextmanager
async def broker_connection(settings: Settings) -> AsyncIterator[AbstractConnection]:
    """A connection to the first host that answers. Raises: `Refused` without a broker to ask, `NeverReached`, `Unreachable`."""
    if not settings.amqp_urls:
        raise Refused("AMQP_URL is not set: PostgreSQL alone carries the work, and there is no broker to ask")
    try:
        connection = await connect_any(settings.amqp_urls)
    except BrokerUnusable as error:
        raise NeverReached(f"the broker cannot be reached: {error}") from error
    try:
        yield connection
    except (AMQPError, ChannelInvalidStateError, ConnectionError, TimeoutError) as error:
        raise Unreachable(f"the broker did not do it: {name_error(error)}") from error
    finally:
        with suppress(*CONNECT_ERRORS):
            await connection.close()
