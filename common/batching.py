"""Group commit: what arrives while one flush is under way is the next batch. Alone, an item goes at once, or lingers."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

from common.errors import Transient

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

Flush = Callable[[Sequence[_Item]], Awaitable[Sequence[_Result]]]


async def flush_by_halves(flush: Flush[_Item, _Result], items: Sequence[_Item]) -> list[_Result | Exception]:
    """Flush items together; when something in the batch is at fault, find it by halves, so that it takes no neighbour along.

    Returns: per item its result, or the error that it met: a `Transient` of the whole batch, or its very own.
    """
    try:
        return list(await flush(items))
    except Transient as error:
        return [error] * len(items)
    except Exception as error:
        if len(items) == 1:
            return [error]
    half = len(items) // 2
    return await flush_by_halves(flush, items[:half]) + await flush_by_halves(flush, items[half:])


class Batcher(Generic[_Item, _Result]):
    """Gathers items of concurrent callers into batches and gives each caller the result of its own item.

    `flush` gets at most `batch_max` items and returns one result per item, in their order. A caller that goes away takes
    nothing back. `linger_seconds`: how long a batch that is not full waits for more, where nobody waits for the answer.
    """

    def __init__(self, flush: Flush[_Item, _Result], *, batch_max: int, linger_seconds: float = 0.0) -> None:
        self._flush = flush
        self._batch_max = batch_max
        self._linger_seconds = linger_seconds
        self._waiting: deque[tuple[_Item, asyncio.Future[_Result]]] = deque()
        self._task: asyncio.Task[None] | None = None

    async def submit(self, item: _Item) -> _Result:
        """Add an item to the next batch and wait for its result. Raises: what `flush` raises for it."""
        future: asyncio.Future[_Result] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, future))
        if self._task is None:
            self._task = asyncio.create_task(self._run())
        return await future

    async def _run(self) -> None:
        try:
            while self._waiting:
                if self._linger_seconds and len(self._waiting) < self._batch_max:
                    await asyncio.sleep(self._linger_seconds)
                batch = [self._waiting.popleft() for _ in range(min(self._batch_max, len(self._waiting)))]
                results = await flush_by_halves(self._flush, [item for item, _ in batch])
                for (_, future), result in zip(batch, results, strict=True):
                    settle_future(future, result)
        finally:
            self._task = None


def settle_future(future: "asyncio.Future[_Result]", result: _Result | Exception) -> None:
    """Give a waiting caller its result or error; one that went away is left alone."""
    if future.done():
        return
    if isinstance(result, Exception):
        future.set_exception(result)
        # Nobody may be looking any more; that is no "exception was never retrieved".
        future.exception()
    else:
        future.set_result(result)
