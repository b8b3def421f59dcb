"""What there is on the broker: one direct exchange, durable quorum queues by shard, and a place for what nobody can read.

Only `x-queue-type` is an argument: arguments cannot change without deleting a queue. Limits are policies (deploy/rabbitmq).
"""

import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Final
from uuid import UUID

from aio_pika.abc import AbstractChannel, AbstractConnection
from aiormq.exceptions import ChannelNotFoundEntity
from pamqp.common import Arguments

QUORUM: Final[Arguments] = {"x-queue-type": "quorum"}
DECLARE_TIMEOUT_SECONDS: Final = 10.0
SHARDS_MAX: Final = 64


class Work(StrEnum):
    """What a message asks for; the value is its AMQP `type`, version included."""

    SETTLE = "payout.settle.v1"
    CALLBACK = "callback.send.v1"


_STEMS: Final = {Work.SETTLE: "settle", Work.CALLBACK: "callbacks"}


@dataclass(frozen=True, slots=True)
class Topology:
    """Names on the broker. `prefix` lets tests and tenants share one; `shards` is the number of queues per kind of work."""

    prefix: str
    shards: int

    @property
    def exchange(self) -> str:
        """Where everything is published."""
        return f"{self.prefix}payouts"

    @property
    def parked(self) -> str:
        """The queue, and the routing key, of messages that nobody could read."""
        return f"{self.prefix}payouts.parked"

    def queue(self, work: Work, shard: int) -> str:
        """The queue, and the routing key, of a shard."""
        return f"{self.stem(work)}{shard}"

    def stem(self, work: Work) -> str:
        """What the names of all queues of one kind of work begin with, of shards that are no more as well."""
        return f"{self.prefix}payouts.{_STEMS[work]}."

    def queues(self, work: Work) -> list[str]:
        """All queues of one kind of work."""
        return [self.queue(work, shard) for shard in range(self.shards)]

    def retired_queues(self) -> Iterator[str]:
        """The queues that there would be with more shards, and that nobody publishes to with these."""
        for work in Work:
            yield from (self.queue(work, shard) for shard in range(self.shards, SHARDS_MAX))

    def all_queues(self) -> Iterator[str]:
        """Every queue there is."""
        for work in Work:
            yield from self.queues(work)
        yield self.parked

    def shard_of(self, shop_id: UUID) -> int:
        """One shop, one shard: stable across processes, versions and broker restarts."""
        return zlib.crc32(shop_id.bytes) % self.shards


async def find_or_declare(connection: AbstractConnection, topology: Topology, queues: Iterable[str] = ()) -> None:
    """See that the exchange and these queues are there; when one is missing, declare everything.

    Looking needs no right to make: none at all up to RabbitMQ 4.2, any right on it since 4.3. A binding cannot be
    looked at; `mandatory` tells of a missing one. Raises: `aiormq.exceptions.ChannelAccessRefused` when something is
    missing and this login may not make it.
    """
    looking = await connection.channel(publisher_confirms=False)
    try:
        await looking.declare_exchange(topology.exchange, passive=True, timeout=DECLARE_TIMEOUT_SECONDS)
        for name in queues:
            await looking.declare_queue(name, passive=True, timeout=DECLARE_TIMEOUT_SECONDS)
        await looking.close()
    except ChannelNotFoundEntity:
        # The answer closed that channel.
        declaring = await connection.channel(publisher_confirms=False)
        await declare(declaring, topology)
        await declaring.close()


async def repair(connection: AbstractConnection, topology: Topology) -> None:
    """Declare everything once more, bindings too: after a message found no queue.

    Raises: `aiormq.exceptions.ChannelAccessRefused` when this login may not.
    """
    declaring = await connection.channel(publisher_confirms=False)
    await declare(declaring, topology)
    await declaring.close()


async def declare(channel: AbstractChannel, topology: Topology) -> None:
    """Declare everything; what exists already with the same arguments is left as it is.

    Raises: `aio_pika.exceptions.ChannelPreconditionFailed` when a queue exists with other arguments.
    """
    exchange = await channel.declare_exchange(
        topology.exchange, "direct", durable=True, timeout=DECLARE_TIMEOUT_SECONDS
    )
    for name in topology.all_queues():
        queue = await channel.declare_queue(name, durable=True, arguments=QUORUM, timeout=DECLARE_TIMEOUT_SECONDS)
        await queue.bind(exchange, routing_key=name, timeout=DECLARE_TIMEOUT_SECONDS)
