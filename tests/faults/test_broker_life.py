"""Faults of the broker itself: while it is away, silent, blocked or empty, payouts settle; then it carries them again."""

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from time import monotonic
from uuid import uuid4

import aiohttp
import psutil
import pytest

from common.messaging.codec import WorkMessage
from common.messaging.consumer import Consumer
from common.messaging.link import HEARTBEAT_SECONDS, Link
from common.messaging.publisher import Publisher
from common.messaging.topology import Topology, Work
from ops.ports import choose_port
from tests.broker import Broker, MakeBroker
from tests.faults.amqp_proxy import START_OK, Way, amqp_proxy
from tests.faults.scene import (
    ANSWER_SECONDS_MAX,
    LAG_SECONDS_MAX,
    SHORT_LEASES,
    Scene,
    control,
    declare_all,
    rises,
    scene,
)
from tests.stack import Process, eventually, http_status

# aiormq's grace: three heartbeats of one second more.
SILENCE_SECONDS = 3 * (HEARTBEAT_SECONDS + 1)


# A blocked broker answers no good-bye; whoever leaves waits for some seconds and no longer.
LEAVING_SECONDS_MAX = 15.0


async def connected(stage: Scene, process: Process, link: str) -> float:
    (value,) = await stage.samples(process, "payouts_broker_connected", link=link)
    return value


async def told(url: str) -> str:
    """What a process says of the broker where it says whether it is ready."""
    async with aiohttp.ClientSession() as session, session.get(url) as response:
        return str((await response.json())["broker"])


async def test_accepts_and_settles_while_the_broker_is_stopped(stage: Scene) -> None:
    """Fault: RabbitMQ is stopped under load, stays away for a while, and comes back."""
    gateway, worker = await stage.start_all()
    async with stage.load():
        await stage.answered(60)
        await control(stage.broker, "stop_app")
        try:
            await stage.answered(180)
        finally:
            await control(stage.broker, "start_app")
        await rises(lambda: stage.consumed(worker), "work flows through the broker by itself", by=20)
    await stage.assert_work_flows(gateway, worker)
    assert await stage.worst_lag() <= LAG_SECONDS_MAX
    assert max(answer.seconds for answer in stage.created) < ANSWER_SECONDS_MAX
    await stage.assert_all_well()


async def test_starts_accepts_and_settles_without_a_broker(stage: Scene) -> None:
    """Fault: RabbitMQ is down when gateway and worker start; it appears later."""
    await control(stage.broker, "stop_app")
    try:
        gateway, worker = await stage.start("gateway"), await stage.start("worker", "all")
        await stage.create(20)
        await stage.settled()
        assert await stage.worst_lag() <= LAG_SECONDS_MAX
        assert await http_status(f"{stage.stack.base_url}/readyz") == 200
        assert await told(f"{stage.stack.base_url}/readyz") == "away: publish"
        assert await told(f"http://127.0.0.1:{worker.admin_port}/readyz") == (
            "away: publish, consume settle, consume callback, count parked"
        )
        assert await connected(stage, gateway, "publish") == 0
        assert await connected(stage, worker, "consume settle") == 0
        assert await stage.published(gateway, "dropped") > 0
    finally:
        await control(stage.broker, "start_app")
    await stage.assert_work_flows(gateway, worker)
    assert await told(f"{stage.stack.base_url}/readyz") == "connected"
    await stage.assert_all_well()


async def test_tells_that_the_broker_is_gone_before_anybody_publishes(stage: Scene) -> None:
    """Fault: RabbitMQ is restarted while nothing is to be done; nobody would notice but those who look."""
    gateway, worker = await stage.start_all()
    await stage.assert_work_flows(gateway, worker)
    await control(stage.broker, "stop_app")
    try:
        for process, link in ((worker, "consume settle"), (worker, "consume callback"), (gateway, "publish")):

            async def gone(process: Process = process, link: str = link) -> bool:
                return await connected(stage, process, link) == 0

            await eventually(gone, f"{process.name}: {link} is down", 10)
    finally:
        await control(stage.broker, "start_app")
    await stage.wait_connected(gateway, worker)
    await stage.assert_work_flows(gateway, worker)
    await stage.assert_all_well()


@pytest.mark.parametrize("resource", ["memory", "disk"])
async def test_accepts_and_settles_while_publishing_is_blocked(stage: Scene, resource: str) -> None:
    """Fault: an alarm; the broker reads no more from whoever publishes. Then there is enough again."""
    alarm, calm = {
        "memory": (("set_vm_memory_high_watermark", "0"), ("set_vm_memory_high_watermark", "absolute", "512MB")),
        "disk": (("set_disk_free_limit", "1000GB"), ("set_disk_free_limit", "50MB")),
    }[resource]
    async with amqp_proxy(stage.broker.url) as proxy:
        gateway, worker = await stage.start("gateway", AMQP_URL=proxy.url), await stage.start("worker", "all")
        leaving = await stage.start("gateway", AMQP_URL=proxy.url)
        await stage.assert_work_flows(gateway, worker)
        await stage.wait_connected(leaving)
        connections = proxy.counts[Way.UP, START_OK]
        await control(stage.broker, *alarm)
        try:
            async with stage.load():
                await rises(lambda: stage.published(gateway, "unconfirmed"), "unconfirmed publishes are counted")
                await rises(lambda: stage.published(gateway, "dropped"), "publishing is given up", by=30)
                assert await told(f"http://127.0.0.1:{gateway.admin_port}/readyz") == "away: publish"
                began = monotonic()
                assert await leaving.stop() == 0
                assert monotonic() - began < LEAVING_SECONDS_MAX
                await stage.answered(60)
            assert proxy.counts[Way.UP, START_OK] == connections, (
                "it piles up connections that the broker does not see closed"
            )
        finally:
            await control(stage.broker, *calm)
        await _assert_back(stage, gateway, worker)


async def test_takes_the_next_host_when_one_is_away(stage: Scene) -> None:
    """Fault: of two hosts the first does not answer."""
    urls = f"amqp://127.0.0.1:{choose_port()},{stage.broker.url}"
    gateway, worker = await stage.start_all(AMQP_URL=urls)
    await stage.assert_work_flows(gateway, worker)
    await stage.assert_all_well()


async def _assert_back(stage: Scene, gateway: Process, worker: Process) -> None:
    await stage.assert_work_flows(gateway, worker)
    assert await stage.worst_lag() <= LAG_SECONDS_MAX
    assert max(answer.seconds for answer in stage.created) < ANSWER_SECONDS_MAX
    await stage.assert_all_well()


async def test_starts_over_after_a_silence_of_the_broker(
    database_url: str, make_broker: MakeBroker, amqp_prefix: str
) -> None:
    """Fault: the broker's process is stopped as it is, longer than the heartbeats allow, and goes on as if nothing were."""
    broker = await make_broker()
    async with scene(database_url, broker, amqp_prefix, **SHORT_LEASES) as stage:
        gateway, worker = await stage.start_all()
        await stage.assert_work_flows(gateway, worker)
        broker.pause()
        async with stage.load(per_second=10):

            async def noticed() -> bool:
                return await connected(stage, worker, "consume settle") == 0

            await eventually(noticed, "the silence is noticed", SILENCE_SECONDS + HEARTBEAT_SECONDS)
        broker.resume()
        await stage.assert_work_flows(gateway, worker)
        assert await stage.worst_lag() <= LAG_SECONDS_MAX

        async def one_consumer_each() -> bool:
            depths = await stage.depths()
            return all(depths[stage.topology.queue(work, 0)] == (0, 1) for work in Work)

        await eventually(one_consumer_each, "each queue has one consumer")
        await stage.assert_all_well()


async def test_makes_progress_and_leaks_nothing_while_connections_are_closed(stage: Scene) -> None:
    """Fault: an operator closes every connection, again and again, under load."""
    async with amqp_proxy(stage.broker.url) as proxy:
        gateway, worker = await stage.start_all(AMQP_URL=proxy.url)
        await stage.assert_work_flows(gateway, worker)
        links = proxy.links
        files = {process.pid: psutil.Process(process.pid).num_fds() for process in (gateway, worker)}
        async with stage.load():
            for _ in range(5):
                consumed = await stage.consumed(worker)
                await control(stage.broker, "close_all_connections", "a fault test")
                await stage.answered(30)
                await rises(lambda: stage.consumed(worker), "messages are consumed", by=1)
                assert await stage.consumed(worker) > consumed
        await stage.assert_work_flows(gateway, worker)
        assert proxy.links == links
        for pid, count in files.items():

            async def few(pid: int = pid, count: int = count) -> bool:
                # A database connection may have been opened meanwhile; a leak would be one file per fault.
                return psutil.Process(pid).num_fds() < count + 8

            await eventually(few, "no connection stays open")
        assert proxy.foreign_acks == []
        assert {code for code, _ in proxy.closes} == {320}
        assert await stage.worst_lag() <= LAG_SECONDS_MAX
        await stage.assert_all_well()


async def test_leaves_no_task_behind_when_connections_break(broker: Broker, amqp_prefix: str) -> None:
    """Fault: the connections of a consumer and a publisher are reset again and again; seen from inside, in this process."""
    topology = Topology(amqp_prefix, 1)
    await declare_all(broker, topology)
    publisher, claimed = Publisher(topology), asyncio.Semaphore(0)

    async def claim(messages: Sequence[WorkMessage]) -> bool:
        for _ in messages:
            claimed.release()
        return True

    consumer = Consumer(topology, Work.SETTLE, claim, publisher)

    async def both_connected() -> bool:
        return all(link.connected for link in links)

    async def carried() -> bool:
        # What is offered to a connection that is about to be found dead is dropped: offer again.
        publisher.offer(Work.SETTLE, [(uuid4(), uuid4())])
        with suppress(TimeoutError):
            async with asyncio.timeout(0.5):
                return await claimed.acquire()
        return False

    counts = [0]

    async def at_rest() -> int:
        # In the middle of something there may be a task less than when everybody waits.
        counts.append(len(asyncio.all_tasks()))
        return counts[-1] if counts[-1] == counts[-2] else 0

    async with amqp_proxy(broker.url) as proxy:
        links = [Link("publish", [proxy.url], publisher.session), Link("consume settle", [proxy.url], consumer.session)]
        running = [asyncio.create_task(link.run()) for link in links]
        try:
            await eventually(both_connected, "both links are up")
            await eventually(carried, "a message is carried")
            before = await eventually(at_rest, "everybody waits")
            for _ in range(8):
                proxy.reset()
                await eventually(carried, "a message is carried again")

            async def as_before() -> bool:
                return len(asyncio.all_tasks()) <= before and len(proxy.links) == 2

            await eventually(as_before, "tasks and connections are as many as before")
            assert proxy.foreign_acks == []
            assert proxy.closes == []
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)


async def test_loses_no_confirmed_message_when_the_broker_is_killed(
    database_url: str, make_broker: MakeBroker, amqp_prefix: str
) -> None:
    """Fault: kill -9 of the node while messages wait, and a restart on what it wrote; then it is wiped, and starts empty."""
    broker = await make_broker()
    async with scene(database_url, broker, amqp_prefix, **SHORT_LEASES) as stage:
        gateway = await stage.start("gateway")
        await stage.wait_connected(gateway)

        async def many_confirmed() -> bool:
            await stage.create(10)
            return await stage.published(gateway, "confirmed") >= 40

        await eventually(many_confirmed, "messages are confirmed")
        await asyncio.to_thread(broker.kill)
        await stage.create(3)
        await asyncio.to_thread(broker.start)
        worker = await stage.start("worker", "all")

        async def all_consumed() -> bool:
            return await stage.consumed(worker) >= 40

        await eventually(all_consumed, "every confirmed message was delivered")
        await stage.assert_work_flows(gateway, worker)
        await stage.assert_all_well()

        since = len(stage.created)
        async with stage.load():
            await stage.answered(60)
            await asyncio.to_thread(broker.kill)
            await stage.answered(60)
            await asyncio.to_thread(broker.wipe)
            await asyncio.to_thread(broker.start)
            await rises(lambda: stage.consumed(worker), "work flows through an empty broker", by=20)
        await stage.assert_work_flows(gateway, worker)
        assert await stage.worst_lag(since=since) <= LAG_SECONDS_MAX
        await stage.assert_all_well()


async def test_consumes_again_after_its_queue_was_deleted(stage: Scene) -> None:
    """Fault: the queue is deleted under load, five times; each time the broker cancels the consumer."""
    gateway, worker = await stage.start_all()
    queue = stage.topology.queue(Work.SETTLE, 0)
    async with stage.load():
        for _ in range(5):
            await stage.answered(20)
            await control(stage.broker, "delete_queue", queue)
            await rises(lambda: stage.consumed(worker), "messages are consumed from a new queue", by=3)
    await stage.assert_work_flows(gateway, worker)

    async def one_consumer() -> bool:
        return (await stage.depths())[queue] == (0, 1)

    await eventually(one_consumer, "the queue has one consumer")
    assert await stage.worst_lag() <= LAG_SECONDS_MAX
    await stage.assert_all_well()


async def test_backs_off_when_the_broker_has_other_queues_of_that_name(stage: Scene) -> None:
    """Fault: a queue exists with other arguments, so that nothing can be declared; later somebody removes it."""
    name = stage.topology.queue(Work.SETTLE, 0)
    await stage.declare_classic(name)
    async with amqp_proxy(stage.broker.url) as proxy:
        gateway, worker = await stage.start("gateway", AMQP_URL=proxy.url), await stage.start("worker", "all")
        async with stage.load(per_second=20):
            await stage.answered(100)
        assert await stage.worst_lag() <= LAG_SECONDS_MAX
        assert 1 <= proxy.counts[Way.UP, START_OK] <= 15, "it connects again and again without a pause"
        await control(stage.broker, "delete_queue", name)
        await stage.assert_work_flows(gateway, worker)
        await stage.assert_all_well()
