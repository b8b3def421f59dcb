"""A connection to RabbitMQ that is kept up: an epoch lasts from connecting until anything breaks; then all is built anew.

We do not use aio-pika's robust connection: half-restored channels and consumers are harder to get right than new ones.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from time import monotonic
from typing import Any, Final

import aio_pika
from aio_pika.abc import AbstractConnection
from aio_pika.exceptions import AMQPError
from aiormq.connection import TCPTransportFactory, TLSTransportFactory, TransportFactory
from prometheus_client import Gauge
from yarl import URL

from common.log import LogEvent, get_logger

CONNECT_TIMEOUT_SECONDS: Final = 10.0
CLOSE_TIMEOUT_SECONDS: Final = 2.0
# A silent peer is noticed after three of these. Source: aiormq, `HEARTBEAT_GRACE_MULTIPLIER`.
HEARTBEAT_SECONDS: Final = 10
BACKOFF_SECONDS_MIN: Final = 0.2
BACKOFF_SECONDS_MAX: Final = 10.0
# A session that was at work for less counts as a failure to connect.
LIVED_SECONDS: Final = 1.0

CONNECTED: Final = Gauge("payouts_broker_connected", "Whether a connection to RabbitMQ is up and at work", ["link"])

# What works over a connection, and reports by its second argument whether it can at the moment.
Session = Callable[[AbstractConnection, Callable[[bool], None]], Awaitable[None]]


class Link:
    """One connection, rebuilt for ever. `session` sets up its channels and works; it raises when something broke.

    A session that returns says that it is over for good.
    """

    def __init__(self, name: str, urls: Sequence[str], session: Session) -> None:
        self._name = name
        self._urls = [URL(url).update_query(heartbeat=HEARTBEAT_SECONDS, name=f"payouts {name}") for url in urls]
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

    async def _run_epoch(self, url: URL) -> bool:
        """Connect, and hold the session until it or the connection ends. Returns whether it is over for good."""
        self._lived = False
        socket = _Socket(url)
        connection = aio_pika.Connection(url)
        connection.kwargs["transport_factory"] = socket
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_SECONDS):
                await connection.connect()
        except Exception as error:
            # aiormq raises nearly anything when a peer is no broker, or hangs up in the middle.
            get_logger().warning(LogEvent.BROKER_UNREACHABLE, link=self._name, host=url.host, error=_describe(error))
            socket.abort()
            return False
        assert connection.transport is not None, "it is connected"
        # Not `connection.closed()`: aio-pika completes that only when we close it ourselves.
        closed = connection.transport.connection.closing
        # A task of its own: aiormq cancels futures when a connection dies, and that is not our cancellation.
        session = asyncio.ensure_future(self._session(connection, self._report))
        try:
            await asyncio.wait({session, closed}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._report(False)
            lost = _describe(closed.exception()) if closed.done() and not closed.cancelled() else None
            closed.cancel()
            session.cancel()
            await asyncio.wait({session}, timeout=CLOSE_TIMEOUT_SECONDS)
            await _close(connection, socket)
        if session.done() and not session.cancelled() and session.exception() is None:
            return True
        reason = session.exception() if session.done() and not session.cancelled() else None
        get_logger().warning(LogEvent.BROKER_LOST, link=self._name, error=lost or _describe(reason))
        return False

    def _report(self, up: bool) -> None:
        self._gauge.set(up)
        if up:
            self._up_since = monotonic()
            get_logger().info(LogEvent.BROKER_CONNECTED, link=self._name)
        elif self._up_since is not None:
            self._lived = monotonic() - self._up_since > LIVED_SECONDS
            self._up_since = None


class _Socket(TransportFactory):
    """The socket under a connection, kept so that it can be cut: aiormq waits for a full one to be flushed, for minutes."""

    def __init__(self, url: URL) -> None:
        self._factory: TransportFactory = TLSTransportFactory() if url.scheme == "amqps" else TCPTransportFactory()
        self._writer: asyncio.StreamWriter | None = None

    async def create(self, url: URL, **kwargs: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """As aiormq would."""
        reader, self._writer = await self._factory.create(url, **kwargs)
        return reader, self._writer

    def abort(self) -> None:
        """Cut it, if it is still open."""
        if self._writer is not None:
            self._writer.transport.abort()


async def _close(connection: AbstractConnection, socket: _Socket) -> None:
    """Say good-bye, but not for long: a broker that is gone does not answer."""
    closing = asyncio.ensure_future(connection.close())
    # Not `asyncio.timeout`: it would wait for what it cancels.
    await asyncio.wait({closing}, timeout=CLOSE_TIMEOUT_SECONDS)
    socket.abort()
    closing.cancel()
    await asyncio.wait({closing}, timeout=CLOSE_TIMEOUT_SECONDS)
    if closing.done() and not closing.cancelled():
        closing.exception()


def _describe(error: BaseException | None) -> str:
    """What went wrong; the broker's own words where it said some."""
    if error is None:
        return "closed"
    return f"{type(error).__name__}: {error}"[:200] if isinstance(error, AMQPError) else type(error).__name__
