"""Consuming: the delivery callback only buffers; work is claimed in our own tasks; a message is acknowledged after its claim
is committed, on the channel that delivered it.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from time import monotonic
from typing import Final

from aio_pika.abc import AbstractConnection
from aio_pika.exceptions import AMQPError, ChannelInvalidStateError
from aiormq.abc import AbstractChannel, DeliveredMessage
from prometheus_client import Counter

from common.errors import BrokerUnavailable, Transient, UnreadableMessage
from common.log import LogEvent, get_logger
from common.messaging.codec import WorkMessage, parse_message
from common.messaging.publisher import OPEN_TIMEOUT_SECONDS, Publisher
from common.messaging.topology import Topology, Work, find_or_declare
from common.process import end_tasks

# Messages one claim may take, and what the broker may send ahead: one set being claimed, one arriving.
BATCH_MAX: Final = 8
PREFETCH: Final = 2 * BATCH_MAX
CANCEL_TIMEOUT_SECONDS: Final = 2.0
_FAILED_CLAIM_SECONDS: Final = 1.0

CONSUMED: Final = Counter(
    "payouts_messages_consumed", "Messages taken from RabbitMQ, by what came of them", ["work", "outcome"]
)

Claim = Callable[[Sequence[WorkMessage]], Awaitable[None]]


class _ConsumerCancelled(Exception):
    """The broker ended our consumer: a queue was deleted or has moved."""


class Consumer:
    """Takes messages of one kind of work and has their ids claimed.

    `claim` gets a few messages at once and returns when the claim is committed, or when it is certain that there is nothing
    to claim; it may take its time while there is no room for more work. What it raises as `Transient` is tried again.
    """

    def __init__(self, topology: Topology, work: Work, claim: Claim, publisher: Publisher) -> None:
        self._topology = topology
        self._work = work
        self._claim = claim
        self._publisher = publisher
        self._stopping = asyncio.Event()
        self._stopped = asyncio.Event()
        self._stopped.set()
        self._claims: set[asyncio.Task[None]] = set()

    @property
    def connected(self) -> bool:
        """Whether messages arrive at the moment."""
        return not self._stopped.is_set()

    async def session(self, connection: AbstractConnection, stands: Callable[[], None]) -> None:
        """Consume over this connection until it breaks, or until told to stop; call `stands` when messages can come.

        Raises: whatever broke it.
        """
        if self._stopping.is_set():
            return
        async with asyncio.timeout(OPEN_TIMEOUT_SECONDS):
            await find_or_declare(connection, self._topology, self._topology.queues(self._work))
            channel = await connection.channel(publisher_confirms=False)
            await channel.set_qos(prefetch_count=PREFETCH)
            underlay = await channel.get_underlay_channel()
        epoch = _Epoch(underlay)
        async with asyncio.timeout(OPEN_TIMEOUT_SECONDS):
            await epoch.consume(self._topology.queues(self._work))
        self._stopped.clear()
        stands()
        try:
            await self._work_through(epoch)
        finally:
            self._stopped.set()

    async def drain(self, deadline_seconds: float) -> None:
        """Take no more, hand back what has not begun, let the claim under way end; for at most that long."""
        self._stopping.set()
        started = monotonic()
        with suppress(TimeoutError):
            await asyncio.wait_for(self._stopped.wait(), deadline_seconds)
        await end_tasks(self._claims, max(0.0, deadline_seconds - (monotonic() - started)))

    async def _work_through(self, epoch: "_Epoch") -> None:
        while not self._stopping.is_set():
            await epoch.wait(self._stopping)
            while not self._stopping.is_set() and (batch := epoch.take(BATCH_MAX)):
                await self._work_on(batch)
                # All up to here is claimed or parked, one batch after the other: the last tag stands for all of them.
                await epoch.acknowledge(batch[-1])
        await epoch.hand_back()

    async def _work_on(self, batch: list[DeliveredMessage]) -> None:
        messages = []
        for delivered in batch:
            try:
                messages.append(parse_message(delivered))
            except UnreadableMessage as error:
                await self._park(delivered, str(error))
        if messages:
            # A task of its own: a connection that breaks must not abandon a claim that may be committed already.
            claim = asyncio.create_task(self._until_done(lambda: self._claim(messages)))
            self._claims.add(claim)
            claim.add_done_callback(self._claims.discard)
            await asyncio.shield(claim)
            CONSUMED.labels(self._work.name.lower(), "claimed").inc(len(messages))

    async def _park(self, delivered: DeliveredMessage, reason: str) -> None:
        get_logger().error(LogEvent.MESSAGE_PARKED, work=self._work.name.lower(), reason=reason)
        queue = delivered.routing_key or ""
        await self._until_done(lambda: self._publisher.park(delivered, reason, queue))
        CONSUMED.labels(self._work.name.lower(), "parked").inc()

    async def _until_done(self, attempt: Callable[[], Awaitable[None]]) -> None:
        """Again and again while the world is wrong: the messages stay ours, unacknowledged."""
        while True:
            try:
                return await attempt()
            except (Transient, BrokerUnavailable) as error:
                get_logger().warning(LogEvent.ROUND_FAILED, round=self._work.name.lower(), error=error.reason)
                await asyncio.sleep(_FAILED_CLAIM_SECONDS)


class _Epoch:
    """The consumers of one channel and what they delivered; dies with the channel, tags and all."""

    def __init__(self, channel: AbstractChannel) -> None:
        self._channel = channel
        self._buffer: deque[DeliveredMessage] = deque()
        self._changed = asyncio.Event()
        self._cancelled = False
        self._tags: list[str] = []
        channel.on_consumer_cancel_callbacks.add(self._on_cancel)

    async def consume(self, queues: Sequence[str]) -> None:
        for queue in queues:
            consumer = await self._channel.basic_consume(queue, self._on_message)
            self._tags.append(str(consumer.consumer_tag))

    async def _on_message(self, delivered: DeliveredMessage) -> None:
        self._buffer.append(delivered)
        self._changed.set()

    def _on_cancel(self, _frame: object) -> None:
        self._cancelled = True
        self._changed.set()

    async def wait(self, stopping: asyncio.Event) -> None:
        """Return when something was delivered or `stopping` is set. Raises: `_ConsumerCancelled` when no more will come."""
        changed = asyncio.ensure_future(self._changed.wait())
        stop = asyncio.ensure_future(stopping.wait())
        closed = asyncio.ensure_future(asyncio.shield(self._channel.closing))
        try:
            await asyncio.wait({changed, stop, closed}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (changed, stop, closed):
                task.cancel()
        self._changed.clear()
        if self._cancelled or self._channel.is_closed:
            raise _ConsumerCancelled

    def take(self, count: int) -> list[DeliveredMessage]:
        """The next few messages, in the order of their tags."""
        return [self._buffer.popleft() for _ in range(min(count, len(self._buffer)))]

    async def acknowledge(self, last: DeliveredMessage) -> None:
        """Acknowledge everything up to that message. On a dead channel nothing happens: it will be delivered again."""
        with suppress(AMQPError, ChannelInvalidStateError, OSError):
            await self._channel.basic_ack(_tag(last), multiple=True, wait=False)

    async def hand_back(self) -> None:
        """Stop consuming, give back what was not begun, and close the channel, so that every acknowledgement has arrived."""
        with suppress(AMQPError, ChannelInvalidStateError, OSError, TimeoutError):
            async with asyncio.timeout(CANCEL_TIMEOUT_SECONDS):
                for tag in self._tags:
                    await self._channel.basic_cancel(tag)
                if self._buffer:
                    await self._channel.basic_nack(_tag(self._buffer[-1]), multiple=True, requeue=True)
                await self._channel.close()


def _tag(delivered: DeliveredMessage) -> int:
    tag = delivered.delivery_tag
    assert tag is not None
    return int(tag)
