"""Deadlines of many that all may take equally long: one timer for the oldest, where one for each costs more than it guards.

`Deadlines` tells who is late; a `TimeLimit` gives their work up. Both belong to the event loop that they are first used in.
"""

import asyncio
from collections.abc import Awaitable, Callable, Hashable
from typing import Any, Generic, TypeVar

_Key = TypeVar("_Key", bound=Hashable)
_Result = TypeVar("_Result")


class Deadlines(Generic[_Key]):
    """Tells `expire` of each key that has not ended `seconds` after it began."""

    def __init__(self, seconds: float, expire: Callable[[_Key], object]) -> None:
        self._seconds = seconds
        self._expire = expire
        # All take equally long, so the order in which they began is the one in which they expire.
        self._ends: dict[_Key, float] = {}
        self._timer: asyncio.TimerHandle | None = None

    def begin(self, key: _Key) -> None:
        """Its time runs from now on. It has not begun before, or has ended."""
        assert key not in self._ends, "it has begun already"
        loop = asyncio.get_running_loop()
        ends_at = self._ends[key] = loop.time() + self._seconds
        if self._timer is None:
            self._timer = loop.call_at(ends_at, self._look)

    def end(self, key: _Key) -> None:
        """It was in time; nothing happens where it was not."""
        self._ends.pop(key, None)

    def _look(self) -> None:
        self._timer = None
        loop = asyncio.get_running_loop()
        while self._ends:
            key, ends_at = next(iter(self._ends.items()))
            if ends_at > loop.time():
                self._timer = loop.call_at(ends_at, self._look)
                return
            del self._ends[key]
            self._expire(key)


class TimeIsOver(TimeoutError):
    """What was done under a `TimeLimit` took too long, and was given up."""


class TimeLimit:
    """`asyncio.timeout` of so many `seconds` for everything that is done under it, by whatever task.

    A task that is in it must not enter it again; it may be in several. Whoever was asked to cancel before it entered, and
    goes on for longer than the limit, is given up like any other.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._deadlines = Deadlines[asyncio.Task[Any]](seconds, self._give_up)
        self._given_up: set[asyncio.Task[Any]] = set()

    async def keep(self, work: Awaitable[_Result]) -> _Result:
        """Do the work in the running task. Raises: `TimeIsOver`, which is a `TimeoutError`; what `work` raises."""
        task = asyncio.current_task()
        assert task is not None, "what can be given up runs in a task"
        canceled_before = task.cancelling()
        self._deadlines.begin(task)
        try:
            return await work
        except asyncio.CancelledError:
            # One of ours, and nobody else's beside it.
            if task not in self._given_up or task.cancelling() > canceled_before + 1:
                raise
            raise TimeIsOver from None
        finally:
            self._deadlines.end(task)
            if task in self._given_up:
                self._given_up.remove(task)
                task.uncancel()

    def _give_up(self, task: asyncio.Task[Any]) -> None:
        self._given_up.add(task)
        task.cancel()
