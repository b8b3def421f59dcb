"""The worker's composition root: its roles, each a loop of rounds, and the life of what they use."""

import asyncio
from collections.abc import Sequence
from contextlib import AsyncExitStack, suppress
from time import monotonic
from typing import Final, Protocol

from common.admin import Readiness, admin_server
from common.db.engine import create_engine
from common.errors import Transient
from common.log import LogEvent, get_logger
from common.process import stop_requested
from common.settings import Settings
from worker.callbacks.deliver import Deliverer
from worker.callbacks.send import open_session
from worker.rails.sandbox import SandboxRail
from worker.settlement import Settler
from worker.sweep import INTERVAL_SECONDS, Sweeper

ROLES: Final = ("settle", "callbacks", "sweep")

_FAILED_ROUND_SECONDS: Final = 1.0


class Role(Protocol):
    """Work in rounds."""

    async def run_round(self) -> bool:
        """Do what is there to do now; True: ask again at once."""

    async def drain(self, deadline_seconds: float) -> None:
        """Let what is under way end, for at most that long."""


async def run_worker(settings: Settings, roles: Sequence[str], *, schema_revision: str) -> None:
    """Work until SIGTERM or SIGINT, then finish what was begun. A second signal ends the process at once."""
    stop = stop_requested()
    readiness = Readiness()
    async with AsyncExitStack() as resources:
        await resources.enter_async_context(admin_server(settings.admin_port, readiness))
        engine = create_engine(
            settings,
            role="payouts_worker",
            application=f"payouts-{'-'.join(roles)}",
            pool_max=settings.database_pool_max,
        )
        resources.push_async_callback(engine.dispose)
        session = await resources.enter_async_context(
            open_session(private_allowed=settings.callback_private_addresses, ports=settings.callback_ports)
        )
        working: dict[str, tuple[Role, float]] = {}
        if "settle" in roles:
            rails = {"sandbox": SandboxRail(engine, settle_seconds=settings.sandbox_settle_seconds)}
            working["settle"] = Settler(engine, settings.keyring, rails, settings), settings.scan_interval_seconds
        if "callbacks" in roles:
            deliverer = Deliverer(engine, settings.keyring, session, settings)
            working["callbacks"] = deliverer, settings.scan_interval_seconds
        if "sweep" in roles:
            working["sweep"] = Sweeper(engine), INTERVAL_SECONDS
        waiting = asyncio.create_task(readiness.wait_for_schema(engine, schema_revision))
        resources.callback(waiting.cancel)
        get_logger().info(LogEvent.PROCESS_STARTED, roles=list(roles))
        async with asyncio.TaskGroup() as loops:
            for name, (role, pause_seconds) in working.items():
                loops.create_task(_run_rounds(name, role, stop, waiting, pause_seconds))
            await stop.wait()
            readiness.leave()
        ends_at = monotonic() + settings.drain_seconds
        await asyncio.gather(*(role.drain(max(0.0, ends_at - monotonic())) for role, _ in working.values()))
    get_logger().info(LogEvent.PROCESS_STOPPED)


async def _run_rounds(
    name: str, role: Role, stop: asyncio.Event, schema: "asyncio.Task[None]", pause_seconds: float
) -> None:
    """Round after round, without a pause while there is work; a failed round is logged and tried again."""
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait({stopping, schema}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    while not stop.is_set():
        pause = pause_seconds
        try:
            if await role.run_round():
                continue
        except Transient as error:
            get_logger().warning(LogEvent.ROUND_FAILED, round=name, error=error.reason)
            pause = _FAILED_ROUND_SECONDS
        except Exception:
            get_logger().exception(LogEvent.ROUND_FAILED, round=name)
            pause = _FAILED_ROUND_SECONDS
        with suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), pause)
