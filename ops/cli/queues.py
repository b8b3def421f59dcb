"""`payouts queues`: the queues that a change of `PAYOUTS_AMQP_SHARDS` leaves behind."""

from collections.abc import Iterable
from typing import Final

import click
from aio_pika.abc import AbstractConnection
from aiormq.exceptions import ChannelAccessRefused, ChannelNotFoundEntity

from common.db.engine import Engine, in_transaction
from common.db.ledger import append_audit
from common.messaging.topology import DECLARE_TIMEOUT_SECONDS, Topology
from ops.cli.broker import broker_connection
from ops.cli.connect import read_settings, run_changing
from ops.cli.errors import CheckFailed, Refused
from ops.cli.options import actor_option, json_option, reason_option
from ops.cli.output import show_records

_BY_HAND: Final = "this login may not; as an administrator: rabbitmqctl delete_queue"


@click.group("queues")
def queues_group() -> None:
    """The queues of RabbitMQ. What is in them are pointers to work that the database knows."""


@queues_group.command("retire")
@reason_option
@actor_option
@json_option
def retire_command(reason: str, actor: str, as_json: bool) -> None:
    """Delete the queues beyond PAYOUTS_AMQP_SHARDS, once every process has that setting.

    Payouts and callbacks that their messages name are found by the workers' scan. Exit code 1, and nothing is deleted, while a
    process still takes from one of them.
    """
    settings = read_settings()
    topology = Topology(settings.amqp_queue_prefix, settings.amqp_shards)

    async def work(engine: Engine) -> dict[str, int]:
        async with broker_connection(settings) as connection:
            retired = await _find_unused(connection, topology)
            if retired:
                await in_transaction(
                    engine,
                    lambda tx: append_audit(
                        tx,
                        actor=actor,
                        action="queues.retire",
                        subject=settings.amqp_queue_prefix,
                        reason=reason,
                        detail={"messages": retired},
                    ),
                    attempts_max=1,
                )
            await _delete(connection, retired)
            return retired

    retired = run_changing(work)
    show_records("retired", ({"queue": name, "messages": count} for name, count in retired.items()), as_json=as_json)


async def _find_unused(connection: AbstractConnection, topology: Topology) -> dict[str, int]:
    """By name, how many messages each has. Raises: `CheckFailed` when one is used, `Refused`."""
    found = {name: state for name in topology.retired_queues() if (state := await _look(connection, name))}
    used = [name for name, (_, consumers) in found.items() if consumers]
    if used:
        raise CheckFailed(
            f"a process still takes from {', '.join(used)}: restart every process with the new setting first"
        )
    return {name: messages for name, (messages, _) in found.items()}


async def _delete(connection: AbstractConnection, names: Iterable[str]) -> None:
    """Delete queues. Raises: `Refused`.

    RabbitMQ has no "delete if unused" for quorum queues, so whoever begins to consume in between loses its queue, and declares
    it anew: a second run retires that.
    """
    for name in names:
        channel = await connection.channel()
        try:
            await channel.queue_delete(name, timeout=DECLARE_TIMEOUT_SECONDS)
        except ChannelAccessRefused:
            raise Refused(f"{name}: {_BY_HAND} {name}") from None
        await channel.close()


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
