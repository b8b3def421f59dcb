"""The admin port every process may have, for nobody outside: `/livez`, `/readyz`, `/metrics`. And what readiness means."""

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import asynccontextmanager
from functools import partial
from importlib.metadata import version
from time import monotonic
from typing import Final

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, Gauge, generate_latest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from common.db.engine import Engine, Tx, find_room, in_transaction
from common.db.recovering import awaits_recovery
from common.errors import Transient
from common.log import LogEvent, get_logger
from common.messaging.link import Link
from common.settings import Settings

_SCHEMA_POLL_SECONDS: Final = 0.5
_DATABASE_POLL_SECONDS: Final = 1.0
# What `?exclude=` of a request for readiness can name.
_DATABASE: Final = "database"
# What is waited for.
_SCHEMA: Final = "the database's schema"
_RECOVERY: Final = "`payouts recover`: the database was restored"

BUILD: Final = Gauge(
    "payouts_build_info", "1, of the release that runs here and the schema it was written for", ["version", "schema"]
)


class Readiness:
    """Whether work may be sent here: the database is one this code can work with now, it answers, and we are not leaving.

    `silence_seconds_max`: how long the database may give no answer until we are not ready.
    """

    def __init__(self, *, silence_seconds_max: float) -> None:
        self._silence_seconds_max = silence_seconds_max
        self._waits_for: str | None = _SCHEMA
        self._answered_at = -math.inf
        self._leaving = False
        self._links: Collection[Link] = ()

    @property
    def leaving(self) -> bool:
        """Whether the process is on its way out."""
        return self._leaving

    def reason(self, *, of_database: bool = True) -> str | None:
        """Why not ready, or None. `of_database` False: its silence is none."""
        if self._leaving:
            return "leaving"
        if self._waits_for is not None:
            return f"waiting for {self._waits_for}"
        silent = monotonic() - self._answered_at > self._silence_seconds_max
        return "the database does not answer" if of_database and silent else None

    @property
    def broker(self) -> str:
        """How it stands with RabbitMQ. Without it work goes on from PostgreSQL, so it is no reason not to be ready."""
        if not self._links:
            return "not used"
        away = [link.name for link in self._links if not link.connected]
        return f"away: {', '.join(away)}" if away else "connected"

    def watch(self, links: Collection[Link]) -> None:
        """Tell of these connections from now on."""
        self._links = links

    def leave(self) -> None:
        """No more work, please."""
        self._leaving = True

    async def wait_for_database(self, engine: Engine, revision: str, settings: Settings) -> None:
        """Return once the database answers, has that revision, and does not wait for `payouts recover`; say it when our pools
        have no room in it.

        Having none is no reason not to start: that would make an outage of what costs some waiting.
        """
        await self._wait_until_usable(engine, revision)
        try:
            room = await in_transaction(engine, find_room)
        except Transient:
            return
        needed = settings.database_processes * settings.database_pool_max
        if needed > room:
            get_logger().error(LogEvent.CONNECTIONS_SHORT, needed=needed, room=room)

    async def _wait_until_usable(self, engine: Engine, revision: str) -> None:
        while self._waits_for is not None:
            try:
                waits_for = await in_transaction(engine, partial(_find_obstacle, revision=revision))
                if waits_for == _RECOVERY != self._waits_for:
                    get_logger().error(LogEvent.DATABASE_RESTORED)
                self._waits_for, self._answered_at = waits_for, monotonic()
            except (Transient, DBAPIError) as error:
                # No table or no role yet: somebody has still to migrate.
                get_logger().warning(LogEvent.ROUND_FAILED, round="schema", error=type(error).__name__)
            if self._waits_for is not None:
                await asyncio.sleep(_SCHEMA_POLL_SECONDS)

    async def watch_database(self, engine: Engine) -> None:
        """Ask the database again and again whether it still answers, for ever."""
        while True:
            try:
                async with asyncio.timeout(self._silence_seconds_max):
                    await in_transaction(engine, lambda tx: tx.scalar(text("SELECT 1")), attempts_max=1)
                self._answered_at = monotonic()
            except (Transient, DBAPIError, TimeoutError) as error:
                get_logger().warning(LogEvent.ROUND_FAILED, round="readiness", error=type(error).__name__)
            await asyncio.sleep(_DATABASE_POLL_SECONDS)


async def _find_obstacle(tx: Tx, revision: str) -> str | None:
    if await tx.scalar(text("SELECT version_num FROM alembic_version")) != revision:
        return _SCHEMA
    return _RECOVERY if await awaits_recovery(tx) else None


async def livez(_request: web.Request) -> web.Response:
    """The event loop answers; nothing else is asked."""
    return web.json_response({"status": "ok"})


def readyz(readiness: Readiness) -> Callable[[web.Request], Awaitable[web.Response]]:
    """A handler that tells whether work may be sent here; `?exclude=database`: whatever the database does by now."""

    async def answer(request: web.Request) -> web.Response:
        reason = readiness.reason(of_database=request.query.get("exclude") != _DATABASE)
        if reason is None:
            return web.json_response({"status": "ready", "broker": readiness.broker})
        return web.json_response({"status": "not ready", "reason": reason, "broker": readiness.broker}, status=503)

    return answer


async def metrics(_request: web.Request) -> web.Response:
    """Prometheus text format."""
    return web.Response(body=generate_latest(), headers={"Content-Type": CONTENT_TYPE_LATEST})


@asynccontextmanager
async def admin_server(settings: Settings, readiness: Readiness, *, schema_revision: str) -> AsyncIterator[None]:
    """Serve the admin port while the context lasts, if there shall be one."""
    BUILD.labels(version("payouts"), schema_revision).set(1)
    if settings.admin_port == 0:
        yield
        return
    app = web.Application()
    app.add_routes([web.get("/livez", livez), web.get("/readyz", readyz(readiness)), web.get("/metrics", metrics)])
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, settings.admin_host, settings.admin_port).start()
        yield
    finally:
        await runner.cleanup()
