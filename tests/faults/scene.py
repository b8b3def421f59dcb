"""The stage of the broker's fault tests: processes of ours, merchants that pay under load and are called back, and what must be
true in the end.
"""

import asyncio
import json
import re
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass
from itertools import cycle
from statistics import median
from time import monotonic
from typing import Any, Final
from uuid import uuid4

import aio_pika
import aiohttp
from aio_pika.abc import AbstractChannel, AbstractIncomingMessage
from aiohttp import web
from prometheus_client.parser import text_string_to_metric_families
from yarl import URL

from common.db.engine import Engine
from common.db.invariants import verify
from common.messaging.parking import FROM, REASON
from common.messaging.topology import Topology, Work, declare
from ops.servers import ServerFailed
from ops.state import CHECKOUT
from tests.broker import Broker, delete_all
from tests.factories import Merchant, add_funded_merchant, create_body, engine, execute, fetch
from tests.stack import Client, Process, Stack, client, eventually, stack

# While the broker does not help, a scan finds what waits, in a second or two; the rest is for a machine that stands still.
# Whoever had to wait for a confirm that does not come, or for a lease to run out, is later.
LAG_SECONDS_MAX: Final = 4.5
# An answer never waits for the broker, which is given up after 5 s.
ANSWER_SECONDS_MAX: Final = 4.0
_SHOPS: Final = 3
_CLIENTS: Final = 8
_TICK_MILLISECONDS: Final = 200
_FILLERS_MAX: Final = 1_000

# Leases so short that a killed worker's payouts come back within a test, and calls that no pause of a busy machine ends.
SHORT_LEASES: Final = {
    "PAYOUTS_RAIL_TIMEOUT_SECONDS": "10",
    "PAYOUTS_SETTLE_LEASE_SECONDS": "15",
    "PAYOUTS_CALLBACK_TIMEOUT_SECONDS": "10",
    "PAYOUTS_CALLBACK_LEASE_SECONDS": "15",
}


class Receiver:
    """The merchants' side of callbacks: answers 200 and remembers every event that came, by payout."""

    def __init__(self) -> None:
        self.events: dict[str, list[str]] = defaultdict(list)
        self.url = ""
        app = web.Application()
        app.router.add_post("/", self._receive)
        self._runner = web.AppRunner(app)

    async def open(self) -> None:
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        host, port = self._runner.addresses[0][:2]
        self.url = f"http://{host}:{port}/"

    async def close(self) -> None:
        await self._runner.cleanup()

    async def _receive(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.events[body["external_id"]].append(request.headers["webhook-id"])
        return web.Response()


@dataclass(frozen=True, slots=True)
class Created:
    """A create that was answered. `seconds` is how long the answer took."""

    external_id: str
    status: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Parked:
    """A message in the parking queue."""

    reason: str
    queue: str
    body: bytes


class Scene:
    """A database, a broker, our processes and the merchants. Everything that was answered is in `created`."""

    def __init__(self, running: Stack, owner: Engine, broker: Broker, topology: Topology, receiver: Receiver) -> None:
        self.stack = running
        self.owner = owner
        self.broker = broker
        self.topology = topology
        self.receiver = receiver
        self.merchants: list[Merchant] = []
        self.created: list[Created] = []
        self.unanswered: set[str] = set()
        self.repeats = 0

    async def start(self, *arguments: str, **overrides: str) -> Process:
        """Start one of our processes and wait until it is ready."""
        return await self.stack.start(*arguments, **overrides)

    async def start_all(self, **overrides: str) -> tuple[Process, Process]:
        """A gateway, and a worker of all roles whose messages arrive."""
        gateway, worker = await self.start("gateway", **overrides), await self.start("worker", "all", **overrides)
        await self.wait_connected(gateway, worker)
        return gateway, worker

    async def wait_connected(self, *processes: Process) -> None:
        """Return once every link of these processes is up and every queue has its consumers."""
        for process in processes:

            async def connected(process: Process = process) -> bool:
                values = [value for _, value in await read_samples(process, "payouts_broker_connected")]
                return bool(values) and all(values)

            await eventually(connected, f"{process.name} is connected")

    async def create(self, count: int = 1, **fields: Any) -> list[str]:
        """Creates, one after the other by shops in turn, each answered 201; their external ids."""
        answers = []
        for _, merchant in zip(range(count), cycle(self.merchants), strict=False):
            async with client(self.stack.base_url, merchant) as sender:
                answers.append(await self._create(sender, **fields))
        assert {answer.status for answer in answers} == {201}, answers
        return [answer.external_id for answer in answers]

    @asynccontextmanager
    async def load(self, per_second: float = 60.0, *, repeats_503: bool = False) -> AsyncIterator[None]:
        """Creates at that rate while the context lasts; afterwards, every one was answered 201.

        `repeats_503`: merchants repeat what was answered 503, as they do what nobody answered; then 200 is as good.
        """
        before, stop = len(self.created), asyncio.Event()
        clients = [
            asyncio.create_task(self._load(merchant, per_second / _CLIENTS, stop, repeats_503=repeats_503))
            for _, merchant in zip(range(_CLIENTS), cycle(self.merchants), strict=False)
        ]
        try:
            yield
        finally:
            stop.set()
            await asyncio.gather(*clients)
        statuses = Counter(answer.status for answer in self.created[before:])
        assert set(statuses) <= ({200, 201} if self.repeats else {201}), statuses

    async def answered(self, count: int) -> None:
        """Return when that many more creates are answered; while a load runs."""
        wanted = len(self.created) + count

        async def enough() -> bool:
            return len(self.created) >= wanted

        await eventually(enough, f"{count} more answers")

    async def settled(self, seconds: float = 30.0) -> None:
        """Return when nothing is due any more: every payout is final, every callback delivered."""

        async def nothing_due() -> bool:
            (row,) = await fetch(
                self.owner,
                "SELECT (SELECT count(*) FROM payout_due) AS payouts, (SELECT count(*) FROM callback_due) AS callbacks",
            )
            return bool(row.payouts == 0 and row.callbacks == 0)

        await eventually(nothing_due, "nothing is due", seconds)

    async def worst_lag(self, *, since: int = 0) -> float:
        """The longest time from acceptance to the end, in seconds, of the payouts answered from the `since`-th on."""
        return max(await self._lags(since))

    async def median_lag(self, *, since: int = 0) -> float:
        """The same for half of them: what delays all of them shows here, a machine that stands still for a moment does not."""
        return median(await self._lags(since))

    async def _lags(self, since: int) -> list[float]:
        rows = await fetch(
            self.owner,
            "SELECT extract(epoch FROM finalized_at - created_at)::float8 AS lag FROM payouts"
            " WHERE external_id = ANY (CAST(:ids AS text[])) AND finalized_at IS NOT NULL",
            ids=[answer.external_id for answer in self.created[since:]],
        )
        return [row.lag for row in rows]

    async def consumed(self, *workers: Process, outcome: str = "claimed") -> float:
        """Messages for settlement that these workers took."""
        return await total(workers, "payouts_messages_consumed_total", work="settle", outcome=outcome)

    async def published(self, gateway: Process, outcome: str) -> float:
        """Messages for settlement that a gateway offered, by what came of them."""
        return await total([gateway], "payouts_messages_published_total", work="settle", outcome=outcome)

    async def all_confirmed(self, gateway: Process) -> None:
        """Return when none of a gateway's messages waits for its confirm."""

        async def none_waits() -> bool:
            (left,) = await self.samples(gateway, "payouts_messages_unconfirmed")
            return left == 0

        await eventually(none_waits, "no publish waits for its confirm")

    async def assert_work_flows(self, gateway: Process, *workers: Process) -> None:
        """New payouts travel by message again: published, confirmed, consumed, and sooner than a scan would look."""
        await self.wait_connected(gateway, *workers)

        async def one_flows() -> bool:
            confirmed, consumed = await self.published(gateway, "confirmed"), await self.consumed(*workers)
            before = len(self.created)
            await self.create(1)
            await self.settled()
            return (
                await self.published(gateway, "confirmed") > confirmed
                and await self.consumed(*workers) > consumed
                and await self.worst_lag(since=before) < 1.0
            )

        await eventually(one_flows, "a payout travels by message")

    async def samples(self, process: Process, name: str, **labels: str) -> list[float]:
        """The values of a metric that a process shows, of the samples with these labels."""
        return [value for found, value in await read_samples(process, name) if labels.items() <= found.items()]

    async def bind(self, queue: str) -> None:
        """Let messages reach a queue again."""
        async with self._channel() as channel:
            await (await channel.get_queue(queue, ensure=False)).bind(self.topology.exchange, queue)

    async def unbind(self, queue: str) -> None:
        """Let no message reach a queue any more."""
        async with self._channel() as channel:
            await (await channel.get_queue(queue, ensure=False)).unbind(self.topology.exchange, queue)

    async def declare_classic(self, name: str) -> None:
        """Have nothing there but this queue, declared as we would not."""
        await delete_all(self.broker, self.topology)
        async with self._channel() as channel:
            await channel.declare_queue(name, durable=True)

    def full_queue(self, name: str = "settle") -> AbstractAsyncContextManager[None]:
        """While the context lasts, a policy keeps such queues to one message, and the broker refuses the rest."""
        return self._policy({"max-length": 1, "overflow": "reject-publish"}, name)

    async def fill_parked(self) -> int:
        """Messages into the parking queue until it takes no more; how many it took.

        The broker tells publishers of a full queue a moment late, and until then takes more than its limit.
        """
        async with self._channel() as channel:
            for count in range(_FILLERS_MAX):
                try:
                    await channel.default_exchange.publish(aio_pika.Message(b"filler"), self.topology.parked)
                except aio_pika.exceptions.DeliveryError:
                    return count
        raise AssertionError("the parking queue is never full")

    def delivery_limit(self, deliveries: int) -> AbstractAsyncContextManager[None]:
        """While the context lasts, the broker drops what was delivered and given back that often."""
        return self._policy({"delivery-limit": deliveries})

    @asynccontextmanager
    async def login_without_configure(self) -> AsyncIterator[str]:
        """The URL of a login that may publish and consume and declare nothing, while the context lasts."""
        name, password = f"{self.topology.prefix}limited", uuid4().hex
        await control(self.broker, "add_user", name, password)
        try:
            await control(self.broker, "set_permissions", name, "", ".*", ".*")
            yield str(URL(self.broker.url).with_user(name).with_password(password))
        finally:
            await control(self.broker, "delete_user", name)

    @asynccontextmanager
    async def _policy(self, definition: dict[str, object], queue: str = "settle") -> AsyncIterator[None]:
        name = self.topology.prefix
        pattern, text = f"^{re.escape(name)}payouts.{queue}", json.dumps(definition)
        await control(self.broker, "set_policy", name, pattern, text, "--apply-to", "queues", "--priority", "20")
        try:
            yield
        finally:
            await control(self.broker, "clear_policy", name)

    async def hang_up(self, count: int) -> None:
        """Creates whose senders hang up at some moment before the answer; whether they count, nobody knows."""

        async def send(merchant: Merchant, patience_seconds: float) -> None:
            async with client(self.stack.base_url, merchant) as sender:
                with suppress(TimeoutError):
                    async with asyncio.timeout(patience_seconds):
                        await self._create(sender)

        for first in range(0, count, _CLIENTS):
            await asyncio.gather(
                *(
                    send(merchant, 0.001 * (first + number) % 0.02)
                    for number, merchant in zip(range(_CLIENTS), cycle(self.merchants), strict=False)
                )
            )

    @asynccontextmanager
    async def _channel(self) -> AsyncIterator[AbstractChannel]:
        async with await aio_pika.connect(self.broker.url) as connection:
            yield await connection.channel(on_return_raises=True)

    async def depths(self) -> dict[str, tuple[int, int]]:
        """Messages, ready or not, and consumers, by queue."""
        return {
            name: (int(messages or 0), int(consumers or 0))
            for name, messages, consumers in await self.list_queues("messages", "consumers")
        }

    async def list_queues(self, *columns: str) -> list[list[str]]:
        """Name and these columns of each of our queues. RabbitMQ refreshes most of them at a queue's next tick."""
        text = await control(self.broker, "list_queues", "--no-table-headers", "name", *columns)
        return [line.split("\t") for line in text.splitlines() if line.startswith(self.topology.prefix)]

    async def take_parked(self) -> list[Parked]:
        """Everything in the parking queue; it is empty afterwards."""
        async with self._channel() as channel:
            queue = await channel.get_queue(self.topology.parked, ensure=False)
            parked = []
            while (message := await queue.get(no_ack=True, fail=False)) is not None:
                parked.append(_parked(message))
            return parked

    @property
    def broker_variables(self) -> dict[str, str]:
        """What tells a command of the broker, and of our names there."""
        return {"AMQP_URL": self.broker.url, "PAYOUTS_AMQP_QUEUE_PREFIX": self.topology.prefix}

    async def park_all(self, work: Work) -> None:
        """Put aside everything that waits in the queues of a kind of work, as a worker does that cannot read it."""
        async with self._channel() as channel:
            exchange = await channel.get_exchange(self.topology.exchange, ensure=False)
            for name in self.topology.queues(work):
                queue = await channel.get_queue(name, ensure=False)
                while (message := await queue.get(fail=False)) is not None:
                    copy = aio_pika.Message(
                        message.body, type=message.type, headers={REASON: "unknown version", FROM: name}
                    )
                    await exchange.publish(copy, self.topology.parked)
                    await message.ack()

    async def publish(
        self, body: bytes, *, work: Work = Work.SETTLE, type_name: str | None = Work.SETTLE, **properties: Any
    ) -> None:
        """Publish by hand, to the first shard of a kind of work, confirmed."""
        async with self._channel() as channel:
            exchange = await channel.get_exchange(self.topology.exchange, ensure=False)
            message = aio_pika.Message(body, type=type_name, **properties)
            await exchange.publish(message, self.topology.queue(work, 0))

    async def assert_all_well(self, *, parked: int = 0, resubmits: bool = False, seconds: float = 30.0) -> None:
        """Nothing lost, nothing doubled, nothing stuck, nothing on the broker.

        `parked`: how many messages wait for people. `resubmits`: a rail may have been asked twice (it pays once).
        """
        await self.settled(seconds)
        await self._assert_each_once(resubmits=resubmits)
        broken = {finding.rule.name: finding.offenders for finding in await verify(self.owner) if finding.count}
        assert not broken, broken
        expected = dict.fromkeys(self.topology.all_queues(), 0) | {self.topology.parked: parked}

        found: dict[str, int] = {}

        async def queues_empty() -> bool:
            found.update({name: messages for name, (messages, _) in (await self.depths()).items()})
            return found == expected

        with suppress(AssertionError):
            await eventually(queues_empty, "the queues are empty", 15.0)
        assert found == expected, found

    async def _assert_each_once(self, *, resubmits: bool) -> None:
        accepted = [answer.external_id for answer in self.created if answer.status in (200, 201)]
        assert accepted, "a test without payouts proves nothing"
        rows = await fetch(
            self.owner,
            """
            SELECT p.external_id, p.state, p.amount_minor, s.state AS bank_state, s.amount_minor AS bank_minor, s.submits,
                   (SELECT count(*) FROM sandbox.payments) AS bank_rows, c.state AS callback,
                   (SELECT count(*) FROM entries e WHERE e.payout_id = p.id) AS entries
              FROM payouts p
              LEFT JOIN payout_attempts a ON a.payout_id = p.id AND a.shop_id = p.shop_id AND a.attempt_no = 1
              LEFT JOIN sandbox.payments s ON s.reference = a.reference
              LEFT JOIN events v ON v.payout_id = p.id AND v.shop_id = p.shop_id
              LEFT JOIN callbacks c ON c.event_id = v.id AND c.shop_id = v.shop_id
            """,
        )
        by_id = {row.external_id: row for row in rows}
        assert len(rows) == len(by_id), "a payout is there twice"
        assert set(accepted) <= set(by_id), "a payout that was answered is not in the table"
        assert set(by_id) <= set(accepted) | self.unanswered, "a payout is there that nobody was told of"
        for row in rows:
            assert (row.state, row.bank_state, row.callback, row.entries) == ("success", "paid", "delivered", 2), row
            assert row.bank_minor == row.amount_minor, row
            assert resubmits or row.submits == 1, row
            assert row.bank_rows == len(rows), "the bank paid something else"
            assert len(set(self.receiver.events[row.external_id])) == 1, row

    async def travel(self) -> None:
        """To the time when everything is due again: leases of the dead have run out. For when nobody alive works."""
        for table in ("payout_due", "callback_due"):
            await execute(self.owner, f"UPDATE {table} SET due_at = now() WHERE due_at > now()")

    async def _load(self, merchant: Merchant, per_second: float, stop: asyncio.Event, *, repeats_503: bool) -> None:
        async with client(self.stack.base_url, merchant) as sender:
            next_at = monotonic()
            while not stop.is_set():
                await self._create(sender, repeats_503=repeats_503)
                next_at = max(next_at + 1 / per_second, monotonic() - 0.1)
                try:
                    await asyncio.wait_for(stop.wait(), next_at - monotonic())
                except TimeoutError:
                    continue

    async def _create(self, sender: Client, *, repeats_503: bool = False, **fields: Any) -> Created:
        body = create_body(amount="1.00", callback_url=self.receiver.url, **fields)
        external_id = json.loads(body)["external_id"]
        started = monotonic()
        self.unanswered.add(external_id)
        while (status := await _status(sender, body)) is None or (repeats_503 and status == 503):
            # Nobody who knows answered: a merchant repeats the same request, and hears 200 when the first one counted.
            self.repeats += 1
            await asyncio.sleep(0.02)
        self.unanswered.discard(external_id)
        answer = Created(external_id, status, monotonic() - started)
        self.created.append(answer)
        return answer


@asynccontextmanager
async def scene(database_url: str, broker: Broker, prefix: str, **overrides: str) -> AsyncIterator[Scene]:
    """A scene for the length of a test. `overrides` are environment variables of every process, `AMQP_URL` too.

    Exchange and queues are there before our processes are, so that none of them has to find out.
    """
    environment = {"AMQP_URL": broker.url, "PAYOUTS_AMQP_QUEUE_PREFIX": prefix, **overrides}
    owner, receiver = engine(database_url), Receiver()
    await receiver.open()
    try:
        # How soon a quorum queue, once declared, tells how many messages it has.
        await control(broker, "eval", f"application:set_env(rabbit, quorum_tick_interval, {_TICK_MILLISECONDS}).")
        async with stack(database_url, **environment) as running, _limits_of_production(broker, prefix):
            shards = running.settings.amqp_shards
            topology = Topology(prefix, shards)
            await declare_all(broker, topology)
            there = Scene(running, owner, broker, topology, receiver)
            there.merchants = [await add_funded_merchant(owner, running.settings) for _ in range(_SHOPS)]
            yield there
    finally:
        await receiver.close()
        await owner.dispose()


@asynccontextmanager
async def _limits_of_production(broker: Broker, prefix: str) -> AsyncIterator[None]:
    """The policies of `deploy/rabbitmq`, for queues with this prefix."""
    policies = json.loads((CHECKOUT / "deploy" / "rabbitmq" / "definitions.json").read_text())["policies"]
    for policy in policies:
        definition = dict(policy["definition"])
        for name in ("dead-letter-exchange", "dead-letter-routing-key"):
            if name in definition:
                definition[name] = f"{prefix}{definition[name]}"
        pattern = f"^{re.escape(prefix)}{policy['pattern'].removeprefix('^')}"
        await control(
            broker, "set_policy", f"{prefix}{policy['name']}", pattern, json.dumps(definition), "--apply-to", "queues"
        )
    try:
        yield
    finally:
        for policy in policies:
            # A broker that a test has wiped has none.
            with suppress(ServerFailed):
                await control(broker, "clear_policy", f"{prefix}{policy['name']}")


async def declare_all(broker: Broker, topology: Topology) -> None:
    """Declare exchange and queues as the product does."""
    async with await aio_pika.connect(broker.url) as connection:
        await declare(await connection.channel(), topology)


async def control(broker: Broker, *arguments: str) -> str:
    """Run rabbitmqctl on the node, and return what it prints."""
    return await asyncio.to_thread(broker.ctl, *arguments)


async def _status(sender: Client, body: bytes) -> int | None:
    with suppress(aiohttp.ClientError):
        status, _ = await sender.create(body)
        return status
    return None


async def read_samples(process: Process, name: str) -> list[tuple[dict[str, str], float]]:
    """The samples of a metric, each with its labels; none while the process does not answer."""
    url = f"http://127.0.0.1:{process.admin_port}/metrics"
    try:
        async with aiohttp.ClientSession() as session, session.get(url) as response:
            text = await response.text()
    except aiohttp.ClientError:
        return []
    return [
        (sample.labels, sample.value)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name
    ]


async def total(processes: Any, name: str, **labels: str) -> float:
    """The sum of a metric over processes, of the samples with these labels."""
    return sum(
        [
            value
            for process in processes
            for found, value in await read_samples(process, name)
            if labels.items() <= found.items()
        ]
    )


async def rises(read: Callable[[], Awaitable[float]], what: str, *, by: float = 1, seconds: float = 30.0) -> None:
    """Return when a number is higher than now."""
    before = await read()

    async def higher() -> bool:
        return await read() >= before + by

    await eventually(higher, what, seconds)


def _parked(message: AbstractIncomingMessage) -> Parked:
    headers = message.headers
    return Parked(str(headers[REASON]), str(headers[FROM]), message.body)
