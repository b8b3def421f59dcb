"""`payouts doctor`: what is as it should be is said, what is not is named, and nothing is changed."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

import aio_pika
import pytest
from aio_pika.abc import AbstractChannel, AbstractIncomingMessage
from sqlalchemy.engine import make_url

from common.messaging.topology import QUORUM, Topology, Work, declare
from common.settings import Settings
from ops.doctor import Finding, Verdict
from ops.doctor.broker import BrokerQueue, check_queues, read_queues_of_management, read_queues_of_node
from ops.doctor.settings import check_settings
from ops.ports import choose_port, loopback_url
from ops.rabbitmq import Node
from tests.broker import Broker, MakeBroker
from tests.conftest import MakeCluster, Server
from tests.factories import environment
from tests.stack import eventually
from tests.terminal import Ended, Terminal

DEFINITIONS: Final = Path(__file__).parent.parent.parent / "deploy" / "rabbitmq" / "definitions.json"
TOPOLOGY: Final = Topology("", 1)
SETTLE: Final = TOPOLOGY.queue(Work.SETTLE, 0)
LIMITS: Final = {
    "delivery-limit": 20,
    "dead-letter-exchange": TOPOLOGY.exchange,
    "dead-letter-routing-key": TOPOLOGY.parked,
    "dead-letter-strategy": "at-least-once",
    "max-length": 100_000,
    "overflow": "reject-publish",
}


def verdicts(ended: Ended) -> dict[str, str]:
    """By what was looked at."""
    return {finding["what"]: finding["verdict"] for finding in json.loads(ended.out)["findings"]}


def advice(ended: Ended, what: str) -> str:
    """What to do about it."""
    return str(next(finding["advice"] for finding in json.loads(ended.out)["findings"] if finding["what"] == what))


def by_subject(findings: Any) -> dict[str, Finding]:
    return {finding.subject: finding for finding in findings}


@pytest.fixture
async def channel(broker: Broker) -> AsyncIterator[AbstractChannel]:
    async with await aio_pika.connect(broker.url) as connection:
        yield await connection.channel(on_return_raises=True)


async def ignore(_: AbstractIncomingMessage) -> None:
    """Take a message and leave it unacknowledged."""


async def test_without_a_broker_everything_is_good(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster(durable=True)
    database_url = cluster.url("payouts")
    ended = await Terminal(environment(database_url, PAYOUTS_CALLBACK_PRIVATE_ADDRESSES="0")).run("doctor", "--json")

    assert (ended.code, ended.err) == (0, "")
    assert set(verdicts(ended).values()) == {"good"}
    assert {"settings", "PostgreSQL", "schema", "roles", "durability", "clock", "RabbitMQ"} <= verdicts(ended).keys()


async def test_broker_and_queues_are_looked_at(
    database_url: str, broker: Broker, amqp_prefix: str, channel: AbstractChannel
) -> None:
    topology = Topology(amqp_prefix, 2)
    variables = {"AMQP_URL": broker.url, "PAYOUTS_AMQP_QUEUE_PREFIX": amqp_prefix, "PAYOUTS_AMQP_SHARDS": "2"}
    terminal = Terminal(environment(database_url, **variables))

    missing = await terminal.run("doctor", "--json")

    assert (missing.code, missing.err.count("\n")) == (1, 1)
    queues = {f"queue {name}" for name in topology.all_queues()}
    wrong = {what for what, verdict in verdicts(missing).items() if verdict == "wrong"}
    assert wrong - {"durability"} == {
        f"exchange {topology.exchange}",
        f"rights on {topology.exchange}",
        *queues,
    }
    assert verdicts(missing)["limits"] == "look"

    await declare(channel, topology)
    for work in Work:
        for name in topology.queues(work):
            await (await channel.get_queue(name, ensure=False)).consume(ignore)
    exchange = await channel.get_exchange(topology.exchange, ensure=False)
    await exchange.publish(aio_pika.Message(b"poison"), topology.parked)
    there = await terminal.run("doctor", "--json")

    assert {verdicts(there)[queue] for queue in queues - {f"queue {topology.parked}"}} == {"good"}
    assert verdicts(there)[f"queue {topology.parked}"] == "look"
    assert advice(there, f"queue {topology.parked}") == "payouts parked list"


async def test_every_host_is_tried_and_no_password_is_shown(database_url: str, broker: Broker) -> None:
    dead = f"amqp://payouts:hunter2@127.0.0.1:{choose_port()}/"
    ended = await Terminal(environment(database_url, AMQP_URL=f"{dead},{broker.url}")).run("doctor", "--json")

    hosts = [verdict for what, verdict in verdicts(ended).items() if what.startswith("RabbitMQ 127.0.0.1:")]
    assert hosts == ["wrong", "good"]
    assert ended.code == 1
    assert "hunter2" not in ended.out + ended.err


async def test_a_login_that_may_not_look_is_told(database_url: str, broker: Broker, amqp_prefix: str) -> None:
    """RabbitMQ shows queues to any login before 4.3; what it does not show is no mistake of the queues."""
    if not isinstance(broker, Node):
        pytest.skip("logins need a node of our own")
    wrong = broker.url.replace("amqp://payouts:", "amqp://nobody:")
    ended = await Terminal(environment(database_url, AMQP_URL=wrong)).run("doctor")

    assert (ended.code, "ACCESS_REFUSED" in ended.out) == (1, True)


async def test_a_database_without_schema_says_what_to_do(server: Server) -> None:
    name = f"test_{uuid4().hex}"
    await server.run(f'CREATE DATABASE {name} OWNER "{make_url(server.login_url).username}"')
    try:
        ended = await Terminal(environment(server.url(name))).run("doctor", "--json")
    finally:
        await server.run(f"DROP DATABASE {name} WITH (FORCE)")

    assert (ended.code, verdicts(ended)["schema"], advice(ended, "schema")) == (1, "wrong", "payouts migrate")


async def test_a_database_out_of_reach_is_one_finding_among_others() -> None:
    ended = await Terminal(environment("postgresql://payouts:hunter2@127.0.0.1:1/payouts")).run("doctor", "--json")

    assert (ended.code, verdicts(ended)["PostgreSQL"]) == (1, "wrong")
    assert "settings" in verdicts(ended)
    assert "hunter2" not in ended.out + ended.err


async def test_a_database_that_forgets_is_wrong(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster(durable=False)

    ended = await Terminal(environment(cluster.url("payouts"))).run("doctor", "--json")

    assert (ended.code, verdicts(ended)["durability"]) == (1, "wrong")


@pytest.mark.parametrize(("processes", "verdict"), [("0", "good"), ("2", "good"), ("1000", "wrong")])
async def test_pools_must_fit_the_database_when_their_number_is_told(
    database_url: str, processes: str, verdict: str
) -> None:
    ended = await Terminal(environment(database_url, PAYOUTS_DATABASE_PROCESSES=processes)).run("doctor", "--json")

    assert verdicts(ended)["connections"] == verdict
    assert ("PAYOUTS_DATABASE_POOL_MAX" in advice(ended, "connections")) == (verdict == "wrong")


@pytest.mark.parametrize(
    ("variables", "subject"),
    [
        ({"PAYOUTS_DRAIN_SECONDS": "5"}, "leaving"),
        ({"PAYOUTS_SETTLE_SHOP_CONCURRENCY": "1100"}, "share per shop"),
        ({"PAYOUTS_RAIL_CONNECT_TIMEOUT_SECONDS": "20"}, "time-outs of rails"),
        ({"PAYOUTS_CALLBACK_LANE_CONCURRENCY": "512"}, "share per lane"),
        ({"PAYOUTS_DATABASE_LOCK_TIMEOUT_SECONDS": "20"}, "database time-outs"),
        ({"PAYOUTS_CALLBACK_PRIVATE_ADDRESSES": "1"}, "callback addresses"),
        ({"DATABASE_URL": "postgresql://user:hunter2@db.example/payouts"}, "way to the database"),
        ({"AMQP_URL": "amqp://user:hunter2@rabbit.example/"}, "way to the broker"),
        ({"AMQP_URL": "amqp://10.0.0.7,amqp://localhost"}, "way to the broker"),
        ({"AMQP_URL": "amqps://rabbit.example/?no_verify_ssl=1"}, "way to the broker"),
    ],
)
def test_relations_that_are_unwise_are_named(variables: dict[str, str], subject: str) -> None:
    good = {"PAYOUTS_CALLBACK_PRIVATE_ADDRESSES": "0", "AMQP_URL": "amqps://rabbit.example,amqp://127.0.0.1"}
    before = by_subject(check_settings(Settings.from_environ(environment("postgresql:///", **good))))
    after = by_subject(check_settings(Settings.from_environ(environment("postgresql:///", **{**good, **variables}))))

    assert {finding.verdict for finding in before.values()} == {Verdict.GOOD}
    assert [name for name, finding in after.items() if finding.verdict is not Verdict.GOOD] == [subject]
    assert after[subject].advice
    assert "hunter2" not in str(after)


@pytest.mark.parametrize(
    ("changes", "subject", "verdict"),
    [
        ({"type": "classic", "arguments": {}}, f"arguments of {SETTLE}", Verdict.WRONG),
        ({"arguments": {"x-queue-type": "quorum", "x-message-ttl": 1}}, f"arguments of {SETTLE}", Verdict.WRONG),
        ({"bound": False}, f"binding of {SETTLE}", Verdict.WRONG),
        ({"limits": {}}, f"limits of {SETTLE}", Verdict.LOOK),
        ({"limits": {**LIMITS, "overflow": "drop-head"}}, f"limits of {SETTLE}", Verdict.LOOK),
        ({"limits": {**LIMITS, "dead-letter-routing-key": "elsewhere"}}, f"limits of {SETTLE}", Verdict.LOOK),
        (
            {"name": TOPOLOGY.queue(Work.SETTLE, 3), "messages": 1},
            f"queue {TOPOLOGY.queue(Work.SETTLE, 3)}",
            Verdict.LOOK,
        ),
    ],
)
def test_a_queue_that_is_not_ours_as_we_declare_it_is_named(
    changes: dict[str, Any], subject: str, verdict: Verdict
) -> None:
    good: dict[str, Any] = {
        "name": SETTLE,
        "type": "quorum",
        "arguments": QUORUM,
        "limits": LIMITS,
        "bound": True,
        "messages": 0,
    }

    assert {finding.verdict for finding in check_queues([BrokerQueue(**good)], TOPOLOGY)} == {Verdict.GOOD}
    found = [f for f in check_queues([BrokerQueue(**{**good, **changes})], TOPOLOGY) if f.verdict is not Verdict.GOOD]
    assert [(finding.subject, finding.verdict) for finding in found] == [(subject, verdict)]
    assert found[0].advice


async def test_both_of_the_brokers_own_interfaces_show_the_limits_of_production(
    database_url: str, make_broker: MakeBroker
) -> None:
    node = await make_broker()
    policies = [{**policy, "vhost": "/"} for policy in json.loads(DEFINITIONS.read_text())["policies"]]
    await asyncio.to_thread(node.ctl, "import_definitions", text=json.dumps({"policies": policies}))
    management_url = await asyncio.to_thread(enable_management, node)
    async with await aio_pika.connect(node.url) as connection:
        await declare(await connection.channel(), TOPOLOGY)

    def of_node() -> list[BrokerQueue]:
        return sorted(read_queues_of_node(node, TOPOLOGY), key=lambda queue: queue.name)

    async def agree() -> list[BrokerQueue]:
        # The management API shows a policy at its next collection.
        shown = await read_queues_of_management(management_url, node.url, TOPOLOGY)
        by_name = sorted(shown, key=lambda queue: queue.name)
        return by_name if by_name == await asyncio.to_thread(of_node) else []

    queues = await eventually(agree, "both show the same")

    assert [queue.name for queue in queues] == sorted(TOPOLOGY.all_queues())
    assert {finding.verdict for finding in check_queues(queues, TOPOLOGY)} == {Verdict.GOOD}
    terminal = Terminal(environment(database_url, AMQP_URL=node.url))
    ended = await terminal.run("doctor", "--management-url", management_url, "--json")
    assert verdicts(ended)[f"limits of {SETTLE}"] == "good"
    wrong_port = await terminal.run("doctor", "--management-url", loopback_url(choose_port()), "--json")
    assert verdicts(wrong_port)["limits"] == "look"


def enable_management(node: Node) -> str:
    """Have the node serve its management API, and return the URL. Blocks."""
    plugins, port = node.home / "configuration" / "plugins", choose_port()
    plugins.write_text("[rabbitmq_management].\n")
    listener = f'[{{port, {port}}}, {{ip, "127.0.0.1"}}]'
    node.ctl(
        "eval",
        "application:load(rabbitmq_management),"
        f" application:set_env(rabbitmq_management, tcp_config, {listener}),"
        f' rabbit_plugins:ensure("{plugins}").',
    )
    return loopback_url(port)
