"""`deploy/rabbitmq`: what operations imports is what the product declares, limits hold, and a role may do its work alone."""

import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import aio_pika
import pytest
from aio_pika.abc import AbstractChannel, AbstractConnection, AbstractIncomingMessage
from aiormq.exceptions import ChannelAccessRefused
from yarl import URL

from common.messaging.topology import QUORUM, Topology, Work, declare, find_or_declare
from ops.rabbitmq import Node
from tests.broker import Broker
from tests.stack import eventually

DEPLOY: Final = Path(__file__).parent.parent.parent / "deploy" / "rabbitmq"
TOPOLOGY: Final = Topology(prefix="", shards=1)
SETTLE: Final = TOPOLOGY.queue(Work.SETTLE, 0)
CALLBACKS: Final = TOPOLOGY.queue(Work.CALLBACK, 0)
PASSWORDS: Final = {role: f"a-long-enough-password-of-{role}" for role in ("gateway", "worker", "ops")}
VHOST: Final = "payouts"

Forbidden = Callable[[AbstractChannel], Any]


def render_users(**environment: str) -> subprocess.CompletedProcess[str]:
    """Run the script as operations does."""
    variables = {f"{role.upper()}_PASSWORD": password for role, password in PASSWORDS.items()} | environment
    return subprocess.run(
        [sys.executable, DEPLOY / "users.py"],
        env={"PATH": os.environ["PATH"], **variables},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def imported(broker: Broker) -> Iterator[Node]:
    """The session's node with everything of `deploy/rabbitmq` imported, twice; our own login may do anything there."""
    if not isinstance(broker, Node):
        pytest.skip("importing definitions needs a node of our own")
    for _ in range(2):
        broker.ctl("import_definitions", text=(DEPLOY / "definitions.json").read_text())
        broker.ctl("import_definitions", text=render_users().stdout)
    broker.ctl("set_permissions", "--vhost", VHOST, login(broker), ".*", ".*", ".*")
    yield broker
    broker.ctl("delete_vhost", VHOST)
    for role in PASSWORDS:
        broker.ctl("delete_user", f"payouts-{role}")


def login(node: Node) -> str:
    """The login of the node's URL."""
    return URL(node.url).user or ""


@asynccontextmanager
async def connection_of(node: Node, role: str | None) -> AsyncIterator[AbstractConnection]:
    """A connection to the virtual host of the definitions, as a role's user, or as the node's own."""
    url = URL(node.url).with_path(f"/{VHOST}")
    if role is not None:
        url = url.with_user(f"payouts-{role}").with_password(PASSWORDS[role])
    connection = await aio_pika.connect(str(url))
    async with connection:
        yield connection


@asynccontextmanager
async def channel_of(node: Node, role: str | None) -> AsyncIterator[AbstractChannel]:
    """A channel of such a connection."""
    async with connection_of(node, role) as connection:
        yield await connection.channel(on_return_raises=True)


def export(node: Node) -> dict[str, list[Any]]:
    """What there is in the virtual host, without what a login of the test's own adds."""
    text = node.ctl("export_definitions", "-")
    everything = json.loads(text[text.index("{") :])
    return {
        kind: sorted(
            ({**item, "arguments": item.get("arguments", {})} for item in everything[kind] if item["vhost"] == VHOST),
            key=lambda item: str(item.get("name", item.get("destination"))),
        )
        for kind in ("exchanges", "queues", "bindings", "policies")
    }


async def ignore(_: AbstractIncomingMessage) -> None:
    """Take a message and leave it unacknowledged."""


async def publish(channel: AbstractChannel, exchange: str, routing_key: str) -> None:
    """Publish a message that must arrive, and wait for its confirm."""
    target = await channel.get_exchange(exchange, ensure=False) if exchange else channel.default_exchange
    await target.publish(aio_pika.Message(b"{}"), routing_key)


async def test_declares_exactly_what_the_definitions_hold(imported: Node) -> None:
    before = export(imported)
    assert [queue["name"] for queue in before["queues"]] == sorted(TOPOLOGY.all_queues())

    async with channel_of(imported, None) as channel:
        await declare(channel, TOPOLOGY)

    assert export(imported) == before


def test_every_queue_is_under_its_policy(imported: Node) -> None:
    listed = json.loads(imported.ctl("list_queues", "--vhost", VHOST, "name", "policy", "--formatter", "json"))

    assert {queue["name"]: queue["policy"] for queue in listed} == {
        SETTLE: "payouts-work",
        CALLBACKS: "payouts-work",
        TOPOLOGY.parked: "payouts-parked",
    }


async def test_parks_a_message_that_is_given_back_for_ever(imported: Node) -> None:
    definitions = json.loads((DEPLOY / "definitions.json").read_text())
    limit = definitions["policies"][0]["definition"]["delivery-limit"]
    async with channel_of(imported, None) as channel:
        await publish(channel, TOPOLOGY.exchange, SETTLE)
        queue, parked = await channel.get_queue(SETTLE), await channel.get_queue(TOPOLOGY.parked)
        for _ in range(limit + 1):
            message = await eventually(lambda: queue.get(fail=False), "the message is there again")
            await message.reject(requeue=True)

        message = await eventually(lambda: parked.get(fail=False), "the message is parked")

        assert message.headers["x-death"][0]["reason"] == "delivery_limit"
        assert await queue.get(fail=False) is None
        await message.ack()


@pytest.mark.parametrize("role", PASSWORDS)
async def test_no_role_may_make_or_delete_anything(imported: Node, role: str) -> None:
    attempts: list[Forbidden] = [
        lambda channel: channel.declare_exchange(TOPOLOGY.exchange, "direct", durable=True),
        lambda channel: channel.declare_queue(SETTLE, durable=True, arguments=QUORUM),
        lambda channel: channel.declare_queue("anything"),
        lambda channel: channel.queue_delete(TOPOLOGY.parked),
        lambda channel: channel.exchange_delete(TOPOLOGY.exchange),
        lambda channel: publish(channel, "", SETTLE),
    ]
    for attempt in attempts:
        await assert_refused(imported, role, attempt)


@pytest.mark.parametrize(
    ("role", "queue"),
    [
        ("gateway", SETTLE),
        ("gateway", CALLBACKS),
        ("gateway", TOPOLOGY.parked),
        ("worker", TOPOLOGY.parked),
        ("ops", SETTLE),
        ("ops", CALLBACKS),
    ],
)
async def test_a_role_reads_no_queue_but_its_own(imported: Node, role: str, queue: str) -> None:
    async def consume(channel: AbstractChannel) -> None:
        await (await channel.get_queue(queue, ensure=False)).consume(ignore)

    async def purge(channel: AbstractChannel) -> None:
        await (await channel.get_queue(queue, ensure=False)).purge()

    await assert_refused(imported, role, consume)
    await assert_refused(imported, role, purge)


async def test_every_role_may_do_its_work(imported: Node) -> None:
    for role, queues in {
        "gateway": (),
        "worker": (SETTLE, CALLBACKS),
        "ops": (TOPOLOGY.parked,),
    }.items():
        async with channel_of(imported, role) as channel:
            await channel.declare_exchange(TOPOLOGY.exchange, passive=True)
            await publish(channel, TOPOLOGY.exchange, TOPOLOGY.parked)
            for name in queues:
                queue = await channel.declare_queue(name, passive=True)
                tag = await queue.consume(ignore)
                await queue.cancel(tag)
    async with channel_of(imported, "ops") as channel:
        await (await channel.get_queue(TOPOLOGY.parked)).purge()


async def test_a_role_finds_what_is_there_and_may_not_make_what_is_missing(imported: Node) -> None:
    async with connection_of(imported, "gateway") as connection:
        await find_or_declare(connection, TOPOLOGY)
        with pytest.raises(ChannelAccessRefused):
            await find_or_declare(connection, Topology("missing.", 1))
    async with connection_of(imported, "worker") as connection:
        await find_or_declare(connection, TOPOLOGY, (SETTLE, CALLBACKS, TOPOLOGY.parked))


async def test_a_login_of_its_own_makes_what_is_missing(broker: Broker, amqp_prefix: str) -> None:
    topology = Topology(amqp_prefix, 2)
    connection = await aio_pika.connect(broker.url)
    async with connection:
        for _ in range(2):
            await find_or_declare(connection, topology, topology.queues(Work.SETTLE))

        channel = await connection.channel(on_return_raises=True)
        for name in topology.all_queues():
            await publish(channel, topology.exchange, name)


@pytest.mark.parametrize("password", ["", "short", "no good in a URL: /@?#&%"])
def test_refuses_a_password_that_will_not_do_and_does_not_repeat_it(password: str) -> None:
    done = render_users(WORKER_PASSWORD=password)

    assert done.returncode == 1
    assert done.stderr.startswith("error: WORKER_PASSWORD: ")
    assert not password or password not in done.stdout + done.stderr


def test_rights_stay_within_the_queue_prefix() -> None:
    done = json.loads(render_users(PAYOUTS_AMQP_QUEUE_PREFIX="tenant.a-", RABBITMQ_VHOST="shared").stdout)

    assert {permission["vhost"] for permission in done["permissions"]} == {"shared"}
    assert {permission["user"]: permission["write"] for permission in done["permissions"]} == {
        "payouts-gateway": r"^tenant\.a\-payouts$",
        "payouts-worker": r"^tenant\.a\-payouts(\.parked)?$",
        "payouts-ops": r"^tenant\.a\-payouts$",
    }
    assert not any(password in json.dumps(done) for password in PASSWORDS.values())


async def assert_refused(node: Node, role: str, attempt: Forbidden) -> None:
    """The broker answers 403."""
    async with channel_of(node, role) as channel:
        with pytest.raises(ChannelAccessRefused):
            await attempt(channel)
