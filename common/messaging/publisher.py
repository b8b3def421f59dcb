"""Publishing, off everybody's path: offered after a commit, confirmed by the broker, or counted and left to the scan."""

import asyncio
from collections import defaultdict, deque
from collections.abc import Callable, Coroutine, Iterable
from contextlib import suppress
from time import monotonic
from typing import Any, Final
from uuid import UUID

from aio_pika.abc import AbstractConnection
from aio_pika.exceptions import DeliveryError, PublishError
from aiormq.abc import AbstractChannel, DeliveredMessage
from pamqp.commands import Basic
from prometheus_client import Counter, Gauge

from common.errors import BrokerUnavailable
from common.log import LogEvent, get_logger
from common.messaging.codec import WorkMessage, render_message, split
from common.messaging.parking import parked_properties
from common.messaging.topology import Topology, Work, find_or_declare, repair
from common.process import end_tasks

# Messages that may wait for their confirm, and for their turn. A confirm that takes longer is not waited for.
WINDOW: Final = 256
QUEUE_MAX: Final = 1_000
CONFIRM_TIMEOUT_SECONDS: Final = 5.0
OPEN_TIMEOUT_SECONDS: Final = 10.0
# Between a full queue's refusal and another try on a new channel; and between two repairs of the topology.
REFUSED_PAUSE_SECONDS: Final = 5.0
REPAIR_PAUSE_SECONDS: Final = 5.0

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
        self._lane: _Lane | None = None
        self._publishing: set[asyncio.Task[None]] = set()
        self._must_repair = asyncio.Event()

    def offer(self, work: Work, ids: Iterable[tuple[UUID, UUID]], traceparents: Iterable[str] = ()) -> None:
        """Ask that (id, shop id) be worked on now: one message per shard, or as many as the ids need. Never waits."""
        by_shard: dict[int, list[UUID]] = defaultdict(list)
        for value, shop_id in ids:
            by_shard[self._topology.shard_of(shop_id)].append(value)
        traces = list(traceparents)
        for shard, shard_ids in by_shard.items():
            for message in split(work, shard_ids, traces):
                if self._lane is None or len(self._waiting) >= QUEUE_MAX:
                    _count(message, "dropped")
                else:
                    self._waiting.append((message, self._topology.queue(work, shard)))
        self._arrived.set()

    async def session(self, connection: AbstractConnection, report: Callable[[bool], None]) -> None:
        """Publish over this connection until it breaks, and report whether it can. Raises: whatever broke it."""
        async with asyncio.timeout(OPEN_TIMEOUT_SECONDS):
            await find_or_declare(connection, self._topology)
        tasks = [asyncio.create_task(self._publish_waiting()), asyncio.create_task(self._repair(connection))]
        closing: list[asyncio.Task[None]] = []
        try:
            lane = self._lane = await _open_lane(connection)
            report(True)
            while True:
                await _first(lane.suspect.wait(), lane.refused_for_long(), *tasks)
                if lane.suspect.is_set():
                    break
                spent, lane = lane, await _open_lane(connection)
                self._lane = lane
                closing = [task for task in closing if not task.done()] + [asyncio.create_task(spent.close())]
        finally:
            self._lane = None
            report(False)
            for message, _ in self._waiting:
                _count(message, "dropped")
            self._waiting.clear()
            await end_tasks([*tasks, *closing], 0)
        await _wait_while_blocked(connection)
        raise BrokerUnavailable

    async def drain(self, deadline_seconds: float) -> None:
        """Wait until what was offered has left and is confirmed, for at most that long."""
        with suppress(TimeoutError):
            async with asyncio.timeout(deadline_seconds):
                while self._lane is not None and (self._waiting or self._publishing):
                    if self._publishing:
                        await asyncio.wait(self._publishing)
                    await asyncio.sleep(0)

    async def park(self, delivered: DeliveredMessage, reason: str, queue: str) -> None:
        """Put aside a message that nobody could read, byte for byte, with the reason and where it came from; confirmed.

        Raises: `BrokerUnavailable` when it was not confirmed.
        """
        lane = self._lane
        if lane is None:
            raise BrokerUnavailable
        outcome = await self._send(
            lane, delivered.body, self._topology.parked, parked_properties(delivered, reason, queue)
        )
        if outcome != "confirmed":
            raise BrokerUnavailable

    async def _publish_waiting(self) -> None:
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            while self._waiting and (lane := self._lane) is not None:
                await lane.window.acquire()
                if not self._waiting:
                    lane.window.release()
                    break
                message, key = self._waiting.popleft()
                task = asyncio.create_task(self._publish(lane, message, key))
                self._publishing.add(task)
                task.add_done_callback(self._publishing.discard)

    async def _publish(self, lane: "_Lane", message: WorkMessage, key: str) -> None:
        UNCONFIRMED.inc()
        outcome = "unconfirmed"
        try:
            body, properties = render_message(message)
            outcome = await self._send(lane, body, key, properties)
        finally:
            lane.window.release()
            UNCONFIRMED.dec()
            _count(message, outcome)

    async def _send(self, lane: "_Lane", body: bytes, key: str, properties: Basic.Properties) -> str:
        """Publish and wait for the broker's word: `confirmed`, `returned`, `refused`, or `unconfirmed` without one."""
        try:
            async with asyncio.timeout(CONFIRM_TIMEOUT_SECONDS):
                await lane.channel.basic_publish(
                    body, exchange=self._topology.exchange, routing_key=key, properties=properties, mandatory=True
                )
        except PublishError:
            # No queue took it.
            get_logger().error(LogEvent.MESSAGE_RETURNED, routing_key=key)
            self._must_repair.set()
            return "returned"
        except DeliveryError:
            get_logger().warning(LogEvent.MESSAGE_REFUSED, routing_key=key)
            lane.note_refusal()
            return "refused"
        except (Exception, asyncio.CancelledError) as error:
            # aiormq cancels what waits on a connection that dies. Either way an unanswered publish makes a channel suspect.
            lane.suspect.set()
            task = asyncio.current_task()
            if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
                raise
            get_logger().warning(LogEvent.MESSAGE_UNCONFIRMED, routing_key=key, error=type(error).__name__)
            return "unconfirmed"
        return "confirmed"

    async def _repair(self, connection: AbstractConnection) -> None:
        """Declare and bind everything again after a message came back, every now and then, where this login may."""
        while True:
            await self._must_repair.wait()
            self._must_repair.clear()
            try:
                async with asyncio.timeout(OPEN_TIMEOUT_SECONDS):
                    await repair(connection, self._topology)
            except Exception as error:
                # Somebody else has to; until then messages are counted as returned and the scan does their work.
                get_logger().warning(LogEvent.TOPOLOGY_UNREPAIRED, error=type(error).__name__)
            await asyncio.sleep(REPAIR_PAUSE_SECONDS)


class _Lane:
    """A channel to publish on, with its own count of what waits for a confirm."""

    def __init__(self, channel: AbstractChannel) -> None:
        self.channel = channel
        self.window = asyncio.Semaphore(WINDOW)
        self.suspect = asyncio.Event()
        self._refused = asyncio.Event()
        self._refused_at = 0.0

    def note_refusal(self) -> None:
        """A full queue nacked a message. RabbitMQ 3.10 goes on refusing on that channel, whatever becomes of the queue."""
        if not self._refused.is_set():
            self._refused_at = monotonic()
            self._refused.set()

    async def close(self) -> None:
        """Close the channel when nobody waits for a confirm on it any more."""
        for _ in range(WINDOW):
            await self.window.acquire()
        with suppress(Exception):
            await self.channel.close()

    async def refused_for_long(self) -> None:
        """Return some seconds after the first refusal: then it is time for another channel."""
        await self._refused.wait()
        await asyncio.sleep(max(0.0, self._refused_at + REFUSED_PAUSE_SECONDS - monotonic()))


async def _open_lane(connection: AbstractConnection) -> _Lane:
    async with asyncio.timeout(OPEN_TIMEOUT_SECONDS):
        channel = await connection.channel(publisher_confirms=True, on_return_raises=True)
        return _Lane(await channel.get_underlay_channel())


async def _first(*waits: Coroutine[Any, Any, object] | asyncio.Task[None]) -> None:
    """Return when the first is done, and end those that were begun here. Raises: what a task raised."""
    begun = [asyncio.ensure_future(wait) for wait in waits]
    try:
        done, _ = await asyncio.wait(begun, return_when=asyncio.FIRST_COMPLETED)
    finally:
        await end_tasks([task for task, wait in zip(begun, waits, strict=True) if task is not wait], 0)
    for task in done:
        task.result()


async def _wait_while_blocked(connection: AbstractConnection) -> None:
    """An alarm: the broker reads nothing from us, not even that we close; one connection that waits is better than many."""
    if connection.transport is not None:
        await connection.transport.ready()


def _count(message: WorkMessage, outcome: str) -> None:
    PUBLISHED.labels(message.work.name.lower(), outcome).inc()
