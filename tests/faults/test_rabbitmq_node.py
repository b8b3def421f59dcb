"""The private node: what was confirmed outlives a crash, nothing outlives a stop, and it meets nobody else."""

import asyncio
import os
import signal
import socket
import stat
from contextlib import suppress
from functools import partial
from pathlib import Path

import aio_pika
import psutil
import pytest
from aiormq.exceptions import ChannelNotFoundEntity
from yarl import URL

from common.messaging.topology import Topology, Work, declare
from ops.ports import LOOPBACK, choose_port
from ops.rabbitmq import Node, find_server
from tests.broker import MakeBroker
from tests.stack import eventually

TOPOLOGY = Topology("", 1)
QUEUE = TOPOLOGY.queue(Work.SETTLE, 0)


def processes_of(node: Node) -> list[psutil.Process]:
    """Everything that was started with this node's folder in its environment."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get("HOME", "").startswith(str(node.home)):
                found.append(process)
    return found


async def has_ended(node: Node) -> bool:
    return node.process_id is None


async def put(url: str) -> None:
    """One confirmed message in a durable queue."""
    connection = await aio_pika.connect(url)
    async with connection:
        channel = await connection.channel()
        await declare(channel, TOPOLOGY)
        exchange = await channel.get_exchange(TOPOLOGY.exchange)
        await exchange.publish(aio_pika.Message(b"{}", delivery_mode=aio_pika.DeliveryMode.PERSISTENT), QUEUE)


async def has_one(url: str) -> bool:
    """Whether there is exactly one message in that queue, which stays there; asked for by getting it."""
    connection = await aio_pika.connect(url)
    async with connection:
        queue = await (await connection.channel()).get_queue(QUEUE)
        messages = [await queue.get(fail=False), await queue.get(fail=False)]
        return [message is not None for message in messages] == [True, False]


async def test_confirmed_messages_outlive_whatever_kills_the_node_and_nothing_outlives_its_stop(
    make_broker: MakeBroker,
) -> None:
    node = await make_broker()
    url = node.url
    await put(url)

    # A crash of the node.
    node.kill()
    assert node.process_id is None
    assert await asyncio.to_thread(node.start) == url
    await eventually(lambda: has_one(url), "the message is there")

    # A crash of whoever started it, which leaves everything running.
    other = Node(node.home, node.home / "other.log", find_server() or Path())
    assert await asyncio.to_thread(other.start) == url
    await eventually(lambda: has_one(url), "the message is there")

    # A crash of all but the virtual machine and epmd: the script in front of them.
    assert other.process_id is not None
    os.kill(other.process_id, signal.SIGKILL)
    await eventually(partial(has_ended, other), "the script has ended")
    assert await asyncio.to_thread(node.start) == url
    await eventually(lambda: has_one(url), "the message is there")

    await asyncio.to_thread(node.stop_app)
    with pytest.raises(OSError):
        await has_one(url)
    await asyncio.to_thread(node.start_app)
    await eventually(lambda: has_one(url), "the message is there")

    await asyncio.to_thread(node.wipe)
    assert processes_of(node) == []
    assert await asyncio.to_thread(node.start) == url
    with pytest.raises(ChannelNotFoundEntity):
        await has_one(url)

    node.pause()
    await asyncio.to_thread(node.stop)
    assert processes_of(node) == []


async def test_is_on_loopback_alone_and_opens_its_secrets_to_nobody(make_broker: MakeBroker) -> None:
    node = await make_broker()

    listening = {
        connection.laddr.ip
        for process in processes_of(node)
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    }
    assert listening <= {"127.0.0.1", "::1"}
    assert "root" not in {process.username() for process in processes_of(node)}
    secret = [node.home / "password", *(node.home / "configuration").glob("*.conf"), node.home / "data"]
    assert all(stat.S_IMODE(path.stat().st_mode) & 0o077 == 0 for path in secret)
    assert stat.S_IMODE((node.home / "data" / ".erlang.cookie").stat().st_mode) == 0o400
    assert node.url.partition("@")[0].split(":")[2] not in "".join(
        " ".join(process.cmdline()) for process in processes_of(node)
    )


async def test_a_new_node_takes_another_port_when_somebody_was_quicker(
    make_broker: MakeBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server((LOOPBACK, 0)) as quicker:
        taken = quicker.getsockname()[1]
        chosen = iter([taken])
        monkeypatch.setattr("ops.rabbitmq.choose_port", lambda wanted=None: next(chosen, None) or choose_port(wanted))
        node = await make_broker()
        assert URL(node.url).port != taken
        await put(node.url)
        assert await has_one(node.url)
