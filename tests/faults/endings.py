"""How processes end in the fault tests."""

import asyncio
import signal

from tests.stack import Process, eventually, http_status


async def leave(process: Process) -> None:
    """One SIGTERM, and return once the process has taken it."""
    process.send(signal.SIGTERM)

    async def leaving() -> bool:
        return await http_status(f"http://127.0.0.1:{process.admin_port}/readyz") == 503

    await eventually(leaving, f"{process.name} is leaving")


async def exit_code(process: Process, seconds: float = 10) -> int:
    """The exit code of a process that was told to end."""
    return await asyncio.wait_for(process._process.wait(), seconds)
