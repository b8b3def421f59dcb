"""Workers come and go: drained, killed by a second signal, hung, many and few. Nothing is lost, nothing is parked."""

import asyncio
import signal
from time import monotonic

from common.messaging.topology import Work
from tests.factories import fetch
from tests.faults.amqp_proxy import CONNECTION_CLOSE, DELIVER, START_OK, Way, amqp_proxy
from tests.faults.endings import exit_code, leave
from tests.faults.proxy import proxy as database_proxy
from tests.faults.scene import LAG_SECONDS_MAX, Scene
from tests.stack import Process, eventually

SILENT = "01712340201"
# To tasks that hang on a silent peer, to the broker's connections, to the database's.
GOOD_BYES_SECONDS_MAX = 10.0


async def a_call_hangs(stage: Scene) -> None:
    async def sending() -> bool:
        return bool(await fetch(stage.owner, "SELECT 1 FROM payouts WHERE state = 'sending'"))

    await eventually(sending, "a call is under way")


async def test_leaves_in_order_under_load(stage: Scene) -> None:
    """Fault: SIGTERM to a worker that is full of messages; another one is there."""
    async with amqp_proxy(stage.broker.url) as proxy:
        gateway = await stage.start("gateway")
        leaving = await stage.start("worker", "all", AMQP_URL=proxy.url, PAYOUTS_DRAIN_SECONDS="25")
        await stage.wait_connected(gateway, leaving)
        async with stage.load(per_second=150):
            await stage.answered(200)
            staying = await stage.start("worker", "all")
            began = monotonic()
            assert await leaving.stop() == 0
            assert monotonic() - began < 10 + GOOD_BYES_SECONDS_MAX, "it waited until its drain was over"
            await stage.answered(100)
        assert proxy.counts[Way.UP, CONNECTION_CLOSE] == 4, (
            "of the publisher, both consumers and the count of what is parked"
        )
        assert proxy.counts[Way.DOWN, DELIVER] > 0
        assert proxy.unacknowledged == 0, "a message was neither acknowledged nor handed back"
        assert proxy.unconfirmed == 0
        assert proxy.foreign_acks == []
        assert proxy.closes == []
    await stage.assert_work_flows(gateway, staying)
    assert await stage.worst_lag() <= LAG_SECONDS_MAX
    await stage.assert_all_well()


async def test_leaves_within_its_deadline_when_a_call_hangs(stage: Scene) -> None:
    """Fault: SIGTERM while a rail keeps silent for longer than the worker may take to leave."""
    hanging = {"PAYOUTS_RAIL_TIMEOUT_SECONDS": "40", "PAYOUTS_SETTLE_LEASE_SECONDS": "50", "PAYOUTS_DRAIN_SECONDS": "2"}
    async with amqp_proxy(stage.broker.url) as proxy:
        gateway = await stage.start("gateway")
        worker = await stage.start("worker", "all", AMQP_URL=proxy.url, **hanging)
        await stage.assert_work_flows(gateway, worker)
        await stage.create(1, card_number=SILENT)
        await a_call_hangs(stage)
        connections = proxy.counts[Way.UP, START_OK]
        began = monotonic()
        assert await worker.stop() == 0
        assert monotonic() - began < 2 + GOOD_BYES_SECONDS_MAX
        assert proxy.counts[Way.UP, START_OK] == connections, "it came back for more while it was leaving"
    await _others_take_over(stage, gateway)


async def test_takes_no_message_any_more_while_it_leaves(stage: Scene) -> None:
    """Fault: messages come while a worker waits for a last call; the broker drops what was given back too often."""
    hanging = {"PAYOUTS_RAIL_TIMEOUT_SECONDS": "40", "PAYOUTS_SETTLE_LEASE_SECONDS": "50", "PAYOUTS_DRAIN_SECONDS": "8"}
    gateway = await stage.start("gateway")
    worker = await stage.start("worker", "all", **hanging)
    await stage.assert_work_flows(gateway, worker)
    async with stage.delivery_limit(5):
        await stage.create(1, card_number=SILENT)
        await a_call_hangs(stage)
        await stage.all_confirmed(gateway)
        confirmed = await stage.published(gateway, "confirmed")
        await leave(worker)
        await stage.create(30)
        assert await exit_code(worker, 8 + GOOD_BYES_SECONDS_MAX) == 0
        await stage.all_confirmed(gateway)
        assert await stage.published(gateway, "confirmed") == confirmed + 30

        async def all_wait() -> bool:
            return (await stage.depths())[stage.topology.queue(Work.SETTLE, 0)] == (30, 0)

        await eventually(all_wait, "the messages wait for another worker")
    await _others_take_over(stage, gateway)


async def test_begins_nothing_more_while_it_leaves(stage: Scene) -> None:
    """Fault: SIGTERM to a worker whose every slot is taken, with a full prefetch of messages behind that."""
    hanging = {"PAYOUTS_RAIL_TIMEOUT_SECONDS": "3", "PAYOUTS_SETTLE_LEASE_SECONDS": "9", "PAYOUTS_DRAIN_SECONDS": "25"}
    gateway = await stage.start("gateway")
    worker = await stage.start("worker", "all", PAYOUTS_SETTLE_CONCURRENCY="1", **hanging)
    await stage.wait_connected(gateway, worker)
    await stage.create(20, card_number=SILENT)
    await a_call_hangs(stage)
    await leave(worker)
    (begun,) = await fetch(stage.owner, "SELECT count(*) AS n FROM payout_attempts")
    assert await exit_code(worker, 25 + GOOD_BYES_SECONDS_MAX) == 0
    (attempts,) = await fetch(
        stage.owner, "SELECT count(*) AS n, count(*) FILTER (WHERE finished_at IS NULL) AS open FROM payout_attempts"
    )
    assert attempts.open == 0, "a call was begun that nobody finished"
    # One more was being claimed.
    assert attempts.n <= begun.n + 1
    assert len(await fetch(stage.owner, "SELECT 1 FROM payouts WHERE state = 'queued'")) >= 15
    await _others_take_over(stage, gateway, **hanging)


async def test_leaves_when_neither_database_nor_broker_answer(stage: Scene, database_url: str) -> None:
    """Fault: SIGTERM to gateway and worker while PostgreSQL and RabbitMQ have fallen silent, with everything in flight."""
    drain = {"PAYOUTS_DRAIN_SECONDS": "2", "PAYOUTS_DATABASE_STATEMENT_TIMEOUT_SECONDS": "20"}
    async with database_proxy(database_url) as database, amqp_proxy(stage.broker.url) as broker:
        gateway, worker = await stage.start_all(DATABASE_URL=database.url, AMQP_URL=broker.url, **drain)
        await stage.assert_work_flows(gateway, worker)
        # What the gateway that leaves has under way is not known to it, and holds its merchants until PostgreSQL hears of it.
        async with stage.load(per_second=60, repeats_503=True):
            await stage.answered(60)
            other = await stage.start("gateway")
            broker.go_dark()
            database.delay(60)
            began = monotonic()
            assert tuple(await asyncio.gather(gateway.stop(), worker.stop())) == (0, 0)
            assert monotonic() - began < 2 + GOOD_BYES_SECONDS_MAX
            database.delay(0)
    await stage.travel()
    worker = await stage.start("worker", "all")
    await stage.assert_work_flows(other, worker)
    await stage.assert_all_well()


async def test_leaves_at_once_at_the_second_signal(stage: Scene) -> None:
    """Fault: SIGTERM twice, the second one while the worker waits for a rail."""
    gateway, worker = await stage.start_all(PAYOUTS_RAIL_TIMEOUT_SECONDS="20", PAYOUTS_SETTLE_LEASE_SECONDS="30")
    await stage.create(1, card_number=SILENT)
    await a_call_hangs(stage)
    await leave(worker)
    worker.send(signal.SIGTERM)
    assert await exit_code(worker) == -signal.SIGTERM
    await _others_take_over(stage, gateway)


async def test_loses_nothing_while_workers_come_and_go(stage: Scene) -> None:
    """Fault: one worker becomes four and one again, ten times, under load."""
    async with amqp_proxy(stage.broker.url) as proxy:
        gateway, worker = await stage.start_all(AMQP_URL=proxy.url)
        async with stage.load(per_second=40):
            for _ in range(10):
                more = [await stage.stack.launch("worker", "settle", AMQP_URL=proxy.url) for _ in range(3)]
                await asyncio.gather(*(process.wait_ready() for process in more))
                await stage.wait_connected(*more)
                await stage.answered(10)
                assert await asyncio.gather(*(process.stop() for process in more)) == [0, 0, 0]
        await stage.assert_work_flows(gateway, worker)

        async def one_consumer() -> bool:
            return (await stage.depths())[stage.topology.queue(Work.SETTLE, 0)] == (0, 1)

        await eventually(one_consumer, "the queue has one consumer")
        assert await stage.worst_lag() <= LAG_SECONDS_MAX
        assert proxy.foreign_acks == []
        assert proxy.closes == []
        await stage.assert_all_well()


async def _others_take_over(stage: Scene, gateway: Process, **overrides: str) -> None:
    """Nobody alive has a lease: let it run out, and a new worker come."""
    await stage.travel()
    worker = await stage.start("worker", "all", **overrides)
    await stage.assert_work_flows(gateway, worker)
    await stage.assert_all_well()
