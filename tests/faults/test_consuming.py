"""Faults between the broker and a worker: every message is claimed or parked, no payout is settled twice."""

import asyncio
import json
import signal
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime
from decimal import Decimal
from statistics import median
from uuid import UUID, uuid4

import aio_pika
import pytest

from common.messaging.codec import BODY_BYTES_MAX, IDS_MAX, WorkMessage
from common.messaging.consumer import PREFETCH, Consumer
from common.messaging.link import Link
from common.messaging.publisher import Publisher
from common.messaging.topology import Topology, Work
from common.process import end_tasks
from tests.broker import Broker
from tests.factories import environment, execute, fetch
from tests.faults.amqp_proxy import ACK, DELIVER, AmqpProxy, Fate, Way
from tests.faults.locks import Superuser, locked, until_waiting
from tests.faults.patience import LONG
from tests.faults.proxy import CommitFault, Proxy
from tests.faults.proxy import proxy as database_proxy
from tests.faults.scene import LAG_SECONDS_MAX, Parked, Scene, control, declare_all
from tests.stack import eventually
from tests.terminal import Terminal


@pytest.fixture
async def slow_database(database_url: str) -> AsyncIterator[Proxy]:
    async with database_proxy(database_url) as between:
        yield between


def body_of(*ids: object, version: object = 1) -> bytes:
    return json.dumps({"v": version, "ids": [str(value) for value in ids]}).encode()


async def payout_ids(stage: Scene) -> list[str]:
    return [str(row.id) for row in await fetch(stage.owner, "SELECT id FROM payouts ORDER BY id")]


async def unacknowledged(stage: Scene) -> int:
    counts = {name: int(count or 0) for name, count in await stage.list_queues("messages_unacknowledged")}
    return counts[stage.topology.queue(Work.SETTLE, 0)]


async def test_settles_a_single_message_at_once(stage: Scene) -> None:
    """Fault: a message that comes alone starves behind a batch that never fills."""
    gateway, worker = await stage.start_all()
    await stage.assert_work_flows(gateway, worker)
    lags = []
    for _ in range(5):
        since, before = len(stage.created), await stage.consumed(worker)
        await stage.create(1)
        await stage.settled()
        lags.append(await stage.worst_lag(since=since))
        assert await stage.consumed(worker) == before + 1
    # Whoever waited for others would be late each time; a machine that stands still is it once.
    assert median(lags) < 0.5, lags
    await stage.assert_all_well()


POISON: list[tuple[str, bytes, str | None, str]] = [
    ("bad JSON", b"{not json", Work.SETTLE, "not JSON"),
    ("no bytes at all", b"", Work.SETTLE, "not JSON"),
    ("not UTF-8", b"\xff\xfe\xfd", Work.SETTLE, "not JSON"),
    ("deep nesting", b"[" * 5_000, Work.SETTLE, "not JSON"),
    ("a number of thousands of digits", b"9" * 5_000, Work.SETTLE, "not JSON"),
    ("no object", b"[]", Work.SETTLE, "unknown version"),
    ("an unknown version", body_of(uuid4(), version=2), Work.SETTLE, "unknown version"),
    ("an unknown type", body_of(uuid4()), "payout.settle.v9", "unknown type"),
    ("no type", body_of(uuid4()), None, "unknown type"),
    ("too many ids", body_of(*[uuid4().hex for _ in range(IDS_MAX + 1)]), Work.SETTLE, "ids missing or too many"),
    ("no ids", body_of(), Work.SETTLE, "ids missing or too many"),
    ("ids that are none", body_of("PAY-1"), Work.SETTLE, "an id that is none"),
    ("numbers as ids", b'{"v":1,"ids":[1]}', Work.SETTLE, "an id that is none"),
    ("too many bytes", body_of(uuid4()) + b" " * BODY_BYTES_MAX, Work.SETTLE, "body too large"),
]


async def test_parks_poison_at_once_with_its_reason_and_settles_its_neighbours(stage: Scene, proxy: AmqpProxy) -> None:
    """Fault: messages that nobody can read, between such that everybody can."""
    gateway, worker = await stage.start_all(AMQP_URL=proxy.url)
    await stage.assert_work_flows(gateway, worker)
    since = len(stage.created)
    for _, body, type_name, _ in POISON:
        await stage.publish(body, type_name=type_name)
        await stage.create(1)
    await stage.settled()
    assert await stage.median_lag(since=since) < 1.0, "neighbours had to wait for a scan"

    async def all_parked() -> bool:
        return await stage.consumed(worker, outcome="parked") == len(POISON)

    await eventually(all_parked, "poison is parked")
    await stage.assert_all_well(parked=len(POISON))
    queue = stage.topology.queue(Work.SETTLE, 0)
    assert await stage.take_parked() == [Parked(reason, queue, body) for _, body, _, reason in POISON]
    assert proxy.foreign_acks == []
    assert proxy.closes == []
    await stage.assert_work_flows(gateway, worker)


async def test_parks_poison_whatever_stands_in_its_headers(stage: Scene) -> None:
    """Fault: the headers of unreadable messages hold everything that AMQP can carry, an instruction to copy them included."""
    gateway, worker = await stage.start_all()
    queue = stage.topology.queue(Work.SETTLE, 0)
    headers = [
        {"nothing": None, "nested": {"list": [1, {"deep": True}]}, "bytes": bytearray(b"\x00\xff"), "float": 0.5},
        {"at": datetime(2020, 1, 1, tzinfo=UTC), "decimal": Decimal("1.5"), "large": 2**40},
        {"x-death": [{"count": 1, "reason": "expired", "queue": queue}], "x-delivery-count": 99},
        {"CC": [queue]},
    ]
    for each in headers:
        await stage.publish(b"poison", headers=each)
    await stage.create(3)

    async def all_parked() -> bool:
        return (await stage.depths())[stage.topology.parked][0] == len(headers)

    await eventually(all_parked, "poison is parked")
    await stage.assert_work_flows(gateway, worker)
    await stage.assert_all_well(parked=len(headers))


async def test_parks_more_poison_than_the_broker_sends_ahead(stage: Scene) -> None:
    """Fault: a whole prefetch of poison, several times over, in front of work."""
    gateway, worker = await stage.start_all()
    count = 5 * PREFETCH
    async with stage.load():
        await asyncio.gather(*(stage.publish(b"poison") for _ in range(count)))
        await stage.answered(30)
    await stage.assert_work_flows(gateway, worker)
    assert await stage.worst_lag() <= LAG_SECONDS_MAX
    await stage.assert_all_well(parked=count)
    assert Counter(parked.body for parked in await stage.take_parked()) == {b"poison": count}


async def test_goes_on_when_the_parking_queue_was_deleted(stage: Scene) -> None:
    """Fault: the queue for poison is gone when poison comes; nothing else would tell the worker."""
    gateway, worker = await stage.start_all()
    await stage.assert_work_flows(gateway, worker)
    await control(stage.broker, "delete_queue", stage.topology.parked)
    await stage.publish(b"poison")
    await stage.create(3)
    await stage.assert_work_flows(gateway, worker)
    await stage.assert_all_well(parked=1)


async def test_neighbours_go_on_while_poison_cannot_be_parked(stage: Scene) -> None:
    """Fault: the parking queue is full when poison comes, and stays full for a while."""
    gateway, worker = await stage.start_all()
    await stage.assert_work_flows(gateway, worker)
    async with stage.full_queue("parked"):
        there = await stage.fill_parked()
        assert there >= 1, "it is there, and full"
        for _ in range(5):
            await stage.publish(b"poison")
        since = len(stage.created)
        async with stage.load():
            await stage.answered(60)
        await stage.settled()
        assert await stage.median_lag(since=since) < 1.0, "neighbours had to wait for a scan"
        assert await stage.consumed(worker, outcome="parked") == 0

    async def all_parked() -> bool:
        return await stage.consumed(worker, outcome="parked") == 5

    await eventually(all_parked, "poison is parked", 30)
    await stage.assert_work_flows(gateway, worker)
    await stage.assert_all_well(parked=there + 5)


async def test_one_message_that_cannot_be_claimed_holds_up_no_other(broker: Broker, amqp_prefix: str) -> None:
    """Fault: an error of ours that no repeat will mend, for one message of many; seen from inside, in this process."""
    topology = Topology(amqp_prefix, 1)
    await declare_all(broker, topology)
    publisher, claimed, bad = Publisher(topology), set[UUID](), uuid4()

    async def claim(messages: Sequence[WorkMessage]) -> bool:
        ids = {value for message in messages for value in message.ids}
        if bad in ids:
            raise LookupError("an error of ours")
        claimed.update(ids)
        return True

    consumer = Consumer(topology, Work.SETTLE, claim, publisher)
    links = [Link("publish", [broker.url], publisher.session), Link("consume settle", [broker.url], consumer.session)]
    running = [asyncio.create_task(link.run()) for link in links]
    try:

        async def connected() -> bool:
            return all(link.connected for link in links)

        await eventually(connected, "both links are up")
        ids = [uuid4() for _ in range(3 * PREFETCH)]
        ids.insert(PREFETCH, bad)
        for value in ids:
            publisher.offer(Work.SETTLE, [(value, value)])

        async def all_claimed() -> bool:
            return claimed == set(ids) - {bad}

        await eventually(all_claimed, "all the others are claimed")
        await consumer.drain(5)
        async with await aio_pika.connect(broker.url) as connection:
            queue = await (await connection.channel()).declare_queue(topology.queue(Work.SETTLE, 0), passive=True)
            assert queue.declaration_result.message_count == 0
    finally:
        await end_tasks(running, 0)


async def test_tells_what_it_was_to_be_told_of_by_messages_that_were_purged(stage: Scene) -> None:
    """Fault: somebody purges the queue of callbacks while they are made, and while there is a worker."""
    gateway, settler = await stage.start("gateway"), await stage.start("worker", "settle")
    await stage.wait_connected(gateway, settler)
    await stage.create(30)
    queue = stage.topology.queue(Work.CALLBACK, 0)

    async def waits() -> bool:
        return (await stage.depths())[queue][0] > 0

    await eventually(waits, "callbacks wait for a worker")
    await control(stage.broker, "purge_queue", queue)
    caller = await stage.start("worker", "callbacks")
    await stage.wait_connected(caller)
    async with stage.load(per_second=60):
        for _ in range(5):
            await stage.answered(20)
            await control(stage.broker, "purge_queue", queue)
    await stage.assert_work_flows(gateway, settler)
    await stage.assert_all_well()


async def test_parks_poison_when_its_publishing_connection_had_died_unused(stage: Scene, proxy: AmqpProxy) -> None:
    """Fault: a worker that publishes only what it parks lost that connection long ago, when poison comes."""
    gateway = await stage.start("gateway")
    settler = await stage.start("worker", "settle")
    caller = await stage.start("worker", "callbacks", AMQP_URL=proxy.url)
    await stage.wait_connected(gateway, settler, caller)
    proxy.reset("publish")
    await stage.publish(b"poison", work=Work.CALLBACK)
    await stage.create(3)

    async def parked() -> bool:
        return (await stage.depths())[stage.topology.parked][0] == 1

    await eventually(parked, "poison is parked")
    await stage.assert_work_flows(gateway, settler)
    await stage.assert_all_well(parked=1)


async def test_settles_once_when_an_acknowledgement_is_lost(stage: Scene, proxy: AmqpProxy) -> None:
    """Fault: the worker's Basic.Ack never arrives and the connection is reset; the message is delivered again."""
    gateway = await stage.start("gateway")
    worker = await stage.start("worker", "all", AMQP_URL=proxy.url)
    await stage.assert_work_flows(gateway, worker)
    before = await stage.consumed(worker)
    lost = proxy.at(Fate.DROP, Way.UP, ACK, link="consume settle")
    await stage.create(1)
    async with asyncio.timeout(10):
        await lost.fired.wait()
    await stage.settled()
    proxy.reset("consume settle")

    async def delivered_again() -> bool:
        return await stage.consumed(worker) == before + 2

    await eventually(delivered_again, "the message was consumed twice")
    assert proxy.foreign_acks == []
    await stage.assert_all_well()


async def test_settles_at_once_what_was_claimed_when_the_connection_broke(
    stage: Scene, proxy: AmqpProxy, slow_database: Proxy
) -> None:
    """Fault: the broker's connection is reset while the answer to the claim's COMMIT is on its way from the database."""
    gateway = await stage.start("gateway")
    # The sandbox keeps its books in the same database: there a new connection takes it seconds.
    slow = {
        "DATABASE_URL": slow_database.url,
        "PAYOUTS_RAIL_TIMEOUT_SECONDS": "15",
        "PAYOUTS_SETTLE_LEASE_SECONDS": "25",
    }
    worker = await stage.start("worker", "settle", AMQP_URL=proxy.url, **slow)
    await stage.start("worker", "callbacks")
    await stage.create(1)
    await stage.assert_work_flows(gateway, worker)
    slow_database.delay(0.1)
    since = len(stage.created)
    (external_id,) = await stage.create(1)

    async def claimed() -> bool:
        query = "SELECT 1 FROM payouts WHERE external_id = :id AND state = 'sending'"
        return bool(await fetch(stage.owner, query, id=external_id))

    await eventually(claimed, "the claim is committed")
    proxy.reset("consume settle")
    await stage.settled()
    slow_database.delay(0)

    lease_seconds = float(slow["PAYOUTS_SETTLE_LEASE_SECONDS"])
    assert await stage.worst_lag(since=since) < lease_seconds, "the claim was abandoned until its lease ran out"
    await stage.assert_work_flows(gateway, worker)
    assert proxy.foreign_acks == []
    assert proxy.closes == []
    await stage.assert_all_well()


@pytest.mark.parametrize(
    "point", ["before the claim is committed", "between the claim's commit and the acknowledgement"]
)
async def test_settles_once_when_a_worker_is_killed(
    stage: Scene, proxy: AmqpProxy, slow_database: Proxy, superuser: Superuser, point: str
) -> None:
    """Fault: kill -9 of a worker with a message in hand, at that point: its claim waits for a table, or for COMMIT's answer."""
    gateway, before = await stage.start("gateway"), point.startswith("before")
    worker = await stage.start("worker", "settle", AMQP_URL=proxy.url, DATABASE_URL=slow_database.url, **LONG)
    await stage.start("worker", "callbacks")
    await stage.create(1)
    await stage.assert_work_flows(gateway, worker)
    delivered = proxy.counts[Way.DOWN, DELIVER]
    async with locked(stage.owner, "LOCK TABLE payout_attempts IN SHARE MODE"):
        (external_id,) = await stage.create(1)

        async def is_sending() -> bool:
            query = "SELECT 1 FROM payouts WHERE external_id = :id AND state = 'sending'"
            return bool(await fetch(stage.owner, query, id=external_id))

        async def in_hand() -> bool:
            return proxy.counts[Way.DOWN, DELIVER] > delivered

        await eventually(in_hand, "the message is delivered")
        await until_waiting(superuser, "settle", "payout_attempts")
        if before:
            await worker.kill()
        else:
            # Of all that the worker writes from now on: the claim need not be the first.
            slow_database.fail_commits(CommitFault.HOLD_ANSWER, count=100)
    if not before:
        await eventually(is_sending, "the claim is committed")
        await worker.kill()
    assert await is_sending() is not before
    assert proxy.unacknowledged == 1
    await stage.travel()
    other = await stage.start("worker", "settle")

    await _until_nobody_is_waited_for(stage)
    await stage.assert_work_flows(gateway, other)
    await stage.assert_all_well()


async def test_replays_what_was_parked_and_settles_it_once(stage: Scene) -> None:
    """Fault: a release that could not read the messages has parked them all; an operator replays them, twice."""
    gateway = await stage.start("gateway")
    await stage.wait_connected(gateway)
    await stage.create(200)
    await stage.park_all(Work.SETTLE)
    worker = await stage.start("worker", "all")
    await stage.wait_connected(worker)
    terminal = Terminal(environment(stage.stack.database_url, **stage.broker_variables))
    for _ in range(2):
        (await terminal.run("parked", "replay", "--all", "--reason", "mended", "--actor", "tests")).assert_shown(
            "replayed"
        )
    await stage.assert_work_flows(gateway, worker)
    await stage.assert_all_well()


async def test_keeps_messages_while_the_database_is_down(stage: Scene, proxy: AmqpProxy, slow_database: Proxy) -> None:
    """Fault: the worker cannot reach PostgreSQL for five seconds while messages arrive."""
    gateway = await stage.start("gateway")
    worker = await stage.start("worker", "all", AMQP_URL=proxy.url, DATABASE_URL=slow_database.url)
    await stage.assert_work_flows(gateway, worker)
    slow_database.refuse()
    async with stage.load(per_second=40):
        await stage.answered(200)
    queue = stage.topology.queue(Work.SETTLE, 0)

    async def all_there() -> bool:
        waiting = await stage.published(gateway, "confirmed") - await stage.consumed(worker)
        return waiting > PREFETCH and (await stage.depths())[queue] == (waiting, 1)

    await eventually(all_there, "every message is still in the queue")
    assert (await stage.depths())[stage.topology.parked] == (0, 0)
    await slow_database.listen()

    await stage.assert_work_flows(gateway, worker)
    assert await stage.consumed(worker, outcome="parked") == 0
    assert proxy.foreign_acks == []
    assert proxy.closes == []
    await stage.assert_all_well()


async def test_starts_over_when_the_broker_loses_patience(stage: Scene, proxy: AmqpProxy, slow_database: Proxy) -> None:
    """Fault: a message stays unacknowledged for longer than the broker's consumer timeout; it closes the channel."""
    keys = {"consumer_timeout": "1000", "channel_tick_interval": "200"}
    before = {
        key: await control(stage.broker, "eval", f"element(2, application:get_env(rabbit, {key})).") for key in keys
    }
    for key, value in keys.items():
        await control(stage.broker, "eval", f"application:set_env(rabbit, {key}, {value}).")
    try:
        gateway = await stage.start("gateway")
        worker = await stage.start("worker", "all", AMQP_URL=proxy.url, DATABASE_URL=slow_database.url)
        await stage.wait_connected(gateway, worker)
        slow_database.refuse()
        await stage.create(3)

        async def closed() -> bool:
            return 406 in {code for code, _ in proxy.closes}

        await eventually(closed, "the broker closed the channel")
    finally:
        for key, text in before.items():
            await control(stage.broker, "eval", f"application:set_env(rabbit, {key}, {text.strip()}).")
    await slow_database.listen()

    await stage.assert_work_flows(gateway, worker)
    assert proxy.foreign_acks == []
    await stage.assert_all_well()


async def test_others_finish_what_a_killed_worker_had_not_acknowledged(stage: Scene) -> None:
    """Fault: kill -9 of a worker that holds a full prefetch of messages; two others are there."""
    gateway = await stage.start("gateway")
    doomed = await stage.start("worker", "settle")
    await stage.start("worker", "callbacks")
    await stage.wait_connected(gateway, doomed)
    await stage.create(1)
    # What is delivered to a process that sleeps stays unacknowledged.
    doomed.send(signal.SIGSTOP)
    await stage.create(3 * PREFETCH)

    async def full() -> bool:
        return await unacknowledged(stage) == PREFETCH

    await eventually(full, "a full prefetch is unacknowledged")
    others = [await stage.start("worker", "settle") for _ in range(2)]
    await stage.wait_connected(*others)
    await doomed.kill()

    await _until_nobody_is_waited_for(stage)
    await stage.assert_work_flows(gateway, *others)
    assert await stage.consumed(*others, outcome="parked") == 0
    await stage.assert_all_well()


async def test_settles_once_what_is_delivered_many_times(stage: Scene, proxy: AmqpProxy) -> None:
    """Fault: every payout is in many messages, in overlapping batches and different orders, and three workers take them."""
    gateway = await stage.start("gateway")
    workers = [await stage.start("worker", "settle", AMQP_URL=proxy.url) for _ in range(3)]
    await stage.start("worker", "callbacks")
    await stage.wait_connected(gateway, *workers)

    async with stage.load(per_second=100):
        for _ in range(20):
            await stage.answered(10)
            newest = (await payout_ids(stage))[-24:]
            await asyncio.gather(
                *(stage.publish(body_of(*newest[:count][::step])) for count in (24, 16, 8) for step in (1, -1))
            )

    await stage.assert_work_flows(gateway, *workers)
    assert await stage.consumed(*workers) > 20 * 6
    assert proxy.foreign_acks == []
    assert proxy.closes == []
    await stage.assert_all_well()


async def test_acknowledges_only_where_it_was_delivered(stage: Scene, proxy: AmqpProxy) -> None:
    """Fault: the consuming connection is reset again and again, between delivery and acknowledgement of some message."""
    gateway = await stage.start("gateway")
    worker = await stage.start("worker", "all", AMQP_URL=proxy.url)
    await stage.wait_connected(gateway, worker)
    cuts = 5
    async with stage.load(per_second=100):
        for nth in range(1, cuts + 1):
            cut = proxy.at(Fate.RESET, Way.DOWN, DELIVER, nth=nth, link="consume settle")
            async with asyncio.timeout(15):
                await cut.fired.wait()
            await stage.publish(b"poison")
    await stage.assert_work_flows(gateway, worker)
    assert proxy.foreign_acks == []
    assert proxy.closes == []
    # A park that was confirmed, but not acknowledged before the reset, happens again.
    parked: list[Parked] = []

    async def all_parked() -> bool:
        parked.extend(await stage.take_parked())
        return len(parked) >= cuts

    await eventually(all_parked, "poison is parked")
    await stage.assert_all_well()
    assert {(each.reason, each.body) for each in parked} == {("not JSON", b"poison")}


async def _until_nobody_is_waited_for(stage: Scene) -> None:
    """Leases of the dead and look-ups of the silent are a matter of time; let it pass."""

    async def all_final() -> bool:
        await execute(
            stage.owner,
            "UPDATE payout_due SET due_at = now() WHERE due_at > now() AND lease_token IS NULL",
        )
        (row,) = await fetch(stage.owner, "SELECT count(*) AS open FROM payout_due")
        return bool(row.open == 0)

    await eventually(all_final, "every payout is final", 60)
