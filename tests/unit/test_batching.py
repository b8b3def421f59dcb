"""Group commit: what arrives during a flush is the next batch, and one bad item takes no neighbour along."""

import asyncio
from collections.abc import Sequence

import pytest

from common.batching import Batcher, flush_by_halves, settle_future
from common.errors import AccountBusy, DatabaseUnavailable


class Flushes:
    """A flush that writes down its batches, doubles numbers, chokes on those in `poison`, and waits at a gate."""

    def __init__(self, *poison: int) -> None:
        self.batches: list[list[int]] = []
        self.begun = asyncio.Event()
        self.gate = asyncio.Event()
        self.gate.set()
        self.poison = set(poison)

    async def __call__(self, items: Sequence[int]) -> list[int]:
        self.batches.append(list(items))
        self.begun.set()
        await self.gate.wait()
        if bad := self.poison & set(items):
            raise ValueError(f"cannot take {sorted(bad)}")
        return [item * 2 for item in items]


async def running(batcher: Batcher[int, int], flushes: Flushes, *items: int) -> list[asyncio.Task[int]]:
    """Submit items and return once the first flush is under way."""
    tasks = [asyncio.create_task(batcher.submit(item)) for item in items]
    await flushes.begun.wait()
    return tasks


async def test_an_item_alone_is_flushed_at_once() -> None:
    flushes = Flushes()
    assert await Batcher(flushes, batch_max=10).submit(21) == 42
    assert flushes.batches == [[21]]


async def test_every_caller_gets_the_result_of_its_own_item() -> None:
    batcher = Batcher(Flushes(), batch_max=7)
    assert await asyncio.gather(*(batcher.submit(number) for number in range(100))) == [
        number * 2 for number in range(100)
    ]


async def test_what_arrives_during_a_flush_is_the_next_batch_in_its_order() -> None:
    flushes = Flushes()
    flushes.gate.clear()
    batcher = Batcher(flushes, batch_max=10)
    first = await running(batcher, flushes, 1)
    later = [asyncio.create_task(batcher.submit(number)) for number in (2, 3, 4)]
    await asyncio.sleep(0)
    flushes.gate.set()
    assert await asyncio.gather(*first, *later) == [2, 4, 6, 8]
    assert flushes.batches == [[1], [2, 3, 4]]


async def test_a_batch_is_never_larger_than_it_may_be() -> None:
    flushes = Flushes()
    batcher = Batcher(flushes, batch_max=3)
    await asyncio.gather(*(batcher.submit(number) for number in range(10)))
    assert [len(batch) for batch in flushes.batches] == [3, 3, 3, 1]


async def test_a_batcher_that_has_come_to_rest_starts_again() -> None:
    flushes = Flushes()
    batcher = Batcher(flushes, batch_max=3)
    assert [await batcher.submit(number) for number in (1, 2, 3)] == [2, 4, 6]
    assert flushes.batches == [[1], [2], [3]]


@pytest.mark.parametrize("poison", [[0], [7], [3, 4], [0, 7], list(range(8))])
async def test_a_bad_item_gets_its_own_error_and_its_neighbours_their_results(poison: list[int]) -> None:
    results = await flush_by_halves(Flushes(*poison), range(8))
    for item, result in enumerate(results):
        if item in poison:
            assert isinstance(result, ValueError)
            assert str(result) == f"cannot take [{item}]"
        else:
            assert result == item * 2


async def test_callers_of_bad_items_are_told_and_the_others_served() -> None:
    batcher = Batcher(Flushes(2), batch_max=10)
    results = await asyncio.gather(*(batcher.submit(number) for number in range(4)), return_exceptions=True)
    assert [results[0], results[1], results[3]] == [0, 2, 6]
    assert isinstance(results[2], ValueError)
    assert await batcher.submit(5) == 10


@pytest.mark.parametrize("error", [DatabaseUnavailable(), AccountBusy()])
async def test_when_the_world_is_wrong_the_batch_is_not_tried_in_parts(error: Exception) -> None:
    batches = []

    async def unavailable(items: Sequence[int]) -> list[int]:
        batches.append(list(items))
        raise error

    assert await flush_by_halves(unavailable, [1, 2, 3, 4]) == [error] * 4
    assert batches == [[1, 2, 3, 4]]


async def test_a_caller_that_goes_away_takes_nothing_back() -> None:
    flushes = Flushes()
    flushes.gate.clear()
    batcher = Batcher(flushes, batch_max=10)
    [gone] = await running(batcher, flushes, 1)
    waiting = [asyncio.create_task(batcher.submit(number)) for number in (2, 3)]
    await asyncio.sleep(0)
    gone.cancel()
    waiting[0].cancel()
    flushes.gate.set()
    assert await waiting[1] == 6
    assert flushes.batches == [[1], [2, 3]]
    assert [task.cancelled() for task in (gone, waiting[0])] == [True, True]


async def test_an_error_that_nobody_waits_for_is_no_warning() -> None:
    future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    settle_future(future, ValueError("nobody looks"))
    assert isinstance(future.exception(), ValueError)
    settle_future(future, 1)
    assert future.done()


async def test_an_empty_batch_is_flushed_as_one() -> None:
    assert await flush_by_halves(Flushes(), []) == []
