"""What every process of ours has in common: how it begins, and how it ends."""

import asyncio
import gc
import resource
import signal
from collections.abc import Collection
from contextlib import suppress
from typing import Any, Final

# For what does not end even when it is cancelled: it shall not keep the process from ending.
_CANCEL_SECONDS: Final = 1.0
# Where the system names no limit of open files, and has one all the same, as macOS does.
_FILES_MAX: Final = 10_240
# Objects that must have come and stayed until the youngest are looked through, and how often until the older ones are. More
# than what a process usually has in flight: else each wave of work is looked through, and hardly any of it is garbage.
_COLLECT_AFTER: Final = (50_000, 20, 50)


def collect_seldom() -> None:
    """Leave what is loaded alone for good, and look for garbage seldom: reference counts free nearly all of it.

    With Python's own thresholds a busy gateway spends a tenth of its time on it, in pauses that requests wait for.
    Source: the documentation of `gc.freeze`.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_COLLECT_AFTER)


def open_many_files() -> None:
    """As many files and connections as we may at most: calls in flight have a connection each, and the usual limit is 1,024."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most if most != resource.RLIM_INFINITY else _FILES_MAX, most))


def stop_requested() -> asyncio.Event:
    """An event that the first SIGTERM or SIGINT sets; a second one ends the process at once. Call inside the loop."""
    stop = asyncio.Event()

    def ask(number: signal.Signals) -> None:
        if stop.is_set():
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, ask, number)
    return stop


async def end_tasks(tasks: Collection["asyncio.Task[Any]"], deadline_seconds: float) -> None:
    """Let tasks end by themselves for that long; then cancel what is left, and wait a moment until it is gone."""
    left = set(tasks)
    if left:
        _, left = await asyncio.wait(left, timeout=deadline_seconds)
    for task in left:
        task.cancel()
    if left:
        await asyncio.wait(left, timeout=_CANCEL_SECONDS)
