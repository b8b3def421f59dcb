"""Deadlines that share a timer, and work that is given up by them."""

import asyncio
from contextlib import suppress

import pytest

from common.deadlines import Deadlines, TimeIsOver, TimeLimit

_SOON = 0.01
_LONG = 60.0


class Heard:
    """Who was late, in order; `all_of` waits until so many were."""

    def __init__(self, seconds: float) -> None:
        self.keys: list[str] = []
        self._news = asyncio.Event()
        self.deadlines = Deadlines(seconds, self._note)

    def _note(self, key: str) -> None:
        self.keys.append(key)
        self._news.set()

    async def all_of(self, count: int) -> list[str]:
        while len(self.keys) < count:
            await self._news.wait()
            self._news.clear()
        return self.keys


async def test_who_does_not_end_is_told_in_the_order_of_beginning() -> None:
    heard = Heard(_SOON)
    for key in ("a", "b", "c"):
        heard.deadlines.begin(key)
    assert await heard.all_of(3) == ["a", "b", "c"]


async def test_who_ended_is_not_told_whoever_comes_before_and_after() -> None:
    heard = Heard(_SOON)
    for key in ("a", "b", "c"):
        heard.deadlines.begin(key)
    heard.deadlines.end("a")
    heard.deadlines.end("c")
    heard.deadlines.begin("d")
    assert await heard.all_of(2) == ["b", "d"]


async def test_one_that_begins_again_has_all_its_time_and_one_that_never_began_may_end() -> None:
    heard = Heard(_SOON)
    heard.deadlines.end("a")
    heard.deadlines.begin("a")
    heard.deadlines.end("a")
    heard.deadlines.begin("b")
    heard.deadlines.begin("a")
    assert await heard.all_of(2) == ["b", "a"]


async def test_it_goes_on_after_all_were_told() -> None:
    heard = Heard(_SOON)
    heard.deadlines.begin("a")
    await heard.all_of(1)
    heard.deadlines.begin("b")
    assert await heard.all_of(2) == ["a", "b"]


async def test_work_that_ends_in_time_gives_its_result_or_its_own_error() -> None:
    limit = TimeLimit(_LONG)

    async def fail() -> None:
        raise LookupError

    assert await limit.keep(asyncio.sleep(0, "done")) == "done"
    with pytest.raises(LookupError):
        await limit.keep(fail())


async def test_a_time_out_of_the_work_itself_is_told_from_that_of_the_limit() -> None:
    async def fail() -> None:
        raise TimeoutError("its own")

    with pytest.raises(TimeoutError, match="its own") as raised:
        await TimeLimit(_LONG).keep(fail())
    assert not isinstance(raised.value, TimeIsOver)


async def test_of_two_limits_the_shorter_one_gives_up_whichever_is_within_the_other() -> None:
    short, long = TimeLimit(_SOON), TimeLimit(_LONG)
    for outer, inner in (short, long), (long, short):
        with pytest.raises(TimeIsOver):
            await outer.keep(inner.keep(asyncio.Event().wait()))
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0


async def test_a_limit_is_not_entered_twice_by_one_task() -> None:
    limit = TimeLimit(_LONG)
    with pytest.raises(AssertionError, match="begun"):
        await limit.keep(limit.keep(asyncio.get_running_loop().create_future()))


async def test_work_that_takes_too_long_is_given_up_and_its_task_goes_on() -> None:
    limit = TimeLimit(_SOON)
    with pytest.raises(TimeoutError):
        await limit.keep(asyncio.Event().wait())
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0
    assert await limit.keep(asyncio.sleep(0, "again")) == "again"


async def test_each_of_many_is_given_up_by_its_own_time() -> None:
    limit = TimeLimit(_SOON)

    async def last() -> str:
        with suppress(TimeoutError):
            await limit.keep(asyncio.Event().wait())
        return await limit.keep(asyncio.sleep(0, "in time"))

    late = [asyncio.create_task(limit.keep(asyncio.Event().wait())) for _ in range(3)]
    found = asyncio.create_task(last())
    assert [type(error) for error in await asyncio.gather(*late, return_exceptions=True)] == [TimeIsOver] * 3
    assert await found == "in time"


async def test_whoever_is_canceled_by_somebody_else_is_canceled() -> None:
    begun = asyncio.Event()

    async def work() -> None:
        begun.set()
        await asyncio.Event().wait()

    task = asyncio.create_task(TimeLimit(_LONG).keep(work()))
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_whoever_is_canceled_by_both_is_canceled() -> None:
    begun, limit = asyncio.Event(), TimeLimit(_SOON)

    async def work() -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            # The limit's; now somebody else comes as well.
            task.cancel()
            raise

    task = asyncio.create_task(limit.keep(work()))
    await begun.wait()
    with pytest.raises(asyncio.CancelledError):
        await task
