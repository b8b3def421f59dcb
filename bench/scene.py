"""What a measurement needs: a durable PostgreSQL of its own, merchants who answer, processes of ours, and their costs.

Everything is in a folder that is removed afterwards. There is no broker: what waits already, and what nobody brings, is
found by the scan.
"""

import asyncio
import os
import shutil
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import aiohttp
import psutil
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

from common.db.engine import Engine, create_engine, driver_url
from common.settings import Settings
from ops import database
from ops.ports import choose_port, loopback_url
from ops.postgres import Cluster, choose_home
from ops.processes import Process, Program
from ops.servers import OwnServer
from ops.state import LOCAL_DEFAULTS, find_or_make_keys

_SUPERUSER: Final = "postgres"
_WORKER: Final = "callbacks"
_POOL_MAX: Final = 8
# Of those whose address is 127.1.y.z; that many merchants have an origin of their own.
_LAST_PARTS: Final = 250


@dataclass(slots=True)
class Scene:
    """What runs. `ops` and `product` act as the roles of operators and of workers, `superuser` may do everything."""

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
        """What autovacuum would have done in time, and everything on disk: each measurement begins from the same."""
        engine = self.superuser.execution_options(isolation_level="AUTOCOMMIT")
        async with engine.connect() as connection:
            await connection.execute(text("VACUUM (ANALYZE)"))
            await connection.execute(text("CHECKPOINT"))

    @asynccontextmanager
    async def worker(self) -> AsyncIterator[psutil.Process]:
        """The product's delivery, one process, as operators start it; ready, and stopped at the end."""
        process = Process(Program(_WORKER, ("-m", "worker", _WORKER)), self.environment, self.folder)
        await process.start()
        try:
            yield self.find_process(_WORKER)
        finally:
            await process.stop()

    def find_process(self, name: str) -> psutil.Process:
        """A process that runs here, by the record that is kept of it."""
        return psutil.Process(int((self.folder / "processes" / name).read_text().split()[0]))

    def costs(self, worker: psutil.Process) -> "Costs":
        """What the processes have taken of the machine's processors so far."""
        server = psutil.Process(self.cluster.process_id)
        database_seconds = sum(cpu_seconds(process) for process in [server, *server.children(recursive=True)])
        return Costs(cpu_seconds(worker), database_seconds, cpu_seconds(self.find_process("receiver")))


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds of processor time."""

    worker: float
    database: float
    receiver: float

    def per_callback(self, before: "Costs", count: int) -> dict[str, float]:
        """Microseconds for each of `count` callbacks since then."""
        return {name: round((getattr(self, name) - getattr(before, name)) / count * 1e6, 1) for name in self.__slots__}


async def end_watch(looking: "asyncio.Task[None]") -> None:
    """End a task that looks at something for ever. Raises: what ended it before, for a figure that nobody took is no figure."""
    looking.cancel()
    with suppress(asyncio.CancelledError):
        await looking


def cpu_seconds(process: psutil.Process) -> float:
    """User and system time of a process; none when it has gone meanwhile."""
    with suppress(psutil.NoSuchProcess):
        times = process.cpu_times()
        return float(times.user + times.system)
    return 0.0


@asynccontextmanager
async def scene(folder: Path) -> AsyncIterator[Scene]:
    """Bring everything up but the worker, and take it down again."""
    async with AsyncExitStack() as running:
        for name in ("logs", "processes"):
            (folder / name).mkdir()
        cluster = Cluster(choose_home(folder / "postgres"), folder / "logs" / "postgresql.log")
        store = OwnServer(database.NAME, cluster)
        # It may be elsewhere, where the server's account gets to.
        running.callback(shutil.rmtree, cluster.home, ignore_errors=True)
        running.push_async_callback(store.stop)
        environment = {
            **{name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ},
            **LOCAL_DEFAULTS,
            **find_or_make_keys(folder),
            "DATABASE_URL": await store.start(),
            "AMQP_URL": "",
        }
        settings = Settings.from_environ(environment)
        await database.migrate(settings.database_url)
        ops, product = (
            create_engine(settings, role=role, application="payouts-bench", pool_max=_POOL_MAX)
            for role in ("payouts_ops", "payouts_worker")
        )
        superuser = create_async_engine(driver_url(cluster.url(_SUPERUSER)))
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
        )


def describe_machine() -> dict[str, Any]:
    """What the figures were measured on."""
    return {"cpus": os.cpu_count(), "load": os.getloadavg()[0], "python": sys.version.split()[0]}
