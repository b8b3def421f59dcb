"""`payouts parked`: what nobody could read waits for people, is shown, sent on or dropped, and never lost on the way."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any, Final
from uuid import uuid4

import aio_pika
import pytest
from aio_pika.abc import AbstractChannel, AbstractIncomingMessage
from pamqp import encode

from common.domain.ids import PAYOUT, render_id
from common.messaging.codec import WorkMessage, render_message
from common.messaging.parking import FROM, LOOKS_MAX, REASON, Verdict, judge_parked
from common.messaging.topology import Topology, Work, declare
from ops.rabbitmq import Node
from tests.broker import Broker
from tests.factories import environment, fetch
from tests.flows import Desk
from tests.stack import eventually
from tests.terminal import Ended, Terminal

BECAUSE: Final = ("--reason", "seen to", "--actor", "alice")


class Lot:
    """A parking queue, and somebody at a terminal who looks after it."""

    def __init__(self, terminal: Terminal, topology: Topology, channel: AbstractChannel) -> None:
        self._terminal = terminal
        self.topology = topology
        self.channel = channel
        self.settle = topology.queue(Work.SETTLE, 0)

    async def run(self, *arguments: object) -> Ended:
        return await self._terminal.run("parked", *arguments)

    async def listed(self) -> list[Any]:
        parked: list[Any] = (await self.run("list", "--json")).document["parked"]
        return parked

    async def park(self, body: bytes, *, queue: str | None = None, **properties: Any) -> None:
        """Park a message as a worker does."""
        headers = {REASON: "not JSON", FROM: self.settle if queue is None else queue, **properties.pop("headers", {})}
        message = aio_pika.Message(
            body, headers=headers, type=Work.SETTLE, **({"message_id": uuid4().hex} | properties)
        )
        exchange = await self.channel.get_exchange(self.topology.exchange, ensure=False)
        await exchange.publish(message, self.topology.parked)

    async def park_undecodable(self) -> None:
        """A message whose timestamp no calendar has."""
        written = encode.METHODS["timestamp"]
        encode.METHODS["timestamp"] = lambda _: (2**62).to_bytes(8, "big")
        try:
            await self.park(b"undecodable", timestamp=datetime.now(UTC))
        finally:
            encode.METHODS["timestamp"] = written

    async def take(self, name: str) -> list[AbstractIncomingMessage]:
        """Everything in a queue, which is empty afterwards."""
        queue = await self.channel.get_queue(name, ensure=False)
        taken = []
        while (message := await queue.get(no_ack=True, fail=False)) is not None:
            taken.append(message)
        return taken

    async def count(self, name: str) -> int:
        queue = await self.channel.declare_queue(name, passive=True)
        return queue.declaration_result.message_count or 0

    async def holds(self, messages: int) -> None:
        """Wait until so many are parked: a broker puts back what was looked at a moment after the connection has closed."""

        async def all_there() -> bool:
            return await self.count(self.topology.parked) == messages

        await eventually(all_there, f"{messages} are parked")


@asynccontextmanager
async def open_lot(database_url: str, broker: Broker, prefix: str) -> AsyncIterator[Lot]:
    topology = Topology(prefix, 1)
    variables = {"AMQP_URL": broker.url, "PAYOUTS_AMQP_QUEUE_PREFIX": prefix}
    async with await aio_pika.connect(broker.url) as connection:
        channel = await connection.channel(on_return_raises=True)
        await declare(channel, topology)
        yield Lot(Terminal(environment(database_url, **variables)), topology, channel)


@pytest.fixture
async def lot(database_url: str, broker: Broker, amqp_prefix: str) -> AsyncIterator[Lot]:
    async with open_lot(database_url, broker, amqp_prefix) as opened:
        yield opened


def headers_of(message: AbstractIncomingMessage) -> dict[str, Any]:
    """Without the count that RabbitMQ 3.10 adds to every delivery."""
    return {name: value for name, value in message.headers.items() if name != "x-delivery-count"}


def ids(parked: list[Any]) -> list[str]:
    return [message["id"] for message in parked]


async def test_an_empty_parking_queue_is_told_in_a_word(lot: Lot) -> None:
    (await lot.run("list")).assert_shown("none")


async def test_messages_are_listed_oldest_first_and_stay_where_they_are(lot: Lot) -> None:
    for number in range(3):
        await lot.park(b"poison", message_id=f"m-{number}")

    for _ in range(3):
        await lot.holds(3)
        assert ids(await lot.listed()) == ["m-0", "m-1", "m-2"]

    await lot.holds(3)
    (first, *_) = await lot.listed()
    assert (first["reason"], first["from"], first["bytes"]) == ("not JSON", lot.settle, 6)
    await lot.holds(3)
    assert ids((await lot.run("list", "--limit", 2, "--json")).document["parked"]) == ["m-0", "m-1"]
    await lot.holds(3)


async def test_looking_never_wears_a_message_out(lot: Lot) -> None:
    """RabbitMQ 4 drops what was given back twenty times, so it is never given back that often."""
    await lot.park(b"poison", message_id="m-0", headers={"nested": {"list": [1, None, bytearray(b"\xff")]}})

    for _ in range(2 * LOOKS_MAX + 5):
        await judge_parked(lot.channel, lot.topology, lambda _: Verdict.KEEP, messages_max=10)

    (message,) = await lot.take(lot.topology.parked)
    assert (message.message_id, message.body, message.type) == ("m-0", b"poison", Work.SETTLE)
    assert message.headers[REASON] == "not JSON"
    assert message.headers["nested"] == {"list": [1, None, bytearray(b"\xff")]}
    assert message.delivery_mode == aio_pika.DeliveryMode.PERSISTENT
    assert int(str(message.headers.get("x-delivery-count", 0))) <= LOOKS_MAX


async def test_a_message_is_shown_with_what_it_asks_for(lot: Lot) -> None:
    payout_id = uuid4()
    body, _ = render_message(WorkMessage(Work.SETTLE, (payout_id,)))
    await lot.park(body, message_id="readable", headers={"traceparents": ["00-1-2-3"]})
    await lot.park(b"\x1b[2J\xff", message_id="unreadable")

    readable = (await lot.run("show", "readable", "--json")).document
    unreadable = await lot.run("show", "unreadable")

    assert readable["asks_for"] == [render_id(PAYOUT, payout_id)]
    assert json.loads(readable["body"]) == json.loads(body)
    assert "traceparents" in readable["headers"]
    unreadable.assert_shown("base64:G1sySv8=", "not JSON")
    assert "\x1b" not in unreadable.out
    (await lot.run("show", "nobody")).assert_refused("no message nobody is parked")


async def test_replay_sends_a_message_on_as_it_was(lot: Lot, floor: Desk) -> None:
    body, _ = render_message(WorkMessage(Work.SETTLE, (uuid4(),)))
    await lot.park(body, message_id="m-1", headers={"traceparents": ["00-1-2-3"], "CC": [lot.topology.parked]})
    await lot.park(b"poison", message_id="m-2")

    ended = await lot.run("replay", "m-1", *BECAUSE, "--json")

    assert ended.document == {"replayed": 1, "kept": 0}
    (message,) = await lot.take(lot.settle)
    assert (message.body, message.type, headers_of(message)) == (body, Work.SETTLE, {"traceparents": ["00-1-2-3"]})
    assert ids(await lot.listed()) == ["m-2"]
    row = await floor.one("SELECT actor, action, subject, reason, detail FROM audit WHERE action LIKE 'parked.%'")
    assert (row.actor, row.action, row.reason) == ("alice", "parked.replay", "seen to")
    assert (row.subject, row.detail) == (lot.topology.parked, {"messages": ["m-1"]})


async def test_a_thousand_messages_are_replayed_and_a_second_time_finds_none(lot: Lot) -> None:
    bodies = [render_message(WorkMessage(Work.SETTLE, (uuid4(),)))[0] for _ in range(1000)]
    for body in bodies:
        await lot.park(body)

    assert (await lot.run("replay", "--all", *BECAUSE, "--json")).document == {"replayed": 1000, "kept": 0}
    assert (await lot.run("replay", "--all", *BECAUSE, "--json")).document == {"replayed": 0, "kept": 0}

    assert [message.body for message in await lot.take(lot.settle)] == bodies
    assert await lot.count(lot.topology.parked) == 0


async def test_two_who_replay_at_once_send_each_message_once(lot: Lot) -> None:
    for number in range(200):
        await lot.park(b"%d" % number)

    judged = await asyncio.gather(
        *(judge_parked(lot.channel, lot.topology, lambda _: Verdict.REPLAY, messages_max=200) for _ in range(2))
    )

    assert sum(map(len, judged)) == 200
    assert sorted(int(message.body) for message in await lot.take(lot.settle)) == list(range(200))


async def test_a_message_from_nowhere_stays_and_is_named(lot: Lot) -> None:
    await lot.park(b"poison", message_id="lost", queue="somewhere.else")

    ended = await lot.run("replay", "--all", *BECAUSE)

    assert (ended.code, ended.err.count("\n")) == (1, 1)
    assert "nobody knows where to send: lost" in ended.err
    assert ids(await lot.listed()) == ["lost"]


async def test_a_message_that_finds_no_queue_stays_parked(lot: Lot) -> None:
    await lot.park(b"poison", message_id="m-1")
    await (await lot.channel.get_queue(lot.settle, ensure=False)).unbind(lot.topology.exchange, lot.settle)

    (await lot.run("replay", "--all", *BECAUSE)).assert_refused("found no queue", "payouts doctor")

    async def there_again() -> bool:
        return ids(await lot.listed()) == ["m-1"]

    await eventually(there_again, "the message is parked")


async def test_drop_forgets_what_was_named_and_nothing_else(lot: Lot, floor: Desk) -> None:
    for name in ("m-1", "m-2", "m-3"):
        await lot.park(b"poison", message_id=name)

    assert (await lot.run("drop", "m-1", "m-3", *BECAUSE, "--json")).document == {"dropped": 2, "kept": 0}

    assert ids(await lot.listed()) == ["m-2"]
    assert await lot.count(lot.settle) == 0
    missing = await lot.run("drop", "m-1", *BECAUSE)
    assert (missing.code, "not parked" in missing.err) == (1, True)
    (await lot.run("drop", "--all", *BECAUSE)).assert_shown("dropped")
    assert await lot.listed() == []
    assert [
        row.n for row in await fetch(floor.owner, "SELECT count(*) AS n FROM audit WHERE action = 'parked.drop'")
    ] == [3]


async def test_what_the_broker_gave_up_is_told_from_its_own_words(lot: Lot, broker: Broker) -> None:
    if not isinstance(broker, Node):
        pytest.skip("policies need a node of our own")
    prefix = lot.topology.prefix
    limits = {
        "delivery-limit": 1,
        "dead-letter-exchange": lot.topology.exchange,
        "dead-letter-routing-key": lot.topology.parked,
    }
    broker.ctl("set_policy", prefix, f"^{prefix}payouts.settle", json.dumps(limits), "--apply-to", "queues")
    try:
        body, properties = render_message(WorkMessage(Work.SETTLE, (uuid4(),)))
        exchange = await lot.channel.get_exchange(lot.topology.exchange, ensure=False)
        await exchange.publish(aio_pika.Message(body, type=Work.SETTLE, message_id=properties.message_id), lot.settle)
        queue = await lot.channel.get_queue(lot.settle, ensure=False)
        for _ in range(2):
            message = await eventually(lambda: queue.get(fail=False), "the message is there")
            await message.reject(requeue=True)

        async def one_parked() -> list[Any]:
            return await lot.listed()

        (parked,) = await eventually(one_parked, "the message is parked")
        assert parked["id"] == properties.message_id
        assert (parked["reason"], parked["from"]) == ("delivered too often", lot.settle)
        assert parked["parked_at"] is not None
        assert (await lot.run("replay", "--all", *BECAUSE, "--json")).document == {"replayed": 1, "kept": 0}
        (message,) = await lot.take(lot.settle)
        assert (message.body, headers_of(message)) == (body, {})
    finally:
        broker.ctl("clear_policy", prefix)


async def test_a_broker_that_was_never_set_up_is_told_apart_from_an_empty_one(
    database_url: str, broker: Broker, amqp_prefix: str
) -> None:
    variables = {"AMQP_URL": broker.url, "PAYOUTS_AMQP_QUEUE_PREFIX": amqp_prefix}
    (await Terminal(environment(database_url, **variables)).run("parked", "list")).assert_refused(
        f"no queue {amqp_prefix}payouts.parked"
    )


async def test_a_broker_out_of_reach_is_exit_code_3_and_keeps_its_password(database_url: str) -> None:
    nobody = Terminal(environment(database_url, AMQP_URL="amqp://payouts:hunter2@127.0.0.1:1/"))

    ended = await nobody.run("parked", "list")

    ended.assert_refused("the broker cannot be reached", code=3)
    assert "hunter2" not in ended.err


async def test_a_message_that_cannot_be_decoded_is_named_and_stepped_over(lot: Lot) -> None:
    """Such a one breaks the connection of whoever takes it; the broker's delivery limit puts it aside."""
    await lot.park(b"before", message_id="m-1")
    await lot.park_undecodable()
    await lot.park(b"behind", message_id="m-2")

    listed = await lot.run("list")
    assert (listed.code, "m-1" in listed.out, "m-2" in listed.out) == (0, True, False)
    assert "drop --undecodable" in listed.err
    await lot.holds(3)
    stopped = await lot.run("drop", "--all", *BECAUSE)
    assert (stopped.code, "dropped  1" in stopped.out, "drop --undecodable" in stopped.err) == (1, True, True)

    await lot.holds(2)
    await lot.park(b"poison", message_id="m-3")
    assert (await lot.run("drop", "--undecodable", *BECAUSE, "--json")).document == {"dropped": 1, "kept": 0}

    assert ids(await lot.listed()) == ["m-2", "m-3"]
    (await lot.run("drop", "--undecodable", *BECAUSE)).assert_refused("every parked message can be decoded")
    (await lot.run("drop", "--undecodable", "--all", *BECAUSE)).assert_refused("stands alone")


async def test_what_stands_before_an_undecodable_message_stays(lot: Lot) -> None:
    for number in range(3):
        await lot.park(b"before", message_id=f"m-{number}")
    await lot.park_undecodable()
    await lot.park(b"behind", message_id="m-9")

    assert (await lot.run("drop", "--undecodable", *BECAUSE, "--json")).document == {"dropped": 1, "kept": 0}

    await lot.holds(4)
    assert sorted(ids(await lot.listed())) == ["m-0", "m-1", "m-2", "m-9"]
