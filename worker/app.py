"""The worker's composition root: its roles, each a loop of rounds, and the life of what they use."""

import asyncio
from collections.abc import Collection, Sequence
from contextlib import AsyncExitStack, suppress
from time import monotonic
from typing import Final, Protocol

from common.admin import Readiness, admin_server
from common.db.callbacks import Event, ids_to_tell, traceparents_of
from common.db.engine import Engine, close_engine, create_engine
from common.errors import Transient
from common.log import LogEvent, get_logger
from common.messaging.consumer import Consumer
from common.messaging.link import Link
from common.messaging.parking import ParkedCount
from common.messaging.publisher import Publisher
from common.messaging.topology import Topology, Work
from common.process import end_tasks, stop_requested
from common.settings import Settings
from worker.callbacks.deliver import Deliverer
from worker.callbacks.send import open_session
from worker.callbacks.upkeep import INTERVAL_SECONDS as LANES_INTERVAL_SECONDS
from worker.callbacks.upkeep import LaneKeeper
from worker.checking import Checker
from worker.collecting import INTERVAL_SECONDS as COLLECT_INTERVAL_SECONDS
from worker.collecting import Collector
from worker.keeping import INTERVAL_SECONDS as KEEP_INTERVAL_SECONDS
from worker.keeping import Keeper
from worker.rails.http import open_rail_session
from worker.rails.registry import Registry
from worker.scanning import REST_SECONDS
from worker.settlement import Settler
from worker.sweep import INTERVAL_SECONDS, Sweeper

ROLES: Final = ("settle", "callbacks", "sweep")

_FAILED_ROUND_SECONDS: Final = 1.0
# Of what looks at the whole, whether there is work or not.
_INTERVALS_SECONDS: Final = {
    "sweep": INTERVAL_SECONDS,
    "collect": COLLECT_INTERVAL_SECONDS,
    "keep": KEEP_INTERVAL_SECONDS,
    "keep lanes": LANES_INTERVAL_SECONDS,
}


class Role(Protocol):
    """Work in rounds."""

    async def run_round(self) -> bool:
        """Do what is there to do now; True: ask again at once."""

    def leave(self) -> None:
        """Begin nothing more."""

    async def drain(self, deadline_seconds: float) -> None:
        """Let what is under way end, for at most that long."""


class Worker:
    """The roles of one process, and RabbitMQ when there is one."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        topology = Topology(settings.amqp_queue_prefix, settings.amqp_shards)
        self._topology = topology
        self._publisher = Publisher(topology)
        self._consumers: dict[Work, Consumer] = {}
        self._parked_count: ParkedCount | None = None
        self.roles: dict[str, Role] = {}

    async def open(self, resources: AsyncExitStack, engine: Engine, roles: Sequence[str]) -> None:
        """Set up the roles asked for."""
        settings = self._settings
        if "settle" in roles:
            rail_session = await resources.enter_async_context(
                open_rail_session(
                    connect_timeout_seconds=settings.rail_connect_timeout_seconds,
                    timeout_seconds=settings.rail_timeout_seconds,
                )
            )
            registry = Registry(engine, settings.keyring, settings, rail_session)
            settler = Settler(
                engine,
                settings.keyring,
                registry,
                settings,
                refresh_rails=registry.refresh,
                messages_arrive=lambda: self._arrive(Work.SETTLE),
                tell=self._tell,
            )
            self.roles["settle"] = settler
            self.roles["collect"] = Collector(engine, registry, settings, tell=self._tell)
            self._consumers[Work.SETTLE] = Consumer(
                self._topology, Work.SETTLE, settler.claim_messages, self._publisher, prefetch=settings.amqp_prefetch
            )
        if "callbacks" in roles:
            session = await resources.enter_async_context(
                open_session(
                    private_allowed=settings.callback_private_addresses,
                    https_only=settings.callback_https_only,
                    ports=settings.callback_ports,
                    forbidden=settings.callback_networks_forbidden,
                )
            )
            deliverer = Deliverer(
                engine, settings.keyring, session, settings, messages_arrive=lambda: self._arrive(Work.CALLBACK)
            )
            self.roles["callbacks"] = deliverer
            self._consumers[Work.CALLBACK] = Consumer(
                self._topology,
                Work.CALLBACK,
                deliverer.claim_messages,
                self._publisher,
                prefetch=settings.amqp_prefetch,
            )
        if "sweep" in roles:
            self._parked_count = ParkedCount(self._topology)
            self.roles["sweep"] = Sweeper(engine, tell=self._tell)
            self.roles["check"] = Checker(engine)
            self.roles["keep"] = Keeper(engine, keep_days=settings.callback_attempts_keep_days)
            self.roles["keep lanes"] = LaneKeeper(engine, hold_seconds=self._settings.callback_hold_hours * 3600)

    def links(self) -> list[Link]:
        """The connections to RabbitMQ that the roles need; none without `AMQP_URL`. Publishing has one of its own."""
        if not self._settings.amqp_urls:
            return []
        urls = self._settings.amqp_urls
        consuming = [Link(f"consume {work.name.lower()}", urls, c.session) for work, c in self._consumers.items()]
        counting = [] if self._parked_count is None else [Link("count parked", urls, self._parked_count.session)]
        return [Link("publish", urls, self._publisher.session), *consuming, *counting]

    def pause_seconds(self, role: str) -> float:
        """How long a role rests when there was nothing to do."""
        if isinstance(checker := self.roles[role], Checker):
            return checker.pause_seconds
        if role in _INTERVALS_SECONDS:
            return _INTERVALS_SECONDS[role]
        work = Work.SETTLE if role == "settle" else Work.CALLBACK
        return REST_SECONDS if self._arrive(work) else self._settings.scan_interval_seconds

    async def drain(self, rounds: "Collection[asyncio.Task[None]]") -> None:
        """Hand back what has not begun and finish the rest, within the deadline."""
        ends_at = monotonic() + self._settings.drain_seconds

        def left() -> float:
            return max(0.0, ends_at - monotonic())

        for role in self.roles.values():
            role.leave()
        for consumer in self._consumers.values():
            consumer.stop()
        await end_tasks(rounds, left())
        await asyncio.gather(*(consumer.drain(left()) for consumer in self._consumers.values()))
        await asyncio.gather(*(role.drain(left()) for role in self.roles.values()))
        await self._publisher.drain(left())

    def _arrive(self, work: Work) -> bool:
        return self._consumers[work].consuming

    def _tell(self, events: Sequence[Event]) -> None:
        if self._settings.amqp_urls:
            self._publisher.offer(Work.CALLBACK, ids_to_tell(events), traceparents_of(events))


async def run_worker(settings: Settings, roles: Sequence[str], *, schema_revision: str) -> None:
    """Work until SIGTERM or SIGINT, then finish what was begun. A second signal ends the process at once."""
    stop = stop_requested()
    readiness = Readiness(silence_seconds_max=settings.ready_silence_seconds_max)
    async with AsyncExitStack() as resources:
        await resources.enter_async_context(admin_server(settings, readiness, schema_revision=schema_revision))
        engine = create_engine(
            settings,
            role="payouts_worker",
            application=f"payouts-{'-'.join(roles)}",
            pool_max=settings.database_pool_max,
        )
        resources.push_async_callback(close_engine, engine)
        worker = Worker(settings)
        await worker.open(resources, engine, roles)
        get_logger().info(LogEvent.PROCESS_STARTED, roles=list(roles))
        schema = asyncio.create_task(readiness.wait_for_database(engine, schema_revision, settings))
        resources.callback(schema.cancel)
        await _first(schema, stop)
        watching = asyncio.create_task(readiness.watch_database(engine))
        resources.callback(watching.cancel)
        links = [] if stop.is_set() else worker.links()
        readiness.watch(links)
        keeping = [asyncio.create_task(link.run()) for link in links]
        rounds = [asyncio.create_task(_run_rounds(name, role, worker, stop)) for name, role in worker.roles.items()]
        await stop.wait()
        readiness.leave()
        await worker.drain(rounds)
        await end_tasks(keeping, 0)
    get_logger().info(LogEvent.PROCESS_STOPPED)


async def _first(task: "asyncio.Task[None]", stop: asyncio.Event) -> None:
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait({task, stopping}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()


async def _run_rounds(name: str, role: Role, worker: Worker, stop: asyncio.Event) -> None:
    """Round after round, without a pause while there is work; a failed round is logged and tried again."""
    while not stop.is_set():
        pause_seconds = _FAILED_ROUND_SECONDS
        try:
            if await role.run_round():
                continue
            pause_seconds = worker.pause_seconds(name)
        except Transient as error:
            get_logger().warning(LogEvent.ROUND_FAILED, round=name, error=error.reason)
        except Exception:
            get_logger().exception(LogEvent.ROUND_FAILED, round=name)
        with suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), pause_seconds)
