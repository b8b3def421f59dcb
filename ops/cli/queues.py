"""`payouts queues`: the queues that a change of `PAYOUTS_AMQP_SHARDS` leaves behind."""

from typing import Final

import click
from aio_pika.abc import AbstractConnection
from aiormq.exceptions import ChannelAccessRefused, ChannelNotFoundEntity

from common.messaging.topology import DECLARE_TIMEOUT_SECONDS, Topology
from ops.cli.broker import broker_connection
from ops.cli.connect import read_settings, run_explained
from ops.cli.errors import CheckFailed, Refused
from ops.cli.options import json_option
from ops.cli.output import show_records

_BY_HAND: Final = "this login may not; as an administrator: rabbitmqctl delete_queue"


@click.group("queues")
def queues_group() -> None:
    """The queues of RabbitMQ. What is in them are pointers to work that the database knows."""


@queues_group.command("retire")
@json_option
def retire_command(as_json: bool) -> None:
    """Delete the queues beyond PAYOUTS_AMQP_SHARDS, once every process has that setting.

    Payouts and callbacks that their messages name are found by the workers' scan. Exit code 1, and nothing is deleted, while a
    process still takes from one of them.
    """
    settings = read_settings()
    topology = Topology(settings.amqp_queue_prefix, settings.amqp_shards)

    async def work() -> dict[str, int]:
        async with broker_connection(settings) as connection:
            return await _retire(connection, topology)

    retired = run_explained(work())
    show_records("retired", ({"queue": name, "messages": count} for name, count in retired.items()), as_json=as_json)


async def _retire(connection: AbstractConnection, topology: Topology) -> dict[str, int]:
    """Delete them all or none; by name, how many messages each had. Raises: `CheckFailed`, `Refused`.

    RabbitMQ has no "delete if unused" for quorum queues, so whoever begins to consume in between loses its queue, and declares
    it anew: a second run retires that.
    """
    found = {name: state for name in topology.retired_queues() if (state := await _look(connection, name))}
    used = [name for name, (_, consumers) in found.items() if consumers]
    if used:
        raise CheckFailed(
            f"a process still takes from {', '.join(used)}: restart every process with the new setting first"
        )
    for name in found:
        channel = await connection.channel()
        try:
            await channel.queue_delete(name, timeout=DECLARE_TIMEOUT_SECONDS)
        except ChannelAccessRefused:
            raise Refused(f"{name}: {_BY_HAND} {name}") from None
        await channel.close()
    return {name: messages for name, (messages, _) in found.items()}


async def _look(connection: AbstractConnection, name: str) -> tuple[int, int] | None:
    """How many messages and consumers a queue has; None when there is no such queue. A refusal closes the channel."""
    channel = await connection.channel()
    try:
        queue = await channel.declare_queue(name, passive=True, timeout=DECLARE_TIMEOUT_SECONDS)
    except ChannelNotFoundEntity:
        return None
    except ChannelAccessRefused:
        raise Refused(f"{name}: {_BY_HAND} {name}") from None
    await channel.close()
    return queue.declaration_result.message_count or 0, queue.declaration_result.consumer_count or 0
