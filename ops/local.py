"""`python -m ops.local up|reset`: the whole product on this machine, every part a real process on loopback."""

import asyncio
import os
import shutil
import signal
import sys
import time
from collections.abc import Mapping
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import click
from rich.console import Console

from common.settings import Settings, SettingsInvalid
from ops import apt, broker, database
from ops.broker import BrokerUnusable
from ops.database import DatabaseUnusable
from ops.ports import choose_port, find_obstacle, keep_port, loopback_url
from ops.processes import Process, ProcessFailed, Program, stop_all, stop_leftovers, wait_until_answers
from ops.seed import BANK_SHOP, CURRENCY, SHOP, seed, seed_bank
from ops.servers import OwnServer, ServerFailed
from ops.state import FOLDER, LOCAL_DEFAULTS, Demo, InUse, find_demo, find_or_make_keys, in_use, save_demo
from ops.welcome import render_welcome

_GATEWAYS: Final = ("gateway-1", "gateway-2")
_ROLES: Final = ("settle", "callbacks", "sweep")

_ALONE: Final = "PostgreSQL alone carries the work"


class PortUnusable(Exception):
    """The gateway cannot listen where it shall."""


# What the person at the terminal can do something about. A folder of root's is one of them.
_REPORTED: Final = (
    BrokerUnusable,
    DatabaseUnusable,
    InUse,
    PermissionError,
    PortUnusable,
    ProcessFailed,
    ServerFailed,
    SettingsInvalid,
)

_console: Final = Console(highlight=False, markup=False, soft_wrap=True)


def tell(text: str) -> None:
    """Show text. A terminal that has gone away stops nothing."""
    try:
        _console.print(text)
    except OSError:
        _console.quiet = True


def say(subject: str, text: str) -> None:
    """Show one line of progress."""
    tell(f"{subject:<14}{text}")


class Stack:
    """Everything that runs here, brought up, kept up and stopped in order."""

    def __init__(self, environ: Mapping[str, str], folder: Path) -> None:
        self._environ = environ
        self._folder = folder
        self._servers: list[OwnServer] = []
        self._processes: list[Process] = []
        self._rail = self._rail_secret = ""

    async def run(self) -> None:
        """Run until cancelled; then stop what takes work in first, and the database last.

        Raises: one of `_REPORTED` when something does not start; then nothing runs.
        """
        async with AsyncExitStack() as running:
            running.enter_context(in_use(self._folder))
            await asyncio.to_thread(_clean_up, self._folder)
            settings, environment = await self._see_to_settings(running)
            say("migrations", f"at revision {await database.migrate(settings.database_url)}")
            demo = await self._see_to_demo(settings)
            await self._start_processes(running, environment, demo)
            say("ready", f"{demo.base_url}, Ctrl-C stops everything")
            async with asyncio.TaskGroup() as keeping:
                for process in self._processes:
                    keeping.create_task(process.keep(say))
                for server in self._servers:
                    keeping.create_task(server.keep(say))

    def kill(self) -> None:
        """End everything at once."""
        for process in self._processes:
            process.kill()
        for server in self._servers:
            server.kill()

    async def _see_to_settings(self, running: AsyncExitStack) -> tuple[Settings, dict[str, str]]:
        """Have a database, and a broker if there can be one, and judge the environment that all processes get."""
        given = self._environ.get("DATABASE_URL")
        keys = find_or_make_keys(self._folder)
        environment = {
            **LOCAL_DEFAULTS,
            **keys,
            **self._environ,
            "DATABASE_URL": given or await self._start(running, database.own_database(self._folder)),
            "AMQP_URL": await self._see_to_broker(running),
        }
        environment.pop(apt.NO_INSTALL, None)
        settings = Settings.from_environ(environment)
        if given:
            await database.check_given(given)
            say(database.NAME, "the one of DATABASE_URL")
        if settings.amqp_urls:
            await broker.check_given(settings.amqp_urls)
        obstacle = find_obstacle(settings.host, settings.port)
        if obstacle is not None:
            raise PortUnusable(f"port {settings.port} of {settings.host}: {obstacle}; PORT=… chooses another")
        keep_port(settings.port)
        return settings, environment

    async def _see_to_broker(self, running: AsyncExitStack) -> str:
        """The broker's URL; empty when PostgreSQL alone carries the work."""
        given = self._environ.get("AMQP_URL")
        if given is not None:
            say(broker.NAME, "the one of AMQP_URL" if given else f"AMQP_URL is empty; {_ALONE}")
            return given
        try:
            server = await asyncio.to_thread(broker.find_or_install, self._environ, say)
            return await self._start(running, broker.own_broker(self._folder, server))
        except ServerFailed as failure:
            say(broker.NAME, f"{_ALONE}: {failure}")
            return ""

    async def _start(self, running: AsyncExitStack, server: OwnServer) -> str:
        """Start a server of our own, to be kept up from then on, and return its URL. Raises: `ServerFailed`."""
        running.push_async_callback(self._stop, server)
        self._servers.append(server)
        started = time.monotonic()
        try:
            url = await server.start()
        except ServerFailed:
            self._servers.remove(server)
            raise
        say(server.name, f"ready on port {urlsplit(url).port} after {time.monotonic() - started:.1f} s")
        return url

    async def _stop(self, server: OwnServer) -> None:
        await server.stop()
        say(server.name, "stopped")

    async def _see_to_demo(self, settings: Settings) -> Demo:
        """The demo merchant with its shop, money and key; remembered for programs and for the next run."""
        remembered = find_demo(self._folder)
        credentials = await seed(settings, remembered)
        demo = Demo(
            base_url=f"http://{settings.host}:{settings.port}",
            api_key=credentials.api_key,
            api_secret=credentials.api_secret,
            webhook_secret=credentials.webhook_secret,
            shop_code=SHOP,
            currency=CURRENCY,
            receiver_url=loopback_url(choose_port(urlsplit(remembered.receiver_url).port if remembered else None)),
            bank_url=loopback_url(choose_port(urlsplit(remembered.bank_url).port if remembered else None)),
            database_url=settings.database_url,
            amqp_url=",".join(settings.amqp_urls) or None,
        )
        save_demo(self._folder, demo)
        self._rail, self._rail_secret = await seed_bank(settings, demo.bank_url, demo.webhook_secret)
        say("demo shops", f"{SHOP} and {BANK_SHOP} in {CURRENCY}; their key is in {self._folder / 'demo.json'}")
        return demo

    async def _start_processes(self, running: AsyncExitStack, environment: Mapping[str, str], demo: Demo) -> None:
        """Start all processes together and wait for all; they stop group by group, the last one first."""
        port = urlsplit(demo.receiver_url).port
        receiver = ("-m", "ops.receiver", "--port", str(port), "--folder", str(self._folder))
        bank_port = urlsplit(demo.bank_url).port
        bank = (
            *("-m", "ops.simulator", "--port", str(bank_port), "--ledger", str(self._folder / "bank.sqlite")),
            *("--events-url", f"{demo.base_url}/api/v1/rails/{self._rail}/events"),
        )
        environment = {**environment, "RAIL_SECRET": self._rail_secret}
        groups = (
            [Program("receiver", receiver, port)],
            [Program("bank", bank, bank_port)],
            [Program(role, ("-m", "worker", role)) for role in _ROLES],
            [Program(name, ("-m", "gateway")) for name in _GATEWAYS],
        )
        for programs in groups:
            group = [Process(program, environment, self._folder) for program in programs]
            running.push_async_callback(stop_all, group, say)
            self._processes += group
        await asyncio.gather(*(self._start_process(process) for process in self._processes))
        await wait_until_answers(f"{demo.base_url}/readyz")
        tell(render_welcome(demo, external_id=f"first-{int(time.time())}"))

    async def _start_process(self, process: Process) -> None:
        await process.start()
        say(process.name, f"ready, {loopback_url(process.port)}")


def _clean_up(folder: Path) -> None:
    """Stop what an earlier run left behind, and begin new logs."""
    for name in (*stop_leftovers(folder), *broker.stop_leftover(folder), *database.stop_leftover(folder)):
        say(name, "stopped, an earlier run had left it behind")
    for name in ("logs", "processes"):
        shutil.rmtree(folder / name, ignore_errors=True)
        (folder / name).mkdir()


async def _run_until_signal(stack: Stack) -> None:
    """Run the stack until SIGINT, SIGTERM or SIGHUP; a second one ends everything at once, this process too."""
    running = asyncio.create_task(stack.run())

    def stop(number: int) -> None:
        if running.cancelling():
            stack.kill()
            os._exit(128 + number)
        say("stopping", "in order; once more kills at once")
        running.cancel()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, stop, number)
    with suppress(asyncio.CancelledError):
        await running


def reset_folder(folder: Path) -> None:
    """Forget a stack that does not run: its database, broker, keys, logs. Raises: `InUse`."""
    if not folder.exists():
        return
    with in_use(folder):
        stop_leftovers(folder)
        broker.remove_own(folder)
        database.remove_own(folder)
        shutil.rmtree(folder)


def bring_up(folder: Path) -> None:
    """Run the stack of a folder until told to stop; exits with the reason when it does not start."""
    try:
        asyncio.run(_run_until_signal(Stack(os.environ, folder)))
    except _REPORTED as failure:
        sys.exit(f"error: {failure}")


@click.group()
def main() -> None:
    """The whole product on this machine."""


@main.command()
def up() -> None:
    """Bring everything up and keep it up until Ctrl-C."""
    bring_up(FOLDER)


@main.command()
def reset() -> None:
    """Forget everything: the database and the broker of this checkout, keys, logs."""
    try:
        reset_folder(FOLDER)
    except _REPORTED as failure:
        sys.exit(f"error: {failure}")
    say("reset", "everything here is forgotten; those of DATABASE_URL and AMQP_URL are left alone")


if __name__ == "__main__":
    main()
