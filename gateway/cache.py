"""What the gateway remembers of the database for a few seconds: loaded together, and again before it is missed."""

from collections.abc import Awaitable, Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import islice
from time import monotonic
from typing import Final, Generic, TypeVar

from common.batching import Batcher

_Key = TypeVar("_Key", bound=Hashable)
_Value = TypeVar("_Value")

# Entries that a cache may hold; what does not exist is remembered too, so that asking for it costs no more.
ENTRIES_MAX: Final = 10_000
# Keys that are loaded by one transaction.
LOAD_MAX: Final = 256


@dataclass(slots=True)
class _Entry(Generic[_Value]):
    value: _Value
    ends_at: float
    wanted: bool = False


class Cache(Generic[_Key, _Value]):
    """Values by their keys, none given out that is older than `seconds`.

    Whoever has to wait for a value brings along those that will be missed next: entries that were asked for and have lived
    half of their time. So a thousand merchants who ask in turn cost a few transactions, not one each.
    """

    def __init__(
        self,
        load: Callable[[Sequence[_Key]], Awaitable[Sequence[_Value]]],
        *,
        seconds: float,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self._load = load
        self._seconds = seconds
        self._clock = clock
        self._batcher = Batcher(self._load_batch, batch_max=LOAD_MAX)
        # Those that were loaded first come first.
        self._entries: dict[_Key, _Entry[_Value]] = {}

    async def get(self, key: _Key) -> _Value:
        """The value of a key. Raises: what `load` raises."""
        entry = self._find(key)
        if entry is None:
            return await self._batcher.submit(key)
        entry.wanted = True
        return entry.value

    def _find(self, key: _Key) -> _Entry[_Value] | None:
        entry = self._entries.get(key)
        return entry if entry is not None and self._clock() < entry.ends_at else None

    async def _load_batch(self, keys: Sequence[_Key]) -> list[_Value]:
        # Many may have asked for one key; those who did not fit into the batch before find it loaded.
        values = {key: entry.value for key in keys if (entry := self._find(key)) is not None}
        if missing := [key for key in keys if key not in values]:
            values |= await self._load_together(missing)
        return [values[key] for key in keys]

    async def _load_together(self, keys: Sequence[_Key]) -> dict[_Key, _Value]:
        # What changes while the database answers may be in the answer or not: it is as old as the question.
        asked_at = self._clock()
        batch = list(dict.fromkeys([*keys, *self._soon_missed(asked_at)]))
        loaded = dict(zip(batch, await self._load(batch), strict=True))
        for key, value in loaded.items():
            self._entries.pop(key, None)
            self._entries[key] = _Entry(value, asked_at + self._seconds)
        while len(self._entries) > ENTRIES_MAX:
            del self._entries[next(iter(self._entries))]
        return loaded

    def _soon_missed(self, now: float) -> list[_Key]:
        """A few that are about to end and were wanted; those that have ended and were not are forgotten."""
        soon, ended = [], []
        for key, entry in islice(self._entries.items(), LOAD_MAX):
            if entry.ends_at > now + self._seconds / 2:
                break
            if entry.wanted:
                # Taken along once, until somebody asks for it again: one that cannot be loaded spoils no other for long.
                entry.wanted = False
                soon.append(key)
            elif entry.ends_at <= now:
                ended.append(key)
        for key in ended:
            del self._entries[key]
        return soon
