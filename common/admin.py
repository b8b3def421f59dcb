"""The admin port every process may have, for nobody outside: `/livez`, `/readyz`, `/metrics`. And what readiness means."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import asynccontextmanager

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from common.db.engine import Engine, in_transaction
from common.errors import Transient
from common.log import LogEvent, get_logger
from common.messaging.link import Link
from common.settings import Settings

_SCHEMA_POLL_SECONDS = 0.5


class Readiness:
    """Whether work may be sent here: the schema is the one this code was written for, and we are not leaving."""

    def __init__(self) -> None:
        self._schema_fits = False
        self._leaving = False
        self._links: Collection[Link] = ()

    @property
    def leaving(self) -> bool:
        """Whether the process is on its way out."""
        return self._leaving

    @property
    def reason(self) -> str | None:
        """Why not ready, or None."""
        if self._leaving:
            return "leaving"
        return None if self._schema_fits else "waiting for the database's schema"

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

    async def wait_for_schema(self, engine: Engine, revision: str) -> None:
        """Return once the database answers and has that revision."""
        while not self._schema_fits:
            try:
                found = await in_transaction(
                    engine, lambda tx: tx.scalar(text("SELECT version_num FROM alembic_version"))
                )
                self._schema_fits = found == revision
            except (Transient, DBAPIError) as error:
                # No table or no role yet: somebody has still to migrate.
                get_logger().warning(LogEvent.ROUND_FAILED, round="schema", error=type(error).__name__)
            if not self._schema_fits:
                await asyncio.sleep(_SCHEMA_POLL_SECONDS)


async def livez(_request: web.Request) -> web.Response:
    """The event loop answers; nothing else is asked."""
    return web.json_response({"status": "ok"})


def readyz(readiness: Readiness) -> Callable[[web.Request], Awaitable[web.Response]]:
    """A handler that tells whether work may be sent here."""

    async def answer(_request: web.Request) -> web.Response:
        reason = readiness.reason
        if reason is None:
            return web.json_response({"status": "ready", "broker": readiness.broker})
        return web.json_response({"status": "not ready", "reason": reason, "broker": readiness.broker}, status=503)

    return answer


async def metrics(_request: web.Request) -> web.Response:
    """Prometheus text format."""
    return web.Response(body=generate_latest(), headers={"Content-Type": CONTENT_TYPE_LATEST})


@asynccontextmanager
async def admin_server(settings: Settings, readiness: Readiness) -> AsyncIterator[None]:
    """Serve the admin port while the context lasts, if there shall be one."""
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
