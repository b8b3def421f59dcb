"""The gate: how many requests may be at work, and for how long; beyond, a 503 before anything piles up."""

from collections.abc import Awaitable, Callable

from aiohttp import web

from common.deadlines import TimeIsOver, TimeLimit
from common.errors import DatabaseSlow, Overloaded


class Gate:
    """Lets in at most `requests_max` requests at the same time, each for at most `seconds_max`."""

    def __init__(self, *, requests_max: int, seconds_max: float) -> None:
        self._requests_max = requests_max
        self._limit = TimeLimit(seconds_max)
        self._count = 0

    async def let_in(self, work: Callable[[], Awaitable[web.Response]]) -> web.Response:
        """Do the work of a request whose body has come. What it had committed when its time is over, stays.

        What `work` shields goes on after that, within the time-outs of its own transactions; it is no longer counted.
        Raises: `Overloaded` at once, when there is no room; `DatabaseSlow` after `seconds_max`; what `work` raises.
        """
        if self._count >= self._requests_max:
            raise Overloaded
        self._count += 1
        try:
            return await self._limit.keep(work())
        except TimeIsOver:
            # All that a request ever waits for is the database.
            raise DatabaseSlow from None
        finally:
            self._count -= 1
