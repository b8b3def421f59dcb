"""The parking queue: messages that nobody could read, or that the broker gave up delivering. They wait for people.

A parked message is a pointer at work that PostgreSQL owns: whatever becomes of it, the payouts that it names are settled.
"""

import asyncio
import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum, auto
from hashlib import sha256
from time import monotonic
from typing import Any, Final
from uuid import uuid4

from aio_pika import DeliveryMode, Message
from aio_pika.abc import AbstractChannel, AbstractConnection, AbstractIncomingMessage
from aiormq.abc import DeliveredMessage
from aiormq.exceptions import InvalidFrameError
from pamqp.commands import Basic
from pamqp.encode import field_table
from prometheus_client import Gauge

from common.messaging.topology import DECLARE_TIMEOUT_SECONDS, Topology, find_or_declare

REASON: Final = "x-parked-reason"
FROM: Final = "x-parked-from"
# A look gives a message back. RabbitMQ 4 counts that, and drops what comes to 20: before that it is put back as a new one.
LOOKS_MAX: Final = 10
_CONFIRM_SECONDS: Final = 10.0
_COUNT_INTERVAL_SECONDS: Final = 5.0
_BACK_SECONDS: Final = 1.0
_BACK_POLL_SECONDS: Final = 0.02
_DEATHS: Final = "x-death"
_DELIVERIES: Final = ("x-delivery-count", "x-acquired-count")
# What would send copies elsewhere, even back to where the message came from.
_ROUTING: Final = ("CC", "BCC")
_OURS: Final = (REASON, FROM)
_BROKERS: Final = ("x-first-death-", "x-last-death-", _DEATHS, *_DELIVERIES)

PARKED: Final = Gauge("payouts_messages_parked", "Messages that were put aside and wait for people")
# In processes that never count, and while the broker is away, nothing is known.
PARKED.set(math.nan)


@dataclass(frozen=True, slots=True)
class Parked:
    """A message in the parking queue. `queue`: where it came from; None when nobody wrote that down.

    `id` is the broker's `message_id`, else a digest of the body: messages without the one and with the same other are alike.
    """

    id: str
    reason: str
    queue: str | None
    type: str | None
    parked_at: datetime | None
    headers: dict[str, Any]
    body: bytes


class Verdict(Enum):
    """What to do with a parked message."""

    KEEP = auto()
    REPLAY = auto()
    DROP = auto()


# None: it has seen enough; that message and those behind it are left where they are.
Judge = Callable[[Parked], Verdict | None]


def parked_properties(delivered: DeliveredMessage, reason: str, queue: str) -> Basic.Properties:
    """The properties of an unreadable message when it is parked: persistent, its own, and why and whence it came."""
    sent = delivered.header.properties
    return Basic.Properties(
        content_type=sent.content_type,
        delivery_mode=int(DeliveryMode.PERSISTENT),
        message_id=uuid4().hex,
        message_type=sent.message_type,
        timestamp=datetime.now(UTC),
        headers={**_without(sent.headers, _ROUTING), REASON: reason, FROM: queue},
    )


async def count_parked(channel: AbstractChannel, topology: Topology) -> int:
    """How many messages are parked and not being looked at. Raises: `aiormq.exceptions.ChannelNotFoundEntity`."""
    queue = await channel.declare_queue(topology.parked, passive=True)
    return queue.declaration_result.message_count or 0


class ParkedCount:
    """Tells how many messages are parked, again and again, as long as there is a connection."""

    def __init__(self, topology: Topology) -> None:
        self._topology = topology

    async def session(self, connection: AbstractConnection, report: Callable[[bool], None]) -> None:
        """Count over this connection until it breaks. Raises: whatever broke it."""
        async with asyncio.timeout(DECLARE_TIMEOUT_SECONDS):
            await find_or_declare(connection, self._topology, [self._topology.parked])
            channel = await connection.channel(publisher_confirms=False)
        report(True)
        try:
            while True:
                async with asyncio.timeout(DECLARE_TIMEOUT_SECONDS):
                    PARKED.set(await count_parked(channel, self._topology))
                await asyncio.sleep(_COUNT_INTERVAL_SECONDS)
        finally:
            PARKED.set(math.nan)


class UndecodableParked(Exception):
    """The next message cannot be decoded by this client; it and those behind it were not shown. The connection is gone."""

    def __init__(self, judged: "list[tuple[Parked, Verdict]]") -> None:
        super().__init__("a parked message cannot be decoded")
        self.judged = judged


async def judge_parked(
    channel: AbstractChannel, topology: Topology, judge: Judge, *, messages_max: int
) -> list[tuple[Parked, Verdict]]:
    """Show parked messages to `judge`, the oldest first, and do what it says; what is replayed is confirmed before it goes.

    Interrupted at any moment: every message is where it was, or where it shall be, or, for a moment, both.
    Raises: `UndecodableParked`; `aio_pika.exceptions.AMQPError`, of it `PublishError` when no queue takes a message (the
    channel has returns on).
    """
    queue = await channel.get_queue(topology.parked, ensure=False)
    exchange = await channel.get_exchange(topology.exchange, ensure=False)
    judged: list[tuple[Parked, Verdict]] = []
    kept: list[AbstractIncomingMessage] = []
    try:
        while len(judged) < messages_max:
            try:
                message = await queue.get(fail=False)
            except InvalidFrameError as error:
                raise UndecodableParked(judged) from error
            if message is None:
                break
            parked = parse_parked(message)
            verdict = judge(parked)
            if verdict is None:
                kept.append(message)
                break
            judged.append((parked, verdict))
            if verdict is Verdict.KEEP:
                # Held until the end, or it would be the next one again.
                kept.append(message)
                continue
            if verdict is Verdict.REPLAY:
                assert parked.queue is not None, "a judge replays only what has somewhere to go"
                copy = _copy(message, (*_ROUTING, *_OURS, *_BROKERS))
                await exchange.publish(copy, parked.queue, timeout=_CONFIRM_SECONDS)
            await message.ack()
    finally:
        # On a dead channel the broker takes everything back by itself.
        for message in kept if not channel.is_closed else ():
            if max(_deliveries(message)) < LOOKS_MAX:
                await message.nack(requeue=True)
            else:
                copy = _copy(message, (*_ROUTING, *_DELIVERIES))
                await exchange.publish(copy, topology.parked, timeout=_CONFIRM_SECONDS)
                await message.ack()
    await _wait_until_back(channel, topology, len(kept))
    return judged


async def drop_undecodable(
    connection: AbstractConnection, taking: AbstractConnection, topology: Topology, *, behind: int, of: int
) -> bool:
    """Drop the message behind so many that can be decoded, unseen, if it can not; whether that was so.

    One connection holds what is in front of it, the other takes it for good, and breaks over it. The look that found it broke
    one too, and what that held comes back a moment later: `of` is how many were parked then.
    """
    channel = await connection.channel(on_return_raises=True)
    await _wait_until_back(channel, topology, of)
    queue = await channel.get_queue(topology.parked, ensure=False)
    held = [await queue.get(fail=False) for _ in range(behind)]
    next_channel = await taking.channel()
    try:
        message = await (await next_channel.get_queue(topology.parked, ensure=False)).get(no_ack=True, fail=False)
    except InvalidFrameError:
        return True
    finally:
        for one in held:
            if one is not None:
                await one.nack(requeue=True)
        await _wait_until_back(channel, topology, len(held))
    if message is not None:
        # Somebody else was here meanwhile: it can be decoded, so it goes back.
        exchange = await channel.get_exchange(topology.exchange, ensure=False)
        await exchange.publish(_copy(message, _DELIVERIES), topology.parked, timeout=_CONFIRM_SECONDS)
    return False


async def _wait_until_back(channel: AbstractChannel, topology: Topology, count: int) -> None:
    """What is given back is there a moment later. Whoever looks next shall see it, unless somebody else has it already."""
    ends_at = monotonic() + _BACK_SECONDS
    while await count_parked(channel, topology) < count and monotonic() < ends_at:  # noqa: ASYNC110 nobody tells
        await asyncio.sleep(_BACK_POLL_SECONDS)


def parse_parked(message: AbstractIncomingMessage) -> Parked:
    """A message from the parking queue, parked by us or by the broker."""
    headers = dict(message.headers)
    death = _last_death(headers)
    reason, queue = headers.get(REASON), headers.get(FROM)
    if reason is None and death is not None:
        reason, queue = _explain(death), death.get("queue")
    return Parked(
        id=_id(message),
        reason="unknown" if reason is None else str(reason),
        queue=None if queue is None else str(queue),
        type=message.type,
        parked_at=message.timestamp if death is None or REASON in headers else death.get("time"),
        headers=headers,
        body=message.body,
    )


def _id(message: AbstractIncomingMessage) -> str:
    return message.message_id or f"sha256-{sha256(message.body).hexdigest()[:32]}"


def _last_death(headers: dict[str, Any]) -> dict[str, Any] | None:
    """What the broker wrote down when it gave up on the message, newest first. Source: RabbitMQ, "Dead Letter Exchanges"."""
    deaths = headers.get(_DEATHS)
    return deaths[0] if isinstance(deaths, list) and deaths and isinstance(deaths[0], dict) else None


def _explain(death: dict[str, Any]) -> str:
    reason = str(death.get("reason"))
    return "delivered too often" if reason == "delivery_limit" else f"{reason} by the broker"


def _deliveries(message: AbstractIncomingMessage) -> list[int]:
    """How often it was delivered before, by each of the broker's counts; none of them is always there."""
    counts = [message.headers.get(name) for name in _DELIVERIES]
    return [count for count in counts if isinstance(count, int)] or [0]


def _copy(message: AbstractIncomingMessage, dropped: Sequence[str]) -> Message:
    return Message(
        message.body,
        headers=_without(message.headers, dropped),
        content_type=message.content_type,
        delivery_mode=DeliveryMode.PERSISTENT,
        message_id=_id(message),
        timestamp=message.timestamp,
        type=message.type,
    )


def _without(headers: Any, dropped: Sequence[str]) -> dict[str, Any]:
    return {
        name: _writable(name, value) for name, value in (headers or {}).items() if not name.startswith(tuple(dropped))
    }


def _writable(name: str, value: Any) -> Any:
    """The value, or how Python shows it when pamqp can read it and not write it: text that is not UTF-8, a large number."""
    try:
        field_table({name: value})
    except (TypeError, ValueError, OverflowError, struct.error):
        return repr(value)
    return value
