"""Consuming: the delivery callback only buffers; work is claimed in our own tasks; a message is acknowledged after its claim
is committed, on the channel that delivered it.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from time import monotonic
from typing import Any, Final

from aio_pika.abc import AbstractConnection
from aiormq.abc import AbstractChannel, DeliveredMessage
from pamqp.commands import Basic
from prometheus_client import Counter

from common.errors import Transient, UnreadableMessage
from common.log import LogEvent, get_logger, since_ms
from common.messaging.codec import WorkMessage, parse_message
from common.messaging.publisher import OPEN_TIMEOUT_SECONDS, Publisher
from common.messaging.topology import Topology, Work, find_or_declare
from common.process import end_tasks

# Messages one claim may take, and what the broker sends ahead of each queue: one set being claimed, one arriving.
BATCH_MAX: Final = 8
PREFETCH: Final = 2 * BATCH_MAX
CANCEL_TIMEOUT_SECONDS: Final = 2.0
# A queue that delivered nothing for this long is subscribed to anew: one that was being deleted when we subscribed takes the
# subscription with it and says nothing (RabbitMQ 3.10.8, quorum queues).
QUIET_SECONDS: Final = 5.0
_FAILED_CLAIM_SECONDS: Final = 1.0
# What comes within this time of a claim of many ids is claimed together: a claim of few costs nearly as much. Where ids come
# one by one there is time for each.
_APART_SECONDS: Final = 0.05
_MANY_IDS: Final = 8

CONSUMED: Final = Counter(
    "payouts_messages_consumed", "Messages taken from RabbitMQ, by what came of them", ["work", "outcome"]
)

# True: everything that there is to claim was claimed, and committed. False: it was given up, since the process leaves.
ClaimMessages = Callable[[Sequence[WorkMessage]], Awaitable[bool]]


class _Lost(Exception):
    """No more will come: the channel is closed, or the broker ended our consumer because a queue was deleted or has moved."""


class Consumer:
    """Takes messages of one kind of work and has their ids claimed.

    `claim` gets a few messages at once and may take its time while there is no room for more work. What it raises as
    `Transient` is tried again. Any other error is ours: then each message is claimed alone, and those that fail again are
    given up, since the scan will come upon the same ids, and say what is wrong with them.
    """

    def __init__(
        self,
        topology: Topology,
        work: Work,
        claim: ClaimMessages,
        publisher: Publisher,
        *,
        prefetch: int = PREFETCH,
    ) -> None:
        self._topology = topology
        self._prefetch = prefetch
        self._work = work
        self._claim = claim
        self._publisher = publisher
        self._stopping = False
        self._epoch: _Epoch | None = None
        self._idle = asyncio.Event()
        self._idle.set()
        self._claims: set[asyncio.Task[bool]] = set()

    @property
    def consuming(self) -> bool:
        """Whether messages arrive at the moment."""
        return not self._idle.is_set()

    async def session(self, connection: AbstractConnection, report: Callable[[bool], None]) -> None:
        """Consume over this connection until it breaks, or until told to stop; report when messages can come.

        Raises: whatever broke it.
        """
        if self._stopping:
            return
        async with asyncio.timeout(OPEN_TIMEOUT_SECONDS):
            await find_or_declare(connection, self._topology, self._topology.queues(self._work))
            channel = await connection.channel(publisher_confirms=False)
            await channel.set_qos(prefetch_count=self._prefetch)
            epoch = self._epoch = _Epoch(await channel.get_underlay_channel())
            await epoch.consume(self._topology.queues(self._work))
        if self._stopping:
            epoch.stop()
        self._idle.clear()
        report(True)
        parking: set[asyncio.Task[None]] = set()
        try:
            while not epoch.is_stopping():
                await epoch.wait(QUIET_SECONDS)
                await epoch.renew_quiet()
                while not epoch.is_stopping() and (batch := epoch.take(BATCH_MAX)):
                    started = monotonic()
                    if await self._work_on(epoch, batch, parking) >= _MANY_IDS:
                        await epoch.gather(BATCH_MAX, until=started + _APART_SECONDS)
            await end_tasks(parking, 0)
            await epoch.hand_back()
        finally:
            await end_tasks(parking, 0)
            self._idle.set()

    def stop(self) -> None:
        """Take no more from now on; what was delivered and not begun is handed back."""
        self._stopping = True
        if self._epoch is not None:
            self._epoch.stop()

    async def drain(self, deadline_seconds: float) -> None:
        """Return when everything is handed back and the claim under way has ended; after at most that long."""
        self.stop()
        started = monotonic()
        with suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), deadline_seconds)
        await end_tasks(self._claims, max(0.0, deadline_seconds - (monotonic() - started)))

    async def _work_on(
        self, epoch: "_Epoch", batch: Sequence[DeliveredMessage], parking: "set[asyncio.Task[None]]"
    ) -> int:
        """Have a batch claimed, and parked what of it nobody can read; returns how many ids there were to claim."""
        readable: list[tuple[DeliveredMessage, WorkMessage]] = []
        for delivered in batch:
            try:
                readable.append((delivered, parse_message(delivered)))
            except UnreadableMessage as error:
                # Beside the others: a parking queue that is full or away keeps nobody waiting.
                task = asyncio.create_task(self._park(epoch, delivered, str(error)))
                parking.add(task)
                task.add_done_callback(parking.discard)
        if readable:
            await self._claim_all(epoch, readable)
        return sum(len(message.ids) for _, message in readable)

    async def _claim_all(self, epoch: "_Epoch", readable: Sequence[tuple[DeliveredMessage, WorkMessage]]) -> None:
        started = monotonic()
        messages = [message for _, message in readable]
        try:
            claimed = await self._claim_shielded(epoch, messages)
        except _Lost:
            raise
        except Exception:
            get_logger().exception(LogEvent.ROUND_FAILED, round=f"messages {self._work.name.lower()}")
            if len(readable) == 1:
                await self._end(epoch, *readable[0], "failed", started)
                return
            for one in readable:
                await self._claim_all(epoch, [one])
            return
        if claimed:
            for delivered, message in readable:
                await self._end(epoch, delivered, message, "claimed", started)

    async def _claim_shielded(self, epoch: "_Epoch", messages: Sequence[WorkMessage]) -> bool:
        """Claim in a task of its own: a connection that breaks must not abandon a claim that may be committed already."""
        claim = asyncio.create_task(self._claim_until_done(epoch, messages))
        self._claims.add(claim)
        claim.add_done_callback(self._claims.discard)
        await epoch.wait_for(claim)
        if not claim.done():
            raise _Lost
        return claim.result()

    async def _claim_until_done(self, epoch: "_Epoch", messages: Sequence[WorkMessage]) -> bool:
        """Again and again while the world is wrong and the messages are ours, unacknowledged."""
        while True:
            try:
                return await self._claim(messages)
            except Transient as error:
                get_logger().warning(
                    LogEvent.ROUND_FAILED, round=f"messages {self._work.name.lower()}", error=error.reason
                )
            if not await epoch.rest(_FAILED_CLAIM_SECONDS):
                return False

    async def _end(
        self, epoch: "_Epoch", delivered: DeliveredMessage, message: WorkMessage, outcome: str, started: float
    ) -> None:
        await epoch.acknowledge(delivered)
        CONSUMED.labels(self._work.name.lower(), outcome).inc()
        get_logger().info(
            LogEvent.MESSAGE_CLAIMED,
            work=self._work.name.lower(),
            message_id=delivered.header.properties.message_id,
            ids=len(message.ids),
            traceparents=list(message.traceparents),
            outcome=outcome,
            duration_ms=since_ms(started),
        )

    async def _park(self, epoch: "_Epoch", delivered: DeliveredMessage, reason: str) -> None:
        """Until it is parked: the message is ours as long as the channel lives. Then it comes again."""
        while True:
            try:
                await self._publisher.park(delivered, reason, epoch.queue_of(delivered))
                break
            except Transient as error:
                get_logger().warning(LogEvent.ROUND_FAILED, round="park", error=error.reason)
            if not await epoch.rest(_FAILED_CLAIM_SECONDS):
                return
        await epoch.acknowledge(delivered)
        CONSUMED.labels(self._work.name.lower(), "parked").inc()
        get_logger().error(LogEvent.MESSAGE_PARKED, work=self._work.name.lower(), reason=reason)


class _Epoch:
    """The consumers of one channel and what they delivered; dies with the channel, tags and all."""

    def __init__(self, channel: AbstractChannel) -> None:
        loop = asyncio.get_running_loop()
        self._channel = channel
        self._buffer: deque[DeliveredMessage] = deque()
        self._arrived = asyncio.Event()
        self._unacknowledged: set[int] = set()
        self._queues: dict[str, str] = {}
        self._heard_at: dict[str, float] = {}
        self._stopping: asyncio.Future[None] = loop.create_future()
        self._closed: asyncio.Future[None] = loop.create_future()
        # Watched once for the epoch's whole life: each access to `closing` makes another observer.
        channel.closing.add_done_callback(lambda _: _complete(self._closed))
        channel.on_consumer_cancel_callbacks.add(lambda _: _complete(self._closed))

    def stop(self) -> None:
        """Wake whoever waits here: it is time to stop."""
        _complete(self._stopping)

    def is_stopping(self) -> bool:
        """Whether it is."""
        return self._stopping.done()

    async def consume(self, queues: Sequence[str]) -> None:
        for queue in queues:
            consumer = await self._channel.basic_consume(queue, self._on_message)
            self._queues[str(consumer.consumer_tag)] = queue
            self._heard_at[queue] = monotonic()

    async def renew_quiet(self) -> None:
        """Subscribe anew to queues that are quiet; what they have delivered stays ours. Raises: what the broker says."""
        quiet_since = monotonic() - QUIET_SECONDS
        for tag, queue in list(self._queues.items()):
            if self._heard_at[queue] <= quiet_since:
                async with asyncio.timeout(OPEN_TIMEOUT_SECONDS):
                    await self._channel.basic_cancel(tag)
                    del self._queues[tag]
                    await self.consume([queue])

    async def _on_message(self, delivered: DeliveredMessage) -> None:
        self._buffer.append(delivered)
        self._heard_at[self.queue_of(delivered)] = monotonic()
        self._unacknowledged.add(_tag(delivered))
        self._arrived.set()

    async def wait(self, seconds: float) -> None:
        """Return when something was delivered, it is time to stop, or so long has passed.

        Raises: `_Lost` when no more will come.
        """
        arrived = asyncio.ensure_future(self._arrived.wait())
        try:
            await _first(arrived, self._stopping, self._closed, seconds=seconds)
        finally:
            arrived.cancel()
        self._arrived.clear()
        if self._closed.done():
            raise _Lost

    async def wait_for(self, task: "asyncio.Task[bool]") -> None:
        """Return when the task is done, or the epoch is over."""
        await _first(task, self._closed)

    async def rest(self, seconds: float) -> bool:
        """Wait for so long, unless the epoch ends or it is time to stop; whether neither has come."""
        await _first(self._stopping, self._closed, seconds=seconds)
        return not (self._stopping.done() or self._closed.done())

    async def gather(self, count: int, *, until: float) -> None:
        """Let messages arrive until there are so many, it is so late, or it is time to stop. Raises: `_Lost`."""
        while len(self._buffer) < count and monotonic() < until and not self.is_stopping():
            await self.wait(until - monotonic())

    def take(self, count: int) -> list[DeliveredMessage]:
        """The next few messages, in the order of their tags. Raises: `_Lost`."""
        if self._closed.done():
            raise _Lost
        return [self._buffer.popleft() for _ in range(min(count, len(self._buffer)))]

    def queue_of(self, delivered: DeliveredMessage) -> str:
        """The queue that it was taken from."""
        tag = delivered.delivery.consumer_tag if isinstance(delivered.delivery, Basic.Deliver) else None
        return self._queues.get(str(tag), delivered.routing_key or "")

    async def acknowledge(self, delivered: DeliveredMessage) -> None:
        """On a dead channel nothing happens: it will be delivered again."""
        self._unacknowledged.discard(_tag(delivered))
        with suppress(Exception):
            await self._channel.basic_ack(_tag(delivered), wait=False)

    async def hand_back(self) -> None:
        """Stop consuming, give back all that was not acknowledged, and close the channel, so that every word has arrived."""
        with suppress(Exception):
            async with asyncio.timeout(CANCEL_TIMEOUT_SECONDS):
                for tag in self._queues:
                    await self._channel.basic_cancel(tag)
                if self._unacknowledged:
                    # Only with one that is: RabbitMQ closes the channel over a tag that it does not know.
                    await self._channel.basic_nack(max(self._unacknowledged), multiple=True, requeue=True)
                await self._channel.close()


async def _first(*futures: "asyncio.Future[Any]", seconds: float | None = None) -> None:
    """Return when one of them is done, or after so long."""
    await asyncio.wait(futures, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)


def _complete(future: "asyncio.Future[None]") -> None:
    if not future.done():
        future.set_result(None)


def _tag(delivered: DeliveredMessage) -> int:
    tag = delivered.delivery_tag
    assert tag is not None
    return int(tag)
