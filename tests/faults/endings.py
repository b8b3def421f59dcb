"""How processes end in the fault tests."""

import asyncio
import signal
from typing import Final

from tests.stack import Process, eventually, http_status

# Whoever does not wait for what it has under way is gone by then; a drain, and what hangs in these tests, takes longer.
EXIT_SECONDS: Final = 10.0


async def leave(process: Process) -> None:
    """One SIGTERM, and return once the process has taken it."""
    process.send(signal.SIGTERM)

    async def leaving() -> bool:
        # Nobody answers any more once it is gone.
        return await http_status(f"http://127.0.0.1:{process.admin_port}/readyz") != 200

    await eventually(leaving, f"{process.name} is leaving")


async def exit_code(process: Process, seconds: float = EXIT_SECONDS) -> int:
    """The exit code of a process that was told to end."""
    return await asyncio.wait_for(process._process.wait(), seconds)
