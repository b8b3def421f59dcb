"""The broker of `AMQP_URL`: what AMQP shows of it, and what only its own interfaces show: arguments, bindings, limits."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, TypeVar

import aiohttp
from aio_pika.abc import AbstractChannel, AbstractConnection, AbstractQueue
from aio_pika.exceptions import AMQPError, ChannelInvalidStateError, PublishError
from aiormq.exceptions import ChannelAccessRefused, ChannelNotFoundEntity
from yarl import URL

from common.messaging.topology import QUORUM, Topology, Work
from common.settings import Settings
from ops.broker import CONNECT_ERRORS, connect, name_error
from ops.doctor import Finding, Verdict, good_if
from ops.rabbitmq import Node

_RABBITMQ_MIN: Final = (3, 10)
_TIMEOUT_SECONDS: Final = 10.0

_MAKE: Final = "a gateway or worker whose login may makes it; else import deploy/rabbitmq/definitions.json"
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class BrokerQueue:
    """A queue as the broker's own interfaces show it. AMQP itself shows none of this."""

    name: str
    type: str
    arguments: Mapping[str, Any]
    limits: Mapping[str, Any]
    bound: bool
    messages: int


# The limits that a policy must set, and for a few the value, by what they guard.
_NAMES: Final[dict[str, Callable[[Topology], Any]]] = {
    "delivery-limit": lambda _: None,
    "dead-letter-exchange": lambda topology: topology.exchange,
    "dead-letter-routing-key": lambda topology: topology.parked,
    "dead-letter-strategy": lambda _: "at-least-once",
    "max-length": lambda _: None,
    "overflow": lambda _: "reject-publish",
}
_PARKED: Final = ("max-length", "overflow")


async def check_broker(settings: Settings, topology: Topology) -> AsyncIterator[Finding]:
    """Every host of `AMQP_URL`, and on the first that answers what AMQP shows of exchange and queues."""
    if not settings.amqp_urls:
        yield Finding("RabbitMQ", Verdict.GOOD, "AMQP_URL is not set: PostgreSQL alone carries the work")
        return
    looked = False
    for url in settings.amqp_urls:
        subject = f"RabbitMQ {URL(url).host}:{URL(url).port or ''}".rstrip(":")
        asked = time.monotonic()
        try:
            connection = await connect(url)
        except CONNECT_ERRORS as error:
            yield Finding(subject, Verdict.WRONG, name_error(error), "AMQP_URL; meanwhile the scan does the work")
            continue
        async with connection:
            yield _check_version(connection, subject, time.monotonic() - asked)
            if not looked:
                looked = True
                async for finding in _check_topology(connection, topology):
                    yield finding


def _check_version(connection: AbstractConnection, subject: str, seconds: float) -> Finding:
    assert connection.transport is not None, "it is connected"
    properties = connection.transport.connection.server_properties
    product, version = (str(properties.get(name, "unknown")) for name in ("product", "version"))
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdecimal())
    return good_if(
        numbers >= _RABBITMQ_MIN,
        subject,
        f"{product} {version}, connected in {seconds * 1000:.0f} ms",
        "3.10 or newer",
    )


async def _check_topology(connection: AbstractConnection, topology: Topology) -> AsyncIterator[Finding]:
    exchange = f"exchange {topology.exchange}"
    yield await _look(
        connection,
        exchange,
        lambda channel: channel.declare_exchange(topology.exchange, passive=True),
        lambda _: Finding(exchange, Verdict.GOOD, "there"),
    )
    yield await _look(
        connection,
        f"rights on {topology.exchange}",
        partial(_may_publish, topology),
        lambda _: Finding(f"rights on {topology.exchange}", Verdict.GOOD, "this login may publish"),
    )
    for name in topology.all_queues():
        yield await _look(
            connection,
            f"queue {name}",
            partial(_find_queue, name),
            partial(_judge_queue, topology=topology),
        )


async def _may_publish(topology: Topology, channel: AbstractChannel) -> None:
    """Publish to nobody, who sends it back. Raises: `ChannelAccessRefused`."""
    underlay = await channel.get_underlay_channel()
    with suppress(PublishError):
        await underlay.basic_publish(
            b"", exchange=topology.exchange, routing_key=f"{topology.parked}.nobody", mandatory=True
        )


async def _find_queue(name: str, channel: AbstractChannel) -> AbstractQueue:
    return await channel.declare_queue(name, passive=True)


async def _look(
    connection: AbstractConnection,
    subject: str,
    find: Callable[[AbstractChannel], Awaitable[_T]],
    judge: Callable[[_T], Finding],
) -> Finding:
    """Judge what is found, on a channel of its own: a refusal closes it. Whoever raised an alarm opens none."""
    try:
        async with asyncio.timeout(_TIMEOUT_SECONDS):
            channel = await connection.channel(on_return_raises=True)
            found = await find(channel)
            await channel.close()
    except ChannelNotFoundEntity:
        return Finding(subject, Verdict.WRONG, "missing", _MAKE)
    except ChannelAccessRefused:
        return Finding(subject, Verdict.LOOK, "this login may not", "its rights: deploy/rabbitmq/users.py")
    except (AMQPError, ChannelInvalidStateError, OSError, TimeoutError) as error:
        return Finding(subject, Verdict.WRONG, f"no answer: {name_error(error)}", "rabbitmq-diagnostics check_alarms")
    return judge(found)


def _judge_queue(queue: AbstractQueue, topology: Topology) -> Finding:
    subject = f"queue {queue.name}"
    messages = queue.declaration_result.message_count or 0
    consumers = queue.declaration_result.consumer_count or 0
    detail = f"{messages} messages, {consumers} consumers"
    if queue.name == topology.parked:
        return good_if(messages == 0, subject, detail, "payouts parked list")
    return good_if(consumers > 0, subject, detail, "no worker takes from it: the scan does its work")


def read_queues_of_node(node: Node, topology: Topology) -> list[BrokerQueue]:
    """What `rabbitmqctl` shows of a node of our own. Blocks. Raises: `ops.servers.ServerFailed`."""

    def listed(what: str, *columns: str) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = json.loads(node.ctl(f"list_{what}", *columns, "--formatter", "json"))
        return rows

    limits = {policy["name"]: json.loads(policy["definition"]) for policy in listed("policies")}
    bound = {
        (b["source_name"], b["destination_name"], b["routing_key"])
        for b in listed("bindings", "source_name", "destination_name", "routing_key")
    }
    return [
        BrokerQueue(
            name=queue["name"],
            type=queue["type"],
            arguments={name: value for name, _, value in queue["arguments"]},
            limits=limits.get(queue["policy"], {}),
            bound=(topology.exchange, queue["name"], queue["name"]) in bound,
            messages=int(queue["messages"] or 0),
        )
        for queue in listed("queues", "name", "type", "arguments", "policy", "messages")
    ]


async def read_queues_of_management(management_url: str, amqp_url: str, topology: Topology) -> list[BrokerQueue]:
    """What RabbitMQ's management API shows to the login of `amqp_url`, which needs the tag `monitoring` or `management`.

    Raises: `aiohttp.ClientError`, `TimeoutError`.
    """
    login = URL(amqp_url)
    vhost = URL.build(path=login.path.removeprefix("/") or "/").raw_path.replace("/", "%2F")
    headers = {"Authorization": aiohttp.encode_basic_auth(login.user or "guest", login.password or "guest")}
    timeout = aiohttp.ClientTimeout(total=_TIMEOUT_SECONDS)
    async with aiohttp.ClientSession(headers=headers, timeout=timeout, raise_for_status=True) as session:

        async def listed(what: str) -> list[dict[str, Any]]:
            url = f"{management_url.rstrip('/')}/api/{what}/{vhost}"
            async with session.get(URL(url, encoded=True)) as response:
                rows: list[dict[str, Any]] = await response.json()
                return rows

        queues, bindings = await listed("queues"), await listed("bindings")
    bound = {(b["source"], b["destination"], b["routing_key"]) for b in bindings}
    return [
        BrokerQueue(
            name=queue["name"],
            type=queue.get("type", "unknown"),
            arguments=queue.get("arguments", {}),
            limits=queue.get("effective_policy_definition") or {},
            bound=(topology.exchange, queue["name"], queue["name"]) in bound,
            messages=queue.get("messages", 0),
        )
        for queue in queues
    ]


def check_queues(queues: Sequence[BrokerQueue], topology: Topology) -> Iterator[Finding]:
    """Type, arguments, bindings and limits of the queues that exist; and queues that nobody serves any more."""
    ours = set(topology.all_queues())
    for queue in queues:
        if queue.name not in ours:
            if queue.messages and any(queue.name.startswith(topology.stem(work)) for work in Work):
                yield Finding(
                    f"queue {queue.name}",
                    Verdict.LOOK,
                    f"{queue.messages} messages, and PAYOUTS_AMQP_SHARDS is {topology.shards}",
                    "payouts queues retire, once every process has that setting; the scan does the work of its messages",
                )
            continue
        good = queue.type == "quorum" and queue.arguments == QUORUM
        yield good_if(
            good,
            f"arguments of {queue.name}",
            "quorum, nothing else" if good else f"{queue.type}, {dict(queue.arguments)}",
            "delete the queue when it is empty; the product makes it anew",
            Verdict.WRONG,
        )
        yield good_if(
            queue.bound,
            f"binding of {queue.name}",
            f"from {topology.exchange}" if queue.bound else "none",
            "messages come back and are counted as returned: import deploy/rabbitmq/definitions.json",
            Verdict.WRONG,
        )
        missing = list(_missing_limits(queue, topology))
        yield good_if(
            not missing,
            f"limits of {queue.name}",
            "a policy sets them" if not missing else f"without {', '.join(missing)}",
            "import the policies of deploy/rabbitmq/definitions.json",
        )


def _missing_limits(queue: BrokerQueue, topology: Topology) -> Iterator[str]:
    for name in _PARKED if queue.name == topology.parked else _NAMES:
        wanted = _NAMES[name](topology)
        if name not in queue.limits or wanted not in (None, queue.limits[name]):
            yield name if wanted is None else f"{name} {wanted}"
