"""Faults between a gateway and the broker: whatever becomes of a publish, the create was answered and the payout settles."""

import asyncio
from contextlib import AsyncExitStack
from time import monotonic

import pytest

from common.messaging.publisher import CONFIRM_TIMEOUT_SECONDS
from common.messaging.topology import Work
from tests.broker import Broker
from tests.factories import add_funded_merchant
from tests.faults.amqp_proxy import ACK, CONNECTION_CLOSE, PUBLISH, START_OK, AmqpProxy, Fate, Way, amqp_proxy
from tests.faults.scene import ANSWER_SECONDS_MAX, LAG_SECONDS_MAX, SHORT_LEASES, Scene, rises, scene
from tests.stack import Process, eventually


async def test_settles_once_when_the_first_confirm_is_lost(stage: Scene, proxy: AmqpProxy) -> None:
    """Fault: the connection is reset at the first Basic.Ack from the broker; the message is there, nobody was told."""
    gateway, worker = await stage.start("gateway", AMQP_URL=proxy.url), await stage.start("worker", "all")
    await stage.assert_work_flows(gateway, worker)
    lost = proxy.at(Fate.RESET, Way.DOWN, ACK)

    await stage.create(10)

    async with asyncio.timeout(10):
        await lost.fired.wait()
    await stage.assert_work_flows(gateway, worker)
    assert await stage.published(gateway, "unconfirmed") >= 1
    assert await stage.worst_lag() <= LAG_SECONDS_MAX
    await stage.assert_all_well()


async def test_accepts_and_settles_while_publishes_vanish(stage: Scene, proxy: AmqpProxy) -> None:
    """Fault: after a few publishes the connection swallows everything that goes up, and stays open."""
    gateway, worker = await stage.start("gateway", AMQP_URL=proxy.url), await stage.start("worker", "all")
    await stage.assert_work_flows(gateway, worker)
    vanishing = proxy.at(Fate.BLACK_HOLE, Way.UP, PUBLISH, nth=5)

    async with stage.load():
        async with asyncio.timeout(10):
            await vanishing.fired.wait()
        began = monotonic()
        await rises(lambda: stage.published(gateway, "unconfirmed"), "an unconfirmed publish is counted")
        # Long before the heartbeats would tell.
        assert monotonic() - began <= CONFIRM_TIMEOUT_SECONDS + 10
        await rises(lambda: stage.consumed(worker), "the gateway publishes again", by=20)

    assert proxy.links == ["payouts publish"], "the connection that failed is still open"
    await stage.assert_work_flows(gateway, worker)
    assert max(answer.seconds for answer in stage.created) < ANSWER_SECONDS_MAX
    assert await stage.worst_lag() <= LAG_SECONDS_MAX
    await stage.assert_all_well()


async def test_publishes_again_by_itself_when_the_network_comes_back(stage: Scene, proxy: AmqpProxy) -> None:
    """Fault: everything to and from the broker vanishes, new connections are taken and never answered; then it heals."""
    gateway, worker = await stage.start_all(AMQP_URL=proxy.url)
    await stage.assert_work_flows(gateway, worker)
    async with stage.load(per_second=30):
        await stage.answered(20)
        proxy.go_dark()
        await rises(lambda: stage.published(gateway, "unconfirmed"), "an unconfirmed publish is counted")
        await rises(lambda: stage.published(gateway, "dropped"), "nothing is offered to a broker that is gone")
        proxy.flow()
        proxy.reset()

    await stage.assert_work_flows(gateway, worker)
    assert await stage.worst_lag() <= LAG_SECONDS_MAX
    assert proxy.foreign_acks == []
    await stage.assert_all_well()


async def test_binds_a_queue_again_that_returned_a_message(stage: Scene) -> None:
    """Fault: the queue is unbound, so that messages come back; nobody binds it again but the gateway itself."""
    gateway, worker = await stage.start_all()
    await stage.assert_work_flows(gateway, worker)
    await stage.unbind(stage.topology.queue(Work.SETTLE, 0))

    await stage.create(10)

    await stage.assert_work_flows(gateway, worker)
    assert await stage.published(gateway, "returned") >= 1
    assert await stage.worst_lag() <= LAG_SECONDS_MAX
    await stage.assert_all_well()


async def test_counts_what_the_broker_returns_and_settles_it_anyway(stage: Scene) -> None:
    """Fault: the queue is unbound and the gateway's login may not bind it; later somebody else does."""
    async with stage.login_without_configure() as url:
        gateway, worker = await stage.start("gateway", AMQP_URL=url), await stage.start("worker", "all")
        await stage.assert_work_flows(gateway, worker)
        queue, consumed = stage.topology.queue(Work.SETTLE, 0), await stage.consumed(worker)
        await stage.unbind(queue)

        async def more_returned() -> bool:
            await stage.create(1)
            return await stage.published(gateway, "returned") >= 3

        await eventually(more_returned, "returned messages are counted")
        await stage.settled()
        assert await stage.consumed(worker) == consumed
        assert await stage.worst_lag() <= LAG_SECONDS_MAX
        await stage.bind(queue)
        await stage.assert_work_flows(gateway, worker)
        await stage.assert_all_well()


@pytest.mark.parametrize("trouble", ["unbound", "full"])
async def test_one_bad_queue_stops_nothing_else(
    database_url: str, broker: Broker, amqp_prefix: str, trouble: str
) -> None:
    """Fault: one shard's queue returns or refuses every message, and the login can do nothing about it."""
    overrides = {**SHORT_LEASES, "PAYOUTS_AMQP_SHARDS": "2"}
    async with (
        scene(database_url, broker, amqp_prefix, **overrides) as stage,
        stage.login_without_configure() as url,
        amqp_proxy(url) as proxy,
        AsyncExitStack() as faults,
    ):
        while len({stage.topology.shard_of(merchant.shop.id) for merchant in stage.merchants}) < 2:
            # First, for no more pay than there are clients.
            stage.merchants.insert(0, await add_funded_merchant(stage.owner, stage.stack.settings))
        bad, queue = 0, stage.topology.queue(Work.SETTLE, 0)
        outcome = "returned" if trouble == "unbound" else "refused"
        if trouble == "unbound":
            await stage.unbind(queue)
        else:
            await faults.enter_async_context(stage.full_queue(f"settle.{bad}"))
        gateway = await stage.start("gateway", AMQP_URL=proxy.url)
        await stage.wait_connected(gateway)
        async with stage.load(per_second=60):
            await rises(lambda: stage.published(gateway, outcome), f"messages are {outcome}", by=20)
            await rises(lambda: stage.published(gateway, "confirmed"), "others are confirmed", by=40)
        assert proxy.counts[Way.UP, START_OK] == 1, "the connection was given up"
        assert await stage.published(gateway, "dropped") == 0
        assert await stage.published(gateway, "unconfirmed") == 0
        await stage.start("worker", "all")
        await stage.settled()


async def test_counts_what_a_full_queue_refuses_and_settles_it_anyway(stage: Scene) -> None:
    """Fault: a policy limits the queue to one message and nobody consumes; then a worker comes."""
    gateway = await stage.start("gateway")
    await stage.wait_connected(gateway)
    async with stage.full_queue():
        await _refused(stage, gateway)
        worker = await stage.start("worker", "all")
        await stage.assert_work_flows(gateway, worker)
    await stage.assert_all_well()


async def test_publishes_again_when_the_limit_of_a_full_queue_is_removed(stage: Scene) -> None:
    """Fault: the policy that made the queue refuse goes while it is full; RabbitMQ 3.10.8 refuses old channels for ever."""
    gateway = await stage.start("gateway")
    await stage.wait_connected(gateway)
    async with stage.full_queue():
        await _refused(stage, gateway)
    worker = await stage.start("worker", "all")
    await stage.assert_work_flows(gateway, worker)
    await stage.assert_all_well()


async def _refused(stage: Scene, gateway: Process) -> None:
    async def refused() -> bool:
        await stage.create(1)
        return await stage.published(gateway, "refused") >= 5

    await eventually(refused, "refused messages are counted")


async def test_confirms_everything_after_a_storm_of_clients_that_hang_up(stage: Scene, proxy: AmqpProxy) -> None:
    """Fault: merchants hang up in the middle of their creates, while the gateway's way to the broker is jammed."""
    gateway, worker = await stage.start("gateway", AMQP_URL=proxy.url), await stage.start("worker", "all")
    await stage.assert_work_flows(gateway, worker)
    proxy.pause(Way.UP)
    began = monotonic()
    await stage.hang_up(150)
    assert monotonic() - began < CONFIRM_TIMEOUT_SECONDS, "too slow to prove anything: confirms have timed out"
    proxy.flow()

    async with stage.load(per_second=150):
        await stage.answered(300)

    await stage.all_confirmed(gateway)
    assert await stage.published(gateway, "confirmed") == proxy.counts[Way.UP, PUBLISH]
    assert await stage.published(gateway, "unconfirmed") == 0
    await stage.assert_all_well()


async def test_settles_what_a_killed_gateway_had_accepted(stage: Scene) -> None:
    """Fault: kill -9 of one of two gateways under load, between commit and publish of many; merchants repeat their requests."""
    gateway, worker = await stage.start_all()
    doomed = await stage.start("gateway")
    await stage.wait_connected(doomed)

    async with stage.load(per_second=150):
        await stage.answered(100)
        await doomed.kill()
        await stage.answered(100)

    await stage.assert_work_flows(gateway, worker)
    assert await stage.worst_lag() <= LAG_SECONDS_MAX
    await stage.assert_all_well()


async def test_publishes_what_it_accepted_before_it_leaves(stage: Scene, proxy: AmqpProxy) -> None:
    """Fault: SIGTERM to a gateway in the middle of its batches."""
    leaving = await stage.start("gateway", AMQP_URL=proxy.url)
    worker = await stage.start("worker", "all")
    await stage.wait_connected(leaving, worker)

    async with stage.load(per_second=150):
        await stage.answered(100)
        staying = await stage.start("gateway")
        await stage.wait_connected(staying)
        assert await leaving.stop() == 0
        await stage.answered(50)

    assert proxy.counts[Way.UP, PUBLISH] > 0
    assert proxy.unconfirmed == 0
    assert proxy.counts[Way.UP, CONNECTION_CLOSE] == 1
    await stage.assert_work_flows(staying, worker)
    assert await stage.worst_lag() <= LAG_SECONDS_MAX
    await stage.assert_all_well()
