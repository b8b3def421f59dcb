"""What the gateway remembers: for how long, and what is loaded along."""

import asyncio
from collections.abc import Sequence

import pytest

from gateway.cache import ENTRIES_MAX, LOAD_MAX, Cache


class Store:
    """What is remembered, where it comes from; and a clock that stands still."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.batches: list[list[str]] = []
        self.broken = False
        self.bad = ""
        self.cache = Cache[str, str | None](self.load, seconds=4.0, clock=lambda: self.now)

    async def load(self, keys: Sequence[str]) -> list[str | None]:
        self.batches.append(list(keys))
        if self.broken or self.bad in keys:
            raise ConnectionError
        return [None if key == "nobody" else f"{key} at {self.now:g}" for key in keys]


async def test_a_value_is_asked_for_once_and_again_when_its_time_is_over() -> None:
    store = Store()
    assert await store.cache.get("a") == "a at 1000"
    store.now = 1003.9
    assert await store.cache.get("a") == "a at 1000"
    store.now = 1004.0
    assert await store.cache.get("a") == "a at 1004"
    assert store.batches == [["a"], ["a"]]


async def test_what_does_not_exist_is_remembered_too() -> None:
    store = Store()
    assert await store.cache.get("nobody") is None
    assert await store.cache.get("nobody") is None
    assert store.batches == [["nobody"]]


async def test_whoever_must_load_brings_along_what_would_be_missed_next() -> None:
    store = Store()
    for key in ("busy", "idle"):
        await store.cache.get(key)
    await store.cache.get("busy")
    store.now = 1001.9
    await store.cache.get("early")
    store.now = 1002.0
    await store.cache.get("other")
    assert store.batches[-1] == ["other", "busy"]
    store.now = 1005.0
    assert await store.cache.get("busy") == "busy at 1002"


async def test_a_failure_is_told_and_not_remembered() -> None:
    store = Store()
    store.broken = True
    with pytest.raises(ConnectionError):
        await store.cache.get("a")
    store.broken = False
    assert await store.cache.get("a") == "a at 1000"


async def test_what_cannot_be_remembered_is_loaded_each_time() -> None:
    store = Store()
    cache = Cache(store.load, seconds=0.0, clock=lambda: store.now)
    for _ in range(2):
        assert await cache.get("a") == "a at 1000"
    assert [batch[0] for batch in store.batches] == ["a", "a"]


async def test_the_oldest_are_forgotten_when_there_are_too_many() -> None:
    store = Store()
    for number in range(ENTRIES_MAX + 1):
        await store.cache.get(str(number))
    store.batches.clear()
    await store.cache.get("1")
    assert store.batches == []
    await store.cache.get("0")
    assert store.batches == [["0"]]


async def test_one_that_cannot_be_loaded_spoils_others_once_at_most() -> None:
    store = Store()
    for _ in range(2):
        await store.cache.get("bad")
    store.now, store.bad = 1002.0, "bad"
    with pytest.raises(ConnectionError):
        await store.cache.get("good")
    assert await store.cache.get("good") == "good at 1002"


async def test_many_who_ask_for_one_at_the_same_time_have_it_loaded_once() -> None:
    store = Store()
    values = await asyncio.gather(*(store.cache.get("a") for _ in range(3 * LOAD_MAX)))
    assert set(values) == {"a at 1000"}
    assert store.batches == [["a"]]
