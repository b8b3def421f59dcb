"""The processes of the stack on this machine: started, watched, started again, stopped; leftovers found by their records."""

import asyncio
import errno
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import aiohttp
import psutil

from ops.ports import choose_port, loopback_url
from ops.state import CHECKOUT

READY_SECONDS: Final = 30.0
STOP_SECONDS: Final = 10.0
_LEFTOVER_SECONDS: Final = 5.0
_POLL_SECONDS: Final = 0.1
_PORT_TAKEN: Final = os.strerror(errno.EADDRINUSE).lower()

# Between a death and the next start; a process that lived for a while starts over at the first.
_RESTART_DELAYS_SECONDS: Final = (0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
_LIVED_SECONDS: Final = 60.0

# Start times are read from a clock that may be set; no number is given to another process as quickly as this.
_START_TIME_TOLERANCE_SECONDS: Final = 2.0

Say = Callable[[str, str], None]


class ProcessFailed(Exception):
    """A process that does not start; the text is for the person at the terminal and ends with its log's last lines."""


class StartAgain(ProcessFailed):
    """One that starts when it is started again: it needed more time, or somebody was quicker to take its port."""


@dataclass(frozen=True, slots=True)
class Program:
    """What to start: `arguments` for Python. Without a `port` of its own it gets one for its health and metrics."""

    name: str
    arguments: tuple[str, ...]
    port: int | None = None


class Process:
    """One program as a process in a session of its own, with its log in `folder/logs`."""

    def __init__(self, program: Program, environment: Mapping[str, str], folder: Path) -> None:
        self.name = program.name
        self.port = 0
        self._program = program
        self._environment = environment
        self._log = folder / "logs" / f"{program.name}.log"
        self._record = folder / "processes" / program.name
        self._process: asyncio.subprocess.Process | None = None

    @property
    def process_id(self) -> int | None:
        """The running process's, else None."""
        return self._process.pid if self._process is not None and self._process.returncode is None else None

    async def start(self) -> None:
        """Start it and wait until it says that it is ready. Raises: `ProcessFailed`; then it does not run."""
        await self.launch()
        await self.wait_ready()

    async def launch(self) -> None:
        """Start it."""
        self.port = self._program.port or choose_port()
        with self._log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                *self._program.arguments,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=CHECKOUT,
                env={**self._environment, "PAYOUTS_ADMIN_PORT": str(self.port), "PYTHONUNBUFFERED": "1"},
                start_new_session=True,
            )
        self._write_record(self._process.pid)

    async def wait_ready(self) -> None:
        """Return once it says that it is ready. Raises: `ProcessFailed`; then it does not run any more."""
        assert self._process is not None, "it was started"
        try:
            async with asyncio.timeout(READY_SECONDS):
                await self._wait_until_ready(self._process)
        except TimeoutError:
            await self.stop()
            raise StartAgain(f"{self.name} is not ready after {READY_SECONDS:g} s{self._last_lines()}") from None

    async def keep(self, say: Say) -> None:
        """Start it again whenever it dies, a little later each time, and say so; for ever."""
        clock = asyncio.get_running_loop().time
        deaths, started = 0, clock()
        while self._process is not None:
            code = await self._process.wait()
            deaths = 1 if clock() - started > _LIVED_SECONDS else deaths + 1
            delay = _RESTART_DELAYS_SECONDS[min(deaths, len(_RESTART_DELAYS_SECONDS)) - 1]
            say(self.name, f"died ({_describe(code)}), starts again in {delay:g} s{self._last_lines()}")
            await asyncio.sleep(delay)
            started = clock()
            # When it fails to start it is dead, and the next turn says so.
            with suppress(ProcessFailed):
                await self.start()
                say(self.name, "ready again")

    async def stop(self) -> bool:
        """Ask it to end, and kill it when it takes too long. Returns whether it ended by itself."""
        if self._process is None:
            return True
        with suppress(ProcessLookupError):
            self._process.terminate()
        try:
            async with asyncio.timeout(STOP_SECONDS):
                await self._process.wait()
            ended = True
        except TimeoutError:
            self.kill()
            await self._process.wait()
            ended = False
        self._record.unlink(missing_ok=True)
        return ended

    def kill(self) -> None:
        """End it, and whatever it started, at once."""
        if self._process is not None and self._process.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    async def _wait_until_ready(self, process: asyncio.subprocess.Process) -> None:
        while process.returncode is None:
            if await _answers(f"{loopback_url(self.port)}/readyz"):
                return
            await asyncio.sleep(_POLL_SECONDS)
        failure = f"{self.name} died ({_describe(process.returncode)}){self._last_lines()}"
        port_taken = self._program.port is None and _PORT_TAKEN in self._last_lines()
        raise StartAgain(failure) if port_taken else ProcessFailed(failure)

    def _write_record(self, process_id: int) -> None:
        with suppress(psutil.NoSuchProcess):
            self._record.write_text(f"{process_id} {psutil.Process(process_id).create_time()}")

    def _last_lines(self, count: int = 10) -> str:
        lines = self._log.read_text(errors="replace").splitlines()[-count:]
        return "".join(f"\n    {line[:200]}" for line in [f"the end of {self._log}:", *lines])


async def wait_until_answers(url: str) -> None:
    """Wait until a GET of this is answered with 200. Raises: `ProcessFailed` when that takes too long."""
    try:
        async with asyncio.timeout(READY_SECONDS):
            while not await _answers(url):  # noqa: ASYNC110 - it is another process that we wait for
                await asyncio.sleep(_POLL_SECONDS)
    except TimeoutError:
        raise ProcessFailed(f"{url} does not answer after {READY_SECONDS:g} s") from None


async def stop_all(processes: Sequence[Process], say: Say) -> None:
    """Stop them at the same time."""
    for process, ended in zip(processes, await asyncio.gather(*(p.stop() for p in processes)), strict=True):
        say(process.name, "stopped" if ended else f"killed: it did not stop in {STOP_SECONDS:g} s")


def stop_leftovers(folder: Path) -> list[str]:
    """Stop what an earlier run left behind, and return the names. Blocks.

    A record counts only while the process of its number began when the record says; anybody may have that number by now.
    """
    found = {record: _find_recorded(record) for record in sorted((folder / "processes").glob("*"))}
    alive = [process for process in found.values() if process is not None]
    for process in alive:
        with suppress(psutil.NoSuchProcess):
            process.terminate()
    _, stubborn = psutil.wait_procs(alive, timeout=_LEFTOVER_SECONDS)
    for process in stubborn:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(stubborn, timeout=_LEFTOVER_SECONDS)
    for record in found:
        record.unlink()
    return [record.name for record, process in found.items() if process is not None]


async def _answers(url: str) -> bool:
    try:
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=1)) as session,
            session.get(url) as response,
        ):
            return response.status == 200
    except (aiohttp.ClientError, TimeoutError):
        return False


def _find_recorded(record: Path) -> psutil.Process | None:
    process_id, _, start_time = record.read_text().partition(" ")
    with suppress(psutil.NoSuchProcess, ValueError):
        process = psutil.Process(int(process_id))
        if abs(process.create_time() - float(start_time)) < _START_TIME_TOLERANCE_SECONDS:
            return process
    return None


def _describe(code: int | None) -> str:
    if code is not None and code < 0:
        return signal.Signals(-code).name
    return f"exit code {code}"
