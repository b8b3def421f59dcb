"""What a measurement needs: a durable PostgreSQL and a RabbitMQ of its own, merchants who answer, processes of ours.

Everything is in a folder that is removed afterwards. Processes are started with a *carrier*: RabbitMQ, or PostgreSQL alone.
"""

import asyncio
import os
import platform
import shutil
import sys
from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import aiohttp
import psutil
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

from bench.costs import Usage, processor_seconds, size_of, written_bytes
from common.db.engine import Engine, create_engine, driver_url, in_transaction
from common.messaging.topology import Topology, declare
from common.settings import Settings
from ops import broker, database
from ops.ports import choose_port, loopback_url
from ops.postgres import Cluster, choose_home
from ops.processes import Process, Program, Say, wait_until_answers
from ops.servers import OwnServer
from ops.state import LOCAL_DEFAULTS, find_or_make_keys

RABBITMQ: Final = broker.NAME
ALONE: Final = "PostgreSQL alone"

SUPERUSER: Final = "postgres"
_WORKER: Final = "callbacks"
_POOL_MAX: Final = 8
# Of those whose address is 127.1.y.z; that many merchants have an origin of their own.
_LAST_PARTS: Final = 250


@dataclass(slots=True)
class Scene:
    """What runs. `ops` and `product` act as the roles of operators and of workers, `superuser` may do everything.

    `carriers`: `AMQP_URL` by the name of the carrier; `gateway_port`: of all gateways.
    """

    folder: Path
    settings: Settings
    environment: Mapping[str, str]
    cluster: Cluster
    ops: Engine
    product: Engine
    superuser: Engine
    port: int
    control: str
    session: aiohttp.ClientSession
    gateway_port: int
    carriers: Mapping[str, str]
    node: OwnServer | None
    running_names: list[str] = field(default_factory=list)

    def origin(self, number: int) -> str:
        """The origin of the merchant of that number, of his own; Linux answers on all of 127.0.0.0/8."""
        return f"http://127.1.{number // _LAST_PARTS}.{number % _LAST_PARTS + 1}:{self.port}"

    async def ask_receiver(self, what: str) -> Any:
        """What the merchants saw: `totals` or `arrivals`."""
        async with self.session.get(f"{self.control}/{what}") as response:
            return await response.json()

    async def forget(self) -> None:
        """Let the merchants forget what came."""
        async with self.session.post(f"{self.control}/forget") as response:
            response.raise_for_status()

    async def maintain(self) -> None:
        """Tidy tables, everything on disk, no messages: each measurement begins from the same."""
        await self.vacuum()
        if RABBITMQ in self.carriers:
            await self._purge()

    async def vacuum(self) -> None:
        """What autovacuum would have done in time, and everything on disk."""
        engine = self.superuser.execution_options(isolation_level="AUTOCOMMIT")
        async with engine.connect() as connection:
            await connection.execute(text("VACUUM (ANALYZE)"))
            await connection.execute(text("CHECKPOINT"))

    async def analyze(self) -> None:
        """Let the planner know how much has come since: what lays a run beside its answers reads all of it."""
        await in_transaction(self.superuser, lambda tx: tx.execute(text("ANALYZE")))

    async def _purge(self) -> None:
        topology = Topology(self.settings.amqp_queue_prefix, self.settings.amqp_shards)
        async with await broker.connect(self.carriers[RABBITMQ]) as connection:
            channel = await connection.channel()
            await declare(channel, topology)
            for name in topology.all_queues():
                await (await channel.get_queue(name)).purge()

    @asynccontextmanager
    async def worker(self, *, carrier: str = ALONE) -> AsyncIterator[psutil.Process]:
        """The product's delivery, one process, as operators start it; ready, and stopped at the end."""
        async with self.running(_WORKER, carrier=carrier):
            yield self.find_process(_WORKER)

    @asynccontextmanager
    async def running(self, *names: str, carrier: str) -> AsyncIterator[None]:
        """Processes of the product, as operators start them; ready, and stopped at the end, the first one first.

        A name is `gateway`, or a role of the worker; a number behind it tells several apart.
        """
        environment = {**self.environment, "AMQP_URL": self.carriers[carrier]}
        processes = [Process(_program(name), environment, self.folder) for name in names]
        async with AsyncExitStack() as running:
            for process in reversed(processes):
                running.push_async_callback(process.stop)
            self.running_names += names
            for name in names:
                running.callback(self.running_names.remove, name)
            await asyncio.gather(*(process.start() for process in processes))
            if any(name.startswith("gateway") for name in names):
                await wait_until_answers(f"{loopback_url(self.gateway_port)}/readyz")
            yield

    def find_process(self, name: str) -> psutil.Process:
        """A process that runs here, by the record that is kept of it."""
        return psutil.Process(int((self.folder / "processes" / name).read_text().split()[0]))

    async def usage(self) -> Usage:
        """What everything that runs here has taken so far."""
        rows = await in_transaction(
            self.superuser,
            lambda tx: tx.execute(
                text(
                    "SELECT pg_database_size(current_database()) AS kept,"
                    " pg_wal_lsn_diff(pg_current_wal_lsn(), '0/0')::float8 AS logged"
                )
            ),
        )
        found = rows.one()
        names = ["receiver", *self.running_names]
        assert self.cluster.process_id is not None, "it runs as long as the scene"
        cpu = {name: processor_seconds(self.find_process(name).pid) for name in names}
        cpu[database.NAME] = processor_seconds(self.cluster.process_id)
        disk = {f"{name}: log": size_of(self.folder / "logs" / f"{name}.log") for name in self.running_names}
        disk[f"{database.NAME}: tables and indexes"] = found.kept
        disk[f"{database.NAME}: write-ahead log"] = int(found.logged)
        if self.node is not None and self.node.process_id is not None:
            cpu[RABBITMQ] = processor_seconds(self.node.process_id)
            disk[f"{RABBITMQ}: written"] = written_bytes(self.node.process_id)
        return Usage(cpu, disk)


async def end_watch(looking: "asyncio.Task[None]") -> None:
    """End a task that looks at something for ever. Raises: what ended it before, for a figure that nobody took is no figure."""
    looking.cancel()
    with suppress(asyncio.CancelledError):
        await looking


def numbered(name: str, count: int) -> list[str]:
    """Names of so many processes of one kind."""
    return [f"{name}-{number}" for number in range(1, count + 1)]


def _program(name: str) -> Program:
    module = name.partition("-")[0]
    arguments = ("-m", "gateway") if module == "gateway" else ("-m", "worker", module)
    return Program(name, arguments)


@asynccontextmanager
async def scene(folder: Path, say: Say, *, carriers: Collection[str]) -> AsyncIterator[Scene]:
    """Bring everything up but the product's processes, and take it down again. Raises: `ServerFailed` without RabbitMQ, if
    that is among the carriers.
    """
    async with AsyncExitStack() as running:
        for name in ("logs", "processes"):
            (folder / name).mkdir()
        cluster = Cluster(choose_home(folder / "postgres"), folder / "logs" / "postgresql.log")
        store = OwnServer(database.NAME, cluster)
        # It may be elsewhere, where the server's account gets to.
        running.callback(shutil.rmtree, cluster.home, ignore_errors=True)
        running.push_async_callback(store.stop)
        node, amqp_url = None, ""
        if RABBITMQ in carriers:
            server = await asyncio.to_thread(broker.find_or_install, os.environ, say)
            running.callback(broker.remove_own, folder)
            node = broker.own_broker(folder, server)
            running.push_async_callback(node.stop)
            amqp_url = await node.start()
        gateway_port = choose_port()
        environment = {
            **{name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ},
            **LOCAL_DEFAULTS,
            **find_or_make_keys(folder),
            "DATABASE_URL": await store.start(),
            "AMQP_URL": "",
            "PORT": str(gateway_port),
        }
        settings = Settings.from_environ(environment)
        await database.migrate(settings.database_url)
        ops, product = (
            create_engine(settings, role=role, application="payouts-bench", pool_max=_POOL_MAX)
            for role in ("payouts_ops", "payouts_worker")
        )
        superuser = create_async_engine(driver_url(cluster.url(SUPERUSER)))
        for engine in (ops, product, superuser):
            running.push_async_callback(engine.dispose)
        port, control_port = choose_port(), choose_port()
        arguments = ("-m", "bench.receiver", "--port", str(port), "--control-port", str(control_port))
        receiver = Process(Program("receiver", arguments, control_port), environment, folder)
        running.push_async_callback(receiver.stop)
        await receiver.start()
        session = await running.enter_async_context(aiohttp.ClientSession())
        yield Scene(
            folder=folder,
            settings=settings,
            environment=environment,
            cluster=cluster,
            ops=ops,
            product=product,
            superuser=superuser,
            port=port,
            control=loopback_url(control_port),
            session=session,
            gateway_port=gateway_port,
            carriers={ALONE: "", **({RABBITMQ: amqp_url} if node else {})},
            node=node,
        )


def describe_machine() -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "load": os.getloadavg()[0],
        "python": sys.version.split()[0],
    }
