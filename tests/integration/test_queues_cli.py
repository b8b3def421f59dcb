"""`payouts queues retire`: goes by the setting, and takes nothing from anybody who still works."""

from typing import Final

import aio_pika
from aio_pika.abc import AbstractIncomingMessage

from common.messaging.topology import Topology, Work, declare
from tests.broker import Broker
from tests.factories import environment, fetch
from tests.flows import Desk
from tests.terminal import Terminal

RETIRE: Final = ("queues", "retire", "--reason", "two are enough", "--actor", "alice")


async def ignore(_: AbstractIncomingMessage) -> None:
    """Take a message and leave it unacknowledged."""


async def test_what_is_left_goes_once_nobody_takes_from_it(
    database_url: str, floor: Desk, broker: Broker, amqp_prefix: str
) -> None:
    before, after = Topology(amqp_prefix, 3), Topology(amqp_prefix, 2)
    left = {before.queue(work, 2) for work in Work}
    variables = {"AMQP_URL": broker.url, "PAYOUTS_AMQP_QUEUE_PREFIX": amqp_prefix, "PAYOUTS_AMQP_SHARDS": "2"}
    terminal = Terminal(environment(database_url, **variables))
    async with await aio_pika.connect(broker.url) as connection:
        channel = await connection.channel()
        await declare(channel, before)
        queue = await channel.get_queue(before.queue(Work.SETTLE, 2), ensure=False)
        tag = await queue.consume(ignore)

        refused = await terminal.run(*RETIRE)
        refused.assert_refused(queue.name, "a process still takes from", code=1)
        for name in before.all_queues():
            await channel.declare_queue(name, passive=True)
        await queue.cancel(tag)

        retired = (await terminal.run(*RETIRE, "--json")).document["retired"]
        assert {row["queue"] for row in retired} == left
        for name in after.all_queues():
            await channel.declare_queue(name, passive=True)
        assert (await terminal.run(*RETIRE, "--json")).document["retired"] == []
    (written,) = await fetch(floor.owner, "SELECT actor, reason, detail FROM audit WHERE action = 'queues.retire'")
    assert (written.actor, written.reason) == ("alice", "two are enough")
    assert written.detail == {"messages": dict.fromkeys(left, 0)}


async def test_without_a_broker_there_is_nothing_to_ask(database_url: str) -> None:
    ended = await Terminal(environment(database_url, AMQP_URL="")).run(*RETIRE)
    ended.assert_refused("AMQP_URL is not set")
