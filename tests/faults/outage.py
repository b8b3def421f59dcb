"""The stage of PostgreSQL's fault tests: merchants who pay and look under load, a process of each role, and a way to a server
that can be hurt; everything that was answered meanwhile, and how long it took.
"""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from time import monotonic
from typing import Final

import psutil

from common.db.engine import Engine
from ops.postgres import DATABASE, Cluster
from tests.factories import Merchant, add_funded_merchant, engine, settings
from tests.faults.load import Load
from tests.faults.merchants import Answer, sender
from tests.faults.outcome import FUNDS, assert_whole
from tests.faults.patience import SHORT, UNHURRIED_LOCKS
from tests.faults.proxy import Proxy, proxy
from tests.faults.receiver import Receiver, receiver
from tests.stack import Process, Stack, eventually, http_status, stack

ROLES: Final = (("gateway",), ("worker", "settle"), ("worker", "callbacks"), ("worker", "sweep"))
# What a request may take, from its last byte to its answer.
REQUEST_SECONDS_MAX: Final = 3.0
# What two busy processors and the way to us add to that.
SLACK_SECONDS: Final = 2.0
RECOVERY_SECONDS: Final = 20.0
# What our containers ask for.
MEMORY_BYTES_MAX: Final = 256 * 1024 * 1024
_CLIENTS: Final = 6
_LOOK_SECONDS: Final = 0.1

PATIENCE: Final = SHORT | {
    # A rail that shares our server takes its time while that comes back.
    "PAYOUTS_RAIL_TIMEOUT_SECONDS": "2",
    "PAYOUTS_SETTLE_LEASE_SECONDS": "7",
    "PAYOUTS_DATABASE_CONNECT_TIMEOUT_SECONDS": "1",
    "PAYOUTS_DATABASE_STATEMENT_TIMEOUT_SECONDS": "1.5",
    "PAYOUTS_DATABASE_LOCK_TIMEOUT_SECONDS": "1",
    "PAYOUTS_ACCEPT_WAIT_SECONDS_MAX": "1.5",
    "PAYOUTS_REQUEST_SECONDS_MAX": str(REQUEST_SECONDS_MAX),
    "PAYOUTS_READY_SILENCE_SECONDS_MAX": "1.5",
    "PAYOUTS_SANDBOX_SETTLE_SECONDS": "1",
}


@dataclass(slots=True)
class Watch:
    """What somebody saw who looked all the time: at health, and at a merchant's balance."""

    live: list[int | None] = field(default_factory=list)
    ready: dict[str, list[int | None]] = field(default_factory=dict)
    balances: list[Answer] = field(default_factory=list)


class Outage:
    """Processes of every role behind a network to PostgreSQL, under load."""

    def __init__(
        self,
        network: Proxy,
        running: Stack,
        processes: dict[str, Process],
        owner: Engine,
        merchants: list[Merchant],
        endpoint: Receiver,
        load: Load,
    ) -> None:
        self.network = network
        self.running = running
        self.processes = processes
        self.owner = owner
        self.load = load
        self.watch = Watch(ready={name: [] for name in processes})
        self._merchants = merchants
        self._endpoint = endpoint

    async def until_ready(self, status: int, seconds: float = RECOVERY_SECONDS) -> None:
        """Return once every process says with this status whether it is ready."""

        async def said() -> bool:
            return all([await self._health(process, "readyz") == status for process in self.processes.values()])

        await eventually(said, f"readiness is {status} everywhere", seconds)

    async def until_refused(self, count: int = 10) -> None:
        """Return once that many more creates, and a look at a balance, were answered 503."""
        looked = len(self.watch.balances)
        await self.until_creates_refused(count)

        async def refused() -> bool:
            return any(answer.status == 503 for answer in self.watch.balances[looked:])

        await eventually(refused, "who looks is told to repeat")

    async def until_creates_refused(self, count: int = 10) -> None:
        """Return once that many more creates were answered 503."""
        before = self.load.statuses()[503]

        async def refused() -> bool:
            return self.load.statuses()[503] >= before + count

        await eventually(refused, "who pays is told to repeat")

    async def until_well(self) -> float:
        """Return once everything works again, and how many seconds that took."""
        started = monotonic()
        await self.until_ready(200)
        await self.load.progress(20)
        return monotonic() - started

    async def look(self) -> None:
        """Look at health and at a balance, for ever."""
        async with sender(self.running.base_url, self._merchants[0]) as send:
            while True:
                for process in self.processes.values():
                    self.watch.live.append(await self._health(process, "livez"))
                self.watch.balances.append(await send.request("GET", "/api/v1/balance"))
                await asyncio.sleep(_LOOK_SECONDS)

    async def assert_survived(self) -> None:
        """Answers came in time and in shape, nobody was taken for dead, nothing crashed; and all of it came to its end."""
        await self.load.stop()
        answers = [answer for sent in self.load.sent for answer in sent.answers if answer] + self.watch.balances
        assert self.load.statuses()[None] == 0, self.load.statuses()
        for answer in self.watch.balances:
            if answer.status != 200:
                answer.assert_unavailable()
        for process in self.processes.values():
            assert "request.crashed" not in process.output
            assert psutil.Process(process.pid).memory_info().rss < MEMORY_BYTES_MAX
        # A machine that stands still once makes no more late than are under way; an outage would do it to all.
        assert _count_late(answers) <= _CLIENTS + 1
        assert _count_late(self.watch.balances) <= 1
        assert set(self.watch.live) == {200}
        # The test's own connections went with the server.
        await self.owner.dispose()
        await assert_whole(self.owner, self._merchants, self.load.sent, self._endpoint)

    async def _health(self, process: Process, path: str) -> int | None:
        return await http_status(f"http://127.0.0.1:{process.admin_port}/{path}")


def _count_late(answers: Sequence[Answer]) -> int:
    return sum(answer.seconds >= REQUEST_SECONDS_MAX + SLACK_SECONDS for answer in answers)


@asynccontextmanager
async def outage(cluster: Cluster) -> AsyncIterator[Outage]:
    """Everybody at work on a server, whose address may answer with another one later."""
    async with AsyncExitStack() as resources:
        network = await resources.enter_async_context(proxy(cluster.url(DATABASE)))
        # The owner's way is the same, so that it leads to whoever answers.
        owner = engine(network.url, **UNHURRIED_LOCKS)
        resources.push_async_callback(owner.dispose)
        merchants = [await add_funded_merchant(owner, settings(network.url), funds=FUNDS) for _ in range(2)]
        endpoint = await resources.enter_async_context(receiver())
        running = await resources.enter_async_context(stack(network.url, **PATIENCE))
        processes = await asyncio.gather(*(running.start(*role) for role in ROLES))
        load = Load(running.base_url, merchants, callback_url=endpoint.url, clients=_CLIENTS)
        there = Outage(
            network, running, {process.name: process for process in processes}, owner, merchants, endpoint, load
        )
        load.start()
        looking = asyncio.create_task(there.look())
        try:
            await load.progress(60)
            yield there
        finally:
            looking.cancel()
            await load.stop()


@contextmanager
def paused(cluster: Cluster) -> Iterator[None]:
    """The server and each of its sessions stand still for the length of the context; the kernel still takes connections."""
    assert cluster.process_id is not None
    server = psutil.Process(cluster.process_id)
    # The one that would make more of them first.
    everybody = [server.pid]
    os.kill(server.pid, signal.SIGSTOP)
    for session in server.children(recursive=True):
        os.kill(session.pid, signal.SIGSTOP)
        everybody.append(session.pid)
    try:
        yield
    finally:
        for process_id in reversed(everybody):
            os.kill(process_id, signal.SIGCONT)
