"""Deadlines that share a timer."""

import asyncio

from common.deadlines import Deadlines

_SOON = 0.01


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
