"""A connection to RabbitMQ that is kept up: an epoch lasts from connecting until anything breaks; then all is built anew.

We do not use aio-pika's robust connection: half-restored channels and consumers are harder to get right than new ones.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from time import monotonic
from typing import Final

import aio_pika
from aio_pika.abc import AbstractConnection
from prometheus_client import Gauge
from yarl import URL

from common.log import LogEvent, get_logger

CONNECT_TIMEOUT_SECONDS: Final = 10.0
CLOSE_TIMEOUT_SECONDS: Final = 5.0
# A silent peer is noticed after three of these. Source: aiormq, `HEARTBEAT_GRACE_MULTIPLIER`.
HEARTBEAT_SECONDS: Final = 10
BACKOFF_SECONDS_MIN: Final = 0.2
BACKOFF_SECONDS_MAX: Final = 10.0
# Work that went on for less is no reason to try again sooner.
LIVED_SECONDS: Final = 1.0

CONNECTED: Final = Gauge("payouts_broker_connected", "Whether a connection to RabbitMQ is up and at work", ["link"])

# What works over a connection; it calls the second argument when everything stands that the work needs.
Session = Callable[[AbstractConnection, Callable[[], None]], Awaitable[None]]


class Link:
    """One connection, rebuilt for ever. `session` sets up its channels and works; it raises when something broke.

    A session that returns says that it is over for good.
    """

    def __init__(self, name: str, urls: Sequence[str], session: Session) -> None:
        self._name = name
        self._urls = [str(URL(url).update_query(heartbeat=HEARTBEAT_SECONDS, name=f"payouts {name}")) for url in urls]
        self._session = session
        self._up_since: float | None = None
        self._lived = False
        self._gauge = CONNECTED.labels(name)
        self._gauge.set(0)

    @property
    def name(self) -> str:
        """What it is for."""
        return self._name

    @property
    def connected(self) -> bool:
        """Whether work goes over it at the moment."""
        return self._up_since is not None

    async def run(self) -> None:
        """Keep the link up until cancelled or over: next host each time, back-off with jitter."""
        backoff, epoch = BACKOFF_SECONDS_MIN, 0
        while not await self._run_epoch(self._urls[epoch % len(self._urls)]):
            epoch += 1
            backoff = BACKOFF_SECONDS_MIN if self._lived else min(backoff * 2, BACKOFF_SECONDS_MAX)
            await asyncio.sleep(random.uniform(backoff / 2, backoff))  # noqa: S311 jitter

    async def _run_epoch(self, url: str) -> bool:
        """Connect, and hold the session until it or the connection ends. Returns whether it is over for good."""
        self._lived = False
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_SECONDS):
                connection = await aio_pika.connect(url)
        except (OSError, TimeoutError, RuntimeError, aio_pika.exceptions.AMQPError) as error:
            get_logger().warning(LogEvent.BROKER_UNREACHABLE, link=self._name, error=type(error).__name__)
            return False
        # A task of its own: aiormq cancels futures when a connection dies, and that is not our cancellation.
        session = asyncio.ensure_future(self._session(connection, self._stands))
        assert connection.transport is not None, "it is connected"
        # Not `connection.closed()`: aio-pika completes that only when we close it ourselves.
        closed = asyncio.ensure_future(asyncio.shield(connection.transport.connection.closing))
        try:
            await asyncio.wait({session, closed}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._ends()
            closed.cancel()
            session.cancel()
            await asyncio.wait({session}, timeout=CLOSE_TIMEOUT_SECONDS)
            await _close(connection)
        if session.done() and not session.cancelled() and session.exception() is None:
            return True
        get_logger().warning(LogEvent.BROKER_LOST, link=self._name, error=_error_name(session))
        return False

    def _stands(self) -> None:
        self._up_since = monotonic()
        self._gauge.set(1)
        get_logger().info(LogEvent.BROKER_CONNECTED, link=self._name)

    def _ends(self) -> None:
        self._lived = self._up_since is not None and monotonic() - self._up_since > LIVED_SECONDS
        self._up_since = None
        self._gauge.set(0)


def _error_name(session: "asyncio.Future[None]") -> str:
    if not session.done() or session.cancelled():
        return "connection closed"
    return type(session.exception()).__name__


async def _close(connection: AbstractConnection) -> None:
    """Say good-bye, but not for long: a broker that is gone does not answer."""
    with suppress(Exception):
        async with asyncio.timeout(CLOSE_TIMEOUT_SECONDS):
            await connection.close()
