"""Processes of ours as tests run them: real ones, on free ports, in sessions of their own, to be killed at will."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryFile
from time import monotonic
from typing import IO, Any

import aiohttp

from common.settings import Settings
from ops.ports import choose_port
from tests.factories import Merchant, create_body, environment

DEADLINE_SECONDS = 30.0

ROOT = Path(__file__).parent.parent


async def eventually(condition: Callable[[], Awaitable[Any]], what: str, seconds: float = DEADLINE_SECONDS) -> Any:
    """Poll until a condition is truthy, and return what it returned; fail by name at the deadline."""
    ends_at = monotonic() + seconds
    while not (value := await condition()):
        assert monotonic() < ends_at, f"not in {seconds:g} s: {what}"
        await asyncio.sleep(0.02)
    return value


class Process:
    """A process of ours. Its output is kept for when a test fails."""

    def __init__(self, name: str, process: asyncio.subprocess.Process, admin_port: int, log: IO[bytes]) -> None:
        self.name = name
        self.admin_port = admin_port
        self._process = process
        self._log = log

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    @property
    def output(self) -> str:
        """Everything it wrote so far."""
        # Not by seeking: the process writes where the file stands, for both.
        log = self._log.fileno()
        return os.pread(log, os.fstat(log).st_size, 0).decode(errors="replace")

    async def wait_ready(self) -> "Process":
        """Return once `/readyz` answers 200."""

        async def ready() -> bool:
            assert self._process.returncode is None, f"{self.name} ended: {self.output}"
            return await http_status(f"http://127.0.0.1:{self.admin_port}/readyz") == 200

        await eventually(ready, f"{self.name} is ready")
        return self

    def send(self, number: signal.Signals) -> None:
        """Send a signal; a process that is gone is left alone."""
        if self._process.returncode is None:
            self._process.send_signal(number)

    async def kill(self) -> None:
        """Kill -9, and wait until it is gone."""
        self.send(signal.SIGKILL)
        await self._process.wait()

    async def stop(self) -> int:
        """SIGTERM, and the exit code."""
        self.send(signal.SIGTERM)
        return await asyncio.wait_for(self._process.wait(), DEADLINE_SECONDS)

    async def close(self) -> None:
        """Kill it if it lives, and close its log."""
        self.send(signal.SIGCONT)
        await self.kill()
        self._log.close()


class Stack:
    """Processes on one database. `base_url` is the port that all gateways share."""

    def __init__(self, database_url: str, **overrides: str) -> None:
        self.database_url = database_url
        self.port = choose_port()
        self._overrides = overrides
        self._processes: list[Process] = []

    @property
    def base_url(self) -> str:
        """Where the gateways answer."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def settings(self) -> Settings:
        """What the processes read."""
        return Settings.from_environ(environment(self.database_url, **self._overrides))

    async def start(self, *arguments: str, **overrides: str) -> Process:
        """Start `python -m` with those arguments, and wait until it is ready: `gateway`, or `worker settle`."""
        return await (await self.launch(*arguments, **overrides)).wait_ready()

    async def launch(self, *arguments: str, **overrides: str) -> Process:
        """Start without waiting."""
        admin_port = choose_port()
        log = TemporaryFile()  # noqa: SIM115 closed by `Process.close`
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            *arguments,
            cwd=ROOT,
            env={
                **{name: os.environ[name] for name in ("PATH", "COVERAGE_PROCESS_CONFIG") if name in os.environ},
                "PORT": str(self.port),
                "PAYOUTS_ADMIN_PORT": str(admin_port),
                **environment(self.database_url, **self._overrides),
                **overrides,
            },
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        started = Process(" ".join(arguments), process, admin_port, log)
        self._processes.append(started)
        return started

    async def close(self) -> None:
        """Kill whatever still lives."""
        for process in self._processes:
            await process.close()


@asynccontextmanager
async def stack(database_url: str, **overrides: str) -> AsyncIterator[Stack]:
    """A stack for the length of a test."""
    running = Stack(database_url, **overrides)
    try:
        yield running
    finally:
        await running.close()


async def http_status(url: str) -> int | None:
    """The status a URL answers with, or None when nobody answers."""
    try:
        async with aiohttp.ClientSession() as session, session.get(url) as response:
            return response.status
    except (aiohttp.ClientError, OSError):
        return None


class Client:
    """A merchant's HTTP client: signs, sends, and returns status and JSON."""

    def __init__(self, session: aiohttp.ClientSession, base_url: str, merchant: Merchant) -> None:
        self._session = session
        self._base_url = base_url
        self._merchant = merchant

    async def create(self, body: bytes | None = None, **fields: Any) -> tuple[int, dict[str, Any]]:
        """`POST /payouts` with a body as it is, or with a fresh one of those fields."""
        return await self.request("POST", "/api/v1/payouts", body=create_body(**fields) if body is None else body)

    async def show(self, external_id: str) -> tuple[int, dict[str, Any]]:
        """`GET /payouts/{external_id}`."""
        return await self.request("GET", f"/api/v1/payouts/{external_id}")

    async def balance(self) -> dict[str, Any]:
        """`GET /balance`."""
        status, body = await self.request("GET", "/api/v1/balance")
        assert status == 200, body
        return body

    async def request(
        self, method: str, path: str, *, body: bytes = b"", query: str = "", headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, Any]]:
        """Any request; signed unless headers are given."""
        url = f"{self._base_url}{path}" + (f"?{query}" if query else "")
        signed = self._merchant.headers(method, path, body, query=query) if headers is None else headers
        async with self._session.request(method, url, data=body or None, headers=signed) as response:
            return response.status, await response.json()


@asynccontextmanager
async def client(base_url: str, merchant: Merchant) -> AsyncIterator[Client]:
    """A client with connections of its own."""
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        yield Client(session, base_url, merchant)
