"""Publishing, off everybody's path: offered after a commit, confirmed by the broker, or counted and left to the scan."""

import asyncio
from collections import defaultdict, deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Final
from uuid import UUID

from aio_pika.abc import AbstractConnection
from aio_pika.exceptions import AMQPError, ChannelInvalidStateError, DeliveryError, PublishError
from aiormq.abc import AbstractChannel, DeliveredMessage
from prometheus_client import Counter, Gauge

from common.errors import BrokerUnavailable
from common.log import LogEvent, get_logger
from common.messaging.codec import WorkMessage, render_message, split
from common.messaging.parking import parked_properties
from common.messaging.topology import Topology, Work, find_or_declare, repair

# Messages that may wait for their confirm, and for their turn. A confirm that takes longer is not waited for.
WINDOW: Final = 256
QUEUE_MAX: Final = 1_000
CONFIRM_TIMEOUT_SECONDS: Final = 5.0
OPEN_TIMEOUT_SECONDS: Final = 10.0
REFUSED_PAUSE_SECONDS: Final = 5.0

PUBLISHED: Final = Counter(
    "payouts_messages_published", "Messages offered to RabbitMQ, by what came of them", ["work", "outcome"]
)
UNCONFIRMED: Final = Gauge("payouts_messages_unconfirmed", "Messages that wait for their confirm")


class Publisher:
    """Publishes work by shard. While the broker is away, everything offered is dropped at once: the scan will find it."""

    def __init__(self, topology: Topology) -> None:
        self._topology = topology
        self._waiting: deque[tuple[WorkMessage, str]] = deque()
        self._arrived = asyncio.Event()
        self._channel: AbstractChannel | None = None
        self._publishing: set[asyncio.Task[None]] = set()
        self._suspect = asyncio.Event()
        self._returned = False

    @property
    def connected(self) -> bool:
        """Whether messages leave at the moment."""
        return self._channel is not None

    def offer(self, work: Work, ids: Iterable[tuple[UUID, UUID]], traceparents: Iterable[str] = ()) -> None:
        """Ask that (id, shop id) be worked on now: one message per shard, or as many as the ids need. Never waits."""
        by_shard: dict[int, list[UUID]] = defaultdict(list)
        for value, shop_id in ids:
            by_shard[self._topology.shard_of(shop_id)].append(value)
        traces = list(traceparents)
        for shard, shard_ids in by_shard.items():
            for message in split(work, shard_ids, traces):
                if self._channel is None or len(self._waiting) >= QUEUE_MAX:
                    PUBLISHED.labels(work.name.lower(), "dropped").inc()
                else:
                    self._waiting.append((message, self._topology.queue(work, shard)))
        self._arrived.set()

    async def session(self, connection: AbstractConnection, stands: Callable[[], None]) -> None:
        """Publish over this connection until it breaks; call `stands` when it can. Raises: whatever broke it."""
        async with asyncio.timeout(OPEN_TIMEOUT_SECONDS):
            await find_or_declare(connection, self._topology)
            if self._returned:
                await repair(connection, self._topology)
                self._returned = False
            channel = await connection.channel(publisher_confirms=True, on_return_raises=True)
            self._channel = await channel.get_underlay_channel()
        self._suspect.clear()
        stands()
        publishing = asyncio.create_task(self._publish_waiting(self._channel, asyncio.Semaphore(WINDOW)))
        try:
            await self._suspect.wait()
        finally:
            self._channel = None
            publishing.cancel()
            for message, _ in self._waiting:
                PUBLISHED.labels(message.work.name.lower(), "dropped").inc()
            self._waiting.clear()
        raise BrokerUnavailable

    async def drain(self, deadline_seconds: float) -> None:
        """Wait until what was offered has left and is confirmed, for at most that long."""
        with suppress(TimeoutError):
            async with asyncio.timeout(deadline_seconds):
                while self.connected and (self._waiting or self._publishing):
                    if self._publishing:
                        await asyncio.wait(self._publishing)
                    await asyncio.sleep(0)

    async def park(self, delivered: DeliveredMessage, reason: str, queue: str) -> None:
        """Put aside a message that nobody could read, byte for byte, with the reason and where it came from; confirmed.

        Raises: `BrokerUnavailable` when it was not confirmed.
        """
        channel = self._channel
        if channel is None:
            raise BrokerUnavailable
        try:
            async with asyncio.timeout(CONFIRM_TIMEOUT_SECONDS):
                await channel.basic_publish(
                    delivered.body,
                    exchange=self._topology.exchange,
                    routing_key=self._topology.parked,
                    properties=parked_properties(delivered, reason, queue),
                    mandatory=True,
                )
        except (AMQPError, ChannelInvalidStateError, OSError, TimeoutError) as error:
            self._returned = self._returned or isinstance(error, PublishError)
            self._suspect.set()
            raise BrokerUnavailable from error

    async def _publish_waiting(self, channel: AbstractChannel, window: asyncio.Semaphore) -> None:
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            while self._waiting:
                await window.acquire()
                message, key = self._waiting.popleft()
                task = asyncio.create_task(self._publish(channel, message, key))
                self._publishing.add(task)
                task.add_done_callback(self._publishing.discard)
                task.add_done_callback(lambda _: window.release())

    async def _publish(self, channel: AbstractChannel, message: WorkMessage, key: str) -> None:
        UNCONFIRMED.inc()
        outcome = "unconfirmed"
        try:
            outcome = await self._confirmed(channel, message, key)
        except (AMQPError, ChannelInvalidStateError, OSError, TimeoutError) as error:
            # A channel with an unanswered publish cannot be trusted any more.
            get_logger().warning(
                LogEvent.MESSAGE_UNCONFIRMED, work=message.work.name.lower(), error=type(error).__name__
            )
            self._suspect.set()
        finally:
            UNCONFIRMED.dec()
            PUBLISHED.labels(message.work.name.lower(), outcome).inc()

    async def _confirmed(self, channel: AbstractChannel, message: WorkMessage, key: str) -> str:
        body, properties = render_message(message)
        try:
            async with asyncio.timeout(CONFIRM_TIMEOUT_SECONDS):
                await channel.basic_publish(
                    body,
                    exchange=self._topology.exchange,
                    routing_key=key,
                    properties=properties,
                    mandatory=True,
                )
        except PublishError:
            # No queue took it: have the topology looked after before the next one.
            get_logger().error(LogEvent.MESSAGE_RETURNED, routing_key=key)
            self._returned = True
            self._suspect.set()
            return "returned"
        except DeliveryError:
            # A full queue. RabbitMQ 3.10 goes on refusing a channel that was refused once, so it gets another one.
            get_logger().warning(LogEvent.MESSAGE_REFUSED, routing_key=key)
            asyncio.get_running_loop().call_later(REFUSED_PAUSE_SECONDS, self._suspect.set)
            return "refused"
        return "confirmed"
