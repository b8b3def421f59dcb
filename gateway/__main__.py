"""`python -m gateway`, or `payouts-gateway` where the product is installed: one gateway process.

Start as many as you like; they share the port (SO_REUSEPORT).
"""

import os
import sys

import uvloop
from aiohttp import web

from common.admin import Readiness, admin_server
from common.log import LogEvent, configure_logging, get_logger
from common.process import collect_seldom, open_many_files, stop_requested
from common.settings import Settings, SettingsInvalid
from common.tracing import traced
from gateway.app import create_app
from gateway.server import GatewayRunner
from migrations.run import newest_revision

KEEPALIVE_SECONDS = 75


async def serve(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT, then finish what was begun."""
    readiness = Readiness(silence_seconds_max=settings.ready_silence_seconds_max)
    schema_revision = newest_revision()
    app = create_app(settings, readiness, schema_revision=schema_revision)
    runner = GatewayRunner(app, keepalive_timeout=KEEPALIVE_SECONDS, shutdown_timeout=settings.drain_seconds)
    stop = stop_requested()
    await runner.setup()
    try:
        await web.TCPSite(runner, settings.host, settings.port, reuse_port=True).start()
        async with admin_server(settings, readiness, schema_revision=schema_revision):
            get_logger().info(LogEvent.PROCESS_STARTED, port=settings.port)
            await stop.wait()
            readiness.leave()
            # Requests that were begun are answered; meanwhile the admin port says that we are leaving.
            await runner.cleanup()
    finally:
        await runner.cleanup()
    get_logger().info(LogEvent.PROCESS_STOPPED)


def main() -> int:
    """Exit code 2: the settings make no sense."""
    try:
        settings = Settings.from_environ(os.environ)
    except SettingsInvalid as error:
        print(f"gateway: {error}", file=sys.stderr)
        return 2
    configure_logging(settings.log_format, settings.log_level, process="gateway")
    open_many_files()
    collect_seldom()
    with traced(os.environ, "gateway"):
        uvloop.run(serve(settings))
    return 0


if __name__ == "__main__":
    sys.exit(main())
