"""The gate: how many requests may be at work, and for how long; beyond, a 503 before anything piles up."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from common.deadlines import Deadlines
from common.errors import DatabaseSlow, Overloaded


class Gate:
    """Lets in at most `requests_max` requests at the same time, each for at most `seconds_max`."""

    def __init__(self, *, requests_max: int, seconds_max: float) -> None:
        self._requests_max = requests_max
        self._deadlines = Deadlines[asyncio.Task[Any]](seconds_max, self._give_up)
        self._given_up: set[asyncio.Task[Any]] = set()
        self._count = 0

    async def let_in(self, work: Callable[[], Awaitable[web.Response]]) -> web.Response:
        """Do the work of a request whose body has come. What it had committed when its time is over, stays.

        What `work` shields goes on after that, within the time-outs of its own transactions; it is no longer counted.
        Raises: `Overloaded` at once, when there is no room; `DatabaseSlow` after `seconds_max`; what `work` raises.
        """
        if self._count >= self._requests_max:
            raise Overloaded
        task = asyncio.current_task()
        assert task is not None, "requests run in tasks"
        canceled_before = task.cancelling()
        self._count += 1
        self._deadlines.begin(task)
        try:
            return await work()
        except asyncio.CancelledError:
            # One of ours, and nobody else's beside it.
            if task not in self._given_up or task.cancelling() > canceled_before + 1:
                raise
            # All that a request ever waits for is the database.
            raise DatabaseSlow from None
        finally:
            self._deadlines.end(task)
            if task in self._given_up:
                self._given_up.remove(task)
                task.uncancel()
            self._count -= 1

    def _give_up(self, task: asyncio.Task[Any]) -> None:
        self._given_up.add(task)
        task.cancel()
