"""The stack of `make run` as somebody brings it up in a terminal, in a folder of its own."""

import asyncio
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Final

import psutil

from ops.apt import NO_INSTALL
from ops.state import Demo, find_demo

LINE_SECONDS: Final = 180
BRING_UP: Final = "import sys, pathlib; from ops.local import bring_up; bring_up(pathlib.Path(sys.argv[1]))"


class Terminal:
    """Somebody who brings the stack of a folder up, and reads what it says."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder = folder
        self.port = port
        self.lines: list[str] = []
        # What people set; nothing is installed because of a test.
        self.environment = {NO_INSTALL: "1"}
        self._process: asyncio.subprocess.Process | None = None

    async def bring_up(self) -> None:
        """Start it, in a session of its own."""
        self.lines = []
        environment = {"PATH": os.environ["PATH"], "PORT": str(self.port), **self.environment}
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            BRING_UP,
            str(self.folder),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )

    async def read_until(self, word: str) -> str:
        """The first line from here on that begins with a word."""
        assert self._process is not None
        assert self._process.stdout is not None
        async with asyncio.timeout(LINE_SECONDS):
            while line := (await self._process.stdout.readline()).decode():
                self.lines.append(line.rstrip())
                if line.startswith(word):
                    return line
        raise AssertionError(f"it ended without {word}: {self.lines}")

    async def end(self, number: signal.Signals) -> int:
        """Send a signal, read the rest, and return the exit code."""
        assert self._process is not None
        with suppress(ProcessLookupError):
            self._process.send_signal(number)
        output, _ = await self._process.communicate()
        self.lines += output.decode().splitlines()
        assert self._process.returncode is not None
        return self._process.returncode

    @property
    def demo(self) -> Demo:
        """The demo merchant."""
        demo = find_demo(self.folder)
        assert demo is not None
        return demo

    def processes(self) -> dict[str, psutil.Process]:
        """The parts that are recorded as running."""
        records = {record.name: record.read_text() for record in (self.folder / "processes").iterdir()}
        return {name: psutil.Process(int(text.split()[0])) for name, text in records.items()}
